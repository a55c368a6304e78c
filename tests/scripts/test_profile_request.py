"""The profile of a request and of a worker's start, of processes that take the steps; and the stopwatch by itself."""

import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from scripts.bench import profile_request
from scripts.bench.profile_request import (
    IMPORTS,
    RECEIVED_BY_FIELDS,
    START_BATCH_SIZES,
    STEPS,
    WHOLE,
    ProfileError,
    StartStep,
    Stopwatch,
    find_places,
    render_start,
    render_steps,
    replaced,
)
from scripts.paths import ROOT


def table_of(*arguments: str) -> list[list[str]]:
    """What a run of the script prints: the cells of each line."""
    command = [sys.executable, "-m", "scripts.bench.profile_request", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]


def test_every_step_of_the_archives_own_code_is_timed(archive: Path) -> None:
    """That the steps add up to the whole is tested below, by a clock that no busy machine disturbs."""
    header, _, *rows = table_of("--archive", str(archive), "--batch-sizes", "1", "8", "--seconds", "1.5")
    assert header == ["microseconds a request", "batch 1", "batch 8"]
    assert [row[0] for row in rows] == [*STEPS, WHOLE, RECEIVED_BY_FIELDS]
    taken_us = {name: [float(cell) for cell in cells] for name, *cells in rows}
    assert all(alone > 0 and in_batch > 0 for alone, in_batch in taken_us.values())


def test_every_step_of_a_start_is_measured_in_a_fresh_process(archive: Path) -> None:
    header, _, *rows = table_of("--archive", str(archive), "--start")
    assert header == ["a worker's step", "seconds", "MiB resident after it"]
    assert len(rows) == 1 + len(IMPORTS) + 1 + len(START_BATCH_SIZES)
    resident = {title: float(mib) for title, _, mib in rows}
    seconds = {title: float(taken) for title, taken, _ in rows}
    python, torch = resident["Python itself"], resident[IMPORTS["torch"]]
    assert python < 100, "something heavy was imported before its turn"
    assert torch > python + 100
    assert all(taken >= 0 for taken in seconds.values())


def test_stopwatch_gives_each_step_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0

    def work(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    stopwatch = Stopwatch()
    inner = stopwatch.wrap("inner", work)

    def call_twice() -> str:
        work(4)
        inner(1)
        inner(2)
        return "done"

    assert stopwatch.wrap("outer", call_twice)() == "done"
    inner(seconds=8)
    assert stopwatch.read() == {"inner": 11, "outer": 4}
    assert stopwatch.read() == {}


def test_stopwatch_counts_a_call_that_fails() -> None:
    def fail() -> None:
        raise ValueError("no")

    stopwatch = Stopwatch()
    with pytest.raises(ValueError, match="no"):
        stopwatch.wrap("step", fail)()
    assert stopwatch.read().keys() == {"step"}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A module with a function and a class, and one that has imported the function under another name."""
    defining: Any = ModuleType("defining")
    importing: Any = ModuleType("importing")

    class Thing:
        def act(self) -> str:
            return "acted"

    def read() -> str:
        return "read"

    defining.read, defining.Thing, importing.alias = read, Thing, read
    monkeypatch.setitem(sys.modules, "defining", defining)
    monkeypatch.setitem(sys.modules, "importing", importing)
    return defining, importing


def worker_of() -> Any:
    return SimpleNamespace(service=SimpleNamespace(_entry_point=lambda: "answered"))


def test_functions_are_timed_wherever_they_are_looked_up(modules: tuple[Any, Any]) -> None:
    defining, importing = modules
    stopwatch, worker = Stopwatch(), worker_of()
    places = find_places(worker, stopwatch, {"read": ["defining:read"], "act": ["defining:Thing.act"]})
    with replaced(places):
        assert (defining.read(), importing.alias(), defining.Thing().act()) == ("read", "read", "acted")
        assert worker.service._entry_point() == "answered"
    assert stopwatch.read().keys() == {"read", "act", profile_request.ENTRY}
    assert (defining.read(), importing.alias(), defining.Thing().act()) == ("read", "read", "acted")
    assert worker.service._entry_point() == "answered"
    assert stopwatch.read() == {}


@pytest.mark.parametrize("name", ["no_such_module:read", "defining:write", "defining:Thing.rest"])
def test_function_that_is_not_there_is_named(modules: tuple[Any, Any], name: str) -> None:
    with pytest.raises(ProfileError, match=f"expected STEPS to name a function, got {name}"):
        find_places(worker_of(), Stopwatch(), {"step": [name]})


def test_missing_archive_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_request.main(["--archive", str(tmp_path / "none.mar")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_tables_have_a_line_for_each_step() -> None:
    assert render_start([StartStep("torch", 2.345, 508.4)]).splitlines()[-1] == "| torch | 2.35 | 508 |"
    assert render_steps({1: {"read": 30.4}, 8: {"read": 160.0}}).splitlines()[-1] == "| read | 30 | 20 |"
