"""From any image to what the network knows, and back."""

from io import BytesIO

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage
from torch import nn

from handler.errors import BlankImage, SeveralDigits
from handler.gradients.explain import predict_and_explain
from handler.images.decode import decode_image
from handler.images.digits import prepare_digit
from handler.images.preparation import Array, PreparedImage, leave_unchanged, resample, scale_image
from model.photograph import SCENES, Scene, ink_of, photograph
from scripts.paths import SAMPLE_FILES
from tests.tolerance import require_close


@pytest.fixture(scope="module")
def inks() -> dict[str, NDArray[np.float64]]:
    """The first test digit of each class, as smooth ink."""
    return {file.stem: ink_of(np.asarray(Image.open(file))) for file in SAMPLE_FILES[::5]}


def grey_of(content: bytes) -> Array:
    return decode_image(content).grey


def exactly_applied(preparation: PreparedImage, images: torch.Tensor) -> torch.Tensor:
    """What `PreparedImage.apply` does, written out in float64: (..., H, W) -> (..., 28, 28)."""
    placement = preparation.placement
    assert placement is not None
    rows, columns, offset, inner_rows, inner_columns, weight, target_weight = (
        torch.from_numpy(np.asarray(part, dtype=np.float64))
        for part in (
            *(preparation.rows, preparation.columns, preparation.offset),
            *(placement.rows, placement.columns, placement.weight, placement.target_weight),
        )
    )
    working = preparation.slope * (rows @ images @ columns.T)
    drawn = weight * working.flatten(-2)[..., torch.from_numpy(placement.source)]
    return target_weight * (inner_rows @ drawn @ inner_columns.T) + offset


def read(network: nn.Module, preparation: PreparedImage) -> int:
    logits, _ = predict_and_explain(network, torch.from_numpy(preparation.pixels)[None, None], [()])
    return int(logits.argmax())


# --- canonical images


@pytest.mark.parametrize("file", SAMPLE_FILES, ids=lambda file: file.stem)
def test_canonical_image_passes_through_bit_for_bit(digit_pixels: Array, file: object) -> None:
    grey = digit_pixels[SAMPLE_FILES.index(file)]  # type: ignore[arg-type]
    preparation = prepare_digit(grey, 28, 28)
    assert preparation.steps == ()
    np.testing.assert_array_equal(preparation.pixels, grey)
    np.testing.assert_array_equal(preparation.apply(grey), grey)
    np.testing.assert_array_equal(preparation.pull_back(grey), grey)


def test_mirrored_polarity_gives_the_same_digit(digit_pixels: Array) -> None:
    """A 28x28 image that is canonical but for its dark ink is inverted, and nothing else."""
    for grey in digit_pixels:
        preparation = prepare_digit(1 - grey, 28, 28)
        assert preparation.inverted
        assert preparation.steps == ("inverted",)
        np.testing.assert_allclose(preparation.pixels, grey, atol=1e-6)
        np.testing.assert_allclose(preparation.apply(1 - grey), grey, atol=1e-6)
        np.testing.assert_array_equal(preparation.pull_back(grey), -grey)


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [(28, 28), (1, 1), (28, 1), (1, 3000), (7, 300), (600, 600)], ids=str)
def test_blank_image_is_refused(size: tuple[int, int], level: float) -> None:
    with pytest.raises(BlankImage, match=r"^expected a digit.* got an image (without ink|of one single grey level)") as caught:
        prepare_digit(np.full(size, level, dtype=np.float32), 28, 28)
    assert caught.value.status == 422


@pytest.mark.parametrize("kind", [kind for kind in SCENES if kind not in ("huge", "ruled paper")])
def test_paper_without_a_digit_is_refused(kind: str) -> None:
    """Grain, noise and light are not ink."""
    empty = np.zeros((160, 100))
    if SCENES[kind].specks == (0, 0):
        with pytest.raises(BlankImage):
            prepare_digit(grey_of(photograph(empty, kind, [1])), 28, 28)


# --- digits as people send them


@pytest.mark.parametrize("kind", SCENES)
def test_digits_of_every_kind_are_read(network: nn.Module, inks: dict[str, NDArray[np.float64]], kind: str) -> None:
    """Nine of ten at least; rates over many more are measured by scripts/research/accuracy.py."""
    names = list(inks)[:: 5 if kind == "huge" else 1]
    right = [read(network, prepare_digit(grey_of(photograph(inks[name], kind, [2])), 28, 28)) == int(name[0]) for name in names]
    assert sum(right) >= 0.9 * len(names), [name for name, is_right in zip(names, right, strict=True) if not is_right]


@pytest.mark.parametrize("inverted", [False, True], ids=["bright ink", "dark ink"])
def test_tiny_digits_that_touch_all_borders_are_read(network: nn.Module, inverted: bool) -> None:
    """16x16 pixels, cropped to the ink, as in old collections of scans. None is taken for its negative."""
    right = 0
    for file in SAMPLE_FILES:
        with Image.open(file) as image:
            cropped = image.crop(image.point(lambda level: 255 * (level > 40)).getbbox())
        square = ImageOps.pad(cropped, (16, 16), Image.Resampling.BILINEAR)
        grey: Array = np.asarray(square, dtype=np.float32) / np.float32(255)
        preparation = prepare_digit(np.float32(1) - grey if inverted else grey, 28, 28)
        assert preparation.inverted is inverted, file.stem
        right += read(network, preparation) == int(file.stem[0])
    assert right >= 0.95 * len(SAMPLE_FILES)


def test_digit_is_fitted_and_centred_as_mnists_makers_did(inks: dict[str, NDArray[np.float64]]) -> None:
    for name, ink in inks.items():
        pixels = prepare_digit(grey_of(photograph(ink, "scan", [3])), 28, 28).pixels
        ys, xs = np.nonzero(pixels > 0.3)
        assert max(np.ptp(ys), np.ptp(xs)) + 1 in (19, 20, 21, 22), name
        rows, columns = np.indices(pixels.shape)
        assert abs((rows * pixels).sum() / pixels.sum() - 14) < 0.6, name
        assert abs((columns * pixels).sum() / pixels.sum() - 14) < 0.6, name
        assert pixels.min() == 0
        assert pixels.max() == 1
        assert np.median(pixels[pixels > 0.1]) > 0.6


def test_preparation_says_what_was_done(inks: dict[str, NDArray[np.float64]]) -> None:
    canvas = np.ones((300, 400), dtype=np.float32)
    canvas[60:260, 150:200] = 0.1  # a bar
    preparation = prepare_digit(canvas, 28, 28)
    assert preparation.inverted
    assert preparation.ink_box is not None
    np.testing.assert_allclose(preparation.ink_box, (150, 60, 200, 260), atol=4)
    assert preparation.threshold is not None
    assert 0 < preparation.threshold < 0.9
    assert preparation.steps[0].startswith("found ink darker than its paper")
    assert "inverted" in preparation.steps


def test_specks_and_a_dark_edge_are_left_out(inks: dict[str, NDArray[np.float64]]) -> None:
    clean = grey_of(photograph(inks["3-0"], "scan", [5]))
    dirty = clean.copy()
    height, width = dirty.shape
    dirty[: height // 40 + 1] = 0.2  # the table's edge
    dirty[height - height // 30 - 4 : height - 4, 3 : 3 + width // 30] = 0.1
    difference = np.abs(prepare_digit(dirty, 28, 28).pixels - prepare_digit(clean, 28, 28).pixels)
    assert difference.mean() < 0.02


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_size_and_place_in_the_image_do_not_matter(inks: dict[str, NDArray[np.float64]], turns: int) -> None:
    random = np.random.default_rng(turns)
    small = np.asarray(Image.fromarray(np.rint(255 * inks["5-0"]).astype(np.uint8)).resize((70, 100))) / 255
    pixels = []
    for size in (160, 500, 1500):
        canvas = np.ones((size, size), dtype=np.float32)
        y, x = random.integers(0, size - 100), random.integers(0, size - 70)
        canvas[y : y + 100, x : x + 70] -= 0.9 * small.astype(np.float32)
        pixels.append(prepare_digit(canvas, 28, 28).pixels)
    for other in pixels[1:]:
        assert np.abs(other - pixels[0]).mean() < 0.02


def test_sixteen_bits_and_eight_bits_give_the_same(inks: dict[str, NDArray[np.float64]]) -> None:
    levels = np.rint(255 * (1 - inks["2-0"])).astype(np.uint8)
    greys = []
    for image in (Image.fromarray(levels), Image.fromarray(levels.astype(np.uint16) * 257)):
        content = BytesIO()
        image.save(content, format="PNG")
        greys.append(grey_of(content.getvalue()))
    np.testing.assert_allclose(prepare_digit(greys[0], 28, 28).pixels, prepare_digit(greys[1], 28, 28).pixels, atol=1e-4)


def test_bright_drawing_on_a_transparent_canvas_is_seen() -> None:
    image = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (45, 20, 55, 80))
    content = BytesIO()
    image.save(content, format="PNG")
    preparation = prepare_digit(grey_of(content.getvalue()), 28, 28)
    assert not preparation.inverted
    assert preparation.pixels.max() == 1


# --- scaling alone


def test_scaling_leaves_everything_else() -> None:
    preparation = scale_image(np.full((600, 300), 0.3, dtype=np.float32), 28, 28)
    np.testing.assert_allclose(preparation.pixels, np.full((28, 28), 0.3), atol=1e-6)
    assert preparation.steps == ("scaled from 300x600 to 28x28",)
    assert not preparation.inverted


@pytest.mark.parametrize(("source", "target"), [(56, 28), (300, 28), (16, 28), (29, 28), (1, 28)])
def test_resampling_equals_pillows_bilinear_filter(source: int, target: int) -> None:
    line = np.random.default_rng(1).random((1, source), dtype=np.float32)
    expected = np.asarray(Image.fromarray(line).resize((target, 1), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(line @ resample(source, 0, source, target).T, expected, atol=1e-5)


# --- the way back


IMAGES = {
    "scan": ("scan", (3, 7)),
    "phone": ("phone", (4, 2)),
    "bright ink": ("inverted scan", (9, 1)),
    "thumbnail": ("thumbnail", (5, 0)),
    "fine pen": ("fine pen", (8, 0)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_prepared_image_is_the_affine_map(inks: dict[str, NDArray[np.float64]], name: str) -> None:
    kind, seed = IMAGES[name]
    grey = grey_of(photograph(inks[f"{seed[0]}-0"], kind, seed))
    preparation = prepare_digit(grey, 28, 28)
    np.testing.assert_allclose(preparation.apply(grey), preparation.pixels, atol=2e-5)


@pytest.mark.parametrize("name", IMAGES)
def test_map_in_the_clients_pixels_is_the_finite_difference_through_the_preparation(
    network: nn.Module, inks: dict[str, NDArray[np.float64]], name: str
) -> None:
    """In float64, with all that the whole image decides treated as constant; dithered, because max pools tie on flat paper."""
    kind, seed = IMAGES[name]
    grey = grey_of(photograph(inks[f"{seed[0]}-0"], kind, seed))
    preparation = prepare_digit(grey, 28, 28)
    dither = 0.05 * torch.rand(28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    double = type(network)().double().eval().requires_grad_(False)
    double.load_state_dict(network.state_dict())

    def score(image: torch.Tensor) -> torch.Tensor:
        """The seed digit's logit of images (N, H, W)."""
        logits: torch.Tensor = double((exactly_applied(preparation, image) + dither)[:, None])
        return logits[:, seed[0]]

    image = torch.from_numpy(grey.astype(np.float64))
    pixels = exactly_applied(preparation, image) + dither
    _, (explanation,) = predict_and_explain(double, pixels[None, None], [(seed[0],)])
    assert explanation is not None
    saliency = preparation.pull_back(explanation.maps[0, 0].astype(np.float32))
    assert saliency.shape == grey.shape

    strongest = np.argsort(np.abs(saliency), axis=None)[-20:]
    random = np.random.default_rng(0).choice(grey.size, 20)
    eps = 1e-6
    differences = []
    for index in [*strongest, *random]:
        y, x = np.unravel_index(index, grey.shape)
        step = torch.zeros_like(image)
        step[y, x] = eps
        differences.append(float((score((image + step)[None]) - score((image - step)[None])) / (2 * eps)))
    require_close(saliency.ravel()[[*strongest, *random]], differences, 1e-5)


def test_way_back_is_the_transpose_of_the_way_there(inks: dict[str, NDArray[np.float64]]) -> None:
    """<gradient, An image> = <A^T gradient, image>, for several maps at once."""
    grey = grey_of(photograph(inks["6-0"], "phone", [6]))
    preparation = prepare_digit(grey, 28, 28)
    random = np.random.default_rng(0)
    gradients, step = random.normal(size=(3, 28, 28)).astype(np.float32), random.normal(size=grey.shape).astype(np.float32)
    there = preparation.apply(grey + step) - preparation.apply(grey)
    back = preparation.pull_back(gradients)
    assert back.shape == (3, *grey.shape)
    require_close((gradients * there).sum((1, 2)), (back * step).sum((1, 2)), 1e-4)


def test_way_back_of_a_canonical_image_changes_nothing() -> None:
    gradient = np.random.default_rng(0).normal(size=(28, 28)).astype(np.float32)
    np.testing.assert_array_equal(leave_unchanged(np.zeros((28, 28), np.float32)).pull_back(gradient), gradient)


def test_scene_ranges_are_ranges() -> None:
    for scene in SCENES.values():
        for name in Scene.__dataclass_fields__:
            value = getattr(scene, name)
            if isinstance(value, tuple):
                assert value[0] <= value[1], name


# --- where the network's image lies in the image


@pytest.mark.parametrize("kind", ["scan", "inverted scan", "phone", "blackboard"])
def test_window_is_where_the_network_s_image_lies(inks: dict[str, NDArray[np.float64]], kind: str) -> None:
    """What Pillow cuts out there and scales is what the network got, but for contrast and cleaning."""
    image = Image.open(BytesIO(photograph(inks["7-0"], kind, [3]))).convert("L")
    grey = np.asarray(image, dtype=np.float32) / np.float32(255)
    preparation = prepare_digit(grey, 28, 28)
    cut = np.asarray(image.transform((280, 280), Image.Transform.EXTENT, preparation.window, Image.Resampling.BILINEAR))
    levels = np.asarray(Image.fromarray(cut).resize((28, 28), Image.Resampling.BOX), dtype=np.float32)
    inside = preparation.pixels > 0.1
    assert np.corrcoef(preparation.slope * levels[inside], preparation.pixels[inside])[0, 1] > 0.9
    moved = np.roll(levels, (2, 1), axis=(0, 1))
    assert np.corrcoef(preparation.slope * moved[inside], preparation.pixels[inside])[0, 1] < 0.7


def test_window_of_an_image_that_is_only_scaled_is_the_whole_of_it() -> None:
    assert scale_image(np.zeros((56, 140), np.float32), 28, 28).window == (0, 0, 140, 56)
    assert leave_unchanged(np.zeros((28, 28), np.float32)).window == (0, 0, 28, 28)
    assert scale_image(np.zeros((7, 5), np.float32), 28, 28).window == pytest.approx((0, 0, 5, 7), abs=0.5)


@pytest.mark.parametrize("seed", range(40))
def test_any_texture_is_read_or_refused(seed: int) -> None:
    """Grain, blots and lattices of any size: finite pixels, or an error that says why; never a division by no ink."""
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 200, 2)
    level = ndimage.gaussian_filter(random.random((height, width)), random.choice([0, 0, 1, 3]))
    grey = (level > random.random((height, width))) if seed % 2 else np.round(level * random.integers(1, 6)) / 6
    try:
        prepared = prepare_digit(grey.astype(np.float32), 28, 28)
    except (BlankImage, SeveralDigits):
        return
    assert np.isfinite(prepared.pixels).all()
    assert 0 <= prepared.pixels.min() <= prepared.pixels.max() <= 1
