"""HTTP/1.1 requests as bytes, and replies read from bytes as they arrive.

Knows nothing of sockets or time.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Call:
    """One prebuilt HTTP/1.1 request.

    Attributes:
        name: its kind, for the report.
        request: all its bytes.
    """

    name: str
    request: bytes


def build_call(name: str, address: str, path: str, body: bytes, headers: Mapping[str, str]) -> Call:
    """Write a POST request.

    Args:
        address: such as http://127.0.0.1:8080.
        path: such as /predictions/digits.
        headers: beside Host and Content-Length.
    Raises:
        ValueError: a header is not ASCII, or contains a line break.
    """
    lines = [f"POST {path} HTTP/1.1", f"Host: {urlsplit(address).netloc}", f"Content-Length: {len(body)}"]
    lines += [f"{header}: {value}" for header, value in headers.items()]
    if not all(line.isascii() and line.isprintable() for line in lines):
        raise ValueError(
            "a header has a character that HTTP does not allow"
        )  # the message leaves out the value: it may be a secret
    return Call(name, "\r\n".join([*lines, "", ""]).encode() + body)


class GarbageReply(ValueError):
    """The server sent something other than one HTTP/1.1 reply."""


class ReplyReader:
    """Bytes as they arrive -> one reply after another.

    Attributes:
        status: of the reply whose head has been read, 0 before.
        keeps_alive: whether the server leaves the connection open after it.
    """

    __slots__ = ("_body_at", "_chunk_at", "_content", "_size", "keeps_alive", "status")

    HEAD_END = b"\r\n\r\n"
    MAX_HEAD_BYTES = 64 * 1024
    UNTIL_CLOSED = -1  # in place of a size: the body ends with the connection
    CHUNKED = -2

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget the reply and wait for the next one."""
        self._content: bytes | bytearray = b""
        self._size = 0  # of head and body; 0 before the head is complete
        self._body_at = 0
        self._chunk_at = 0
        self.status = 0
        self.keeps_alive = True

    @property
    def head(self) -> bytes:
        """The head of the reply, with the empty line that ends it."""
        return bytes(self._content[: self._body_at])

    @property
    def body(self) -> bytes:
        """The body of the complete reply, its chunks joined."""
        if self._size != self.CHUNKED:
            return bytes(self._content[self._body_at :])
        body, at = bytearray(), self._body_at
        while size := self._chunk_size(at):
            start = self._content.index(b"\r\n", at) + 2
            body += self._content[start : start + size]
            at = start + size + 2
        return bytes(body)

    def feed(self, data: bytes) -> bool:
        """Take the next bytes. Returns whether the reply is complete.

        Raises:
            GarbageReply: the bytes are no HTTP/1.1 reply, or more than one.
        """
        if self._content:
            if isinstance(self._content, bytes):
                self._content = bytearray(self._content)
            self._content += data
        else:
            self._content = data
        if not self._size and not self._read_head():
            return False
        if self._size > 0:
            if len(self._content) > self._size:
                raise GarbageReply("more bytes than the reply's length")
            return len(self._content) == self._size
        return self._size == self.CHUNKED and self._read_chunks()

    def is_complete_at_end(self) -> bool:
        """Whether the end of the connection completes the reply."""
        return self._size == self.UNTIL_CLOSED

    def _read_head(self) -> bool:
        end = self._content.find(self.HEAD_END)
        if end < 0:
            if not b"HTTP/1.".startswith(self._content[:7]) or len(self._content) > self.MAX_HEAD_BYTES:
                raise GarbageReply("no HTTP/1.1 head")
            return False
        matched = _STATUS_LINE.match(self._content)
        if matched is None:
            raise GarbageReply("no HTTP/1.1 status line")
        self.status = int(matched[1])
        self._body_at = end + len(self.HEAD_END)
        if self.status < 200:  # an interim reply, such as 100 Continue; the final one follows
            content = self._content[self._body_at :]
            self.start()
            self._content = content
            return bool(content) and self._read_head()
        head = self._content[: end + 2].lower()
        self.keeps_alive = b"\r\nconnection: close\r\n" not in head and not head.startswith(b"http/1.0")
        if length := _LENGTH.search(head):
            self._size = self._body_at + int(length[1])
        elif b"\r\ntransfer-encoding: chunked\r\n" in head:
            self._size, self._chunk_at = self.CHUNKED, self._body_at
        elif self.status in (204, 304):
            self._size = self._body_at
        else:
            self._size, self.keeps_alive = self.UNTIL_CLOSED, False
        return True

    def _read_chunks(self) -> bool:
        while (size := self._chunk_size(self._chunk_at)) is not None:
            start = self._content.index(b"\r\n", self._chunk_at) + 2
            if size == 0:  # trailers, which no server here sends, end with an empty line
                return self._content.endswith(b"\r\n\r\n")
            if len(self._content) < start + size + 2:
                return False
            self._chunk_at = start + size + 2
        return False

    def _chunk_size(self, at: int) -> int | None:
        """The size that the chunk at an offset declares; None where its line is incomplete."""
        end = self._content.find(b"\r\n", at)
        if end < 0:
            return None
        matched = _CHUNK_SIZE.match(self._content, at, end)
        if matched is None:
            raise GarbageReply("a chunk without a size")
        return int(matched[0], 16)


_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d)[ \r]")
_CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]+")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+) *\r\n")
