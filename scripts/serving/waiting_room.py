"""A waiting room between the front and TorchServe: requests that come while TorchServe is replaced wait, and are then passed on.

The front connects to one path, a link. Usually it leads to TorchServe's socket, and this module has no part in any request. While
TorchServe is replaced it leads here: connections are taken and nothing is read from them. Afterwards each is joined with one to
the new TorchServe. Each carries one request (`proxy/configuration.py`). Knows nothing of HTTP but the end of a request's head.
"""

import contextlib
import os
import selectors
import socket
import threading
from pathlib import Path

WAITING_SOCKET = "waiting.sock"
BACKLOG = 1024
CHUNK_BYTES = 65_536
HEAD_BYTES = 131_072  # more than the front lets through
POLL_S = 0.1


class WaitingRoom:
    """Connections that wait.

    Attributes:
        is_open: whether everyone waits who comes now.
    Args:
        door: the path that the front connects to.
        server: TorchServe's socket.
    """

    def __init__(self, door: Path, server: Path) -> None:
        self._door, self._server = door, server
        self._waiting: list[socket.socket] = []
        self.is_open = False
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def lead_to_server(self) -> None:
        """Let the door lead to TorchServe's socket, which need not be there yet."""
        _point(self._door, self._server)

    def open(self) -> None:
        """Let everyone wait from now on. What has come before is TorchServe's."""
        own = self._door.with_name(WAITING_SOCKET)
        own.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(own))
        self._listener.listen(BACKLOG)
        self._listener.settimeout(POLL_S)
        self.is_open = True
        self._thread = threading.Thread(target=self._receive, name="waiting room", daemon=True)
        self._thread.start()
        _point(self._door, own)

    def let_in(self, former_token: str | None = None, token: str | None = None) -> int:
        """Pass on all who wait, and let the door lead to TorchServe again.

        Args:
            former_token: a token that stands in the heads of those who wait, and that the new TorchServe does not know.
            token: the new TorchServe's, of the same length.
        Returns:
            how many waited.
        """
        self.lead_to_server()
        self._close()
        waiting, self._waiting = self._waiting, []
        replace = None if former_token is None or token is None else (former_token.encode(), token.encode())
        for client in waiting:
            threading.Thread(target=_pass_on, args=(client, self._server, replace), daemon=True).start()
        return len(waiting)

    def send_away(self) -> None:
        """Close the connections of all who wait: there is no server for them."""
        self._close()
        for client in self._waiting:
            client.close()
        self._waiting = []

    def _close(self) -> None:
        self.is_open = False
        if self._thread is not None:
            self._thread.join()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _receive(self) -> None:
        listener = self._listener
        assert listener is not None
        while True:
            is_last_look = not self.is_open  # those in the queue came before the door was turned
            try:
                while True:
                    self._waiting.append(listener.accept()[0])
            except TimeoutError:
                if is_last_look:
                    return


def _point(link: Path, target: Path) -> None:
    """Let a link lead elsewhere, at one stroke."""
    fresh = link.with_name(f"{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target.name)
    os.replace(fresh, link)  # noqa: PTH105  # Path.replace is the same


def _pass_on(client: socket.socket, server: Path, replace: tuple[bytes, bytes] | None) -> None:
    """Join a connection with a new one to the server, until both have ended."""
    upstream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with client, upstream, selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
        client.settimeout(None)
        upstream.connect(str(server))
        head = b""
        while b"\r\n\r\n" not in head and len(head) < HEAD_BYTES and (content := client.recv(CHUNK_BYTES)):
            head += content
        front, end, body = head.partition(b"\r\n\r\n")
        upstream.sendall((front.replace(*replace) if replace else front) + end + body)
        selector.register(client, selectors.EVENT_READ, upstream)
        selector.register(upstream, selectors.EVENT_READ, client)
        while selector.get_map():
            for key, _ in selector.select():
                source = key.fileobj
                assert isinstance(source, socket.socket)
                content = source.recv(CHUNK_BYTES)
                if content:
                    key.data.sendall(content)
                else:
                    selector.unregister(source)
                    key.data.shutdown(socket.SHUT_WR)
