"""Children of the launcher: real processes, and real ends of each of the three that are involved."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from scripts.paths import ROOT
from scripts.serving.child import Child
from scripts.serving.guard import LOG_COUNT, RotatingLog
from tests.servers import processes_with, wait_for

GONE_S = 10  # from the launcher's end to the end of all that it started

# A program as a JVM is: it has a child, which has one too and ignores signals, and which leaves its process group.
FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, {on_term})
grandchild = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; time.sleep(600)"
subprocess.Popen([sys.executable, "-c", grandchild], start_new_session=True)
print("started", flush=True)
time.sleep(600)
"""
ENDS = FAMILY.format(on_term="lambda *_: sys.exit(0)")
STAYS = FAMILY.format(on_term="signal.SIG_IGN")

LAUNCHER = """
import os, sys, time
from pathlib import Path
from scripts.serving.child import Child
Path(sys.argv[2], "temporary").mkdir()
child = Child([sys.executable, "-c", sys.argv[1]], log=Path(sys.argv[2], "console.log"), folder=Path(sys.argv[2]),
    environment=dict(os.environ), remove=[Path(sys.argv[2], "temporary")])
time.sleep(600)
"""


def start(command: str, folder: Path) -> Child:
    environment = os.environ | {"MARK": str(folder)}
    return Child([sys.executable, "-c", command], log=folder / "console.log", folder=folder, environment=environment)


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE  # its parent may not have asked for it yet


def wait_until_started(folder: Path) -> None:
    wait_for(lambda: (folder / "console.log").is_file() and "started" in (folder / "console.log").read_text(), "first line")


@pytest.mark.parametrize("program", [ENDS, STAYS], ids=["ends when asked", "does not end when asked"])
@pytest.mark.parametrize("victim", ["launcher", "guard", "program"])
def test_killing_one_of_them_ends_all(tmp_path: Path, program: str, victim: str) -> None:
    """By SIGKILL, which nobody can catch. Of a killed guard, only the program itself ends at once."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, program, str(tmp_path)], cwd=ROOT, env=os.environ | {"MARK": str(tmp_path)}
    )
    try:
        wait_until_started(tmp_path)
        guard = next(process for process in psutil.Process(launcher.pid).children() if "guard.py" in " ".join(process.cmdline()))
        (child,) = guard.children()
        (grandchild,) = child.children()
        family = {"launcher": launcher.pid, "guard": guard.pid, "program": child.pid}
        os.kill(family[victim], signal.SIGKILL)
        ending = [child] if victim == "guard" else [guard, child, grandchild]
        wait_for(lambda: all(has_ended(process) for process in ending), "end of all", GONE_S)
        assert (tmp_path / "temporary").exists() == (victim != "launcher")
    finally:
        launcher.kill()
        launcher.wait()
        for left in processes_with(str(tmp_path)):
            left.kill()


@pytest.mark.parametrize("program", [ENDS, STAYS], ids=["ends when asked", "does not end when asked"])
def test_stop_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr("scripts.serving.child.STOP_TIMEOUT_S", 1)
    child = start(program, tmp_path)
    wait_until_started(tmp_path)
    assert len(child.processes()) == 2  # the third has left the group
    child.stop()
    assert child.processes() == []
    if program is ENDS:  # else the guard had to be killed too
        assert processes_with(str(tmp_path)) == []
    for left in processes_with(str(tmp_path)):
        left.kill()


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("import sys; print('last words'); sys.exit(3)", 3),
        ("import os; print('last words', flush=True); os.kill(os.getpid(), 9)", 128 + 9),
    ],
    ids=["exit", "signal"],
)
def test_exit_code_and_last_words_reach_the_launcher(tmp_path: Path, program: str, code: int) -> None:
    child = start(program, tmp_path)
    wait_for(lambda: child.exit_code() is not None, "end")
    assert child.exit_code() == code
    assert child.log_tail() == "last words"
    child.stop()


def test_program_that_cannot_be_run_says_so(tmp_path: Path) -> None:
    child = Child(["/nonexistent"], log=tmp_path / "console.log", folder=tmp_path, environment={})
    wait_for(lambda: child.exit_code() is not None, "end")
    assert child.exit_code() == 127
    assert "cannot run /nonexistent" in child.log_tail()
    child.stop()


def test_log_is_appended_to_and_its_tail_is_this_starts_alone(tmp_path: Path) -> None:
    for number in range(2):
        child = start(f"print('start {number}')", tmp_path)
        wait_for(lambda child=child: child.exit_code() is not None, "end")  # type: ignore[misc]
        assert child.log_tail() == f"start {number}"
        child.stop()
    assert (tmp_path / "console.log").read_text() == "start 0\nstart 1\n"


def test_log_rotates(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "console.log", size=100)
    for number in range(200):
        log.write(b"line %3d\n" % number)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["console.log", *(f"console.log.{number + 1}" for number in range(LOG_COUNT))]
    assert all(file.stat().st_size <= 100 for file in files)
    kept = "".join(file.read_text() for file in [*files[:0:-1], files[0]]).splitlines()
    assert kept == [f"line {number:3}" for number in range(200 - len(kept), 200)]
    again = RotatingLog(tmp_path / "console.log", size=100)
    again.write(b"line 200\n")
    again.close()
    assert (tmp_path / "console.log").read_text().endswith("line 199\nline 200\n")


@pytest.mark.parametrize("path", [Path("/dev/full"), Path("/nonexistent/console.log")], ids=str)
def test_program_goes_on_where_its_output_cannot_be_written(tmp_path: Path, path: Path) -> None:
    done = tmp_path / "done"
    program = f"import pathlib; print('x' * 1_000_000, flush=True); pathlib.Path({str(done)!r}).touch()"
    child = Child([sys.executable, "-c", program], log=path, folder=tmp_path, environment=dict(os.environ))
    wait_for(done.exists, "end of the output")
    child.stop()


def test_output_of_a_busy_program_is_whole(tmp_path: Path) -> None:
    child = start("for number in range(100_000): print(number)", tmp_path)
    wait_for(lambda: child.exit_code() is not None, "end")
    assert (tmp_path / "console.log").read_text() == "".join(f"{number}\n" for number in range(100_000))
    child.stop()


def test_idle_guard_takes_no_processor_time(tmp_path: Path) -> None:
    child = start("import time; print('started', flush=True); time.sleep(600)", tmp_path)
    wait_until_started(tmp_path)
    (guard,) = [process for process in child.processes() if "guard.py" in " ".join(process.cmdline())]
    switches: Callable[[], int] = lambda: guard.num_ctx_switches().voluntary  # noqa: E731
    time.sleep(0.5)
    before = switches()
    time.sleep(1)
    assert switches() - before <= 2
    child.stop()
