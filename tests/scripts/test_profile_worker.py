"""What the look at a worker's start says, of a process that takes its steps."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.profile_worker import BATCH_SIZES, IMPORTS, Row, render_table
from scripts.paths import ROOT


def test_every_step_is_looked_at_in_a_fresh_process(archive: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench.profile_worker", "--archive", str(archive)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert header == ["a worker's step", "seconds", "MiB resident after it"]
    assert len(rows) == 1 + len(IMPORTS) + 1 + len(BATCH_SIZES)
    resident = {title: float(mib) for title, _, mib in rows}
    seconds = {title: float(taken) for title, taken, _ in rows}
    python, torch = resident["Python itself"], resident[IMPORTS["torch"]]
    assert python < 100, "something heavy was imported before its turn"
    assert torch > python + 100
    assert seconds[IMPORTS["torch"]] == pytest.approx(max(seconds.values()))


def test_table_has_a_line_for_each_step() -> None:
    assert render_table([Row("torch", 2.345, 508.4)]).splitlines()[-1] == "| torch | 2.35 | 508 |"
