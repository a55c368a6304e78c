"""HTTP/1.1 requests at a set rate or over a set number of connections -> one sample a request.

Open loop: requests are due by the clock, whatever the server does, and latency counts from the instant a request was due, so that
a stall of the server shows in every request that it held up. Closed loop: each connection sends its next request when its reply
has come. One thread, non-blocking sockets. Knows nothing of digits, files or reports.
"""

import contextlib
import errno
import itertools
import math
import os
import re
import select
import selectors
import socket
import ssl
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

TIMEOUT_S = 10.0
TICK_S = 0.05  # how often timeouts are looked for, and the caller's hook is called
RETRY_S = 0.1  # how long a closed loop's connection waits after a failure, so that a dead server is not hammered
RECEIVE_BYTES = 256 * 1024
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)

RECORD = np.dtype(
    [
        ("scheduled_s", "f8"),  # when the request was to be sent
        ("due_s", "f8"),  # when it could be sent: the schedule had come and a connection was free; NaN where it never was
        ("sent_s", "f8"),  # when it was taken up; NaN where it never was
        ("done_s", "f8"),  # when the reply was complete, or the request given up
        ("call", "i4"),  # index of the call
        ("status", "i2"),  # of the reply, 0 where there was none
        ("failure", "i1"),  # a Failure
    ]
)


class Failure(IntEnum):
    """Why a request has no good reply, beside its status."""

    NONE = 0
    REFUSED = 1
    UNREACHABLE = 2
    TLS = 3
    RESET = 4
    CLOSED = 5  # by the server, before the reply was complete
    TIMEOUT = 6
    GARBAGE = 7  # no HTTP/1.1
    WRONG_FORM = 8  # HTTP, with content that is not what was asked for; for the caller to find

    @property
    def label(self) -> str:
        """As people read it."""
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True, slots=True)
class Call:
    """One prebuilt HTTP/1.1 request.

    Attributes:
        name: its kind, for the report.
        request: all its bytes.
    """

    name: str
    request: bytes


@dataclass(frozen=True, slots=True)
class FirstReply:
    """The first good reply in the window to a call, whole. `row` is its place among the records."""

    row: int
    head: bytes
    body: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """What a run measured. Times are seconds since the end of the warm-up, so that those of the warm-up are negative.

    Every property counts only the window: requests scheduled from 0 to `duration_s`, or, for `served_rate`, answered in it.

    Attributes:
        names: of the calls, by their index.
        records: (N,) of RECORD, in the order in which requests ended, the warm-up's included.
        duration_s: of the window.
        offered_rate: requests scheduled a second; None in a closed loop.
        connections: most that were open at once.
        cpu_share: the processor time of this process in the window, over its wall time.
        first_replies: by index of the call.
    """

    names: tuple[str, ...]
    records: NDArray[np.void]
    duration_s: float
    offered_rate: float | None
    connections: int
    cpu_share: float
    first_replies: Mapping[int, FirstReply]

    @property
    def scheduled_s(self) -> NDArray[np.float64]:
        """When each request was to be sent: (N,), the warm-up's included."""
        return self._column("scheduled_s")

    @property
    def sent_s(self) -> NDArray[np.float64]:
        """When each request was taken up: (N,), NaN where it never was."""
        return self._column("sent_s")

    @property
    def done_s(self) -> NDArray[np.float64]:
        """When each reply was complete or given up: (N,)."""
        return self._column("done_s")

    @property
    def call(self) -> NDArray[np.int32]:
        """Index of the call of each request: (N,)."""
        return self._column("call")

    @property
    def status(self) -> NDArray[np.int16]:
        """Status of each reply: (N,), 0 where there was none."""
        return self._column("status")

    @property
    def failure(self) -> NDArray[np.int8]:
        """A `Failure` for each request: (N,)."""
        return self._column("failure")

    @property
    def good(self) -> NDArray[np.bool_]:
        """Which requests have a reply with a 2xx status and without failure: (N,)."""
        return np.asarray((self.status >= 200) & (self.status < 300) & (self.failure == Failure.NONE))

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Which requests were scheduled in the window: (N,)."""
        return np.asarray((self.scheduled_s >= 0) & (self.scheduled_s < self.duration_s))

    @property
    def timed(self) -> NDArray[np.bool_]:
        """Which requests have a latency: (N,), the good ones, and timeouts with the time that was waited.

        A timeout is left in since its latency is at least that; other failures say nothing of how long an answer takes.
        """
        return np.asarray(self.counted & (self.good | (self.failure == Failure.TIMEOUT)))

    @property
    def request_count(self) -> int:
        """How many requests were scheduled in the window."""
        return int(self.counted.sum())

    @property
    def served_rate(self) -> float:
        """Good replies a second that came in the window."""
        in_window = (self.done_s >= 0) & (self.done_s < self.duration_s)
        return float((in_window & self.good).sum() / self.duration_s)

    @property
    def error_counts(self) -> dict[str, int]:
        """How many requests of the window failed, by kind: a `Failure`, or the status as "HTTP 503"."""
        bad = self.counted & ~self.good
        kinds = zip(self.failure[bad].tolist(), self.status[bad].tolist(), strict=True)
        return dict(sorted(Counter(Failure(failure).label if failure else f"HTTP {status}" for failure, status in kinds).items()))

    def latencies_ms(self, name: str | None = None) -> NDArray[np.float64]:
        """Latencies from schedule to complete reply: (M,) of the `timed` requests.

        Args:
            name: only of calls of this name.
        """
        chosen = self.timed
        if name is not None:
            chosen = chosen & np.array([own == name for own in self.names])[self.call]
        return np.asarray((self.done_s - self.scheduled_s)[chosen] * 1e3)

    def latency_quantiles_ms(self, quantiles: Sequence[float] = QUANTILES, name: str | None = None) -> NDArray[np.float64]:
        """Quantiles of `latencies_ms`: (len(quantiles),), NaN where there are none."""
        return _quantiles(self.latencies_ms(name), quantiles)

    def lag_quantiles_ms(self, quantiles: Sequence[float] = QUANTILES) -> NDArray[np.float64]:
        """How late requests were sent by the generator's own fault, after both schedule and connection were there."""
        lags_ms = (self.sent_s - self._column("due_s"))[self.counted] * 1e3
        return _quantiles(lags_ms[~np.isnan(lags_ms)], quantiles)

    def _column(self, name: str) -> NDArray[Any]:
        return np.asarray(self.records[name])


def _quantiles(values: NDArray[np.float64], quantiles: Sequence[float]) -> NDArray[np.float64]:
    return np.quantile(values, quantiles) if len(values) else np.full(len(quantiles), np.nan)


def build_call(name: str, address: str, path: str, body: bytes, headers: Mapping[str, str]) -> Call:
    """Write a POST request.

    Args:
        address: such as http://127.0.0.1:8080.
        path: such as /predictions/digits.
        headers: beside Host and Content-Length.
    Raises:
        ValueError: a header is not ASCII, or has a line break in it.
    """
    lines = [f"POST {path} HTTP/1.1", f"Host: {urlsplit(address).netloc}", f"Content-Length: {len(body)}"]
    lines += [f"{header}: {value}" for header, value in headers.items()]
    if not all(line.isascii() and line.isprintable() for line in lines):
        raise ValueError("a header has a character that HTTP does not allow")  # which one might be a secret
    return Call(name, "\r\n".join([*lines, "", ""]).encode() + body)


Tick = Callable[[float, int], bool]  # called with the time and the number of requests that ended; False ends the run
Inspect = Callable[[int, int, bytes], bool]  # called with call, status and body of each reply; False makes it of the wrong form


def run_closed(
    address: str,
    calls: Sequence[Call],
    *,
    connections: int,
    duration_s: float,
    warm_up_s: float = 0.0,
    timeout_s: float = TIMEOUT_S,
    tls: ssl.SSLContext | None = None,
    tick: Tick | None = None,
    inspect: Inspect | None = None,
) -> Samples:
    """Keep a number of connections busy; a request is due when the reply before it has come.

    Args:
        address: such as http://127.0.0.1:8080.
        calls: taken in turn, by all connections together.
        timeout_s: how long after its schedule a request without reply is given up.
        tls: for an https address.
        tick: called some twenty times a second.
        inspect: called for every reply, whatever its status, after its time was taken.
    Raises:
        OSError: the address has no host of that name.
    """
    run = _Run(address, calls, duration_s, warm_up_s, timeout_s, tls, inspect, max_connections=connections, closed=True)
    return run.run([-warm_up_s] * connections, None, tick)


def run_open(
    address: str,
    calls: Sequence[Call],
    *,
    rate: float,
    duration_s: float,
    warm_up_s: float = 0.0,
    max_connections: int = 256,
    timeout_s: float = TIMEOUT_S,
    tls: ssl.SSLContext | None = None,
    tick: Tick | None = None,
    inspect: Inspect | None = None,
) -> Samples:
    """Send requests at a steady rate, whatever the server does.

    Where all connections are busy, another is opened; beyond `max_connections` requests wait for one, which counts as their
    latency. After the window the requests that are still without reply are waited for, up to `timeout_s`.

    Args: as `run_closed`, and
        rate: requests a second.
    Raises:
        OSError: the address has no host of that name.
    """
    run = _Run(address, calls, duration_s, warm_up_s, timeout_s, tls, inspect, max_connections=max_connections, closed=False)
    count = round((warm_up_s + duration_s) * rate)
    return run.run((np.arange(count) / rate - warm_up_s).tolist(), rate, tick)


class GarbageReply(ValueError):
    """What the server sent is no HTTP/1.1 reply."""


class ReplyReader:
    """Bytes as they come -> one reply after another.

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
        """Forget the reply, for the next one."""
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
        """Take what came. Returns whether the reply is complete.

        Raises:
            GarbageReply: it is none, or there is more than one.
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
        """Whether the reply is one that the end of the connection completes."""
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
        if self.status < 200:  # an interim reply, such as 100 Continue; the real one follows
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
            if size == 0:  # trailers, of which nobody sends any, end with an empty line
                return self._content.endswith(b"\r\n\r\n")
            if len(self._content) < start + size + 2:
                return False
            self._chunk_at = start + size + 2
        return False

    def _chunk_size(self, at: int) -> int | None:
        """The size that the chunk at an offset declares; None where its line is not there yet."""
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


class _Connection:
    """A socket, and the request that it carries."""

    __slots__ = ("call", "connect_code", "connected", "due_s", "reader", "scheduled_s", "sent_s", "socket", "unsent")

    def __init__(self, opened: socket.socket, connect_code: int) -> None:
        self.socket = opened
        self.connect_code = connect_code  # what connecting failed with at once, or 0
        self.connected = False  # and shaken hands with, where there is TLS
        self.reader = ReplyReader()
        self.call = -1  # none
        self.unsent: memoryview | None = None
        self.scheduled_s = self.due_s = self.sent_s = math.nan


_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class _Run:
    """One run's connections, schedule and records."""

    def __init__(
        self,
        address: str,
        calls: Sequence[Call],
        duration_s: float,
        warm_up_s: float,
        timeout_s: float,
        tls: ssl.SSLContext | None,
        inspect: Inspect | None,
        *,
        max_connections: int,
        closed: bool,
    ) -> None:
        parts = urlsplit(address)
        self._host = parts.hostname or ""
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        port = parts.port or (443 if self._tls else 80)
        found = socket.getaddrinfo(self._host, port, type=socket.SOCK_STREAM)
        found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # "localhost" has ::1 too, where few servers listen
        self._family, self._peer = found[0][0], found[0][4]
        self._calls = calls
        self._turn = itertools.cycle(range(len(calls)))
        self._duration_s, self._warm_up_s, self._timeout_s = duration_s, warm_up_s, timeout_s
        self._inspect = inspect
        self._max_connections = max_connections
        self._closed = closed
        self._selector = selectors.DefaultSelector()
        self._connections: set[_Connection] = set()
        self._idle: list[_Connection] = []  # the last one used is used next
        self._upcoming: deque[float] = deque()  # when requests are to be sent, the next one first
        self._waiting: deque[float] = deque()  # the same of those whose time has come, for want of a connection
        self._most_connections = 0
        self._zero = 0.0  # the clock's time at the end of the warm-up
        self._woken_s = 0.0  # when the events that are being handled became known
        self._columns: dict[str, array[Any]] = {name: array(RECORD[name].char) for name in RECORD.names or ()}
        self._first_replies: dict[int, FirstReply] = {}

    def run(self, schedule: Sequence[float], offered_rate: float | None, tick: Tick | None) -> Samples:
        """Work until every request has ended, or the tick says so."""
        self._upcoming.extend(schedule)
        self._zero = time.perf_counter() + self._warm_up_s
        window_start: tuple[float, float] | None = None  # wall and processor time
        window_end: tuple[float, float] | None = None
        next_tick_s, interrupted = -math.inf, False
        try:
            while self._upcoming or self._waiting or len(self._idle) < len(self._connections):
                now_s = self._now()
                if now_s >= next_tick_s:
                    next_tick_s = now_s + TICK_S
                    if window_start is None and now_s >= 0:
                        window_start = now_s, time.process_time()
                    if window_end is None and now_s >= self._duration_s:
                        window_end = now_s, time.process_time()
                    self._give_up(now_s - self._timeout_s)
                    if tick is not None and not tick(now_s, len(self._columns["call"])):
                        interrupted = True
                        break
                while self._upcoming and self._upcoming[0] <= now_s:
                    scheduled_s = self._upcoming.popleft()
                    self._start(scheduled_s, scheduled_s)
                while self._waiting and self._has_room():
                    self._start(self._waiting.popleft(), now_s)
                self._handle_events(min(self._upcoming[0] if self._upcoming else math.inf, next_tick_s))
        finally:
            self._close_all()
        end = window_end or (self._now(), time.process_time())
        start = window_start or end
        return Samples(
            names=tuple(call.name for call in self._calls),
            records=self._records(),
            duration_s=min(max(end[0], TICK_S), self._duration_s) if interrupted else self._duration_s,
            offered_rate=offered_rate,
            connections=self._most_connections,
            cpu_share=(end[1] - start[1]) / max(end[0] - start[0], TICK_S),
            first_replies=self._first_replies,
        )

    def _now(self) -> float:
        return time.perf_counter() - self._zero

    def _has_room(self) -> bool:
        return bool(self._idle) or len(self._connections) < self._max_connections

    def _handle_events(self, until_s: float) -> None:
        """Wait for the sockets, up to an instant, and read and write what can be."""
        wait_s = until_s - self._now()
        if wait_s > 0:  # epoll counts in milliseconds, select in microseconds; and select can watch an epoll
            select.select([self._selector], [], [], wait_s)
        events = self._selector.select(0)
        self._woken_s = self._now()
        for key, mask in events:
            connection: _Connection = key.data
            if mask & _WRITE and (connection.unsent is not None or not connection.connected):
                self._write(connection)
            if mask & _READ and connection in self._connections:
                self._read(connection) if connection.connected else self._write(connection)

    def _start(self, scheduled_s: float, due_s: float) -> None:
        """Send the next call over a free or a new connection, or let it wait for one."""
        if not self._has_room():
            self._waiting.append(scheduled_s)
            return
        connection = self._idle.pop() if self._idle else self._open()
        call = connection.call = next(self._turn)
        connection.scheduled_s, connection.due_s, connection.sent_s = scheduled_s, due_s, self._now()
        if not connection.connected:
            connection.unsent = memoryview(self._calls[call].request)
            return
        request = self._calls[call].request
        try:
            count = connection.socket.send(request)
        except _WOULD_BLOCK:
            count = 0
        except OSError as error:
            self._fail(connection, _kind_of(error, connected=True))
            return
        if count < len(request):
            connection.unsent = memoryview(request)[count:]
            self._selector.modify(connection.socket, _READ | _WRITE, connection)

    def _open(self) -> _Connection:
        opened = socket.socket(self._family, socket.SOCK_STREAM)
        opened.setblocking(False)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = opened.connect_ex(self._peer)
        connection = _Connection(opened, 0 if code == errno.EINPROGRESS else code)
        self._connections.add(connection)
        self._most_connections = max(self._most_connections, len(self._connections))
        self._selector.register(opened, _WRITE, connection)
        return connection

    def _write(self, connection: _Connection) -> None:
        """Go on connecting, shaking hands and sending, as far as it goes now."""
        try:
            if not connection.connected:
                self._connect(connection)
            assert connection.unsent is not None
            count = connection.socket.send(connection.unsent)
        except _WOULD_BLOCK:
            return
        except OSError as error:
            self._fail(connection, _kind_of(error, connected=connection.connected))
            return
        connection.unsent = connection.unsent[count:] if count < len(connection.unsent) else None
        self._selector.modify(connection.socket, _READ if connection.unsent is None else _READ | _WRITE, connection)

    def _connect(self, connection: _Connection) -> None:
        """Finish connecting.

        Raises:
            OSError: it did not succeed, or would block.
        """
        opened = connection.socket
        if not isinstance(opened, ssl.SSLSocket):
            code = connection.connect_code or opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
        if self._tls is not None and not isinstance(opened, ssl.SSLSocket):
            self._selector.unregister(opened)
            opened = connection.socket = self._tls.wrap_socket(opened, server_hostname=self._host, do_handshake_on_connect=False)
            self._selector.register(opened, _READ, connection)
        if isinstance(opened, ssl.SSLSocket):
            opened.do_handshake()
        connection.connected = True

    def _read(self, connection: _Connection) -> None:
        """Read what has come, up to the end of the reply."""
        reader = connection.reader
        complete = False
        while not complete:
            try:
                data = connection.socket.recv(RECEIVE_BYTES)
                if connection.call < 0:  # nothing was asked: the server closes, or should not have sent it
                    self._idle.remove(connection)
                    self._close(connection)
                    return
                if not data:
                    if not reader.is_complete_at_end():
                        self._fail(connection, Failure.CLOSED)
                        return
                    complete = True
                else:
                    complete = reader.feed(data)
            except _WOULD_BLOCK:
                return
            except GarbageReply:
                self._fail(connection, Failure.GARBAGE)
                return
            except OSError as error:
                if connection.call < 0:
                    self._idle.remove(connection)
                    self._close(connection)
                else:
                    self._fail(connection, _kind_of(error, connected=True))
                return
        self._end(connection)

    def _end(self, connection: _Connection) -> None:
        """Note a complete reply, and put its connection to the next use."""
        reader, call = connection.reader, connection.call
        if call not in self._first_replies and 200 <= reader.status < 300 and connection.scheduled_s >= 0:
            self._first_replies[call] = FirstReply(len(self._columns["call"]), reader.head, reader.body)
        self._note(connection, reader.status, Failure.NONE)
        if self._inspect is not None and not self._inspect(call, reader.status, reader.body):
            self._columns["failure"][-1] = Failure.WRONG_FORM
        if reader.keeps_alive and connection.unsent is None:
            connection.call = -1
            reader.start()
            self._idle.append(connection)
        else:
            self._close(connection)
        if self._waiting:
            self._start(self._waiting.popleft(), self._woken_s)
        elif self._closed and self._woken_s < self._duration_s:
            self._start(self._woken_s, self._woken_s)

    def _fail(self, connection: _Connection, failure: Failure) -> None:
        """Note a request without a reply, and leave its connection."""
        self._note(connection, connection.reader.status if failure is Failure.GARBAGE else 0, failure)
        self._close(connection)
        again_s = self._now() + RETRY_S
        if self._closed and again_s < self._duration_s:
            self._upcoming.append(again_s)

    def _give_up(self, before_s: float) -> None:
        """End the requests that were scheduled before an instant and have no reply."""
        for connection in [busy for busy in self._connections if busy.call >= 0 and busy.scheduled_s < before_s]:
            self._fail(connection, Failure.TIMEOUT)
        while self._waiting and self._waiting[0] < before_s:
            self._add_record(self._waiting.popleft(), math.nan, math.nan, self._now(), next(self._turn), 0, Failure.TIMEOUT)

    def _note(self, connection: _Connection, status: int, failure: Failure) -> None:
        times = connection.scheduled_s, connection.due_s, connection.sent_s, self._now()
        self._add_record(*times, connection.call, status, failure)

    def _add_record(self, *values: float) -> None:
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def _records(self) -> NDArray[np.void]:
        records = np.empty(len(self._columns["call"]), RECORD)
        for name, column in self._columns.items():
            records[name] = column
        return records

    def _close(self, connection: _Connection) -> None:
        self._selector.unregister(connection.socket)
        self._connections.remove(connection)
        connection.socket.close()

    def _close_all(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                self._close(connection)
        self._selector.close()


def _kind_of(error: OSError, *, connected: bool) -> Failure:
    if isinstance(error, ssl.SSLError):
        return Failure.TLS
    if isinstance(error, ConnectionRefusedError):
        return Failure.REFUSED
    return Failure.RESET if connected else Failure.UNREACHABLE
