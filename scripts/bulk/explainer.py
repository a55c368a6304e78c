"""Image files -> their answers, by a process that may die: the image that killed it gets the error, all others get answers.

Knows nothing of where images come from or where answers go.
"""

import base64
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from scripts.bulk.errors import BulkError, ImageProblem, Stopped
from scripts.bulk.explainer_process import join_batch, receive_message, send_message

PROGRAM = Path(__file__).with_name("explainer_process.py")
START_TIMEOUT_S = 180  # importing torch from a cold disk, and starting CUDA, take most of them
STARTS = 5  # tried in a row, as memory may be short for a while
LOG_LINES_SHOWN = 8
DEATHS = 2  # by one image alone, until it counts as what killed the process; one may have another cause
START_PAUSE_S = 0.5  # before the next start
SEND_TIMEOUT_S = 60
SENT_AHEAD = 1  # batches that lie at the process while it answers another, so that it never waits

Item = bytes | ImageProblem  # an image file, or why there is none


class _NotLoaded(Exception):
    """The process ended before it had loaded the archive."""


class _ProcessEnded(Exception):
    """The process gave no answer."""


@dataclass(frozen=True, slots=True)
class Description:
    """What an archive and the options give.

    Attributes:
        model: name, version and weights_sha256.
        schema: of the answers.
        batch_size: the archive's own, images.
        timeout_s: the archive's own, for one batch.
    """

    model: Mapping[str, str]
    schema: pa.Schema
    batch_size: int
    timeout_s: float


class Explainer:
    """Holds the process, and starts it anew where it dies."""

    def __init__(self, model_dir: Path, headers: Mapping[str, str], log_file: Path, gpu: int | None = None) -> None:
        """Start the process.

        Args:
            model_dir: the unpacked archive.
            headers: of a request, with its options.
            log_file: what the process logs is appended to it.
            gpu: index of the GPU to use; None for the CPU.
        Raises:
            BulkError: the archive cannot be loaded, or does not take the options.
        """
        self._arguments = (model_dir, headers, gpu)
        self._log_file = log_file
        self._is_stopped = False
        self._batch_size = 1
        self.description = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._channel.close()

    def stop(self) -> None:
        """End the process from another thread; whoever waits for its answer gets a Stopped."""
        self._is_stopped = True
        self._process.kill()

    def explain(self, groups: Iterable[Sequence[Item]], batch_size: int) -> Iterator[list[pa.RecordBatch]]:
        """Answer groups of images in their order.

        Args:
            groups: of images that are sent together.
            batch_size: images that are answered at once.
        Returns:
            for each group record batches that have one row for each of its items together, in order.
        Raises:
            BulkError: the process does not start any more.
            Stopped: by `stop`.
        """
        waiting: deque[Sequence[Item]] = deque()
        self._batch_size = batch_size
        for group in groups:
            waiting.append(group)
            self._send(group)
            if len(waiting) > SENT_AHEAD:
                yield self._receive_next(waiting)
        while waiting:
            yield self._receive_next(waiting)

    # --- one batch

    def _receive_next(self, waiting: deque[Sequence[Item]]) -> list[pa.RecordBatch]:
        group = waiting.popleft()
        if not _contents_of(group):
            return self._merge(group, iter(()))
        try:
            return self._merge(group, iter([self._receive(len(group))]))
        except _ProcessEnded:
            self._restart()
        alone = [self._explain_alone(content) for content in _contents_of(group)]
        for other in waiting:
            self._send(other)
        return self._merge(group, iter(alone))

    def _explain_alone(self, content: bytes) -> pa.RecordBatch:
        """Answer one image of a batch in which the process died. The second death is taken for the image's fault."""
        for _ in range(DEATHS):
            self._send([content])
            try:
                return self._receive(1)
            except _ProcessEnded as error:
                self._restart()
                (problem,) = error.args
        return self.error_rows([problem])

    def _merge(self, group: Sequence[Item], answers: Iterator[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """Put answers to a group's images, and the problems of the others, into the group's order."""
        merged: list[pa.RecordBatch] = []
        own: pa.RecordBatch | None = None
        for is_content, count in _runs(group):
            if not is_content:
                start = sum(one.num_rows for one in merged)
                merged.append(self.error_rows([item for item in group[start : start + count] if isinstance(item, ImageProblem)]))
            while is_content and count:
                if own is None or not len(own):
                    own = next(answers)
                part = own.slice(0, count)
                own, count = own.slice(len(part)), count - len(part)
                merged.append(part)
        return merged

    def error_rows(self, problems: Sequence[ImageProblem]) -> pa.RecordBatch:
        """Make rows that hold nothing but an error."""
        errors = [{"code": one.code, "type": one.type, "message": one.message} for one in problems]
        columns = [
            pa.array(errors, field.type) if field.name == "error" else pa.nulls(len(errors), field.type)
            for field in self.description.schema
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self.description.schema)

    # --- the process

    def _send(self, group: Sequence[Item]) -> None:
        """Send the images of a group, if any. A process that does not take them is found dead when its answer is read."""
        contents = _contents_of(group)
        if contents:
            try:
                send_message(self._channel, join_batch(contents, self._batch_size))
            except OSError:  # it is gone; or it takes nothing, and must not be waited for
                self._process.kill()

    def _receive(self, image_count: int) -> pa.RecordBatch:
        limit = self.description.timeout_s * -(-image_count // self._batch_size)
        try:
            if not wait([self._channel], limit):
                self._process.kill()
                raise _ProcessEnded(
                    ImageProblem("ProcessTimeout", f"expected an answer within {limit:.0f} s, got none: the process was ended")
                )
            content = receive_message(self._channel)
        except (EOFError, OSError) as error:
            raise _ProcessEnded(
                ImageProblem("ProcessDied", f"expected an answer, got a process that ended {_how_it_ended(self._process.wait())}")
            ) from error
        return pa.ipc.read_record_batch(content, self.description.schema)

    def _restart(self) -> None:
        """Start the process anew.

        Raises:
            BulkError: it does not start, more than once.
        """
        self.close()
        self._start()

    def _start(self) -> Description:
        """Start the process, more than once where it does not load the archive.

        Raises:
            BulkError: it does not load the archive, or the archive does not take the options.
        """
        for left in reversed(range(STARTS)):
            if self._is_stopped:
                raise Stopped
            try:
                return self._start_once()
            except _NotLoaded as error:
                if not left:
                    raise BulkError(str(error)) from error
                time.sleep(START_PAUSE_S)
        raise AssertionError

    def _start_once(self) -> Description:
        model_dir, headers, gpu = self._arguments
        here, there = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        with self._log_file.open("ab") as log, there:
            command = [sys.executable, "-P", str(PROGRAM), str(model_dir), str(there.fileno()), json.dumps(dict(headers))]
            self._process = subprocess.Popen(
                command if gpu is None else [*command, str(gpu)],
                cwd=model_dir,
                env={**environment, "PYTHONPATH": str(model_dir), "PYTHONDONTWRITEBYTECODE": "1"},
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if self._is_stopped:  # by `stop` meanwhile, which has ended the process before this one
            self._process.kill()
        timeout = struct.pack("ll", SEND_TIMEOUT_S, 0)
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)  # a process that hangs takes no more
        self._channel = here
        try:
            return self._read_description()
        except BaseException:
            self.close()
            raise

    def _read_description(self) -> Description:
        """Wait until the process has loaded the archive, and says what it gives."""
        try:
            if not wait([self._channel], START_TIMEOUT_S):
                raise _NotLoaded(f"the archive was not loaded within {START_TIMEOUT_S} s; see {self._log_file}")
            content: dict[str, Any] = json.loads(receive_message(self._channel).to_pybytes())
        except (EOFError, OSError) as error:
            ended = _how_it_ended(self._process.wait())
            raise _NotLoaded(f"the archive cannot be loaded; its process ended {ended}:\n{self._log_tail()}") from error
        if "error" in content:
            raise BulkError(content["error"])
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["schema"])))
        return Description(content["model"], schema, content["batch_size"], content["timeout_s"])

    def _log_tail(self) -> str:
        return "\n".join(self._log_file.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])


def _contents_of(group: Sequence[Item]) -> list[bytes]:
    return [item for item in group if isinstance(item, bytes)]


def _runs(group: Sequence[Item]) -> Iterator[tuple[bool, int]]:
    """Tell how many images follow each other, then how many problems, and so on."""
    start = 0
    for end in range(1, len(group) + 1):
        if end == len(group) or isinstance(group[end], bytes) != isinstance(group[start], bytes):
            yield isinstance(group[start], bytes), end - start
            start = end


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"by {name}" + (" (perhaps out of memory)" if name == "SIGKILL" else "")
    return f"by signal {-code}"
