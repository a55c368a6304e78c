"""Training for real, on a small data set of the project's own drawings in MNIST's format."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from model.augment import augment
from model.data import load_mnist
from model.draw_samples import draw_digit
from model.network import DigitNetwork
from model.train import CARD_FILE, ERASED_WEIGHT, WEIGHTS_FILE, Evaluation, _compute_loss, _TrainingNetwork, evaluate, main
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
    arguments = ["--data-dir", str(data_dir), "--output-dir", str(tmp_path), "--epochs", "80", "--seed", "3"]
    assert main(arguments) == 0
    weights = (tmp_path / WEIGHTS_FILE).read_bytes()
    card = (tmp_path / CARD_FILE).read_text()
    assert hashlib.sha256(weights).hexdigest() in card
    assert "--epochs 80 --seed 3" in card

    network = DigitNetwork()
    network.load_state_dict(safetensors.torch.load(weights))
    images = torch.from_numpy(np.stack([draw_digit(digit, 200) for digit in range(10)]))[:, None]
    assert evaluate(network, images, torch.arange(10)).accuracy >= 0.9
    printed = capsys.readouterr().out
    assert printed.count(": test accuracy ") == 80
    final = re.findall(r"test accuracy (\S+)%", printed)[-1]
    assert f"**{final}%** of 40" in card


def test_same_seed_gives_the_same_weights(data_dir: Path, tmp_path: Path) -> None:
    for name, seed in (("one", "1"), ("two", "1"), ("other", "2")):
        main(["--data-dir", str(data_dir), "--output-dir", str(tmp_path / name), "--epochs", "1", "--seed", seed])
    one, two, other = ((tmp_path / name / WEIGHTS_FILE).read_bytes() for name in ("one", "two", "other"))
    assert one == two
    assert one != other


def test_held_out_images_are_not_seen(data_dir: Path, tmp_path: Path) -> None:
    """Other images in the places of the last 8 of 240 give the same weights; in the place of the one before them, others."""
    images, labels = (tensor.numpy() for tensor in load_mnist(data_dir, train=True))
    test_images, test_labels = (tensor.numpy() for tensor in load_mnist(data_dir, train=False))
    weights = []
    for name, first in (("as it is", len(images)), ("held out", len(images) - 8), ("seen", len(images) - 9)):
        changed = images[:, 0].copy()
        changed[first:] = 255 - changed[first:]
        for part, some, truth in (("train", changed, labels), ("t10k", test_images[:, 0], test_labels)):
            write_mnist(tmp_path / name, part, some, truth.astype(np.uint8))
        main(["--data-dir", str(tmp_path / name), "--output-dir", str(tmp_path / name), "--epochs", "1"])
        weights.append((tmp_path / name / WEIGHTS_FILE).read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_loss_of_a_network_that_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits 0: one of eleven for digits and non-digits, one of ten for what is kept; what is gone is seen at 1/10."""
    network = DigitNetwork()
    for parameter in network.parameters():
        parameter.data.zero_()
    erased, is_gone, kept = torch.zeros(15, 1, 28, 28), torch.arange(15) < 6, torch.zeros(25, 1, 28, 28)
    monkeypatch.setattr("model.train.compute_guidance", lambda *_: (erased, is_gone, kept))
    loss = _compute_loss(network, torch.rand(140, 1, 28, 28), torch.arange(100) % 10, torch.Generator()).item()
    expected = 140 * np.log(11) + 25 * np.log(10) - ERASED_WEIGHT * 6 * np.log(0.9)
    assert loss == pytest.approx(expected / 100, rel=1e-5)


def test_network_is_trained_as_it_is_served(digit_batch: torch.Tensor, network: torch.nn.Module) -> None:
    """But for dropout, and with pooling before ReLU: the same scores and gradients."""
    trained = _TrainingNetwork().eval()
    trained.load_state_dict(network.state_dict())
    inputs, served_inputs = digit_batch.clone().requires_grad_(), digit_batch.clone().requires_grad_()
    logits, served = trained(inputs), network(served_inputs)
    torch.testing.assert_close(logits, served)
    gradients, served_gradients = (
        torch.autograd.grad(scores.max(dim=1).values.sum(), pixels)[0]
        for scores, pixels in ((logits, inputs), (served, served_inputs))
    )
    torch.testing.assert_close(gradients, served_gradients)


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
