"""Send HTTP/1.1 requests at a set rate, or over a set number of busy connections: a Load -> Samples.

Open loop: requests are due by the clock, whatever the server does, and latency counts from the instant a request was due, so that
a stall of the server shows in every request that it held up. Closed loop: each connection sends its next request when its reply
has come. One thread, non-blocking sockets.
"""

import contextlib
import errno
import itertools
import math
import os
import select
import selectors
import socket
import ssl
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from scripts.bench.load.http_messages import Call, GarbageReply, ReplyReader
from scripts.bench.load.samples import RECORD, Failure, FirstReply, Samples

TICK_S = 0.05  # between looks for timeouts, and between calls of the caller's hook
RETRY_S = 0.1  # how long a closed loop's connection waits after a failure, so that a dead server is not hammered
RECEIVE_BYTES = 256 * 1024

Tick = Callable[[float, int], bool]  # called with the time and the number of requests that ended; False ends the run
Inspect = Callable[[int, int, bytes], bool]  # called with call, status and body of each reply; False marks a wrong form


@dataclass(frozen=True, slots=True)
class Load:
    """Requests to send to a server, with their rate and duration.

    Attributes:
        address: such as http://127.0.0.1:8080.
        calls: sent in turn, by all connections together.
        duration_s: of the window, in which requests count.
        rate: requests a second, whatever the server does: an open loop; None for a closed loop.
        connections: closed loop: how many are kept busy. Open loop: the most that are opened; beyond it requests wait for one,
            which counts as their latency.
        warm_up_s: before the window.
        timeout_s: how long after its schedule a request without reply is given up.
        tls: for an https address; None for the system's default.
    """

    address: str
    calls: Sequence[Call]
    duration_s: float
    rate: float | None = None
    connections: int = 256
    warm_up_s: float = 0.0
    timeout_s: float = 10.0
    tls: ssl.SSLContext | None = None

    @property
    def label(self) -> str:
        """Its rate or its connections, for reports."""
        return label_load(self.rate, self.connections)

    def schedule(self) -> list[float]:
        """List when requests are due, in seconds since the end of the warm-up; of a closed loop, the first ones."""
        if self.rate is None:
            return [-self.warm_up_s] * self.connections
        due_s: list[float] = (
            np.arange(round((self.warm_up_s + self.duration_s) * self.rate)) / self.rate - self.warm_up_s
        ).tolist()
        return due_s


def label_load(rate: float | None, connections: int) -> str:
    """Name a load by its rate or, in a closed loop, by its connections."""
    return f"{rate:g}/s" if rate is not None else f"{connections} connection{'s' if connections > 1 else ''}"


def run_load(load: Load, *, tick: Tick | None = None, inspect: Inspect | None = None) -> Samples:
    """Send a load, and wait for the last replies, up to its timeout.

    Args:
        tick: called some twenty times a second.
        inspect: called for every reply, whatever its status, after its time was taken.
    Raises:
        OSError: the address has no host of that name.
    """
    return _Run(load, inspect).run(tick)


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

    def __init__(self, load: Load, inspect: Inspect | None) -> None:
        parts = urlsplit(load.address)
        self._host = parts.hostname or ""
        self._tls = (load.tls or ssl.create_default_context()) if parts.scheme == "https" else None
        port = parts.port or (443 if self._tls else 80)
        found = socket.getaddrinfo(self._host, port, type=socket.SOCK_STREAM)
        found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # "localhost" has ::1 too, where few servers listen
        self._family, self._peer = found[0][0], found[0][4]
        self._load = load
        self._closed = load.rate is None
        self._turn = itertools.cycle(range(len(load.calls)))
        self._inspect = inspect
        self._selector = selectors.DefaultSelector()
        self._connections: set[_Connection] = set()
        self._idle: list[_Connection] = []  # the last one used is used next
        self._upcoming = deque(load.schedule())  # when requests are due, the next one first
        self._waiting: deque[float] = deque()  # the same, of those that are due and wait for a connection
        self._most_connections = 0
        self._zero = 0.0  # the clock's time at the end of the warm-up
        self._woken_s = 0.0  # when the events that are being handled became known
        self._columns: dict[str, array[Any]] = {name: array(RECORD[name].char) for name in RECORD.names or ()}
        self._first_replies: dict[int, FirstReply] = {}

    def run(self, tick: Tick | None) -> Samples:
        """Work until every request has ended, or the tick says so."""
        load = self._load
        self._zero = time.perf_counter() + load.warm_up_s
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
                    if window_end is None and now_s >= load.duration_s:
                        window_end = now_s, time.process_time()
                    self._give_up(now_s - load.timeout_s)
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
            names=tuple(call.name for call in load.calls),
            records=self._records(),
            duration_s=min(max(end[0], TICK_S), load.duration_s) if interrupted else load.duration_s,
            offered_rate=load.rate,
            connections=self._most_connections,
            cpu_share=(end[1] - start[1]) / max(end[0] - start[0], TICK_S),
            first_replies=self._first_replies,
        )

    def _now(self) -> float:
        return time.perf_counter() - self._zero

    def _has_room(self) -> bool:
        return bool(self._idle) or len(self._connections) < self._load.connections

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
            connection.unsent = memoryview(self._load.calls[call].request)
            return
        request = self._load.calls[call].request
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
        elif self._closed and self._woken_s < self._load.duration_s:
            self._start(self._woken_s, self._woken_s)

    def _fail(self, connection: _Connection, failure: Failure) -> None:
        """Note a request without a reply, and leave its connection."""
        self._note(connection, connection.reader.status if failure is Failure.GARBAGE else 0, failure)
        self._close(connection)
        again_s = self._now() + RETRY_S
        if self._closed and again_s < self._load.duration_s:
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
