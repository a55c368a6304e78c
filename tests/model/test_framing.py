"""Framing against images whose box and centre of mass are known."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model.data import load_mnist
from model.framing import CENTRE, INK_SIDE, Framing, frame_ink
from tests.conftest import write_mnist

Image = NDArray[np.uint8]
DATA_DIR = Path(os.environ.get("DATA_DIR", "build/data"))  # where MNIST is, if it is


def box(top: int, left: int, height: int, width: int, level: int = 255) -> Image:
    """One bright box in an image."""
    image = np.zeros((28, 28), dtype=np.uint8)
    image[top : top + height, left : left + width] = level
    return image


def test_boxes_are_measured() -> None:
    """A box of 20 rows from row 4 has its centre at 14, half a pixel from 14.5; one of 18 columns from column 6 at 15."""
    framing = Framing.of(np.stack([box(4, 10, 20, 8), box(5, 6, 3, 18, level=200)]))
    assert (framing.shortest_side, framing.longest_side) == (18, 20)
    assert framing.centre_distance == pytest.approx(14.5 - 6.5)  # rows 5 to 7 of the second
    assert framing.lowest_maximum == pytest.approx(200 / 255)
    assert (framing.highest_margin_median, framing.highest_margin) == (0, 0)


def test_faint_pixels_are_no_ink() -> None:
    image = box(4, 4, 20, 20)
    image[26, 4:24] = 25  # 0.098 of the maximum
    assert Framing.of(image[None]).longest_side == 20
    image[26, 4:24] = 26
    assert Framing.of(image[None]).longest_side == 23


def test_images_framed_otherwise_do_not_hold() -> None:
    """One change for each number that is looked at."""
    images = np.stack([box(4, 10, 20, 9), box(10, 5, 9, 19)])
    framing = Framing.of(images)
    assert framing.holds(images).all()
    margin = box(4, 10, 20, 9)
    margin[0] = margin[-1] = 20  # half of the margin
    margin[:, 0] = 1
    bright_corner = box(4, 10, 20, 9)
    bright_corner[0, 0] = 25
    changed = [
        box(4, 10, 18, 9),
        box(3, 10, 22, 9),
        box(4, 14, 20, 9),
        box(4, 10, 20, 9, level=250),
        margin,
        bright_corner,
        np.zeros((28, 28), dtype=np.uint8),
    ]
    assert framing.holds(np.stack(changed)).tolist() == [False] * len(changed)


@pytest.mark.parametrize("shape", [(100, 60), (40, 90), (12, 12)], ids=["tall", "wide", "enlarged"])
def test_ink_is_fitted_and_centred(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    ink = random.uniform(0.2, 1, shape) * np.linspace(0.5, 1, shape[1])
    image = frame_ink(ink)
    assert image.shape == (28, 28)
    assert image.max() == 255
    framing = Framing.of(image[None])
    assert framing.centre_distance < 0.05
    assert INK_SIDE <= framing.longest_side <= INK_SIDE + 1  # it seldom begins where a pixel does
    places = np.arange(28) + 0.5
    for axis in (0, 1):
        assert (image.sum(axis=1 - axis) @ places) / image.sum() == pytest.approx(CENTRE, abs=0.05)


def test_lopsided_ink_stays_inside() -> None:
    """All the mass at one end would push the other end out of the image."""
    ink = np.full((200, 20), 0.2)
    ink[:10] = 1
    ink[:10, :] *= 8
    image = frame_ink(ink / ink.max())
    rows = np.flatnonzero(image.any(axis=1))
    assert len(rows) >= INK_SIDE
    assert rows.max() == 27


def test_framing_of_a_data_set_holds_for_it(tmp_path: Path, digit_pixels: NDArray[np.float32]) -> None:
    digits = np.rint(digit_pixels * 255).astype(np.uint8)
    for name in ("train", "t10k"):
        write_mnist(tmp_path, name, digits, np.zeros(len(digits), dtype=np.uint8))
    images, _ = load_mnist(tmp_path, train=True)
    framing = Framing.of(images[:, 0].numpy())
    assert framing.holds(digits).all()
    assert (framing.shortest_side, framing.longest_side) == (20, 20)


@pytest.fixture(scope="session")
def load_real_mnist() -> Callable[[bool], NDArray[np.uint8]]:
    """MNIST itself, where it is at hand; it is never downloaded for a test."""
    if not (DATA_DIR / "MNIST" / "raw").is_dir():
        pytest.skip(f"needs MNIST in {DATA_DIR}; the environment variable DATA_DIR names another folder")
    return lambda train: load_mnist(DATA_DIR, train=train)[0][:, 0].numpy()


def test_all_of_mnist_has_the_framing_of_its_training_set(load_real_mnist: Callable[[bool], NDArray[np.uint8]]) -> None:
    images = load_real_mnist(True)
    framing = Framing.of(images)
    assert framing.holds(images).all()
    assert framing.holds(load_real_mnist(False)).all()
    assert (framing.shortest_side, framing.longest_side) == (18, 20)
    assert framing.centre_distance < 0.53
    assert framing.lowest_maximum > 0.99
    assert framing.highest_margin_median == 0
