"""Training for real, on a small data set of the project's own drawings in MNIST's format."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from model.augment import augment
from model.draw_samples import draw_digit
from model.network import DigitNetwork
from model.train import CARD_FILE, WEIGHTS_FILE, Evaluation, evaluate, main
from scripts.paths import ROOT
from tests.conftest import write_mnist

VARIANTS = 24


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn digits as MNIST's four files."""
    root: Path = tmp_path_factory.mktemp("data")
    for name, variants in (("train", range(VARIANTS)), ("t10k", range(100, 104))):
        images = np.stack([draw_digit(digit, variant) for variant in variants for digit in range(10)])
        write_mnist(root, name, images, np.tile(np.arange(10, dtype=np.uint8), len(variants)))
    return root


def test_training_learns_and_writes_weights_and_card(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data-dir", str(data_dir), "--output-dir", str(tmp_path), "--epochs", "40", "--seed", "3"]
    assert main(arguments) == 0
    weights = (tmp_path / WEIGHTS_FILE).read_bytes()
    card = (tmp_path / CARD_FILE).read_text()
    assert hashlib.sha256(weights).hexdigest() in card
    assert "--epochs 40 --seed 3" in card

    network = DigitNetwork()
    network.load_state_dict(safetensors.torch.load(weights))
    images = torch.from_numpy(np.stack([draw_digit(digit, 200) for digit in range(10)]))[:, None]
    assert evaluate(network, images, torch.arange(10)).accuracy >= 0.9
    printed = capsys.readouterr().out
    assert printed.count(": test accuracy ") == 40
    final = re.findall(r"test accuracy (\S+)%", printed)[-1]
    assert f"**{final}%** of 40" in card


def test_same_seed_gives_the_same_weights(data_dir: Path, tmp_path: Path) -> None:
    for name, seed in (("one", "1"), ("two", "1"), ("other", "2")):
        main(["--data-dir", str(data_dir), "--output-dir", str(tmp_path / name), "--epochs", "1", "--seed", seed])
    one, two, other = ((tmp_path / name / WEIGHTS_FILE).read_bytes() for name in ("one", "two", "other"))
    assert one == two
    assert one != other


def test_committed_card_is_of_the_committed_weights() -> None:
    card = (ROOT / "model" / CARD_FILE).read_text()
    assert hashlib.sha256((ROOT / "model" / WEIGHTS_FILE).read_bytes()).hexdigest() in card
    accuracy = re.search(r"\*\*([\d.]+)%\*\* of 10,000", card)
    assert accuracy is not None
    assert float(accuracy[1]) >= 99.3
    matrix = [[int(n) for n in row] for row in re.findall(r"(?m)^\| \*\*\d\*\* \|" + r" (\d+) \|" * 10, card)]
    assert sum(sum(row) for row in matrix) == 10_000
    assert sum(matrix[k][k] for k in range(10)) == round(float(accuracy[1]) * 100)


def test_network_has_the_fixed_shape() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in DigitNetwork().state_dict().items()}
    assert shapes == {
        **{"mean": (), "std": (), "conv1.weight": (16, 1, 3, 3), "conv1.bias": (16,)},
        **{"conv2.weight": (32, 16, 3, 3), "conv2.bias": (32,), "lin.weight": (10, 2048), "lin.bias": (10,)},
    }


def test_evaluation_counts_by_class() -> None:
    evaluation = Evaluation(torch.tensor([[3, 1], [0, 4]]))
    assert evaluation.accuracy == pytest.approx(7 / 8)
    assert evaluation.accuracy_by_class == pytest.approx([0.75, 1.0])


def test_distortions_keep_range_and_shape_and_differ_by_row(digit_batch: torch.Tensor) -> None:
    rows = digit_batch[:1].repeat(64, 1, 1, 1)
    distorted = augment(rows, torch.Generator().manual_seed(0))
    assert distorted.shape == rows.shape
    assert distorted.isfinite().all()
    assert ((distorted > -1) & (distorted < 2)).all()
    assert len({row.numpy().tobytes() for row in distorted}) == 64
    ink = distorted.flatten(1).sum(1) / rows[0].sum()
    assert 0.5 < ink.median() < 2  # thinner and thicker strokes around the drawn one
    assert ink.std() > 0.1
