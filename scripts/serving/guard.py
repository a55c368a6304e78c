"""Run a command that cannot outlive the process that started it, and write what it prints into a log that rotates.

    python -I -S guard.py '{"command": [...], "alive": 3, "log": "console.log", "remove": [...]}'

`child.py` starts it. It stands between the launcher and one child (TorchServe's JVM, a proxy), so that every end of either is an
end of all: a launcher killed by SIGKILL takes the child with it, and a child that ends takes what it had started with it. A file
of its own, with the standard library alone: it takes little memory, for as long as the child lives.
"""

import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO

PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 4  # from the launcher's sudden end to the child's: the child may end in its own way first
KILL_S = 5  # for the end of what was killed: a process that waits for a disk takes longer
LOG_BYTES = 20_000_000  # of one file, before it becomes console.log.1
LOG_COUNT = 4  # older files that are kept
CHUNK_BYTES = 65_536


class RotatingLog:
    """A file that lines are appended to, and its predecessors. What has no room on the disk is lost; the child goes on."""

    def __init__(self, path: Path, size: int = LOG_BYTES, count: int = LOG_COUNT) -> None:
        self._path, self._size, self._count = path, size, count
        self._file: IO[bytes] | None = None

    def write(self, content: bytes) -> None:
        """Append bytes, first to a new file where this one is full."""
        with contextlib.suppress(OSError):
            if self._file is not None and self._file.tell() + len(content) > self._size:
                self._rotate()
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            self._file.write(content)

    def close(self) -> None:
        """Close the file; the next write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rotate(self) -> None:
        self.close()
        for number in range(self._count - 1, -1, -1):
            older = self._path.with_name(f"{self._path.name}.{number + 1}")
            newer = self._path.with_name(f"{self._path.name}.{number}") if number else self._path
            if newer.exists():
                newer.replace(older)


def run(command: list[str], alive: int, log: Path, remove: list[Path]) -> int:
    """Run a command until it ends or the launcher does. Returns its exit code, negative for a signal's number.

    Args:
        command: the program, found on the PATH, and its arguments.
        alive: the reading end of a pipe whose only writing end is the launcher's: it ends when the launcher does.
        log: the file for all that the command prints.
        remove: files and folders that are removed at the end where the launcher cannot do so, as it is gone.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what loses its parent becomes this process's child, and is found at the end
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    console = RotatingLog(log)
    child: subprocess.Popen[bytes] | None = None
    asked = False

    def ask_to_end(_number: int = 0, _frame: FrameType | None = None) -> None:
        nonlocal asked
        asked = True
        if child is not None:
            child.terminate()

    signal.signal(signal.SIGTERM, ask_to_end)
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,  # this process has one thread
        )
    except OSError as error:
        console.write(f"cannot run {command[0]}: {error}\n".encode(errors="backslashreplace"))
        return 127
    if asked:  # while it was being started
        child.terminate()
    output = child.stdout
    assert output is not None
    os.set_blocking(output.fileno(), False)
    with selectors.DefaultSelector() as selector:
        for descriptor in (alive, woken, output.fileno()):
            selector.register(descriptor, selectors.EVENT_READ)
        deadline = None  # until the launcher is gone
        while child.poll() is None and (deadline is None or time.monotonic() < deadline):
            for key, _ in selector.select(None if deadline is None else 0.1):
                content = _read(key.fd)
                if key.fd == output.fileno() and content:
                    console.write(content)
                if key.fd == woken or content is None or content:
                    continue
                selector.unregister(key.fd)
                if key.fd == alive:
                    deadline = time.monotonic() + GRACE_S
                    ask_to_end()
    _kill_all()
    code = child.wait()
    while content := _read(output.fileno()):  # its last words
        console.write(content)
    console.close()
    for path in remove if deadline is not None else []:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return code


def _read(descriptor: int) -> bytes | None:
    """Read what is there: b"" at the end, None where there is nothing yet."""
    try:
        return os.read(descriptor, CHUNK_BYTES)
    except BlockingIOError:
        return None


def _kill_all() -> None:
    """Kill the child and all that it started: what loses its parent becomes this process's child, and has its turn."""
    deadline = time.monotonic() + KILL_S
    while (running := _running_children()) and time.monotonic() < deadline:
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _running_children() -> list[int]:
    found = []
    for entry in os.listdir("/proc"):  # noqa: PTH208  # names are all that is needed
        if entry.isdigit():
            with contextlib.suppress(OSError):
                state, parent = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if int(parent) == os.getpid() and state != "Z":
                    found.append(int(entry))
    return found


def _die_with_parent() -> None:
    """Have the kernel kill this process with the guard, whatever ends the guard."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    ended = run(given["command"], given["alive"], Path(given["log"]), [Path(path) for path in given["remove"]])
    sys.exit(ended if ended >= 0 else 128 - ended)
