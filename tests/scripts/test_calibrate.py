"""Calibrating for real on a few drawn digits, and what the committed calibration says."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model import drawn_digits, drawn_non_digits
from model.calibration import compute_energy
from model.draw_samples import draw_digit
from model.framing import Framing
from model.photograph import SCENES
from scripts.paths import WEIGHTS_FILE
from scripts.research.calibrate import (
    CALIBRATION_FILE,
    CARD_FILE,
    SECTION,
    SLOW_SCENES,
    Scored,
    compute_logits,
    main,
    photograph_digits,
    prepare_pixels,
    render_section,
)
from tests.conftest import write_mnist


class Constant(nn.Module):
    """Answers 3 to every image, with a probability of 0.9 and an energy of 0."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        probabilities = torch.full((len(pixels), 10), 0.1 / 9)
        probabilities[:, 3] = 0.9
        return probabilities.log()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn digits as MNIST's four files; two training images are held out."""
    root: Path = tmp_path_factory.mktemp("data")
    for name, first in (("train", 0), ("t10k", 100)):
        images = np.stack([draw_digit(digit, first + variant) for variant in range(6) for digit in range(10)])
        write_mnist(root, name, images, np.tile(np.arange(10, dtype=np.uint8), 6))
    return root


def test_calibration_is_written_and_said_in_the_card(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card, output = tmp_path / "card.md", tmp_path / "calibration.json"
    card.write_text("# A card\n\n## Limits\n\nsome\n")
    arguments = ["--data-dir", str(data_dir), "--output", str(output), "--card", str(card), "--photographs", "1", "--drawn", "1"]
    assert main([*arguments, "--seed", "5"]) == 0
    calibration = json.loads(output.read_text())
    assert calibration["temperature"] > 0
    assert set(calibration["framing"]) == {field.name for field in fields(Framing)}
    assert calibration["weights_sha256"] == hashlib.sha256(WEIGHTS_FILE.read_bytes()).hexdigest()
    assert calibration["fit"]["images"] == 2
    assert set(calibration["non_digits"]) == {"all", *drawn_non_digits.KINDS}
    scenes = [f"photographs: {scene}" for scene in SCENES if scene not in SLOW_SCENES]
    habits = [f"drawn digits: {habit}" for habit in drawn_digits.HABITS]
    assert list(calibration["digits"]) == ["MNIST's test images", "photographs", *scenes, "drawn digits", *habits]
    assert calibration["digits"]["MNIST's test images"]["images"] == 60
    assert calibration["digits"]["photographs"]["images"] == len(scenes)
    assert card.read_text() == f"# A card\n\n## Limits\n\nsome\n\n{render_section(calibration)}"
    assert f"temperature {calibration['temperature']}" in capsys.readouterr().out

    first = output.read_text()
    main([*arguments, "--seed", "5"])
    assert output.read_text() == first
    assert card.read_text().count(SECTION) == 1


def test_measures_of_known_logits() -> None:
    """Half of the images show a 3: sure at 0.9 and right at 0.5, whatever is sent; with a high temperature sure at about 0.1."""
    scored = Scored.of(Constant(), np.zeros((8, 28, 28), dtype=np.float32), np.array([3, 3, 3, 3, 1, 2, 4, 5]))
    measured = scored.measure(temperature=1e6, energy_threshold=-0.1)
    assert measured["images"] == 8
    assert measured["accuracy"] == 0.5
    assert measured["false_alarms"] == 0
    assert measured["calibration_error_before"] == pytest.approx(0.4, abs=1e-4)
    assert measured["calibration_error"] == pytest.approx(0.4, abs=1e-3)
    assert scored.measure(temperature=1, energy_threshold=0.1)["false_alarms"] == 1
    np.testing.assert_allclose(compute_energy(scored.logits), 0, atol=1e-6)


def test_logits_do_not_depend_on_the_batch(network: nn.Module) -> None:
    pixels = np.random.default_rng(0).random((600, 28, 28), dtype=np.float32)
    logits = compute_logits(network, pixels)
    assert logits.shape == (600, 10)
    np.testing.assert_allclose(logits[[599]], compute_logits(network, pixels[[599]]), rtol=1e-4, atol=1e-4)


def test_photographs_are_of_the_digits_that_are_named(network: nn.Module) -> None:
    digits = np.stack([draw_digit(digit, 0) for digit in range(10)])
    photographs = photograph_digits(digits, 2, seed=1)
    assert set(photographs) == set(SCENES) - SLOW_SCENES
    right = [compute_logits(network, pixels).argmax(axis=1) == chosen for pixels, chosen in photographs.values()]
    assert np.mean(right) > 0.9
    assert all(len(set(chosen)) == 2 for _, chosen in photographs.values())


def test_an_image_without_ink_is_an_empty_one() -> None:
    assert not prepare_pixels(np.full((50, 60), 0.7, dtype=np.float32)).any()


def test_committed_calibration_is_of_the_committed_weights_and_good_enough() -> None:
    calibration = json.loads(CALIBRATION_FILE.read_text())
    assert calibration["weights_sha256"] == hashlib.sha256(WEIGHTS_FILE.read_bytes()).hexdigest()
    assert calibration["digits"]["MNIST's test images"]["images"] == 10_000
    assert calibration["digits"]["MNIST's test images"]["accuracy"] >= 0.993
    assert calibration["digits"]["MNIST's test images"]["false_alarms"] <= 0.03
    assert calibration["digits"]["drawn digits"]["false_alarms"] <= 0.03
    assert calibration["non_digits"]["all"] >= 0.85
    for name in ("MNIST's test images", "photographs"):
        measured = calibration["digits"][name]
        assert measured["calibration_error"] <= max(0.01, measured["calibration_error_before"])
    assert CARD_FILE.read_text().endswith(render_section(calibration))
