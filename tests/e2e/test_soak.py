"""A short soak of a real TorchServe: a minute at a rate that a slow machine can serve, in which every attack is sent."""

import json
from pathlib import Path

import pytest

from scripts.bench import soak
from scripts.bench.soak_report import KIND_COLUMNS
from scripts.bench.soak_traffic import ATTACKS, KINDS
from scripts.serving.launcher import read_model_config

# Slopes and latencies say nothing in so short a time; what is left over and what was answered does.
JUDGED = {
    "no wrong answer",
    "no 5xx",
    "no request without an answer",
    f"each of {len(ATTACKS)} attacks ends as it has to",
    "the same processes at the end",
    "no descriptor left open",
    "no temp file left over",
}


@pytest.mark.long
def test_short_soak_leaves_nothing_and_answers_all_rightly(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "soak"
    options = ["--archive", str(archive), "--minutes", "1", "--rate", "20", "--warm-up", "10", "--output", str(output)]
    code = soak.main(options)
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    report = json.loads(output.with_suffix(".json").read_text())
    assert {gate["demand"] for gate in report["gates"] if gate["passed"]} == JUDGED
    sent = {kind["name"] for kind in [*report["kinds"], *report["attacks"]] if kind["right"]}
    assert sent == {kind.name for kind in KINDS}
    names = [process["name"] for process in report["processes"]]
    assert names == [*(f"worker {number}" for number in range(1, 1 + read_model_config("auto")["minWorkers"])), "JVM"]
    assert all(100 < process["rss_mib"] < 4000 and process["slope"] for process in report["processes"])
    assert " of 1 min: " in printed.err
    assert "<svg" in output.with_suffix(".html").read_text()

    assert soak.main(["--report", str(output.with_suffix(".npz"))]) == 0
    assert capsys.readouterr().out == printed.out
    assert KIND_COLUMNS[0] in printed.out
    assert all(name in printed.out for name in ATTACKS)


def test_server_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--url", "http://127.0.0.1:9", "--management-url", "http://127.0.0.1:9", "--output", str(tmp_path / "soak")]
    assert soak.main(options) == 1
    assert "the server's processes cannot be found by http://127.0.0.1:9" in capsys.readouterr().err


def test_samples_of_something_else_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--report", str(tmp_path / "none.npz")]) == 1
    assert "holds no samples" in capsys.readouterr().err
