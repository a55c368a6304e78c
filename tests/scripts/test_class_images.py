"""Images that maximise a class's score, against the closed form and the committed network."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from handler.gradients.explain import freeze
from scripts.paths import SAMPLE_FILES, WEIGHTS_FILE
from scripts.research.class_images import draw_class_images, main, make_class_images
from tests.conftest import label_of, write_mnist

WEIGHTS = WEIGHTS_FILE


def test_image_of_a_linear_class_is_its_weights_over_twice_lambda() -> None:
    """The gradient of w.I - lambda |I|^2 vanishes at I = w / (2 lambda); the bias and the start do not matter."""
    linear = nn.Linear(12, 3)
    network = freeze(nn.Sequential(nn.Flatten(), linear))
    made = make_class_images(network, 3, torch.full((1, 3, 4), 0.7), regularisation=0.25, steps=400)
    torch.testing.assert_close(made, linear.weight.detach().reshape(3, 1, 3, 4) / 0.5)


def test_no_small_change_of_an_image_raises_what_is_maximised(network: nn.Module) -> None:
    """Score less regularisation, before and after small changes at random and towards nothing."""
    random = torch.Generator().manual_seed(0)
    start = torch.full((1, 28, 28), 0.13)
    made = make_class_images(network, 10, start, regularisation=0.8, steps=1000)

    def objective(images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = network(start + images).diagonal()
        return scores - 0.8 * images.flatten(1).square().sum(dim=1)

    best = objective(made)
    assert (best > objective(torch.zeros_like(made))).all()
    for size in (0.02, 0.1):
        for _ in range(10):
            changed = made + size * torch.randn(made.shape, generator=random)
            assert (objective(changed) < best).all()
        assert (objective((1 - size) * made) < best + 0.02 * best.abs()).all()


def test_drawing_has_a_labelled_panel_for_each_class() -> None:
    """Two rows of five panels of 168 pixels; the second class has ink alone, the last one less than none."""
    made = torch.zeros(10, 1, 28, 28)
    made[1], made[9] = 2.0, -2.0
    with Image.open(BytesIO(draw_class_images(made))) as image:
        pixels = np.asarray(image)
    full = {"red": (103, 0, 31), "blue": (5, 48, 97)}
    places = {name: np.argwhere((pixels == colour).all(axis=2)) for name, colour in full.items()}
    assert len(places["red"]) == len(places["blue"]) == 168 * 168
    assert (places["red"].max(axis=0) < np.array(pixels.shape[:2]) / 2).all()
    assert (places["blue"].min(axis=0) > np.array(pixels.shape[:2]) / 2).all()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory, digit_pixels: NDArray[np.float32]) -> Path:
    """The test digits as MNIST's four files."""
    root: Path = tmp_path_factory.mktemp("data")
    images = np.rint(digit_pixels * 255).astype(np.uint8)
    labels = np.array([label_of(file) for file in SAMPLE_FILES], dtype=np.uint8)
    for name in ("train", "t10k"):
        write_mnist(root, name, images, labels)
    return root


@pytest.mark.parametrize(
    ("settings", "code"), [([], 0), (["--regularisation", "1000"], 1)], ids=["worked", "too faint to beat a digit"]
)
def test_exit_code_says_whether_the_images_beat_real_digits(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], code: int
) -> None:
    output = tmp_path / "made" / "classes.png"
    arguments = ["--data-dir", str(data_dir), "--weights", str(WEIGHTS), "--steps", "200", "--output", str(output)]
    assert main([*arguments, *settings]) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    cells = [[float(cell) for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[0] for row in cells] == list(range(10))
    assert all(row[0] == row[1] and row[2] > row[3] for row in cells) == (code == 0)
    assert output.is_file()


def test_missing_weights_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", str(tmp_path / "none.safetensors"), "--data-dir", str(tmp_path)]) == 2
    assert "error: the weights none.safetensors" in capsys.readouterr().err


def test_regularisation_has_to_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--regularisation", "0"])
    assert "expected a number above 0, without which there is no maximum; got 0" in capsys.readouterr().err
