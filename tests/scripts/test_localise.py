"""Digits found from their maps, without a server."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import nn

from handler.gradients.explain import predict_and_explain
from handler.images.decode import decode_image
from handler.images.digits import prepare_digit
from model.photograph import ink_of, photograph
from scripts.paths import ROOT, SAMPLE_FILES
from scripts.research.localise import (
    LocaliseError,
    Location,
    arrange,
    draw_location,
    lay_on_image,
    localise,
    main,
    overlap,
    overlap_at_random,
)

Numbers = NDArray[np.float32]


def disc(height: int, width: int, radius: int, centre: tuple[int, int]) -> NDArray[np.bool_]:
    ys, xs = np.ogrid[:height, :width]
    return np.asarray((ys - centre[0]) ** 2 + (xs - centre[1]) ** 2 <= radius**2)


def map_of(network: nn.Module, grey: Numbers) -> Numbers:
    """The map, as the server gives it, on the image."""
    prepared = prepare_digit(grey, 28, 28)
    _, (explanation,) = predict_and_explain(network, torch.from_numpy(prepared.pixels)[None, None], [(None,)])
    assert explanation is not None
    return lay_on_image(explanation.maps[0, 0].astype(np.float32), prepared.window, *grey.shape)


@pytest.mark.parametrize(("height", "width"), [(300, 200), (60, 90)], ids=["shrunk", "enlarged"])
@pytest.mark.parametrize("paper", [0.9, 0.1], ids=["on paper", "on a board"])
def test_disc_is_found_from_salient_pixels_around_it(height: int, width: int, paper: float) -> None:
    """The map is largest in a part of the disc, and spills over its edge; signs do not matter."""
    radius, centre = height // 6, (height // 2, width // 3)
    shape = disc(height, width, radius, centre)
    random = np.random.default_rng(0)
    grey = (np.where(shape, 1 - paper, paper) + random.normal(0, 0.02, shape.shape)).astype(np.float32)
    saliency = ndimage.gaussian_filter(disc(height, width, radius // 2, centre).astype(np.float32), radius / 3)
    location = localise(grey, (saliency * random.choice([-1, 1], shape.shape)).astype(np.float32))
    assert (location.ink & shape).sum() / (location.ink | shape).sum() > 0.9
    top, left = centre[0] - radius, centre[1] - radius
    assert overlap(location.box, (left, top, left + 2 * radius + 1, top + 2 * radius + 1)) > 0.9


def test_only_the_piece_with_most_ink_is_taken() -> None:
    large, small = disc(200, 200, 40, (80, 80)), disc(200, 200, 10, (170, 170))
    grey = np.where(large | small, 0.1, 0.9).astype(np.float32)
    location = localise(grey, np.where(large, 1.0, 0.1).astype(np.float32))
    assert not (location.ink & small).any()
    assert (location.ink & large).sum() > 0.95 * large.sum()


@pytest.mark.parametrize(
    "kind", ["scan", "canvas", "fine pen", "marker", "grey paper", "ruled paper", "blackboard", "faint pencil"]
)
def test_photographed_digit_is_found_by_its_map(network: nn.Module, kind: str) -> None:
    with Image.open(SAMPLE_FILES[28]) as image:
        grey = decode_image(photograph(ink_of(np.asarray(image)), kind, [0])).grey
    ink_box = prepare_digit(grey, 28, 28).ink_box
    assert ink_box is not None
    assert overlap(localise(grey, map_of(network, grey)).box, ink_box) > 0.8


def test_known_ink_is_found_by_its_map(network: nn.Module) -> None:
    """Not the server's box, but the very pixels that were drawn."""
    with Image.open(SAMPLE_FILES[17]) as image:
        ink = ink_of(np.asarray(image))
    cover = np.zeros((320, 400))
    cover[70 : 70 + ink.shape[0], 150 : 150 + ink.shape[1]] = ink
    noise = np.random.default_rng(0).normal(0, 0.01, cover.shape)
    grey = (0.85 - 0.7 * cover + noise).astype(np.float32)
    found = localise(grey, map_of(network, grey)).ink
    assert (found & (cover > 0.5)).sum() / (found | (cover > 0.5)).sum() > 0.85


def test_random_pixels_find_less_than_the_map() -> None:
    """Grey discs on paper with a dark edge: the edge is what random pixels mostly find."""
    random = np.random.default_rng(0)
    overlaps = []
    for row in range(40, 120, 10):
        shape = disc(200, 300, 25, (row, 80))
        grey = np.where(shape, np.float32(0.4), np.float32(0.6)) + random.normal(0, 0.02, shape.shape).astype(np.float32)
        grey[:, 210:] -= np.float32(0.35)
        saliency, box = shape.astype(np.float32), (55, row - 25, 106, row + 26)
        overlaps.append((overlap(localise(grey, saliency).box, box), overlap_at_random(grey, saliency, box)))
    by_map, at_random = np.mean(overlaps, axis=0)
    assert by_map > 0.9
    assert at_random < 0.6


def test_flat_map_is_refused() -> None:
    with pytest.raises(LocaliseError, match="the map is flat"):
        localise(np.full((40, 40), 0.5, np.float32), np.zeros((40, 40), np.float32))
    assert overlap_at_random(np.full((40, 40), 0.5, np.float32), np.zeros((40, 40), np.float32), (0, 0, 9, 9)) == 0


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ((0, 0, 4, 4), (0, 0, 4, 4), 1),
        ((0, 0, 4, 4), (2, 0, 6, 4), 8 / 24),
        ((0, 0, 4, 4), (1, 1, 3, 3), 4 / 16),
        ((0, 0, 4, 4), (4, 0, 8, 4), 0),
        ((0, 0, 4, 4), (9, 9, 10, 10), 0),
    ],
)
def test_overlap_is_intersection_over_union(box: tuple[int, ...], other: tuple[int, ...], expected: float) -> None:
    assert overlap(box, other) == overlap(other, box) == pytest.approx(expected)


def test_box_is_drawn_around_the_ink() -> None:
    grey = np.full((50, 100), 1.0, np.float32)
    grey[10:20, 30:60] = 0
    location = Location(grey < 0.5, (30, 10, 60, 20))
    panel = np.asarray(draw_location(grey, 1 - grey, 3, location, 200))[:, 210:]  # beside the overlay and its gap
    ys, xs = np.nonzero((panel == (0, 150, 60)).all(axis=2))
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == (60, 20, 119, 39)


def test_drawings_are_set_in_rows() -> None:
    drawings = [Image.new("RGB", (200, 100), colour) for colour in ("red", "lime", "blue")]
    sheet = arrange(drawings, columns=2)
    assert sheet.size == (10 + 2 * 210, 10 + 2 * 110)
    assert [sheet.getpixel(place) for place in ((10, 10), (220, 10), (10, 120), (220, 120))] == [
        *((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)),
    ]


def test_missing_server_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(SAMPLE_FILES[0]), "--url", "http://127.0.0.1:9"]) == 2
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_missing_opencv_is_said() -> None:
    """In a process of its own, in which importing cv2 fails as it does where there is none."""
    code = "import sys; sys.modules['cv2'] = None; from scripts.research.localise import main; sys.exit(main(['image.png']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "OpenCV is missing; install it with: pip install opencv-python-headless" in done.stderr


def test_opencv_is_imported_only_when_it_is_needed() -> None:
    code = "import sys, scripts.research.localise; sys.exit('cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
