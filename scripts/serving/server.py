"""A TorchServe with one model, from its start to its end.

Adds to `torchserve --start` what a person expects of a server: it is ready when its workers give the reference answer, it says
what is wrong where they cannot, and it leaves no process and no temp file behind.
"""

import contextlib
import os
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import psutil
import requests

from handler.runtime.archive import ArchiveError
from scripts.paths import JAVA_LOGGING
from scripts.serving.configuration import configure, stock_model_store
from scripts.serving.credentials import CredentialsError, authorization, read_token
from scripts.serving.hardened import HardeningError, prepare_key_dir, require_hardening, require_own_certificate, verify_checksum
from scripts.serving.java import find_java_home
from scripts.serving.proxy.front import make_front
from scripts.serving.proxy.process import Envoy, ProxyError
from scripts.serving.ready import NotReady, read_reference_answer, require_right_answers
from scripts.serving.settings import CONSOLE_FILE, LOOPBACK, ServeError, Settings

READY_TIMEOUT_S = 180
READY_POLL_S = 0.25
FIRST_ANSWER_TIMEOUT_S = 60  # a GPU's first image takes long
IDLE_S = 0.3  # a server that did nothing for so long has answered all that was asked of it
DRAIN_TIMEOUT_S = 10  # for requests in flight, and for those that still come in; with the next one less than Kubernetes' 30
STOP_TIMEOUT_S = 15  # for TorchServe's own end; what is left then is killed
LOG_TAIL_LINES = 40
WORKER_DIED = "Backend worker process died."  # TorchServe's words; it would start the worker again, for minutes


class TorchServe:
    """A running TorchServe with one model. A context manager: inside it every worker is ready; after it nothing is left.

    Attributes:
        settings: of this server.
        model_name: the archive's stem.
        address: the inference API's, as a URL: https where the server is hardened, else http.
        management_address: the management API's, as a URL.
        worker_count: the number of workers that the model's configuration asks for; 0 before the start.
    Raises (on entering):
        ServeError: it did not start; whatever had started is ended.
    """

    def __init__(self, settings: Settings, interrupted: threading.Event | None = None) -> None:
        self.settings = settings
        self.model_name = settings.archive.stem
        hardening, port = settings.hardening, settings.ports.inference
        self.address = f"https://{hardening.local_host}:{port}" if hardening else f"http://{LOOPBACK}:{port}"
        self.management_address = f"http://{LOOPBACK}:{settings.ports.management}"
        self.worker_count = 0
        self._interrupted = interrupted or threading.Event()
        self._launcher: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._front: Envoy | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
            self._wait_until_ready()
            self._require_reference_answer()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._wait_until_idle()
        self.stop()

    def has_ended(self) -> bool:
        """Tell whether TorchServe, or its front, ended by itself."""
        if self._front is not None:
            self._front.rotate_log()
            if self._front.has_ended():
                return True
        return self._launcher is not None and self._launcher.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """List what was started and still runs: launcher, JVM, workers. They share one process group."""
        if self._launcher is None:
            return []
        return [process for process in psutil.process_iter() if _belongs_to(process, self._launcher.pid)]

    def log_tail(self) -> str:
        """Read the last lines that TorchServe printed, or its front, where that has ended."""
        if self._front is not None and self._front.has_ended():
            return self._front.log_tail()
        console = self.settings.log_dir / CONSOLE_FILE
        lines = console.read_text(errors="replace").splitlines() if console.is_file() else []
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def stop(self) -> None:
        """End the JVM in the orderly way, wait for all processes, kill those that do not end, remove the temp files."""
        if self._front is not None:
            self._front.stop()
        if self._launcher is not None:
            self._end_processes(self._launcher)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._launcher is not None and self.settings.hardening is not None:
            self.settings.hardening.key_file.unlink(missing_ok=True)

    def _start(self) -> None:
        archive = self._require_startable()
        self._folder = Path(tempfile.mkdtemp(prefix="serve-"))  # short: Unix sockets in it have at most 107 characters
        configuration = self._write_configuration(archive, self._folder)
        hardening = self.settings.hardening
        if hardening is not None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold requests and keys
        with _open_console(self.settings) as console:
            self._launcher = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "ts.model_server", "--start", "--foreground", "--ncs"),
                    *("--model-store", str(self._folder / "store")),
                    *("--models", f"{self.model_name}={self.settings.archive.name}"),
                    *("--ts-config", str(configuration)),
                    *("--log-config", str(self.settings.log_configuration.resolve())),
                ],
                cwd=hardening.key_dir if hardening else self._folder,
                env=_environment(self._folder / "tmp", self.settings.log_dir),
                umask=0o077 if hardening else -1,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal reaches this program alone, and all of the server is one group
            )
        if self.settings.is_fronted:
            self._front = make_front(self.settings, self._folder)
            try:
                self._front.start()
            except ProxyError as error:
                raise ServeError(str(error)) from error

    def _require_startable(self) -> bytes:
        """Check all that can be checked before anything starts, and make the folder of a hardened server's tokens.

        Returns:
            the archive.
        Raises:
            ServeError: something is missing, or not as it must be.
        """
        settings, hardening = self.settings, self.settings.hardening
        if not settings.archive.is_file():
            raise ServeError(f"there is no archive {settings.archive}; build it with: python -m scripts.packaging")
        try:
            archive = settings.archive.read_bytes()
            verify_checksum(archive, settings.archive, settings.archive_sha256, required=hardening is not None)
            if hardening is not None:
                require_hardening(hardening, settings.configuration)
            settings.ports.require_free(settings.inference_host, settings.metrics_host)
            if hardening is not None:
                prepare_key_dir(hardening.key_dir)
        except HardeningError as error:
            raise ServeError(str(error)) from error
        return archive

    def _write_configuration(self, archive: bytes, folder: Path) -> Path:
        """Write everything that TorchServe starts from into a folder; returns its config.properties."""
        for name in ("store", "tmp", "unpacked"):
            (folder / name).mkdir()
        try:
            self.worker_count = stock_model_store(folder / "store", self.settings, archive, folder / "unpacked")
        except (ArchiveError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ServeError(f"the archive {self.settings.archive} cannot be served: {error}") from error
        configuration = folder / "config.properties"
        configuration.write_text(configure(self.settings, Path(shutil.copy(JAVA_LOGGING, folder))))
        return configuration

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

    def _require_reference_answer(self) -> None:
        headers, tls = {}, None
        if self.settings.hardening is not None:
            headers = authorization(read_token(self.settings.hardening.key_file))
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE  # it has just been compared with the server's own
        try:
            reference = read_reference_answer(self.settings.archive)
            if reference is not None:  # another packager's archive may hold none
                require_right_answers(self.address, self.model_name, reference, FIRST_ANSWER_TIMEOUT_S, headers, tls)
        except NotReady as error:
            raise ServeError(f"the workers are ready, but the readiness probe fails: {error}\n{self.log_tail()}") from error

    def _wait_until_idle(self) -> None:
        """Wait until nothing has been done for a while: TorchServe drops what it has not answered when it is told to end."""
        cluster = self.settings.cluster
        deadline = time.monotonic() + (DRAIN_TIMEOUT_S if cluster is None else cluster.drain_timeout_s)
        while self._front is not None and self._front.requests_in_flight() and time.monotonic() < deadline:
            time.sleep(IDLE_S)
        before, now = None, self._activity()
        while now and now != before and time.monotonic() < deadline:
            time.sleep(IDLE_S)
            before, now = now, self._activity()

    def _activity(self) -> dict[int, object]:
        """Read what changes while JVM or workers do something, or want to and get no processor."""
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


def _open_console(settings: Settings) -> BinaryIO:
    """Empty the folder of the logs, and open the file for all that is printed.

    A hardened server keeps the logs of its former runs, and is alone in reading them.
    """
    try:
        if settings.hardening is None:
            shutil.rmtree(settings.log_dir, ignore_errors=True)
        settings.log_dir.mkdir(parents=True, exist_ok=True)
        if settings.hardening is not None:
            settings.log_dir.chmod(0o700)
        return (settings.log_dir / CONSOLE_FILE).open("wb")
    except OSError as error:
        advice = f"cannot write logs into {settings.log_dir} ({error.strerror}); choose another folder with --log-dir"
        raise ServeError(advice) from error


def _environment(temp_dir: Path, log_dir: Path) -> dict[str, str]:
    """Make the server's environment: ours, less what would lead it to other code or another configuration."""
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
