"""The sweep of settings with real servers: one changed setting, briefly."""

import json
from pathlib import Path

import pytest

from scripts.bench import sweep


@pytest.mark.long
def test_sweep_measures_a_setting_beside_the_committed_one(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "BUSY_CONNECTIONS", (16,))
    change = sweep.Change("metrics_mode", "log", "prometheus")
    # Without the one that changes nothing, which costs two more starts.
    monkeypatch.setattr(sweep, "list_changes", lambda _names, _device: [change])
    output = tmp_path / "sweep.json"
    options = ["--rounds", "1", "--seconds", "0.5", "--settings", "metrics_mode"]
    assert sweep.main([*options, "--archive", str(archive), "--output", str(output)]) == 0
    [row] = capsys.readouterr().out.splitlines()[2:]
    assert row.startswith("| metrics_mode | log | prometheus | ")
    content = json.loads(output.read_text())
    [pair] = content["pairs"]
    assert [load["connections"] for load in pair["changed"]] == [1, 16]
    assert all(load["rate"] > 0 and load["error_counts"] == {} for side in ("changed", "committed") for load in pair[side])
    assert pair["rate_ratio"] == pytest.approx(pair["changed"][1]["rate"] / pair["committed"][1]["rate"])
    assert content["machine"]["Java"].startswith(("openjdk", "java"))
