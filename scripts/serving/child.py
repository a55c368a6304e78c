"""A child process of the launcher: a program with a name, a log and an end.

The launcher starts its children in order, watches them and ends them in reverse order. Each runs under a guard (`guard.py`),
which ends it and all that it started when the launcher ends, in whatever way. Knows nothing of TorchServe.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import psutil

from scripts.serving import guard

TAIL_LINES = 40
TAIL_BYTES = 65_536
STOP_TIMEOUT_S = 15  # for a child's own end; what is left then is killed


class Child:
    """A running child process.

    Attributes:
        log: the file that all its output is appended to, and that rotates.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        folder: Path,
        environment: Mapping[str, str],
        umask: int = -1,
        remove: Sequence[Path] = (),
    ) -> None:
        """Start a program.

        Args:
            command: the program and its arguments.
            log: a file; its folder exists.
            folder: that the program is started in.
            environment: the program's.
            umask: the program's; -1 for this process's own.
            remove: files and folders that are removed when the program has ended, where this process is gone before it.
        """
        self.log = log
        self._log_start = log.stat().st_size if log.is_file() else 0
        self._alive: int | None
        reading, self._alive = os.pipe()  # only this process holds the writing end, so it closes when this process ends
        try:
            arguments = {"command": [*command], "alive": reading, "log": str(log), "remove": [str(path) for path in remove]}
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, json.dumps(arguments)],
                cwd=folder,
                env=environment,
                umask=umask,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[reading],
                start_new_session=True,  # a Ctrl-C in the terminal reaches the launcher alone, and all of the child is one group
            )
        except BaseException:
            os.close(self._alive)
            raise
        finally:
            os.close(reading)

    def exit_code(self) -> int | None:
        """The exit code of the program, 128 and the number of the signal that ended it; None while it runs."""
        return self._guard.poll()

    def pid(self) -> int | None:
        """The program's process id; None where it has ended, or has not begun."""
        with contextlib.suppress(psutil.Error):
            return next((child.pid for child in psutil.Process(self._guard.pid).children()), None)
        return None

    def listens_on(self, port: int) -> bool:
        """Tell whether the program itself listens on a TCP port: what answers there is then no other program."""
        pid = self.pid()
        with contextlib.suppress(psutil.Error):
            connections = [] if pid is None else psutil.Process(pid).net_connections("tcp")
            return any(found.status == psutil.CONN_LISTEN and found.laddr.port == port for found in connections)
        return False

    def note(self, text: str) -> None:
        """Write a line of the launcher's own into the program's log."""
        with contextlib.suppress(OSError), self.log.open("a", errors="backslashreplace") as opened:
            opened.write(f"{datetime.now().isoformat(' ', 'milliseconds')} [launcher] {text}\n")

    def processes(self) -> list[psutil.Process]:
        """List what was started and still runs: the guard, the program, and what the program started. They are one group."""
        return [process for process in psutil.process_iter() if _belongs_to(process, self._guard.pid)]

    def log_tail(self) -> str:
        """Read the last lines that this start of the program printed."""
        with contextlib.suppress(OSError), self.log.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            start = self._log_start if size >= self._log_start else 0  # it has rotated since
            opened.seek(max(start, size - TAIL_BYTES))
            return "\n".join(opened.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
        return ""

    def stop(self) -> None:
        """Ask the program to end, wait until all is ended, kill what does not end."""
        self._guard.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self.processes() and time.monotonic() < deadline:
            self._guard.poll()
            time.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """End the program and all that it started, at once."""
        if self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.wait()
        psutil.wait_procs(self.processes(), timeout=STOP_TIMEOUT_S)
        if self._alive is not None:
            os.close(self._alive)
            self._alive = None


def _belongs_to(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.Error):
        return False
