import json
from pathlib import Path

import pytest

from scripts.bench.benchmark_bulk import BULK, LARGER_LOOP, LOOP, main


def test_bulk_is_measured_beside_the_plain_loop(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--archive", str(archive), "--images", "60", "--shard-size", "20", "--processes", "1", "--rounds", "3"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["images"] == 60
    assert {name: len(own["all"]) for name, own in report["images_per_s"].items()} == {LOOP: 3, LARGER_LOOP: 3, BULK: 3}
    medians = {name: own["median"] for name, own in report["images_per_s"].items()}
    assert report["of_the_loop"][BULK] == pytest.approx(medians[BULK] / medians[LOOP], rel=0.01)
    assert "round 3: bulk" in printed.err
