"""What has the framing of the training set goes to the network bit for bit; everything else is prepared, and read rightly."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import nn

from handler.errors import BlankImage
from handler.images.digits import prepare_digit
from handler.images.framing import MNIST_FRAMING, Framing, has_framing, have_framing
from handler.runtime.calibration import read_calibration
from model.data import load_mnist
from scripts.paths import DATA_DIR, ROOT, SAMPLE_FILES
from tests.conftest import label_of

Grey = NDArray[Any]
MNIST = Path(os.environ.get("DATA_DIR", DATA_DIR))  # as `make accuracy` takes it


def ink_of(grey: Grey) -> Grey:
    """The box of a digit's ink."""
    ys, xs = np.nonzero(grey > 0.1)
    return grey[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def resized(ink: Grey, height: int) -> Grey:
    width = min(28, max(1, round(ink.shape[1] * height / ink.shape[0])))
    return np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR))


def at(ink: Grey, y: int, x: int, size: int = 28) -> Grey:
    """Put ink on an empty canvas, with its upper left corner as near to (x, y) as it fits."""
    canvas = np.zeros((size, size), np.float32)
    y, x = min(y, size - ink.shape[0]), min(x, size - ink.shape[1])
    canvas[y : y + ink.shape[0], x : x + ink.shape[1]] = ink
    return canvas


def enlarged(grey: Grey) -> Grey:
    return np.kron(grey, np.ones((4, 4), np.float32))


def thin(grey: Grey) -> Grey:
    """The middle line of the strokes."""
    depth = ndimage.distance_transform_edt(grey > 0.4)
    return np.asarray(depth >= np.maximum(1, ndimage.maximum_filter(depth, 3)), dtype=np.float32)


KINDS: dict[str, Callable[[Grey], Grey]] = {
    "as MNIST": lambda grey: grey,
    "dark on bright": lambda grey: 1 - grey,
    "upper left corner": lambda grey: at(ink_of(grey), 1, 1),
    "lower right corner": lambda grey: at(ink_of(grey), 27 - ink_of(grey).shape[0], 27 - ink_of(grey).shape[1]),
    "upper right corner, dark on bright": lambda grey: 1 - at(ink_of(grey), 1, 27 - ink_of(grey).shape[1]),
    "shifted by 4": lambda grey: np.roll(grey, (4, 4), (0, 1)),
    "12 pixels high": lambda grey: at(resized(ink_of(grey), 12), 8, 8),
    "8 pixels high": lambda grey: at(resized(ink_of(grey), 8), 10, 10),
    "27 pixels high": lambda grey: at(resized(ink_of(grey), 27), 0, 4),
    "enlarged": lambda grey: enlarged(at(ink_of(grey), 1, 1)),
    "one pixel thin": thin,
    "integers 0 and 1": lambda grey: np.round(grey) / 255,
    "integers 0 to 16": lambda grey: np.round(grey * 16) / 255,
    "integers 0 and 1, dark on bright": lambda grey: (1 - np.round(grey)) / 255,
    "divided by 255 twice": lambda grey: grey / 255,
    "mask of 0 and 1, enlarged": lambda grey: enlarged(np.round(grey)) / 255,
}
MOST_WRONG, MOST_WRONG_UNWARNED = 2, 1  # of 50, of each kind


@pytest.mark.parametrize("kind", KINDS)
def test_digits_of_every_kind_are_read_rightly(network: nn.Module, kind: str) -> None:
    """Strokes of one pixel leave little to read: one digit more may be wrong where the reply warns of it."""
    calibration = read_calibration(ROOT / "model")
    wrong = unwarned = 0
    for file in SAMPLE_FILES:
        grey = np.asarray(Image.open(file), dtype=np.float32) / np.float32(255)
        pixels = prepare_digit(np.ascontiguousarray(KINDS[kind](grey), dtype=np.float32), 28, 28).pixels
        logits = network(torch.from_numpy(np.ascontiguousarray(pixels))[None, None]).detach().numpy()
        if logits.argmax() != label_of(file):
            wrong += 1
            unwarned += not calibration.warnings(logits)[0]
    assert wrong <= MOST_WRONG
    assert unwarned <= MOST_WRONG_UNWARNED


def test_what_has_the_framing_is_not_touched(digit_pixels: Grey) -> None:
    for grey in digit_pixels:
        image = prepare_digit(grey, 28, 28)
        assert image.steps == ()
        assert image.pixels is grey


def test_what_lacks_the_framing_says_what_was_done(digit_pixels: Grey) -> None:
    assert prepare_digit(np.roll(digit_pixels[0], 4, axis=1), 28, 28).steps[0].startswith("found ink brighter than its paper")
    assert prepare_digit((digit_pixels[0] / 255).astype(np.float32), 28, 28).steps == (
        "stretched its levels, 0.0000 to 0.0039, to the whole scale",
    )
    assert prepare_digit((1 - digit_pixels[0]).astype(np.float32), 28, 28).steps == ("inverted",)


@pytest.mark.parametrize("kind", ["integers 0 and 1, dark on bright", "mask of 0 and 1, enlarged", "integers 0 to 16"])
def test_way_back_goes_through_the_stretch_too(digit_pixels: Grey, kind: str) -> None:
    grey = np.ascontiguousarray(KINDS[kind](digit_pixels[12]), dtype=np.float32)
    image = prepare_digit(grey, 28, 28)
    np.testing.assert_allclose(image.apply(grey), image.pixels, rtol=0, atol=2e-3)
    gradient, change = np.random.default_rng(0).standard_normal((2, *grey.shape)).astype(np.float32)[:, :28, :28], grey
    there = (image.apply(change * 2) - image.apply(change)).astype(np.float64)
    np.testing.assert_allclose((there * gradient[0]).sum(), (image.pull_back(gradient[0]) * change).sum(), rtol=1e-3)


def test_noise_in_the_dark_is_no_ink() -> None:
    noise = np.random.default_rng(0).integers(0, 4, (200, 200)).astype(np.float32) / np.float32(255)
    with pytest.raises(BlankImage):
        prepare_digit(noise, 28, 28)


@pytest.mark.parametrize("level", [0, 0.003, 0.5, 1])
def test_one_level_is_no_ink(level: float) -> None:
    with pytest.raises(BlankImage, match="one single grey level"):
        prepare_digit(np.full((28, 28), level, np.float32), 28, 28)


def test_one_image_and_a_batch_are_judged_alike(digit_pixels: Grey) -> None:
    images = np.concatenate([digit_pixels, np.roll(digit_pixels, 3, axis=2), digit_pixels * np.float32(0.5), 1 - digit_pixels])
    assert have_framing(images).tolist() == [has_framing(image) for image in images]
    assert have_framing(digit_pixels).all()
    assert not have_framing(images[50:]).any()


def test_framing_is_read_from_settings() -> None:
    assert Framing.from_settings({}) == Framing.from_settings(None) == MNIST_FRAMING
    assert Framing.from_settings({"shortest_ink": 10}).shortest_ink == 10
    wrong: tuple[object, ...] = (
        *({"size": 3}, {"height": "28"}, {"farthest_centre": 0}, {"longest_ink": True}, {"shortest_ink": 25}),
        *({"ink_level": float("nan")}, {"centre_x": float("inf")}, {14.5: 14.5}, [17, 21], 28),
    )
    for settings in wrong:
        with pytest.raises(ValueError, match=r"expected .* of a framing"):
            Framing.from_settings(settings)


@pytest.mark.parametrize("name", ["model-config.yaml", "model-config-gpu.yaml"])
def test_archives_say_the_framing_of_mnist_in_full(name: str) -> None:
    settings = yaml.safe_load((ROOT / "serve_config" / name).read_text())["handler"]["framing"]
    assert settings == dataclasses.asdict(MNIST_FRAMING)


@pytest.mark.skipif(not (MNIST / "MNIST" / "raw").is_dir(), reason="MNIST is not at hand: set DATA_DIR")
@pytest.mark.parametrize("train", [True, False], ids=["training images", "test images"])
def test_every_image_of_mnist_has_the_framing(train: bool) -> None:
    images, _ = load_mnist(MNIST, train=train)
    assert have_framing(images.numpy().reshape(-1, 28, 28)).all()
