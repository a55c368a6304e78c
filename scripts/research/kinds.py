"""Count wrong answers by kind of image: small, off-centre, nearly black, framed, underlined, several digits, photographs.

    python -m scripts.research.kinds

Makes every kind of the project's own 50 test digits and gives each image to the preprocessing and the network, without a server.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import nn
from tqdm import tqdm

from handler.errors import ClientError, SeveralDigits
from handler.gradients.explain import predict_and_explain
from handler.gradients.methods import softmax
from handler.images.decode import decode_image
from handler.images.digits import prepare_digit
from model.photograph import SCENES, Ink, ink_of, photograph
from scripts.command_line import HelpFormatter
from scripts.network import load_committed_network
from scripts.paths import SAMPLE_FILES

SURE = 0.9  # probability from which a wrong answer counts as sure
CANVAS = 280  # pixels a side, as drawing pages have it

Grey = NDArray[np.float32]  # (H, W), brightness in [0, 1]
Draw = Callable[
    [Ink, NDArray[np.uint8], np.random.Generator], NDArray[np.floating]
]  # ink, its 28x28 levels -> ink bright on dark


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of image.

    Attributes:
        name: as the table shows it.
        draw: makes an image of a digit, ink bright on dark.
        finish: makes what is sent of it: another polarity, a photograph, nearly black numbers.
        several: it shows more than one digit, and has to be refused.
    """

    name: str
    draw: Draw
    finish: Callable[[NDArray[np.floating], np.random.Generator], NDArray[np.floating]] = field(default=lambda grey, _: grey)
    several: bool = False


@dataclass(slots=True)
class Count:
    """What became of one kind: of `total` images so many are wrong, wrong and sure without a warning, refused, warned of."""

    name: str
    total: int = 0
    wrong: int = 0
    sure: int = 0
    refused: int = 0
    warned: int = 0
    mistakes: list[str] = field(default_factory=list)


# --- how a digit is drawn


def resize(ink: Ink, height: int) -> Ink:
    """Scale ink to so many pixels of its longer side."""
    factor = height / max(ink.shape)
    size = (max(1, round(ink.shape[1] * factor)), max(1, round(ink.shape[0] * factor)))
    image = Image.fromarray(np.rint(ink * 255).astype(np.uint8))
    return np.asarray(image.resize(size, Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC)) / 255


def paste(canvas: Ink, ink: Ink, y: int, x: int) -> Ink:
    """Lay ink onto a canvas, its upper left corner at (y, x)."""
    height, width = ink.shape
    part = canvas[y : y + height, x : x + width]
    np.maximum(part, ink[: part.shape[0], : part.shape[1]], out=part)
    return canvas


def centred(ink: Ink, size: int) -> Ink:
    """Lay ink into the middle of a square canvas."""
    return paste(np.zeros((size, size)), ink, (size - ink.shape[0]) // 2, (size - ink.shape[1]) // 2)


def thin(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Thin ink to lines of one pixel. Source: Zhang and Suen, 1984."""
    mask = np.pad(mask, 1)
    changed = True
    while changed:
        changed = False
        for first in (True, False):
            ring = [
                np.roll(mask, shift, (0, 1)) for shift in ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))
            ]
            count = sum(neighbour.astype(int) for neighbour in ring)
            turns = sum((~a & b).astype(int) for a, b in zip(ring, [*ring[1:], ring[0]], strict=True))
            north, east, south, west = ring[0], ring[2], ring[4], ring[6]
            open_sides = (
                (~(north & east & south), ~(east & south & west)) if first else (~(north & east & west), ~(north & south & west))
            )
            removed = mask & (count >= 2) & (count <= 6) & (turns == 1) & open_sides[0] & open_sides[1]
            changed |= bool(removed.any())
            mask = mask & ~removed
    return mask[1:-1, 1:-1]


def hairline(ink: Ink, height: int, width: int = 1) -> Ink:
    """Draw a digit of this height with a line of this width: no softness at its edges."""
    line = thin(resize(ink, height) > 0.5)
    return np.asarray(ndimage.maximum_filter(np.pad(line, width), width)).astype(np.float64)


def thicken(ink: Ink, share: float) -> Ink:
    """Draw a digit with a broader pen: by this share of its height on each side."""
    pixels = round(share * max(ink.shape))
    distance = ndimage.distance_transform_edt(np.pad(ink, pixels + 1) < 0.5)
    return np.asarray(np.clip(pixels + 0.5 - distance, 0, 1))


def on_canvas(ink: Ink, share: float = 0.64, size: int = CANVAS) -> Ink:
    """Draw a digit into the middle of a drawing page."""
    return centred(resize(ink, round(share * size)), size)


def one_pixel_thin(height: int, size: int, width: int = 1) -> Draw:
    """A digit of this height, drawn with a line of one pixel, or of `width`."""
    return lambda ink, _, __: centred(hairline(ink, height, width)[1:-1, 1:-1], size)


def bold(pen: float, height: int, size: int) -> Draw:
    """A digit of this height, drawn with a pen that is broader by this share of it on each side."""
    return lambda ink, _, __: centred(resize(thicken(ink, pen), height), size)


def corner(_: Ink, levels: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.floating]:
    """Shift a canonical digit against one of the four corners, with one pixel of margin."""
    ys, xs = np.nonzero(levels > 25)
    cropped = levels[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] / 255
    y, x = (int(random.choice([1, 27 - side])) for side in cropped.shape)
    return paste(np.zeros((28, 28)), cropped, y, x)


def shifted(dy: int, dx: int) -> Draw:
    """Shift a canonical digit."""
    return lambda _, levels, __: ndimage.shift(levels / 255, (dy, dx), order=0)


def small(height: int, size: int = 28) -> Draw:
    """Draw a digit of this height into a small image."""
    return lambda ink, _, __: centred(resize(ink, height), size)


def enlarged(draw: Draw, factor: int = 4) -> Draw:
    """The same, enlarged."""
    return lambda ink, levels, random: np.kron(draw(ink, levels, random), np.ones((factor, factor)))


def canonical(_: Ink, levels: NDArray[np.uint8], __: np.random.Generator) -> NDArray[np.floating]:
    """A digit as MNIST has it."""
    return levels / 255


def canvas(share: float = 0.64, size: int = CANVAS) -> Draw:
    """A digit in the middle of a drawing page."""
    return lambda ink, _, __: on_canvas(ink, share, size)


# --- what else is on the page


def ring(size: int, inset: int, width: int) -> Ink:
    """A square frame, its outer edge `inset` pixels from the image's."""
    frame = np.zeros((size, size))
    frame[inset : size - inset, inset : size - inset] = 1
    frame[inset + width : size - inset - width, inset + width : size - inset - width] = 0
    return frame


def framed(width: int, inset: int = 0, share: float = 0.64, size: int = CANVAS) -> Draw:
    """A digit in a square frame."""
    return lambda ink, _, __: np.maximum(on_canvas(ink, share, size), ring(size, inset, width))


def open_box(width: int, inset: int = 20, share: float = 0.6) -> Draw:
    """A box that misses a side, or has a gap in two, or whose corners do not close."""

    def draw(ink: Ink, _: NDArray[np.uint8], random: np.random.Generator) -> Ink:
        frame = ring(CANVAS, inset, width)
        kind = random.integers(4)
        if kind == 0:  # a side is missing
            frame[: inset + width] = 0
        elif kind == 1:  # gaps
            frame[:, 90:120] = 0
        elif kind == 2:  # corners
            for y in (slice(0, inset + 15), slice(CANVAS - inset - 15, CANVAS)):
                for x in (slice(0, inset + 15), slice(CANVAS - inset - 15, CANVAS)):
                    frame[y, x] = 0
        else:  # a side is missing, and another is short
            frame[:, CANVAS - inset - width :] = 0
            frame[CANVAS // 2 :, : inset + width] = 0
        return np.maximum(on_canvas(ink, share), np.rot90(frame, int(random.integers(4))))

    return draw


def touching_box(width: int, share: float = 0.6) -> Draw:
    """A form's box whose lower side runs through the digit's foot, or whose right side through its right."""

    def draw(ink: Ink, _: NDArray[np.uint8], random: np.random.Generator) -> Ink:
        page = on_canvas(ink, share)
        ys, xs = np.nonzero(page > 0.5)
        half = round(0.42 * CANVAS)
        bottom, right = int(ys.max()) + 1, int(xs.max()) + 1
        frame = np.zeros_like(page)
        if random.random() < 0.5:
            top, left = bottom - 2 * half, CANVAS // 2 - half
        else:
            top, left = CANVAS // 2 - half, right - 2 * half
        top, left = max(2, top), max(2, left)
        square = ring(2 * half, 0, width)
        return np.maximum(page, paste(frame, square, top, left))

    return draw


def underlined(width: int, gap: int, length: float = 0.75, share: float = 0.6, tilt: float = 0.0) -> Draw:
    """A line under the digit: `gap` pixels below it, into it where negative; as long as this share of the page."""

    def draw(ink: Ink, _: NDArray[np.uint8], __: np.random.Generator) -> Ink:
        page = on_canvas(ink, share)
        bottom = int(np.nonzero(page.max(1) > 0.5)[0].max()) + 1 + gap
        half = round(length * CANVAS / 2)
        for x in range(CANVAS // 2 - half, CANVAS // 2 + half):
            y = bottom + round(tilt * (x - CANVAS // 2))
            page[y : y + width, x] = 1
        return page

    return draw


def ruled(spacing: int, width: int, level: float = 1.0, *, squared: bool = False, share: float = 0.6) -> Draw:
    """Ruled or squared paper."""

    def draw(ink: Ink, _: NDArray[np.uint8], random: np.random.Generator) -> Ink:
        lines = np.zeros((CANVAS, CANVAS))
        for axis in range(1 + squared):
            for start in range(int(random.integers(spacing)), CANVAS, spacing):
                (lines if axis == 0 else lines.T)[start : start + width] = level
        return np.maximum(on_canvas(ink, share), lines)

    return draw


def pair(gap: float, share: float = 0.45) -> Draw:
    """A 3 beside a digit, with this gap, as a share of their height."""

    def draw(ink: Ink, _: NDArray[np.uint8], random: np.random.Generator) -> Ink:
        height = round(share * CANVAS)
        other = resize(any_ink(random), height)
        first = resize(ink, height)
        space = round(gap * height)
        page = np.zeros((CANVAS, CANVAS))
        left = (CANVAS - first.shape[1] - space - other.shape[1]) // 2
        paste(page, first, (CANVAS - first.shape[0]) // 2, left)
        return paste(page, other, (CANVAS - other.shape[0]) // 2, left + first.shape[1] + space)

    return draw


def sheet(rows: int, columns: int) -> Draw:
    """A sheet of digits in rows."""

    def draw(ink: Ink, _: NDArray[np.uint8], random: np.random.Generator) -> Ink:
        cell = 64
        page = np.zeros((rows * cell, columns * cell))
        for row in range(rows):
            for column in range(columns):
                own = resize(any_ink(random) if row + column else ink, 40)
                paste(page, own, row * cell + 10, column * cell + 10)
        return page

    return draw


def with_small_others(count: int = 2) -> Draw:
    """A large digit, and small ones in a corner of the page: a number of the page, a date."""

    def draw(ink: Ink, _: NDArray[np.uint8], random: np.random.Generator) -> Ink:
        page = on_canvas(ink, 0.62)
        y, x = int(random.choice([6, CANVAS - 30])), int(random.choice([8, CANVAS - 26 * count]))
        for place in range(count):
            paste(page, resize(any_ink(random), 24), y, x + 22 * place)
        return page

    return draw


def broken(width: int, share: float = 0.64) -> Draw:
    """A digit whose strokes are cut by a line of paper somewhere."""

    def draw(ink: Ink, _: NDArray[np.uint8], random: np.random.Generator) -> Ink:
        page = on_canvas(ink, share)
        at = int(random.integers(CANVAS * 2 // 5, CANVAS * 3 // 5))
        if random.random() < 0.5:
            page[at : at + width] = 0
        else:
            page[:, at : at + width] = 0
        return page

    return draw


def outlined(shape: str, width: int, *, dash: int = 0, level: float = 1.0, share: float = 0.5) -> Draw:
    """A digit within a `rounded` box, an `ellipse`, or a `double` frame, whose lines may be dashed."""

    def draw(ink: Ink, _: NDArray[np.uint8], random: np.random.Generator) -> Ink:
        image = Image.new("L", (CANVAS, CANVAS))
        pen = ImageDraw.Draw(image)
        inset = int(random.integers(8, 24))
        box = (inset, inset, CANVAS - inset, CANVAS - inset)
        if shape == "ellipse":
            pen.ellipse(box, outline=255, width=width)
        elif shape == "rounded":
            pen.rounded_rectangle(box, radius=40, outline=255, width=width)
        else:
            for own in (inset, inset + 3 * width):
                pen.rectangle((own, own, CANVAS - own, CANVAS - own), outline=255, width=width)
        frame = level * np.asarray(image) / 255
        if dash:
            y, x = np.indices(frame.shape)
            frame[(y + x) // dash % 2 == 1] = 0
        return np.maximum(on_canvas(ink, share), frame)

    return draw


def with_dot(place: str, size: float = 0.11) -> Draw:
    """A digit with a `dot`, or a `comma`, at its foot, or with specks on the page."""

    def draw(ink: Ink, _: NDArray[np.uint8], random: np.random.Generator) -> Ink:
        page = on_canvas(ink, 0.55)
        ys, xs = np.nonzero(page > 0.5)
        radius = round(size * 0.55 * CANVAS / 2)
        image = Image.fromarray(np.rint(page * 255).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        x, y = int(xs.max()) + 12 + radius, int(ys.max()) - radius
        if place == "dot":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        elif place == "comma":
            pen.line((x, y, x - radius, y + 3 * radius), fill=255, width=max(3, radius))
        else:
            for _speck in range(12):
                x, y = (int(place) for place in random.integers(4, CANVAS - 8, 2))
                pen.ellipse((x, y, x + 4, y + 4), fill=255)
        return np.asarray(image) / 255

    return draw


def smaller_beside(share: float, gap: float = 0.3) -> Draw:
    """A digit and another one beside it, whose height is this share of its."""

    def draw(ink: Ink, _: NDArray[np.uint8], random: np.random.Generator) -> Ink:
        height = round(0.55 * CANVAS)
        other = resize(any_ink(random), round(share * height))
        first = resize(ink, height)
        page = np.zeros((CANVAS, CANVAS))
        paste(page, first, 40, 20)
        return paste(page, other, 40, 20 + first.shape[1] + round(gap * height))

    return draw


def dashed_one(_: Ink, __: NDArray[np.uint8], random: np.random.Generator) -> Ink:
    """A vertical line of dashes."""
    page = np.zeros((CANVAS, CANVAS))
    dash, gap = int(random.integers(16, 40)), int(random.integers(6, 16))
    for top in range(50, 220, dash + gap):
        page[top : min(top + dash, 226), 132:148] = 1
    return page


# --- how it is sent


def dark_on_bright(grey: NDArray[np.floating], _: np.random.Generator) -> NDArray[np.floating]:
    """Dark ink on bright paper."""
    return 1 - grey


def integers(most: int, *, inverted: bool = False) -> Callable[[NDArray[np.floating], np.random.Generator], NDArray[np.floating]]:
    """The integers 0 to `most`, which arrive as so many of 255."""

    def finish(grey: NDArray[np.floating], _: np.random.Generator) -> NDArray[np.floating]:
        levels = np.rint(grey * most) / 255
        return np.asarray(most / 255 - levels if inverted else levels)

    return finish


def twice_divided(grey: NDArray[np.floating], _: np.random.Generator) -> NDArray[np.floating]:
    """Intensities that were divided by 255 once more."""
    return grey / 255


def camera(
    *, inverted: bool = True, angle: float = 2.0, noise: float = 0.01, light: float = 0.15, contrast: float = 0.6
) -> Callable[[NDArray[np.floating], np.random.Generator], NDArray[np.floating]]:
    """A photograph of the page: turned, unevenly lit, with noise, as a JPEG."""

    def finish(page: NDArray[np.floating], random: np.random.Generator) -> NDArray[np.floating]:
        turned = ndimage.rotate(page, random.uniform(-angle, angle), reshape=False, order=1, mode="constant")
        turned = np.clip(ndimage.gaussian_filter(turned, 0.7), 0, 1)
        slope = np.linspace(-0.5, 0.5, page.shape[1])
        paper = 0.8 if inverted else 0.15
        grey = (paper - contrast * turned if inverted else paper + contrast * turned) * (1 + light * slope)
        grey = grey + random.normal(0, noise, page.shape)
        content = BytesIO()
        Image.fromarray(np.clip(np.rint(grey * 255), 0, 255).astype(np.uint8)).save(content, format="JPEG", quality=85)
        return decode_image(content.getvalue()).grey

    return finish


def photographed(kind: str) -> Draw:
    """A photograph of one of the scenes of `model.photograph`."""
    return lambda ink, _, random: decode_image(photograph(ink, kind, [int(random.integers(1 << 30))])).grey


# --- all kinds


def kinds() -> dict[str, list[Kind]]:
    """All kinds, by group."""
    groups: dict[str, list[Kind]] = {}

    def add(group: str, name: str, draw: Draw, *finishes: str, several: bool = False) -> None:
        for finish in finishes or ("",):
            groups.setdefault(group, []).append(Kind(f"{name}{', ' + finish if finish else ''}", draw, FINISHES[finish], several))

    both = ("", "dark on white")
    add("28x28", "canonical", canonical, *both)
    add("28x28", "corner", corner, *both)
    for shift in ((4, 4), (-4, 3), (0, 4), (3, 0), (2, 2), (1, 1)):
        add("28x28", f"shifted {shift}", shifted(*shift), *both)
    for height in (6, 8, 12, 16, 24, 27, 28):
        add("28x28", f"{height} px high", small(height), *both)
    for height in (14, 20, 24):
        add("28x28", f"one pixel thin, {height} high", one_pixel_thin(height, 28), *both)
    add("28x28", "bold", bold(0.06, 24, 28), *both)
    for name, draw in {"canonical": canonical, "corner": corner, "8 px": small(8), "27 px": small(27)}.items():
        add("112x112", f"{name}, enlarged", enlarged(draw), *both)
    add("112x112", "thin, enlarged", enlarged(one_pixel_thin(20, 28)), *both)
    weak = ("0/1", "0-16", "0-16 dark on bright", "0-3", "/255 twice", "0/1 dark on bright", "0-100")
    for name, draw in {
        "28x28 canonical": canonical, "28x28 corner": corner, "112x112": enlarged(canonical), "280x280": canvas(),
        "8x8": small(8, 8), "16x16": small(16, 16), "32x32": small(28, 32),
    }.items():  # fmt: skip
        add("nearly black", name, draw, *weak)
    page = ("", "dark on white", "photograph", "photograph of a board")
    for width in (1, 2, 4, 8, 16):
        add("frame", f"frame {width} px at the edge", framed(width), *page)
    for width, inset in ((1, 6), (2, 8), (4, 10), (8, 6), (16, 8)):
        add("frame", f"frame {width} px, {inset} in", framed(width, inset, 0.55 if width == 16 else 0.62), *page)
    for width in (1, 2, 4, 8):
        add("frame", f"box {width} px, 20 in", framed(width, 20, 0.6), *page)
        add("frame", f"open box {width} px", open_box(width), *page)
        add("frame", f"box {width} px that touches", touching_box(width), *page)
    add("frame", "box 3 px, 60 in", framed(3, 60, 0.4), *page)
    add("frame", "tight box 3 px", framed(3, 44, 0.64), *page)
    for width, gap in ((2, 12), (4, 8), (6, 20), (2, -2), (4, -3), (8, -4), (6, 2)):
        add("line", f"underlined {width} px, gap {gap}", underlined(width, gap), *page)
    add("line", "underlined 4 px, gap 8, whole width", underlined(4, 8, 1.0), *page)
    add("line", "underlined 4 px, gap -3, whole width", underlined(4, -3, 1.0), *page)
    add("line", "underlined 5 px, tilted", underlined(5, 6, 0.7, tilt=0.03), *page)
    add("line", "underlined 5 px, short", underlined(5, 6, 0.5), *page)
    for spacing, thickness, level in ((28, 1, 0.6), (28, 2, 0.6), (40, 2, 1.0), (20, 1, 1.0), (56, 3, 0.8)):
        add("ruled", f"ruled {spacing}/{thickness} at {level}", ruled(spacing, thickness, level), *page)
        add("ruled", f"squared {spacing}/{thickness} at {level}", ruled(spacing, thickness, level, squared=True), *page)
    for shape in ("rounded", "ellipse", "double"):
        for width in (2, 5):
            add("frame", f"{shape} frame {width} px", outlined(shape, width), *page)
    add("frame", "dashed box 3 px", outlined("rounded", 3, dash=9), *page)
    add("frame", "dashed double box 2 px", outlined("double", 2, dash=5), *page)
    add("ruled", "squares of 5 mm, light", ruled(34, 2, 0.35, squared=True), *page)
    for place in ("dot", "comma", "specks"):
        add("one", f"with {place}", with_dot(place), *page)
    add("one", "another of half its size", smaller_beside(0.33), *page)
    for space in (0.1, 0.25, 0.5):
        add("several", f"two digits, gap {space}", pair(space), *page, several=True)
    add("several", "sheet of 20", sheet(4, 5), *page, several=True)
    add("several", "sheet of 6", sheet(2, 3), *page, several=True)
    add("several", "two in a column", sheet(2, 1), *page, several=True)
    add("one", "small others in a corner", with_small_others(), *page)
    add("one", "broken by 3 px", broken(3), *page)
    add("one", "broken by 8 px", broken(8), *page)
    for size in (12, 16, 20, 28):
        for pen in (0.04, 0.07):
            add("pen", f"bold {pen} in {size}x{size}", bold(pen, size, size), *both)
    for size in (100, 300, 1000, 2000):
        add("pen", f"hairline 1 px in {size}", one_pixel_thin(size * 6 // 10, size), *both)
    add("pen", "hairline 2 px", one_pixel_thin(280, 400, width=2), "photograph", "photograph of a board")
    for pen in (0.03, 0.06, 0.09):
        add("pen", f"bold {pen}, 280", bold(pen, round(0.7 * CANVAS), CANVAS), *page)
    for kind in SCENES:
        if kind != "huge":
            add("photograph", kind, photographed(kind))
    return groups


FINISHES: dict[str, Callable[[NDArray[np.floating], np.random.Generator], NDArray[np.floating]]] = {
    "": lambda grey, _: grey,
    "dark on white": dark_on_bright,
    "0/1": integers(1),
    "0/1 dark on bright": integers(1, inverted=True),
    "0-16": integers(16),
    "0-16 dark on bright": integers(16, inverted=True),
    "0-3": integers(3),
    "0-100": integers(100),
    "/255 twice": twice_divided,
    "photograph": camera(),
    "photograph of a board": camera(inverted=False),
}


def images_of(kind: Kind, count: int) -> list[tuple[Grey, int, str]]:
    """Make images of a kind: grey, digit, name of the digit's file."""
    images = []
    for number, (ink, levels, digit, name) in enumerate(sample_inks()[:: max(1, len(SAMPLE_FILES) // count)]):
        random = np.random.default_rng([sum(kind.name.encode()), number])
        grey = np.clip(kind.finish(kind.draw(ink, levels, random), random), 0, 1).astype(np.float32)
        images.append((grey, digit, name))
    return images


@functools.cache
def sample_inks() -> list[tuple[Ink, NDArray[np.uint8], int, str]]:
    """The test digits: smooth ink, 28x28 levels, class, name."""
    samples = []
    for file in SAMPLE_FILES:
        with Image.open(file) as image:
            levels = np.asarray(image)
        samples.append((ink_of(levels), levels, int(file.stem[0]), file.stem))
    return samples


def any_ink(random: np.random.Generator) -> Ink:
    """One of the test digits."""
    return sample_inks()[int(random.integers(len(SAMPLE_FILES)))][0]


def count_kind(network: nn.Module, kind: Kind, count: int) -> Count:
    """Prepare and read all images of a kind."""
    result = Count(kind.name)
    for grey, digit, name in images_of(kind, count):
        result.total += 1
        try:
            image = prepare_digit(grey, 28, 28)
        except ClientError as error:
            result.refused += 1
            if kind.several != isinstance(error, SeveralDigits):
                result.mistakes.append(f"{name}: {type(error).__name__}")
            continue
        logits, _ = predict_and_explain(network, torch.from_numpy(image.pixels)[None, None], [()])
        probability = float(softmax(logits).max())
        result.warned += bool(image.warnings)
        if kind.several or int(logits.argmax()) != digit:
            result.wrong += 1
            result.sure += bool(probability > SURE and not image.warnings)
            result.mistakes.append(f"{name}: {int(logits.argmax())} at {probability:.2f}{' warned' if image.warnings else ''}")
    return result


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.research.kinds",
        description="Count wrong answers by kind of image, without a server.",
        epilog="example:\n  %(prog)s --groups frame,line --mistakes",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--groups", default="", help="groups of kinds, with commas; all without it")
    parser.add_argument("--images", type=int, default=len(SAMPLE_FILES), help="of each kind, at most")
    parser.add_argument("--mistakes", action="store_true", help="name every image that was read wrong or wrongly refused")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make, prepare, read, count. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    network = load_committed_network()
    groups = kinds()
    chosen = arguments.groups.split(",") if arguments.groups else list(groups)
    unknown = set(chosen) - set(groups)
    if unknown:
        print(f"error: expected groups of {', '.join(groups)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    print("| kind | wrong | sure and wrong | refused | warned | images |\n| --- | --- | --- | --- | --- | --- |")
    for group in chosen:
        for kind in tqdm(groups[group], desc=group, unit="kind", disable=None):
            result = count_kind(network, kind, arguments.images)
            print(
                f"| {kind.name} | {result.wrong} | {result.sure} | {result.refused} | {result.warned} | {result.total} |",
                flush=True,
            )
            if arguments.mistakes and result.mistakes:
                print("    " + "; ".join(result.mistakes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
