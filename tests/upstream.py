"""A model's server as tests need it: it keeps what it is asked, and answers as it is told to."""

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

ANSWER = {"digit": 7}
DESCRIPTION = [{"customizedMetadata": {"class_count": 10}}]


def free_port() -> int:
    """A TCP port of the loopback address that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Asked:
    """A request as it came in. Names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def answer_plainly(asked: Asked) -> tuple[int, object]:
    return 200, DESCRIPTION if asked.path.startswith("/models/") else ANSWER


class Upstream(http.server.ThreadingHTTPServer):
    """Inference and management in one.

    Attributes:
        asked: all requests, in order.
        ended: seconds from a request to the end of its connection, of those that were ended unanswered.
        answer: gives status and content (bytes, or what becomes JSON) to a request.
        delay_s: how long it takes to answer.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        self.forget()
        super().__init__(("127.0.0.1", port), _Answering)

    def forget(self) -> None:
        """Begin anew."""
        self.asked: list[Asked] = []
        self.ended: list[float] = []
        self.answer: Callable[[Asked], tuple[int, object]] = answer_plainly
        self.delay_s = 0.0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        """Serve in a thread of its own."""
        with self:
            thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            try:
                yield self
            finally:
                self.shutdown()
                thread.join()


class _Answering(http.server.BaseHTTPRequestHandler):
    server: Upstream

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = Asked(self.command, self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        self.server.asked.append(asked)
        if not self._wait():
            return
        status, content = self.server.answer(asked)
        encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if encoded.startswith(b"<") else "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.send_header("Set-Cookie", "upstream=1")
            self.end_headers()
            self.wfile.write(encoded)

    do_GET = do_POST  # noqa: N815
    do_OPTIONS = do_POST  # noqa: N815

    def _wait(self) -> bool:
        """Take as long as it was told to, and notice a client that leaves; whether it is still there."""
        started = time.monotonic()
        self.connection.settimeout(0.02)
        while time.monotonic() - started < self.server.delay_s:
            with contextlib.suppress(TimeoutError, ConnectionError):
                if self.connection.recv(1, socket.MSG_PEEK) == b"":
                    self.server.ended.append(time.monotonic() - started)
                    return False
        self.connection.settimeout(None)
        return True

    def log_message(self, *_: object) -> None:
        pass
