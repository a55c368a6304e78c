"""A process of its own for decoding image files: one that takes too much time or memory costs nobody else anything.

It is started once and kept: a file and a budget go in, grey levels or an error come out. Files and levels lie in memory that both
processes share, and a socket says what lies there. Processor time ends it by a signal, also in the middle of a decoder; memory is
bounded by the kernel. It is an interpreter with Pillow and numpy alone (some 40 MB), and ends with the process that started it,
whose end of the socket is closed then.

    request:  the file, shared; REQUEST
    reply:    the levels, shared; REPLY, a JSON object
"""

import atexit
import contextlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from handler import errors
from handler.errors import OVERLOADED, ClientError, ImageTooLarge, Overloaded, ServiceError, UnreadableImage
from handler.images.budget import DecodingBudget, Stopwatch
from handler.images.file_decoder import DecodedFile, decode_file
from handler.limits import MAX_DECODER_BYTES

REQUEST = struct.Struct("=Qqqqd")  # bytes of the file; the budget's pixels, steps, uncounted bytes and seconds
REPLY = struct.Struct("=I")  # bytes of the JSON object
WAIT_S = 20.0  # for an answer, by the clock: processor time ends a decoder long before, unless it does not get any
ROOT = Path(__file__).resolve().parents[2]  # of the package `handler`
ENVIRONMENT = {  # no threads, which would only take memory; and large memory that is freed goes back to the system
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "33554432",
}


class DecoderProcess:
    """The process, as those see it that want a file decoded. It is started for the first file, and again where it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._shared: BinaryIO | None = None
        self._owner = 0  # the process that started it: a fork of that must not share its socket

    @property
    def pid(self) -> int | None:
        """Its process id, None where there is none."""
        return self._process.pid if self._process is not None and self._owner == os.getpid() else None

    def start(self) -> None:
        """Start it, unless it runs. It is ready a fifth of a second later; a file that comes before waits for that.

        Raises:
            Overloaded: the system has no room for a process.
        """
        if self._connection is not None and self._owner == os.getpid():
            return
        ours, theirs = socket.socketpair()
        shared = _share_memory()
        handles = (theirs.fileno(), shared.fileno())
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "handler.images.decoder_process", *map(str, handles)],
                cwd="/",
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what decoders say of a file may show its data
                pass_fds=handles,
                start_new_session=True,  # Ctrl-C is for the server, which answers what is in flight before it ends
            )
        except OSError as error:
            ours.close()
            shared.close()
            raise Overloaded("expected room for another process, got none: retry later") from error
        finally:
            theirs.close()
        ours.settimeout(WAIT_S)
        self._connection, self._shared, self._owner = ours, shared, os.getpid()

    def close(self) -> None:
        """End it."""
        if self._connection is not None:
            self._connection.close()
        if self._shared is not None:
            self._shared.close()
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._process = self._connection = self._shared = None

    def decode(self, content: bytes, budget: DecodingBudget) -> DecodedFile:
        """Decode a file as `decode_file` does, within the budget's seconds and MAX_DECODER_BYTES.

        Raises:
            UnreadableImage, ImageTooLarge, Overloaded: as of `decode_file`.
            ImageTooLarge: it took more processor time than the budget has, or more memory.
            Overloaded: the process could not work at all.
        """
        with self._lock:
            self.start()
            try:
                return self._ask(content, budget)
            except (OSError, EOFError) as error:
                refusal = self._end_of(content, budget)
                with contextlib.suppress(Overloaded):
                    self.start()
                raise refusal from error

    def _ask(self, content: bytes, budget: DecodingBudget) -> DecodedFile:
        connection, shared = self._connection, self._shared
        assert connection is not None
        assert shared is not None
        _write(shared.fileno(), content)
        amounts = (budget.pixels_left, budget.steps_left, budget.uncounted_bytes_left, budget.seconds_left)
        connection.sendall(REQUEST.pack(len(content), *amounts))
        (said_size,) = REPLY.unpack(_receive(connection, REPLY.size))
        said: dict[str, Any] = json.loads(_receive(connection, said_size))
        budget.pixels_left, budget.steps_left, budget.uncounted_bytes_left = said["left"]
        budget.seconds_left -= said["seconds"]
        if "error" in said:
            error: type[ServiceError] = getattr(errors, said["error"])
            raise error(said["message"])
        levels = np.empty(said["shape"], said["dtype"])
        _read(shared.fileno(), levels.data.cast("B"))
        os.ftruncate(shared.fileno(), 0)  # the memory is free again
        return DecodedFile(levels, said["format"], said["reduction"])

    def _end_of(self, content: bytes, budget: DecodingBudget) -> ServiceError:
        """Say why the process no longer answers, and see to its end."""
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)  # of its own, as it seems: the socket is closed
        status = process.returncode
        self.close()
        if status == -signal.SIGPROF:
            budget.seconds_left = 0
            try:
                budget.require_seconds()
            except ImageTooLarge as error:
                return error
        if status is not None and status in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL):
            return UnreadableImage(f"expected a whole image file, got {len(content):,} bytes that no decoder can read")
        return Overloaded(OVERLOADED)


def _share_memory() -> BinaryIO:
    """Make memory that another process can share: a file without a name."""
    create = getattr(os, "memfd_create", None)  # of Linux
    return os.fdopen(create("decoder"), "r+b", buffering=0) if create else tempfile.TemporaryFile(buffering=0)


def _write(handle: int, content: bytes | memoryview) -> None:
    """Put content at the start of shared memory."""
    at = 0
    while at < len(content):
        at += os.pwrite(handle, memoryview(content)[at:], at)


def _read(handle: int, view: memoryview) -> None:
    """Fill a view from the start of shared memory.

    Raises:
        EOFError: there is less.
    """
    at = 0
    while at < len(view):
        count = os.preadv(handle, [view[at:]], at)
        if not count:
            raise EOFError
        at += count


def _receive(connection: socket.socket, size: int) -> bytearray:
    """Receive exactly so many bytes.

    Raises:
        EOFError: the other side has closed.
    """
    content = bytearray(size)
    view = memoryview(content)
    at = 0
    while at < size:
        count = connection.recv_into(view[at:])
        if not count:
            raise EOFError
        at += count
    return content


DECODER_PROCESS = DecoderProcess()  # one for each process that decodes
atexit.register(DECODER_PROCESS.close)


# --- inside the process


def serve(connection: socket.socket, shared: int) -> None:
    """Decode one file after the other, until the other side closes.

    Args:
        connection: to that side.
        shared: the handle of the shared memory.
    """
    while True:
        try:
            size, pixels, steps, uncounted, seconds = REQUEST.unpack(_receive(connection, REQUEST.size))
        except EOFError:
            return
        content = bytearray(size)
        _read(shared, memoryview(content))
        budget = DecodingBudget()
        budget.pixels_left, budget.steps_left, budget.uncounted_bytes_left = pixels, steps, uncounted
        stopwatch = Stopwatch()
        signal.setitimer(signal.ITIMER_PROF, max(seconds, 0.001))  # processor time; its signal ends the process
        said, levels = _decode(bytes(content), budget)
        if levels.nbytes:
            _write(shared, levels.data.cast("B"))
        signal.setitimer(signal.ITIMER_PROF, 0)
        said["left"] = (budget.pixels_left, budget.steps_left, budget.uncounted_bytes_left)
        said["seconds"] = stopwatch.seconds()
        text = json.dumps(said).encode()
        connection.sendall(REPLY.pack(len(text)) + text)


def _decode(content: bytes, budget: DecodingBudget) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    try:
        decoded = decode_file(content, budget)
    except Overloaded as error:  # here it is this process's own limit, and the file's doing
        message = f"{error.message.partition(', got')[0]} of at most {MAX_DECODER_BYTES:,} bytes, got one that needs more"
        return {"error": ImageTooLarge.__name__, "message": message}, np.empty(0)
    except ClientError as error:
        return {"error": type(error).__name__, "message": error.message}, np.empty(0)
    levels = np.ascontiguousarray(decoded.levels)
    return {
        "dtype": levels.dtype.str,
        "shape": levels.shape,
        "format": decoded.image_format,
        "reduction": decoded.reduction,
    }, levels


def main() -> int:
    """Serve the socket and the shared memory that the command line names, within bounds. Returns the exit code."""
    with contextlib.suppress(ValueError, OSError):  # a limit that is lower already stays
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + MAX_DECODER_BYTES, used + MAX_DECODER_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a client's image
    with contextlib.suppress(ConnectionError), socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, int(sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
