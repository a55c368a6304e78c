"""The waiting room: real Unix sockets, clients before, during and after a replacement."""

import contextlib
import http.client
import http.server
import socket
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scripts.serving.waiting_room import WaitingRoom
from tests.servers import wait_for

BODY_BYTES = 300_000  # more than a socket's buffer holds


class Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


@contextlib.contextmanager
def serving_at(path: Path, name: str) -> Iterator[None]:
    """A server that answers with its name, the request's token, and the request's body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = f"{name} {self.headers['Authorization']} ".encode() + body
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True
        request_queue_size = 100

        def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
            return self.socket.accept()[0], ("client", 0)

    path.unlink(missing_ok=True)
    with Server(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield
        server.shutdown()
        thread.join()


def ask(door: Path, number: int) -> bytes:
    connection = Connection(door)
    with contextlib.closing(connection):
        connection.request("POST", "/", f"token-a {number} ".encode() * (BODY_BYTES // 10), {"Authorization": "token-a"})
        return connection.getresponse().read()


def answer(name: str, token: str, number: int) -> bytes:
    return f"{name} {token} ".encode() + f"token-a {number} ".encode() * (BODY_BYTES // 10)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="w", dir="/tmp") as made:
        yield Path(made)


def test_who_comes_during_a_replacement_is_answered_by_the_new_server(folder: Path) -> None:
    """The token in a request's head is exchanged, and what looks like it in a body is left alone."""
    door, path = folder / "door.sock", folder / "server.sock"
    room = WaitingRoom(door, path)
    room.lead_to_server()
    with serving_at(path, "old"):
        assert ask(door, 0) == answer("old", "token-a", 0)
        room.open()
    with ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(ask, door, number) for number in range(20)]
        wait_for(lambda: len(room._waiting) == 20, "20 who wait")
        assert not any(one.done() for one in waiting)
        with serving_at(path, "new"):
            assert room.let_in("token-a", "token-b") == 20
            assert [one.result() for one in waiting] == [answer("new", "token-b", number) for number in range(20)]
            assert ask(door, 1) == answer("new", "token-a", 1)  # the room has no part in it any more
    assert not room.is_open


def test_nobody_is_lost_while_the_door_turns(folder: Path) -> None:
    door, path = folder / "door.sock", folder / "server.sock"
    room = WaitingRoom(door, path)
    room.lead_to_server()
    ended = threading.Event()

    def keep_asking(number: int) -> int:
        count = 0
        while not ended.is_set():
            assert ask(door, number).endswith(f"token-a {number} ".encode())
            count += 1
        return count

    with serving_at(path, "one"), ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(8)]
        for _ in range(20):
            room.open()
            room.let_in()
        ended.set()
        assert all(one.result() > 0 for one in asking)


def test_who_waits_in_vain_is_sent_away(folder: Path) -> None:
    door, path = folder / "door.sock", folder / "server.sock"
    room = WaitingRoom(door, path)
    room.open()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, door, 0)
        wait_for(lambda: len(room._waiting) == 1, "one who waits")
        room.send_away()
        with pytest.raises((http.client.HTTPException, OSError)):
            waiting.result()
