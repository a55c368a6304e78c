"""The measurement of growing cost with a real server: the first points of each question, briefly."""

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts.bench import scale


@pytest.mark.long
def test_scale_measures_and_draws_every_question(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "1", "--seconds", "0.3", "--workers", "1", "--archive", str(archive)]
    files = ["--output", str(tmp_path / "scale.json"), "--image", str(tmp_path / "scaling.png")]
    extent = scale.Extent(sides_px=(28, 1000), image_counts=(1, 64), connections=(1, 16))
    assert scale.main([*options, *files], extent) == 0, capsys.readouterr().err
    points = json.loads((tmp_path / "scale.json").read_text())["points"]
    measured = {(point["question"], point["series"], point["x"]) for point in points}
    assert measured == {
        ("workers", "", 1),
        *(("sides", name, side) for name in scale.FORMATS for side in extent.sides_px),
        *(("images", name, count) for name in scale.PROTOCOLS for count in extent.image_counts),
        *(("connections", "", count) for count in extent.connections),
    }
    assert all(point["load"]["p50_ms"] > 0 and point["load"]["error_counts"] == {} for point in points)
    with Image.open(tmp_path / "scaling.png") as image:
        image.load()
