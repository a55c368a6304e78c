"""Every colour is the colour of a number: exact pixels, computed here from the published colours."""

import io
import itertools
import struct
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from handler.errors import InvalidOption
from handler.gradients.explain import predict_and_explain
from handler.limits import MAX_PIXELS_DRAWN
from handler.render.drawing import DIVERGING, HUE_SHARE, OPACITY, Colormap, Layout, Polarity, Row, Style, draw

Numbers = NDArray[np.float32]
NEUTRAL = (247, 247, 247)  # zero in RdBu and PuOr
FULL_RED, FULL_BLUE = (103, 0, 31), (5, 48, 97)  # the ends of RdBu
SEQUENTIAL = [colormap for colormap in Colormap if colormap not in DIVERGING]
# Machado, Oliveira and Fernandes (2009): how people without one kind of cone see linear RGB.
COLOUR_BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def row_of(numbers: Any, image: float | Numbers = 0.0, classes: tuple[int, ...] | None = None) -> Row:
    """A row of maps (T, H, W), or of one (H, W), over a constant or given image."""
    maps = np.array(numbers, dtype=np.float32)
    maps = maps if maps.ndim == 3 else maps[None]
    image = np.full(maps.shape[1:], image, np.float32) if isinstance(image, float) else image
    return Row(image, maps, classes or tuple(range(len(maps))))


def drawn(rows: Row | list[Row], style: Style) -> NDArray[np.uint8]:
    """The drawing's pixels: (H, W, 3)."""
    with Image.open(io.BytesIO(draw(rows if isinstance(rows, list) else [rows], style))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def map_style(**changes: object) -> Style:
    settings: dict[str, object] = {"size": 28, "layout": Layout.MAP, "clip_percentile": 100.0}
    return Style(**settings | changes)  # type: ignore[arg-type]


def one_pixel_each(pixels: NDArray[np.uint8], height: int, width: int) -> list[list[tuple[int, ...]]]:
    """The colour of each cell of a panel of height x width cells, each of which must have one colour only."""
    cells = pixels.reshape(height, len(pixels) // height, width, pixels.shape[1] // width, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    return [[tuple(int(value) for value in cell) for cell in line] for line in cells[:, 0, :, 0]]


# --- numbers and colours


def test_colours_are_the_published_ones_at_their_own_numbers() -> None:
    """RdBu has eleven colours at -1, -0.8, ... 1; here with a limit of 5."""
    numbers = [[-5, -4, -3, -2, -1, 0, 1], [2, 3, 4, 5, -5, 0, 5]]
    pixels = drawn(row_of(numbers), map_style(size=70))
    rdbu = [
        (5, 48, 97),
        (33, 102, 172),
        (67, 147, 195),
        (146, 197, 222),
        (209, 229, 240),
        NEUTRAL,
        (253, 219, 199),
        (244, 165, 130),
        (214, 96, 77),
        (178, 24, 43),
        (103, 0, 31),
    ]
    expected = [[rdbu[number + 5] for number in line] for line in numbers]
    assert pixels.shape == (20, 70, 3)
    np.testing.assert_allclose(one_pixel_each(pixels, 2, 7), expected, atol=4)  # 255 levels do not meet every tenth exactly
    assert one_pixel_each(pixels, 2, 7)[1][4:] == [FULL_BLUE, NEUTRAL, FULL_RED]


@pytest.mark.parametrize(("colormap", "tolerance"), [(c, 4 if c in DIVERGING else 14) for c in Colormap])
def test_colour_maps_are_those_that_matplotlib_knows_by_these_names(colormap: Colormap, tolerance: int) -> None:
    shares = np.linspace(0, 1, 1001, dtype=np.float32)[None]
    style = Style(size=1001, layout=Layout.MAP, clip_percentile=100, colormap=colormap, polarity=Polarity.POSITIVE)
    places = 0.5 + shares[0] / 2 if colormap in DIVERGING else shares[0]
    expected = mpl.colormaps[colormap](places)[:, :3] * 255
    np.testing.assert_allclose(drawn(row_of(shares), style)[0], expected, atol=tolerance)


@pytest.mark.parametrize(
    ("polarity", "expected"),
    [
        (Polarity.SIGNED, [[FULL_BLUE, NEUTRAL, FULL_RED]]),
        (Polarity.ABSOLUTE, [[FULL_RED, NEUTRAL, FULL_RED]]),
        (Polarity.POSITIVE, [[NEUTRAL, NEUTRAL, FULL_RED]]),
        (Polarity.NEGATIVE, [[FULL_BLUE, NEUTRAL, NEUTRAL]]),
    ],
)
def test_polarity_chooses_the_numbers_that_are_drawn(polarity: Polarity, expected: list[list[tuple[int, ...]]]) -> None:
    assert one_pixel_each(drawn(row_of([[-2, 0, 2]]), map_style(size=30, polarity=polarity)), 1, 3) == expected


@pytest.mark.parametrize("colormap", SEQUENTIAL)
@pytest.mark.parametrize(
    ("polarity", "expected"),
    [(Polarity.ABSOLUTE, "high low high"), (Polarity.POSITIVE, "low low high"), (Polarity.NEGATIVE, "high low low")],
)
def test_sequential_colours_run_from_zero_to_the_limit(colormap: Colormap, polarity: Polarity, expected: str) -> None:
    pixels = drawn(row_of([[-2, 0, 2]]), map_style(size=30, colormap=colormap, polarity=polarity))
    ends = {"low": mpl.colormaps[colormap](0.0), "high": mpl.colormaps[colormap](1.0)}
    colours = [[round(channel * 255) for channel in ends[name][:3]] for name in expected.split()]
    np.testing.assert_array_equal(one_pixel_each(pixels, 1, 3), [colours])


@pytest.mark.parametrize("colormap", SEQUENTIAL)
def test_signed_numbers_need_a_colour_map_that_diverges(colormap: Colormap) -> None:
    with pytest.raises(
        InvalidOption, match=rf"expected one of RdBu_r, PuOr as 'colormap' with .* signed, got {colormap}; .* absolute"
    ):
        Style(colormap=colormap)


@pytest.mark.parametrize("zeros", [0, 1, 900], ids=lambda zeros: f"beside {zeros} zeros")
def test_percentile_says_from_which_number_on_colours_are_full(zeros: int) -> None:
    """Of the absolute numbers 1, 2, ... 99 the 50th percentile is 50: -50 and beyond are full blue, 25 is half of full red."""
    numbers = np.concatenate([np.arange(1, 100, dtype=np.float32), np.zeros(zeros, np.float32)])[None]
    numbers[:, 39:] *= -1
    style = Style(size=99 + zeros, layout=Layout.MAP, clip_percentile=50)
    clipped, unclipped = drawn(row_of(numbers), style)[0], drawn(row_of(numbers), map_style(size=99 + zeros))[0]
    assert (clipped[49:99] == FULL_BLUE).all()
    assert (clipped[48] != FULL_BLUE).any()
    np.testing.assert_array_equal(clipped[24], unclipped_colour_of_half())
    assert (unclipped[97] != FULL_BLUE).any()
    assert (unclipped[98] == FULL_BLUE).all()
    assert (clipped[99:] == NEUTRAL).all()


def unclipped_colour_of_half() -> list[int]:
    """RdBu at 3/4 of its length: halfway between the eighth and the ninth of its eleven colours, on the nearest of 255 levels."""
    level = np.rint(127 + 127 / 2)  # 190 of 0 to 254
    place = level / 254 * 10  # among the eleven colours
    low, high = np.array((244, 165, 130)), np.array((214, 96, 77))
    return list(np.rint(low + (high - low) * (place - 7)).astype(int))


def test_map_that_is_zero_at_nearly_all_pixels_is_drawn_up_to_its_largest_number() -> None:
    numbers = np.zeros((20, 20), np.float32)
    numbers[3, 4] = -7
    pixels = drawn(row_of(numbers), Style(size=40, layout=Layout.MAP, clip_percentile=99))
    assert (pixels[6:8, 8:10] == FULL_BLUE).all()
    assert (pixels == NEUTRAL).all(axis=2).sum() == 1600 - 4


def test_maps_of_one_row_share_their_limit_and_rows_do_not() -> None:
    """The largest numbers of the rows are 4 and 1: each has one cell of the full colour, and a smaller map has none."""
    first = row_of([[[1, 0]], [[4, 0]]])
    second = row_of([[[1, 0]], [[0.5, 0]]])
    pixels = drawn([first, second], map_style(size=100))
    full = (pixels == FULL_RED).all(axis=2)
    middle_y, middle_x = (length // 2 for length in full.shape)
    cells = [full[:middle_y, :middle_x], full[:middle_y, middle_x:], full[middle_y:, :middle_x], full[middle_y:, middle_x:]]
    assert [cell.sum() for cell in cells] == [0, 50 * 50, 50 * 50, 0]


def test_extreme_numbers_overflow_nothing() -> None:
    pixels = drawn(row_of([[3e38, -3e38, 1e-30, 1e-30, -1e-30]]), Style(size=50, layout=Layout.MAP, clip_percentile=50))
    assert one_pixel_each(pixels, 1, 5) == [[FULL_RED, FULL_BLUE, FULL_RED, FULL_RED, FULL_BLUE]]
    tiny = drawn(row_of([[1e-45, -1e-45, 0]]), map_style(size=30))
    assert one_pixel_each(tiny, 1, 3) == [[FULL_RED, FULL_BLUE, NEUTRAL]]


# --- colour-blind people


def seen_in_oklab(colours: NDArray[np.uint8], matrix: list[list[float]]) -> NDArray[np.float64]:
    """sRGB colours (N, 3) as a colour-blind person sees them, in Oklab (lightness first), where distances are what eyes tell."""
    srgb = colours / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.array(matrix).T, 0, 1)
    cones = (
        linear
        @ np.array(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ]
        ).T
    )
    lab: NDArray[np.float64] = (
        np.cbrt(cones)
        @ np.array(
            [
                [0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660],
            ]
        ).T
    )
    return lab


@pytest.mark.parametrize("blindness", COLOUR_BLINDNESS)
@pytest.mark.parametrize("colormap", DIVERGING)
@pytest.mark.parametrize("layout", [Layout.MAP, Layout.OVERLAY])
def test_signs_are_told_apart_by_colour_blind_people(blindness: str, colormap: Colormap, layout: Layout) -> None:
    """Half of the limit against minus half of it; 0.02 is about the least difference that is seen."""
    for grey in (0.0, 0.5, 1.0):
        style = Style(size=40, layout=layout, colormap=colormap, clip_percentile=100)
        pixels = drawn(row_of([[-1, -0.5, 0.5, 1]], image=grey), style)[0, 5::10]
        _, minus, plus, _ = seen_in_oklab(pixels, COLOUR_BLINDNESS[blindness])
        assert np.linalg.norm(plus - minus) > 0.06


@pytest.mark.parametrize("blindness", COLOUR_BLINDNESS)
@pytest.mark.parametrize("colormap", SEQUENTIAL)
def test_sequential_colours_get_lighter_all_the_way_for_everyone(blindness: str, colormap: Colormap) -> None:
    style = map_style(size=60, colormap=colormap, polarity=Polarity.POSITIVE)
    pixels = drawn(row_of(np.linspace(0, 1, 12, dtype=np.float32)[None]), style)[0, 2::5]
    assert (np.diff(seen_in_oklab(pixels, COLOUR_BLINDNESS[blindness])[:, 0]) > 0.01).all()


# --- the overlay


@pytest.mark.parametrize(
    ("sign", "hue"), [(1, (214, 96, 77)), (-1, (67, 147, 195))], ids=["red for positive", "blue for negative"]
)
@pytest.mark.parametrize("grey", [0.0, 0.4, 1.0])
def test_overlay_mixes_the_hue_of_the_sign_in_proportion_to_the_number(sign: int, hue: tuple[int, ...], grey: float) -> None:
    assert HUE_SHARE == 0.6  # where RdBu has these colours
    shares = np.array([[0, 0.25, 0.5, 1]])
    pixels = drawn(row_of(sign * shares.astype(np.float32), image=grey), Style(size=40, clip_percentile=100))
    weights = shares[0][:, None] * OPACITY
    expected = weights * np.array(hue) + (1 - weights) * grey * 255
    np.testing.assert_allclose(one_pixel_each(pixels, 1, 4)[0], expected, atol=2.5)


def test_image_stays_grey_where_saliency_is_zero() -> None:
    image = np.linspace(0, 1, 28 * 28, dtype=np.float32).reshape(28, 28)
    numbers = np.zeros((28, 28), np.float32)
    numbers[:, 20:] = 1
    pixels = drawn(row_of(numbers, image), Style(size=28))
    expected = np.rint(image * 255)
    for channel in range(3):
        np.testing.assert_array_equal(pixels[:, :20, channel], expected[:, :20])
    assert (pixels[:, 20:, 0] > pixels[:, 20:, 2]).all()


@pytest.mark.parametrize("polarity", Polarity)
def test_digit_shows_through_the_fullest_colour(polarity: Polarity) -> None:
    image = np.zeros((2, 2), np.float32)
    image[:, 1] = 1
    for colormap in Colormap if polarity is not Polarity.SIGNED else DIVERGING:
        style = Style(size=28, colormap=colormap, polarity=polarity)
        for sign in (1, -1):
            pixels = drawn(row_of(np.full((2, 2), sign, np.float32), image), style).astype(int)
            assert (pixels[:, -1] - pixels[:, 0] >= 24).all()  # of 255: 1 - OPACITY


# --- flat maps, constant images


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("polarity", Polarity)
def test_flat_map_is_drawn_as_zero(layout: Layout, polarity: Polarity) -> None:
    image = np.linspace(0, 1, 784, dtype=np.float32).reshape(28, 28)
    pixels = drawn(row_of(np.zeros((28, 28), np.float32), image), Style(size=56, layout=layout, polarity=polarity))
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 1] == pixels[..., 2]).all()
    if layout is Layout.MAP:
        assert (pixels == NEUTRAL).all()


@pytest.mark.parametrize("grey", [0.0, 0.5, 1.0])
def test_constant_image_is_drawn_as_it_is(grey: float) -> None:
    pixels = drawn(row_of(np.zeros((28, 28), np.float32), image=grey), Style(size=28))
    assert (pixels == np.rint(grey * 255)).all()


# --- geometry


@pytest.mark.parametrize("layout", [Layout.OVERLAY, Layout.MAP])
@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((28, 28), 28, (28, 28)),
        ((28, 28), 448, (448, 448)),
        ((28, 28), 1024, (1024, 1024)),
        ((28, 28), 101, (101, 101)),
        ((300, 4000), 400, (30, 400)),
        ((4000, 300), 400, (400, 30)),
        ((16, 16), 448, (448, 448)),
        ((1, 4000), 28, (1, 28)),
        ((3, 7), 100, (43, 100)),
        ((1, 1), 33, (33, 33)),
    ],
    ids=str,
)
def test_one_map_is_one_panel_of_exactly_the_size_asked_for(
    layout: Layout, shape: tuple[int, int], size: int, expected: tuple[int, int]
) -> None:
    numbers = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert drawn(row_of(numbers, image=0.5), Style(size=size, layout=layout)).shape == (*expected, 3)


def test_large_map_is_averaged_and_a_small_one_repeated() -> None:
    """A checkerboard of 3 and -1 has the mean 1 everywhere, which becomes the limit."""
    board = np.where(np.indices((280, 280)).sum(axis=0) % 2, 3, -1).astype(np.float32)
    half = board * np.repeat([1, -1], 140)  # the left half has the mean 1, the right half -1
    averaged = drawn(row_of(half), map_style(size=28))
    assert one_pixel_each(averaged, 1, 2) == [[FULL_RED, FULL_BLUE]]
    repeated = drawn(row_of([[1, -1], [-1, 1]], np.full((280, 280), 0.5, np.float32)), map_style(size=280))
    assert one_pixel_each(repeated, 2, 2) == [[FULL_RED, FULL_BLUE], [FULL_BLUE, FULL_RED]]


def test_map_lies_where_its_image_has_it() -> None:
    """A map of 2x4 over an image of 100x200: each quarter of the image's pixels has its own number's colour."""
    numbers = np.zeros((2, 4), np.float32)
    numbers[1, 3] = 1
    coloured = drawn(row_of(numbers, np.full((100, 200), 0.5, np.float32)), Style(size=200)).std(axis=2) > 0
    expected = np.zeros((100, 200), bool)
    expected[50:, 150:] = True
    np.testing.assert_array_equal(coloured, expected)


def panels_in(pixels: NDArray[np.uint8], colours: set[tuple[int, ...]]) -> list[tuple[int, int, int, int]]:
    """Left, top, width, height of each upright rectangle of the given colours, in reading order along the middle of a row."""
    wanted = np.zeros(pixels.shape[:2], bool)
    for colour in colours:
        wanted |= (pixels == colour).all(axis=2)
    found = []
    line = wanted[len(wanted) * 3 // 4]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], line, [False]]).astype(int)))
    for left, right in zip(edges[::2], edges[1::2], strict=True):
        rows = np.flatnonzero(wanted[:, left])
        found.append((int(left), int(rows[0]), int(right - left), int(rows[-1] - rows[0] + 1)))
    return found


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("size", [28, 100, 448])
def test_several_maps_are_a_strip_of_labelled_panels(count: int, size: int) -> None:
    """Flat maps, which are NEUTRAL all over, on the white of the strip; labels are dark and above them."""
    pixels = drawn(row_of(np.zeros((count, 28, 28), np.float32)), map_style(size=size))
    panels = panels_in(pixels, {NEUTRAL})
    assert len(panels) == count
    assert {panel[1:] for panel in panels} == {(panels[0][1], size, size)}
    assert len({after[0] - before[0] for before, after in itertools.pairwise(panels)}) == 1
    for left, top, width, _ in panels:
        assert (pixels[:top, left : left + width].min(axis=(0, 2)) < 128).any(), "no label above this panel"
    gap = panels[1][0] - panels[0][0] - size
    assert gap >= 2
    assert pixels.shape[:2] == (panels[0][1] + size + gap, count * (size + gap) + gap)


def label_above(numbers: Numbers, target: int, size: int) -> NDArray[np.uint8]:
    pixels = drawn(row_of(np.stack([numbers, numbers]), classes=(target, target)), map_style(size=size))
    left, top, width, _ = panels_in(pixels, {NEUTRAL})[0]
    return pixels[:top, left : left + width]


@pytest.mark.parametrize("size", [28, 448])
def test_each_class_has_its_own_label(size: int) -> None:
    labels = [label_above(np.zeros((28, 28), np.float32), target, size).tobytes() for target in range(10)]
    assert len(set(labels)) == 10


def test_small_panel_is_labelled_with_the_digit_alone() -> None:
    flat = np.zeros((28, 28), np.float32)
    small, large = (label_above(flat, 4, size).min(axis=(0, 2)) < 128 for size in (28, 448))
    assert 3 <= small.sum() <= 12
    assert large.sum() > 25


def test_side_by_side_has_the_image_the_maps_and_a_bar() -> None:
    numbers = np.zeros((2, 28, 28), np.float32)
    numbers[0, 0, 27] = 2
    pixels = drawn(row_of(numbers, image=0.5), map_style(size=280, layout=Layout.SIDE_BY_SIDE))
    (left, top, _, _), *maps = panels = panels_in(pixels, {NEUTRAL, (128, 128, 128)})[:3]
    assert [panel[1:] for panel in panels] == [(top, 280, 280)] * 3
    assert (pixels[top : top + 280, left : left + 280] == 128).all()
    assert (pixels[top : top + 10, maps[0][0] + 270 : maps[0][0] + 280] == FULL_RED).all()
    gap = maps[0][0] - left - 280
    bar_left = maps[1][0] + 280 + gap
    scale = pixels[top : top + 280, bar_left : bar_left + 10]
    assert (scale == scale[:, :1]).all()
    assert (tuple(scale[0, 0]), tuple(scale[-1, 0])) == (FULL_RED, FULL_BLUE)
    np.testing.assert_allclose(scale[139:141, 0].mean(axis=0), NEUTRAL, atol=1)
    beside = pixels[top : top + 280, bar_left + 21 :].min(axis=2) < 128
    highest, zero, lowest = (
        np.flatnonzero(beside[rows, :45].any(axis=0)) for rows in (slice(0, 20), slice(130, 150), slice(260, 280))
    )
    assert len(zero) > 0
    assert highest[-1] + 3 < lowest[-1], "the lowest number has a minus sign before the same digits"
    above = [pixels[:top, start : start + 280].tobytes() for start, _, _, _ in panels]
    assert len(set(above)) == 3, "image, class 0 and class 1 have labels of their own"


def test_bar_has_the_unit_of_its_row_where_there_is_room() -> None:
    def width_around(size: int, unit: str) -> int:
        row = replace(row_of([[1, 1], [1, 0]]), unit=unit)
        width: int = drawn(row, map_style(size=size, layout=Layout.SIDE_BY_SIDE)).shape[1]
        return width - 2 * size

    assert width_around(100, "logit per unit of intensity") == width_around(100, "") < 60
    assert width_around(300, "logit per unit of intensity") > 75 > width_around(300, "")
    assert width_around(300, "logit") > 75


def test_title_stands_above_its_row() -> None:
    row = row_of([[1, 1], [1, 0]])
    plain, titled = (drawn(one, map_style(size=100)) for one in (row, replace(row, title="smoothgrad, samples 5")))
    assert plain.shape[0] == 100
    assert titled.shape[0] > 100 + 2 * 12  # a line for the title and one for the class
    assert (titled[:12] < 128).any()


@pytest.mark.parametrize(
    ("polarity", "top", "bottom"),
    [(Polarity.ABSOLUTE, FULL_RED, NEUTRAL), (Polarity.POSITIVE, FULL_RED, NEUTRAL), (Polarity.NEGATIVE, NEUTRAL, FULL_BLUE)],
)
def test_bar_shows_the_numbers_that_the_polarity_draws(polarity: Polarity, top: tuple[int, ...], bottom: tuple[int, ...]) -> None:
    style = map_style(size=280, layout=Layout.SIDE_BY_SIDE, polarity=polarity)
    pixels = drawn(row_of([[-1, 1], [1, -1]], image=0.5), style)
    below = pixels.shape[0] - 280 - 5  # the panels' upper edge
    scale = pixels[below : below + 280, 5 + 280 + 5 + 280 + 5 + 3]
    assert (tuple(scale[0]), tuple(scale[-1])) == (top, bottom)


def test_rows_are_stacked() -> None:
    flat = np.zeros((28, 28), np.float32)
    pixels = drawn([row_of(flat), row_of(flat[:14]), row_of(flat)], map_style(size=100))
    column = (pixels == NEUTRAL).all(axis=2)[:, pixels.shape[1] // 2]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], column, [False]]).astype(int)))
    assert (edges[1::2] - edges[::2]).tolist() == [100, 50, 100]


def test_extreme_proportions_are_drawn_in_every_layout() -> None:
    random = np.random.default_rng(0)
    for shape in ((300, 4000), (4000, 300), (1, 500), (500, 1), (1, 1)):
        row = row_of(random.normal(size=(3, *shape)).astype(np.float32), random.random(shape, dtype=np.float32))
        for layout in Layout:
            assert drawn(row, Style(size=100, layout=layout)).std() > 0


def test_drawing_of_too_many_pixels_is_refused_before_it_is_drawn() -> None:
    row = row_of(np.zeros((10, 28, 28), np.float32))
    with pytest.raises(
        InvalidOption, match=r"^expected a drawing of at most 3,000,000 pixels, got 'size' 1024, .* about [0-9,]+$"
    ):
        draw([row], Style(size=1024))
    with pytest.raises(InvalidOption, match="at most 3,000,000"):
        draw([row_of(np.zeros((1, 4000), np.float32))] * 100_000, Style(size=28))
    assert MAX_PIXELS_DRAWN == 3_000_000


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("shapes", [[(28, 28)], [(4000, 1)], [(1, 4000)], [(28, 28), (4000, 1), (1, 4000)]], ids=str)
def test_no_drawing_has_many_more_pixels_than_the_limit(layout: Layout, shapes: list[tuple[int, int]]) -> None:
    """As many rows as are let through, the first of them with ten maps: the narrow ones leave much white beside them."""
    style = Style(size=448, layout=layout)
    rows = [row_of(np.zeros((10, *shapes[0]), np.float32))]
    most = None
    for count in (*range(0, 20, 2), *range(20, 100, 10)):
        try:
            most = draw([*rows, *[row_of(np.zeros(shape, np.float32)) for shape in shapes] * count], style)
        except InvalidOption:
            break
    assert most is not None
    width, height = struct.unpack(">II", most[16:24])
    assert width * height < 1.1 * MAX_PIXELS_DRAWN


def test_largest_drawing_of_noise_fits_into_a_reply() -> None:
    """Noise does not compress. TorchServe's limit is 32 MiB (serve_config/config.properties), and above it kills the worker."""
    random = np.random.default_rng(0)
    shape = (1024, 1024)
    row = row_of(random.normal(size=shape).astype(np.float32), random.random(shape, dtype=np.float32))
    overlay = len(draw([row, row], Style(size=1024, clip_percentile=50)))
    assert 5_000_000 < overlay < 32 * 2**20


# --- the real thing


def test_same_input_gives_the_same_bytes(network: nn.Module, digit_batch: torch.Tensor) -> None:
    _, (explanation,) = predict_and_explain(network, digit_batch[:1], [tuple(range(10))])
    assert explanation is not None
    row = Row(digit_batch[0, 0].numpy(), explanation.maps[:, 0], explanation.classes)
    for layout in Layout:
        assert draw([row], Style(layout=layout)) == draw([row], Style(layout=layout))


def test_every_pixel_of_a_real_map_has_the_colour_of_its_sign(network: nn.Module, digit_batch: torch.Tensor) -> None:
    _, (explanation,) = predict_and_explain(network, digit_batch[:1], [(None,)])
    assert explanation is not None
    saliency = explanation.maps[0, 0]
    row = Row(digit_batch[0, 0].numpy(), saliency[None], explanation.classes)
    cells = np.array(one_pixel_each(drawn(row, Style(layout=Layout.MAP)), 28, 28)).astype(int)
    redness = cells[..., 0] - cells[..., 2]
    limit = np.percentile(np.abs(saliency), 99)
    clear = np.abs(saliency) > limit / 50
    assert clear.sum() > 100
    np.testing.assert_array_equal(np.sign(redness)[clear], np.sign(saliency)[clear])
