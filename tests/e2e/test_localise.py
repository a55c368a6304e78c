"""Localisation of a digit in a photograph by the saliency map of a real server."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.photograph import ink_of, photograph
from scripts.paths import SAMPLE_FILES
from scripts.research.localise import main
from scripts.serving.launcher import TorchServe


def test_digits_are_found_in_photographs_by_a_servers_maps(
    server: TorchServe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for number, kind in ((28, "ruled paper"), (17, "canvas")):
        with Image.open(SAMPLE_FILES[number]) as image:
            content = photograph(ink_of(np.asarray(image)), kind, [0])
        files.append(tmp_path / kind)
        files[-1].write_bytes(content)
    output = tmp_path / "localised.png"
    canonical = SAMPLE_FILES[3]  # its ink is where it should be: the server reports no box, and there is nothing to compare with
    assert main([*map(str, files), str(canonical), "--url", server.address, "--output", str(output), "--columns", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    found = [re.search(r"digit (\d), box \(.*\), overlap (\S+), from random pixels \S+$", line) for line in lines[:2]]
    assert [match and match[1] for match in found] == ["5", "3"]
    assert all(match and float(match[2]) > 0.8 for match in found)
    assert "overlap" not in lines[2]
    assert lines[3].startswith("2 of 2 found, mean overlap 0.")
    with Image.open(output) as image:
        assert image.width > 4 * 224
