"""A TorchServe with one model, from its start to its end.

Adds to `torchserve --start` what a person expects of a server: it is ready when its workers give the reference answer, it says
what is wrong where they cannot, and it leaves no process and no temp file behind.
"""

import contextlib
import importlib.util
import os
import re
import resource
import shutil
import ssl
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import requests

from handler.runtime.checksums import ArchiveError
from scripts.paths import JAVA_LOGGING
from scripts.serving.child import Child
from scripts.serving.configuration import (
    INFERENCE_SOCKET,
    TORCHSERVE_SOCKET,
    configure,
    find_property,
    link,
    stock_model_store,
)
from scripts.serving.credentials import CredentialsError, authorization, read_expiration, read_token
from scripts.serving.frontend_metrics import LIMIT_VARIABLE, REPLACEMENTS_VARIABLE
from scripts.serving.hardened import HardeningError, prepare_key_dir, require_hardening, require_own_certificate, verify_checksum
from scripts.serving.java import java_command
from scripts.serving.proxy.front import make_front
from scripts.serving.proxy.process import Envoy, ProxyError
from scripts.serving.ready import NotReady, read_reference_answer, require_right_answers
from scripts.serving.settings import CONSOLE_FILE, LOOPBACK, ServeError, Settings, option_of
from scripts.serving.surroundings import clean_environment, log_folder, require_limits, require_memory, temporary_folder
from scripts.serving.waiting_room import WaitingRoom
from scripts.serving.watch import Watch, jvm_bound

READY_TIMEOUT_S = 180
READY_POLL_S = 0.25
FIRST_ANSWER_TIMEOUT_S = 60  # a GPU's first image takes long
IDLE_S = 0.3  # a server that did nothing for so long has answered all that was asked of it
DRAIN_TIMEOUT_S = 10  # for requests in flight, and for those that still come in; with a child's end less than Kubernetes' 30
LOGS = "logs"  # in the temporary folder: a link to the folder of the logs
MAX_REPLACEMENTS = 3  # within this time; then the launcher ends, so that whoever watches it notices
OFTEN_S = 600
MODEL_NAME = re.compile(r"[\w.-]+", re.ASCII)  # it stands in URLs, unescaped
WORKER_DIED = "Backend worker process died."  # TorchServe's words; it would start the worker again, for minutes
NOT_BOUND = re.compile(  # twice TorchServe's words, then Envoy's
    r"Failed to bind to address: \S*?(\d+)$|Failed to bind to address \S*?:(\d+)$"
    r"|cannot bind '[^']*:(\d+)': Address already in use",
    re.MULTILINE,
)


class TorchServe:
    """A running TorchServe with one model. A context manager: inside it every worker is ready; after it nothing is left.

    Attributes:
        settings: of this server.
        model_name: the archive's stem.
        address: the inference API's, as a URL: https where the server is hardened, else http.
        management_address: the management API's, as a URL.
        folder: of its temporary files; an empty path before the start.
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
        self._child: Child | None = None
        self._front: Envoy | None = None
        self._folders = contextlib.ExitStack()  # of temporary files, of logs
        self._command: list[str] = []
        self.folder = Path()
        self._waiting_room: WaitingRoom | None = None
        self._watch: Watch | None = None
        self._replaced: list[float] = []  # when
        self._new_token: str | None = None  # since the last replacement
        self._former_tokens_end = float("inf")  # seconds since 1970

    def __enter__(self) -> Self:
        try:
            self._start()
            self._wait_until_ready()
            self._require_reference_answer()
        except (OSError, UnicodeError) as error:  # of files and folders that were there a moment ago, or have impossible names
            self.stop()
            raise ServeError(f"cannot start: {error}") from error
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
        return self._child is not None and self._child.exit_code() is not None

    def processes(self) -> list[psutil.Process]:
        """List what was started and still runs: the guard, the JVM, the workers."""
        return [] if self._child is None else self._child.processes()

    def log_tail(self) -> str:
        """Read the last lines that TorchServe printed, or its front, where that has ended."""
        if self._front is not None and self._front.has_ended():
            return self._front.log_tail()
        return "" if self._child is None else self._child.log_tail()

    def find_reason_to_replace(self) -> str:
        """Say why TorchServe must be replaced; "" where it need not be. To be asked about once a second."""
        if self._new_token is not None and (
            self._inference_token() not in (None, self._new_token)  # someone has made a new one: the older ones end at once
            or time.time() > self._former_tokens_end
        ):
            self._forget_former_tokens()
        return "" if self._watch is None or self._child is None else self._watch.find_reason(self._child.pid())

    def replace(self, reason: str) -> None:
        """End TorchServe, start it again on the same ports, and say why in its log.

        What is in flight is answered first, for up to DRAIN_TIMEOUT_S. Behind a front, what comes meanwhile waits, and is then
        answered by the new TorchServe. Without one it is refused (connection refused) until the new one listens.

        Raises:
            ServeError: it did not start again, or has had to be replaced too often.
        """
        assert self._child is not None
        self._child.note(f"replacing TorchServe: {reason}")
        self._replaced = [*self._replaced, time.monotonic()]
        if len(self._replaced) > MAX_REPLACEMENTS and self._replaced[-1] - self._replaced[-1 - MAX_REPLACEMENTS] < OFTEN_S:
            raise ServeError(
                f"TorchServe had to be replaced {MAX_REPLACEMENTS + 1} times in {OFTEN_S // 60} minutes, now as {reason}"
            )
        room, former_token = self._waiting_room, self._inference_token()
        if self.settings.hardening is not None:
            self._former_tokens_end = min(self._former_tokens_end, read_expiration(self.settings.hardening.key_file))
        if room is not None:
            room.open()
        try:
            self._wait_until_idle()
            self._child.kill()  # its own way to the end takes seconds, and has nothing left to do
            self._start_torchserve()
            self._wait_until_ready()
        except BaseException:
            if room is not None:
                room.send_away()
            raise
        self._new_token = self._inference_token()
        if self.settings.hardening is not None and former_token is not None:
            self.settings.hardening.former_tokens.touch(mode=0o600)
            with self.settings.hardening.former_tokens.open("a") as former:
                former.write(f"{former_token}\n")
        waited = 0 if room is None else room.let_in(former_token, self._new_token)
        self._require_reference_answer()
        took = time.monotonic() - self._replaced[-1]
        self._child.note(f"TorchServe is replaced, in {took:.1f} s; {waited} requests waited meanwhile")

    def _inference_token(self) -> str | None:
        """Read the inference token; None where there is none, or TorchServe is just writing it."""
        if self.settings.hardening is not None:
            with contextlib.suppress(CredentialsError):
                return read_token(self.settings.hardening.key_file)
        return None

    def _forget_former_tokens(self) -> None:
        self._new_token = None
        self._former_tokens_end = float("inf")
        if self.settings.hardening is not None:
            self.settings.hardening.former_tokens.unlink(missing_ok=True)

    def stop(self) -> None:
        """End the JVM in the orderly way, wait for all processes, kill those that do not end, remove the temp files."""
        if self._front is not None:
            self._front.stop()
        if self._child is not None:
            self._child.stop()
            if self.settings.hardening is not None:
                self.settings.hardening.key_file.unlink(missing_ok=True)
                self._forget_former_tokens()
        self._folders.close()

    def _start(self) -> None:
        settings, hardening = self.settings, self.settings.hardening
        require_limits()
        archive = self._require_startable()
        java = java_command()
        folder = self._folders.enter_context(temporary_folder(len(archive)))
        options = self._write_configuration(archive, folder)
        require_memory(self.worker_count)
        self._folders.enter_context(log_folder(settings.log_dir, private=hardening is not None))
        if hardening is not None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold requests and keys
        link(folder / LOGS, settings.log_dir)
        self._command, self.folder = [java, *options], folder
        self._start_torchserve()
        if settings.is_fronted:
            self._waiting_room = WaitingRoom(folder / INFERENCE_SOCKET, folder / TORCHSERVE_SOCKET)
            self._waiting_room.lead_to_server()
            self._front = make_front(settings, folder)
            try:
                self._front.start()
            except ProxyError as error:
                raise ServeError(self._find_taken_port(str(error)) or str(error)) from error

    def _start_torchserve(self) -> None:
        settings, hardening, folder = self.settings, self.settings.hardening, self.folder
        temp_dir = folder / "tmp"
        shutil.rmtree(temp_dir, ignore_errors=True)  # a former TorchServe's
        temp_dir.mkdir()
        bound = settings.limits.jvm_bytes or jvm_bound(" ".join(self._command))
        places = {"TMPDIR": temp_dir, "TEMP": temp_dir, "LOG_LOCATION": folder / LOGS, "METRICS_LOCATION": folder / LOGS}
        self._child = Child(
            self._command,
            log=settings.log_dir.resolve() / CONSOLE_FILE,
            folder=hardening.key_dir if hardening else folder,
            environment=clean_environment(os.environ)
            | {name: str(path) for name, path in places.items()}
            | {LIMIT_VARIABLE: str(bound), REPLACEMENTS_VARIABLE: str(len(self._replaced))},
            umask=0o077 if hardening else -1,
            remove=[folder, *([hardening.key_file.resolve(), hardening.former_tokens.resolve()] if hardening else [])],
        )
        count = self.worker_count  # an expired token says nothing of workers, and that TorchServe lives
        self._watch = Watch(settings.limits, bound, count, lambda: self._count_ready_workers(if_refused=count))

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
        if not MODEL_NAME.fullmatch(self.model_name):
            raise ServeError(
                f"the archive's name is the model's, which stands in URLs: expected letters, digits and ._- alone, got "
                f"{settings.archive}; rename it"
            )
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
        except OSError as error:
            raise ServeError(f"cannot read {error.filename or settings.archive}: {error.strerror}") from error
        return archive

    def _write_configuration(self, archive: bytes, folder: Path) -> list[str]:
        """Write everything that TorchServe starts from into a folder.

        Returns:
            Java's options. TorchServe's own starter is left out: it cuts them at spaces, and would be one more process.
        """
        settings = self.settings
        for name in ("store", "unpacked"):
            (folder / name).mkdir()
        try:
            self.worker_count = stock_model_store(folder / "store", settings, archive, folder / "unpacked")
            properties = configure(settings, folder)
            configuration = folder / "config.properties"
            configuration.write_text(properties)
        except (ArchiveError, OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ServeError(f"the archive {settings.archive} cannot be served: {error}") from error
        if not settings.log_configuration.is_file():
            raise ServeError(f"there is no file {settings.log_configuration}, given as --log-config")
        log_configuration = link(folder / f"log4j2{settings.log_configuration.suffix}", settings.log_configuration)
        torchserve = importlib.util.find_spec("ts")
        if torchserve is None or torchserve.origin is None:
            raise ServeError(f"{sys.executable} has no TorchServe; install requirements.txt, or start .venv/bin/python")
        home = Path(torchserve.origin).resolve().parents[1]
        return [
            f"-Dmodel_server_home={home}",
            f"-Dlog4j.configurationFile={log_configuration.as_uri()}",
            f"-Djava.util.logging.config.file={link(folder / JAVA_LOGGING.name, JAVA_LOGGING)}",
            f"-Djava.io.tmpdir={folder / 'tmp'}",
            *(find_property(properties, "vmargs") or "").split(),
            *("-cp", f"{home}/ts/frontend/*", "org.pytorch.serve.ModelServer"),
            *("--python", sys.executable, "-f", str(configuration), "-ncs"),
            *("-s", str(folder / "store"), "-m", f"{self.model_name}={self.model_name}.mar"),
        ]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (self._count_ready_workers() or 0) < self.worker_count:
            if self._interrupted.wait(READY_POLL_S):
                raise ServeError("interrupted")
            if self.has_ended():
                raise ServeError(self._why_it_ended())
            if WORKER_DIED in self.log_tail():
                raise ServeError(f"a worker cannot load the archive:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServeError(f"the workers were not ready after {READY_TIMEOUT_S} s:\n{self.log_tail()}")
        if self.settings.hardening is not None:
            try:
                require_own_certificate(self.settings.hardening, self.settings.ports.inference)
            except HardeningError as error:
                raise ServeError(str(error)) from error

    def _count_ready_workers(self, *, if_refused: int = 0) -> int | None:
        """Count the workers that can answer; None where this TorchServe does not answer, although another may.

        Args:
            if_refused: what to return where the token is an earlier one, or has expired.
        """
        hardening = self.settings.hardening
        if self._child is None or not self._child.listens_on(self.settings.ports.management):
            return None
        try:
            token = read_token(hardening.key_file, "management") if hardening else None
            url = f"{self.management_address}/models/{self.model_name}"
            with requests.Session() as session:
                session.trust_env = False  # it is this machine: no proxy of the environment, no password of ~/.netrc
                reply = session.get(url, headers=authorization(token), timeout=5)
            if reply.status_code == 400 and "InvalidKeyException" in reply.text:
                return if_refused
            reply.raise_for_status()
            workers = reply.json()[0]["workers"]
        except (requests.RequestException, CredentialsError, LookupError, TypeError):  # not there yet
            return None
        return sum(1 for worker in workers if worker["status"] == "READY")

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
        is_open = self._waiting_room is None or not self._waiting_room.is_open  # what waits there is in flight to the front alone
        while self._front is not None and is_open and self._front.requests_in_flight() and time.monotonic() < deadline:
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

    def _why_it_ended(self) -> str:
        """Say why TorchServe ended at its start."""
        printed = self.log_tail()
        return self._find_taken_port(printed) or f"TorchServe ended at its start:\n{printed}"

    def _find_taken_port(self, printed: str) -> str:
        """Say which port was taken, from what TorchServe or Envoy printed; "" where none was."""
        taken = NOT_BOUND.search(printed)
        if taken is None:
            return ""
        ports = self.settings.ports
        port = next(int(group) for group in taken.groups() if group)
        names = [name for name in ports.__dataclass_fields__ if getattr(ports, name) == port]
        return f"port {port} was taken by another program while the server started; choose another with {option_of(names[0])}"
