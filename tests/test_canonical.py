"""Scaling to the network's size."""

import numpy as np
import pytest
from PIL import Image

from handler.canonical import canonicalise, resampling_matrix
from tests.conftest import DIGIT_FILES


def test_canonical_picture_passes_through_bit_for_bit() -> None:
    grey = np.random.default_rng(0).random((28, 28), dtype=np.float32)
    canonical = canonicalise(grey, 28, 28)
    assert canonical.pixels is grey
    assert canonical.steps == ()


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (28, 1), (1, 5000), (7, 300), (600, 600)], ids=str)
def test_constant_picture_stays_constant_at_every_size(size: tuple[int, int], level: float) -> None:
    canonical = canonicalise(np.full(size, level, dtype=np.float32), 28, 28)
    assert canonical.pixels.dtype == np.float32
    np.testing.assert_allclose(canonical.pixels, np.full((28, 28), level), atol=1e-6)
    assert canonical.steps == (f"scaled from {size[0]}x{size[1]} to 28x28",)


@pytest.mark.parametrize(("source", "target"), [(56, 28), (300, 28), (16, 28), (29, 28), (1, 28)])
def test_resampling_equals_pillows_bilinear_filter(source: int, target: int) -> None:
    line = np.random.default_rng(1).random((1, source), dtype=np.float32)
    expected = np.asarray(Image.fromarray(line).resize((target, 1), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(line @ resampling_matrix(source, target).T, expected, atol=1e-5)


def test_picture_scaled_up_comes_back() -> None:
    with Image.open(DIGIT_FILES[20]) as image:
        small = np.asarray(image, dtype=np.float32) / 255
        large = np.asarray(image.resize((280, 280), Image.Resampling.BOX), dtype=np.float32) / np.float32(255)
    assert np.abs(canonicalise(large, 28, 28).pixels - small).mean() < 0.03
