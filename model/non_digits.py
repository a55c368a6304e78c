"""Images that are no digits, for training: letters, shapes, scribbles, textures.

Letters, Greek letters and shapes are drawn as `model/strokes.py` draws digits; beside them there are scribbles, textures, blobs,
and what may become of digits: several at once, lying on their side, dark on bright. What a digit may look like is left out: no O,
no l, no Z, no circle. The non-digits that tests draw (`model/drawn_non_digits.py`) share nothing with these.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from model.framing import INK_SIDE, SIZE, frame_ink
from model.strokes import Random, Stroke, render

JITTER = 0.05  # standard deviation of each point, in units of the box
ROUNDINGS = 3  # times that a round stroke's corners are cut

Point = tuple[float, float]
Glyph = list[tuple[bool, list[Point]]]  # strokes: whether it is round, and its corners, y downwards in a box of 1 by 1
Images = NDArray[np.uint8]  # (N, 28, 28), ink bright on dark


def _sharp(*corners: Point) -> tuple[bool, list[Point]]:
    return False, list(corners)


def _round(*corners: Point) -> tuple[bool, list[Point]]:
    return True, list(corners)


def _ring(x: float, y: float, across: float, down: float) -> tuple[bool, list[Point]]:
    """A closed oval around a point."""
    sides = [(x, y - down), (x + across, y - down), (x + across, y + down), (x - across, y + down), (x - across, y - down)]
    return True, [*sides, (x, y - down)]


LETTERS: dict[str, Glyph] = {
    "A": [_sharp((0, 1), (0.5, 0), (1, 1)), _sharp((0.2, 0.62), (0.8, 0.62))],
    "E": [_sharp((0.8, 0), (0.1, 0), (0.1, 1), (0.8, 1)), _sharp((0.1, 0.5), (0.7, 0.5))],
    "F": [_sharp((0.85, 0), (0.1, 0), (0.1, 1)), _sharp((0.1, 0.48), (0.7, 0.48))],
    "H": [_sharp((0.1, 0), (0.1, 1)), _sharp((0.9, 0), (0.9, 1)), _sharp((0.1, 0.5), (0.9, 0.5))],
    "K": [_sharp((0.1, 0), (0.1, 1)), _sharp((0.85, 0), (0.1, 0.55), (0.9, 1))],
    "M": [_sharp((0, 1), (0.1, 0), (0.5, 0.7), (0.9, 0), (1, 1))],
    "N": [_sharp((0.1, 1), (0.1, 0), (0.9, 1), (0.9, 0))],
    "R": [_sharp((0.1, 1), (0.1, 0)), _round((0.1, 0), (0.9, 0), (0.9, 0.5), (0.1, 0.5)), _sharp((0.3, 0.5), (0.9, 1))],
    "T": [_sharp((0, 0), (1, 0)), _sharp((0.5, 0), (0.5, 1))],
    "V": [_sharp((0, 0), (0.5, 1), (1, 0))],
    "W": [_sharp((0, 0), (0.25, 1), (0.5, 0.3), (0.75, 1), (1, 0))],
    "X": [_sharp((0.1, 0), (0.9, 1)), _sharp((0.9, 0), (0.1, 1))],
    "f": [_round((0.8, 0.1), (0.5, -0.15), (0.35, 0.2), (0.35, 1)), _sharp((0.1, 0.45), (0.7, 0.42))],
    "h": [_sharp((0.15, 0), (0.15, 1)), _round((0.15, 0.65), (0.5, 0.35), (0.85, 0.5), (0.8, 1))],
    "k": [_sharp((0.15, 0), (0.15, 1)), _sharp((0.7, 0.4), (0.15, 0.7), (0.75, 1))],
    "m": [
        _sharp((0, 0), (0, 0.8)),
        _round((0, 0.3), (0.25, -0.15), (0.5, 0.1), (0.5, 0.8)),
        _round((0.5, 0.3), (0.75, -0.15), (1, 0.1), (1, 0.8)),
    ],
    "n": [_sharp((0.1, 0), (0.1, 1)), _round((0.1, 0.4), (0.5, -0.2), (0.9, 0.1), (0.9, 1))],
    "p": [_sharp((0.15, 0), (0.15, 1)), _round((0.15, 0.15), (0.5, -0.1), (1, 0.25), (0.6, 0.6), (0.15, 0.45))],
    "r": [_sharp((0.2, 0.1), (0.2, 1)), _round((0.2, 0.5), (0.4, 0), (0.8, 0.1))],
    "w": [_round((0, 0), (0.1, 1), (0.5, 1), (0.5, 0.3)), _round((0.5, 0.3), (0.5, 1), (0.9, 1), (1, 0))],
    "x": [_round((0, 0.1), (0.3, 0), (0.7, 1), (1, 0.9)), _sharp((0.9, 0), (0.1, 1))],
    "e": [_round((0.1, 0.5), (0.9, 0.5), (0.9, 0), (0.1, 0), (0, 0.5), (0.1, 1), (0.6, 1), (0.9, 0.85))],
    "a": [_round((0.9, 0.1), (0.5, -0.1), (0, 0.3), (0.2, 1), (0.8, 0.8), (0.9, 0.1)), _round((0.9, 0.1), (0.85, 0.9), (1.1, 1))],
    "in": [_sharp((0, 0.2), (0, 1)), _sharp((0.35, 0.2), (0.35, 1)), _round((0.35, 0.5), (0.6, 0.1), (0.95, 0.3), (0.95, 1))],
}

GREEK: dict[str, Glyph] = {
    "Gamma": [_sharp((0.9, 0.15), (0.9, 0), (0.1, 0), (0.1, 1))],
    "Pi": [_sharp((0, 0), (1, 0)), _sharp((0.2, 0), (0.2, 1)), _sharp((0.8, 0), (0.8, 1))],
    "Sigma": [_sharp((0.9, 0), (0.1, 0), (0.6, 0.5), (0.1, 1), (0.95, 1))],
    "Xi": [_sharp((0.1, 0), (0.9, 0)), _sharp((0.25, 0.5), (0.75, 0.5)), _sharp((0.1, 1), (0.9, 1))],
    "Psi": [_round((0, 0), (0.05, 0.7), (0.95, 0.7), (1, 0)), _sharp((0.5, 0), (0.5, 1))],
    "Omega": [_sharp((0, 1), (0.3, 1)), _round((0.3, 1), (-0.2, 0.3), (0.2, -0.1), (0.8, -0.1), (1.2, 0.3), (0.7, 1)),
              _sharp((0.7, 1), (1, 1))],
    "omega": [_round((0.2, 0), (-0.2, 0.8), (0.45, 1.2), (0.5, 0.4)), _round((0.5, 0.4), (0.55, 1.2), (1.2, 0.8), (0.8, 0))],
    "pi": [_round((0, 0.15), (0.2, 0), (1, 0.05)), _round((0.3, 0.05), (0.3, 0.6), (0.15, 1)),
           _round((0.7, 0.05), (0.65, 0.7), (0.75, 1), (0.95, 0.9))],
    "psi": [_round((0, 0), (0.1, 0.7), (0.9, 0.7), (1, 0)), _sharp((0.55, -0.2), (0.45, 1.1))],
    "xi": [_round((0.8, 0), (0.1, -0.05), (0.1, 0.4), (0.7, 0.35)),
           _round((0.7, 0.35), (0, 0.35), (0, 0.8), (0.9, 0.75), (0.6, 1.1))],
    "mu": [_sharp((0.1, 0), (0, 1.3)), _round((0.1, 0), (0.1, 0.9), (0.7, 0.9), (0.8, 0)),
           _round((0.8, 0), (0.75, 0.8), (1, 0.8))],
    "alpha": [_round((1, 0), (0.6, 0.9), (0, 1.1), (0, -0.1), (0.6, 0), (0.75, 0.9), (1.05, 0.95))],
    "eta": [_round((0, 0.1), (0.15, 0), (0.15, 0.8)), _round((0.15, 0.4), (0.5, -0.2), (0.8, 0), (0.75, 1.4))],
    "Delta": [_sharp((0.5, 0), (0, 1), (1, 1), (0.5, 0))],
    "chi": [_round((0, 0), (0.3, 0), (0.7, 1.3), (1, 1.3)), _sharp((1, 0), (0, 1.3))],
}  # fmt: skip

SHAPES: dict[str, Glyph] = {
    "plus": [_sharp((0.5, 0), (0.5, 1)), _sharp((0, 0.5), (1, 0.5))],
    "asterisk": [_sharp((0.5, 0), (0.5, 1)), _sharp((0, 0.25), (1, 0.75)), _sharp((1, 0.25), (0, 0.75))],
    "star": [_sharp((0.5, 0), (0.8, 1), (0, 0.35), (1, 0.35), (0.2, 1), (0.5, 0))],
    "hash": [_sharp((0.3, 0), (0.3, 1)), _sharp((0.7, 0), (0.7, 1)), _sharp((0, 0.3), (1, 0.3)), _sharp((0, 0.7), (1, 0.7))],
    "grid": [
        *(_sharp((x, 0), (x, 1)) for x in (0, 0.33, 0.67, 1)),
        *(_sharp((0, y), (1, y)) for y in (0, 0.33, 0.67, 1)),
    ],
    "arrow right": [_sharp((0, 0.5), (1, 0.5)), _sharp((0.6, 0.15), (1, 0.5), (0.6, 0.85))],
    "arrow left": [_sharp((1, 0.5), (0, 0.5)), _sharp((0.4, 0.15), (0, 0.5), (0.4, 0.85))],
    "arrow up": [_sharp((0.5, 0), (0.5, 1)), _sharp((0.15, 0.4), (0.5, 0), (0.85, 0.4))],
    "arrow down": [_sharp((0.5, 0), (0.5, 1)), _sharp((0.15, 0.6), (0.5, 1), (0.85, 0.6))],
    "square": [_sharp((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))],
    "crossed square": [_sharp((0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (1, 1)), _sharp((1, 0), (0, 1))],
    "rhombus": [_sharp((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5), (0.5, 0))],
    "triangle down": [_sharp((0, 0), (1, 0), (0.5, 1), (0, 0))],
    "house": [_sharp((0, 1), (0, 0.45), (0.5, 0), (1, 0.45), (1, 1), (0, 1))],
    "heart": [_round((0.5, 0.25), (0.4, -0.15), (-0.15, -0.05), (0.05, 0.5), (0.5, 1)),
              _round((0.5, 0.25), (0.6, -0.15), (1.15, -0.05), (0.95, 0.5), (0.5, 1))],
    "zigzag": [_sharp((0, 0), (0.25, 0.6), (0.5, 0), (0.75, 0.6), (1, 0))],
    "wave": [_round((0, 0.3), (0.2, -0.1), (0.4, 0.1), (0.6, 0.5), (0.8, 0.5), (1, 0.1))],
    "chevron right": [_sharp((0, 0), (1, 0.5), (0, 1))],
    "chevron left": [_sharp((1, 0), (0, 0.5), (1, 1))],
    "bracket": [_sharp((0.5, 0), (0, 0), (0, 1), (0.5, 1))],
    "bracket that closes": [_sharp((0, 0), (0.5, 0), (0.5, 1), (0, 1))],
    "pentagon": [_sharp((0.5, 0), (1, 0.4), (0.8, 1), (0.2, 1), (0, 0.4), (0.5, 0))],
    "dash": [_sharp((0, 0.5), (1, 0.5))],
    "two lines": [_sharp((0, 0.3), (1, 0.3)), _sharp((0, 0.7), (1, 0.7))],
    "two bars": [_sharp((0.3, 0), (0.3, 1)), _sharp((0.75, 0), (0.75, 1))],
    "three lines": [_sharp((0, 0.1), (1, 0.1)), _sharp((0, 0.5), (1, 0.5)), _sharp((0, 0.9), (1, 0.9))],
    "three bars": [_sharp((0.1, 0), (0.1, 1)), _sharp((0.5, 0), (0.5, 1)), _sharp((0.9, 0), (0.9, 1))],
    "spiral": [_round((0.5, 0.5), (0.7, 0.5), (0.6, 0.8), (0.2, 0.7), (0.2, 0.2), (0.9, 0.1), (1, 0.9), (0.2, 1.1), (-0.1, 0.6),
                      (0, 0))],
    "face": [_ring(0.5, 0.5, 0.5, 0.5), _sharp((0.33, 0.3), (0.33, 0.42)), _sharp((0.67, 0.3), (0.67, 0.42)),
             _round((0.25, 0.65), (0.5, 0.9), (0.75, 0.65))],
    "rings": [_ring(0.5, 0.5, 0.5, 0.5), _ring(0.5, 0.5, 0.25, 0.25)],
    "crossed circle": [_ring(0.5, 0.5, 0.5, 0.5), _sharp((0.5, 0), (0.5, 1)), _sharp((0, 0.5), (1, 0.5))],
    "percent": [_ring(0.2, 0.2, 0.18, 0.2), _ring(0.8, 0.8, 0.18, 0.2), _sharp((0.9, 0), (0.1, 1))],
    "man": [_ring(0.5, 0.15, 0.15, 0.15), _sharp((0.5, 0.3), (0.5, 0.7)), _sharp((0.2, 0.4), (0.8, 0.4)),
            _sharp((0.2, 1), (0.5, 0.7), (0.8, 1))],
    "brackets": [_sharp((0.3, 0), (0, 0), (0, 1), (0.3, 1)), _sharp((0.7, 0), (1, 0), (1, 1), (0.7, 1))],
    "bowl": [_round((0, 0), (0, 1), (1, 1), (1, 0)), _sharp((-0.1, 0), (1.1, 0))],
}  # fmt: skip


def _draw_glyphs(glyphs: dict[str, Glyph], count: int, random: Random) -> Images:
    chosen = random.integers(len(glyphs), size=count)
    names = list(glyphs)
    return render([_draw_glyph(glyphs[names[k]], random) for k in chosen], random)


def _draw_glyph(glyph: Glyph, random: Random) -> list[Stroke]:
    strokes = []
    for is_round, corners in glyph:
        path = np.array(corners) + random.normal(0, JITTER, (len(corners), 2))
        strokes.append(_cut_corners(path) if is_round else path)
    return strokes


def _cut_corners(path: Stroke) -> Stroke:
    """Round a line of corners (Chaikin): what it tends to is a quadratic B-spline between its ends."""
    for _ in range(ROUNDINGS):
        first, last = path[:1], path[-1:]
        quarter, rest = 0.75 * path[:-1] + 0.25 * path[1:], 0.25 * path[:-1] + 0.75 * path[1:]
        path = np.concatenate([first, np.stack([quarter, rest], axis=1).reshape(-1, 2), last])
    return path


def _draw_scribbles(count: int, random: Random) -> Images:
    """One to four strokes here and there; one alone is long, so that it is seldom a digit."""
    drawings = []
    for _ in range(count):
        strokes = int(random.integers(1, 5))
        drawing = []
        for _ in range(strokes):
            path = random.uniform(0, 1, (int(random.integers(9, 16) if strokes == 1 else random.integers(3, 8)), 2))
            drawing.append(_cut_corners(path) if random.random() < 0.6 else path)
        drawings.append(drawing)
    return render(drawings, random)


def _draw_marked_rings(count: int, random: Random) -> Images:
    """A ring with two to five marks in it, as a face has them, in no order; one mark alone may be a 0 of some habit."""
    drawings = []
    for _ in range(count):
        drawing = [_draw_glyph([_ring(0.5, 0.5, random.uniform(0.35, 0.55), 0.5)], random)[0]]
        for _ in range(random.integers(2, 6)):
            place, half = random.uniform(0.28, 0.72, 2), random.normal(0, 0.06, 2)
            drawing.append(np.stack([place - half, place + half]))
        drawings.append(drawing)
    return render(drawings, random)


def _draw_textures(count: int, random: Random) -> Images:
    """Noise of all grains, stripes and chequers, on the whole image or in the ink's box alone, hard or soft."""
    y, x = np.indices((SIZE, SIZE)) - (SIZE - 1) / 2
    images = []
    for _ in range(count):
        angle, period = random.uniform(0, np.pi), random.uniform(2.5, 12)
        along, across = (np.cos(angle) * x + np.sin(angle) * y), (np.cos(angle) * y - np.sin(angle) * x)
        kind = random.integers(4)
        if kind < 2:
            pattern = ndimage.gaussian_filter(random.normal(0, 1, (SIZE, SIZE)), random.choice([0, 0.7, 1.2, 2, 3]), mode="wrap")
            pattern /= pattern.std()
        elif kind == 2:
            pattern = 1.4 * np.sin(2 * np.pi * along / period + random.uniform(0, 6))
        else:
            pattern = 2 * np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period + random.uniform(0, 6))
        levels = np.clip(0.5 + random.uniform(0.3, 2) * (pattern + random.uniform(-1, 1)), 0, 1)
        if random.random() < 0.6:  # in the ink's box: a square or an oval
            half = INK_SIDE / 2 * random.uniform(0.6, 1, 2)
            inside = np.hypot(x / half[0], y / half[1]) < 1 if random.random() < 0.5 else (abs(x) < half[0]) & (abs(y) < half[1])
            levels = levels * inside
        images.append(np.rint(255 * levels * random.choice([1, 1, random.uniform(0, 1)])).astype(np.uint8))
    return np.array(images, dtype=np.uint8).reshape(-1, SIZE, SIZE)


def _draw_blobs(count: int, random: Random) -> Images:
    """Filled shapes with smooth or straight sides, some with a hole; compact, so that none is a 1."""
    images = []
    for _ in range(count):
        angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
        waves = sum(random.normal(0, 0.35 / k) * np.cos(k * angles + random.uniform(0, 6)) for k in range(2, 7))
        corners = random.integers(3, 7)
        straight = np.cos(np.pi / corners) / np.cos(angles % (2 * np.pi / corners) - np.pi / corners)
        radii = straight if random.random() < 0.4 else np.clip(1 + random.uniform(0, 1) * np.asarray(waves), 0.3, None)
        side = 60
        y, x = np.indices((side, side)) - (side - 1) / 2
        turned = np.arctan2(y, x) + random.uniform(0, 6)
        aspect = random.uniform(0.7, 1.4)
        distance = np.hypot(x * aspect, y) / (side / 2.6)
        filled = distance < np.interp(turned % (2 * np.pi), angles, radii, period=2 * np.pi)
        images.append(frame_ink(_crop(filled.astype(np.float64))))
    return np.array(images, dtype=np.uint8).reshape(-1, SIZE, SIZE)


def _crop(ink: NDArray[np.float64]) -> NDArray[np.float64]:
    ys, xs = np.nonzero(ink > 0.1 * ink.max())
    return ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def _combine_digits(digits: Images, count: int, random: Random) -> Images:
    """Two or three digits beside each other, or two below each other, as one."""
    images = []
    for _ in range(count):
        parts = [_crop(digits[k] / 255) for k in random.integers(len(digits), size=random.integers(2, 4))]
        below = len(parts) == 2 and random.random() < 0.25
        if below:
            parts = [part.T for part in parts]
        height = max(len(part) for part in parts)
        gap = int(random.integers(0, 6))
        columns = []
        for part in parts:
            top = (height - len(part)) // 2
            columns += [np.pad(part, ((top, height - len(part) - top), (0, gap)))]
        line = np.hstack(columns)[:, : -gap or None]
        if random.random() < 0.6:  # with a bolder pen, as where hair lines are drawn again
            line = ndimage.grey_dilation(line, 3)
        images.append(frame_ink(line.T if below else line))
    return np.array(images, dtype=np.uint8).reshape(-1, SIZE, SIZE)


def _lay_digits(digits: Images, count: int, random: Random) -> Images:
    """Digits on their side, turned to the left or to the right."""
    chosen = digits[random.integers(len(digits), size=count)]
    turned = np.where(
        (random.random(count) < 0.5)[:, None, None], np.rot90(chosen, axes=(1, 2)), np.rot90(chosen, -1, axes=(1, 2))
    )
    return np.asarray(turned)


def _invert_digits(digits: Images, count: int, random: Random) -> Images:
    """Dark ink on bright paper."""
    return np.asarray(255 - digits[random.integers(len(digits), size=count)])


KINDS: dict[str, Callable[[int, Random], Images]] = {
    "letters": lambda count, random: _draw_glyphs(LETTERS, count, random),
    "Greek letters": lambda count, random: _draw_glyphs(GREEK, count, random),
    "shapes": lambda count, random: _draw_glyphs(SHAPES, count, random),
    "marked rings": _draw_marked_rings,
    "scribbles": _draw_scribbles,
    "textures": _draw_textures,
    "blobs": _draw_blobs,
}
KINDS_OF_DIGITS: dict[str, Callable[[Images, int, Random], Images]] = {
    "several digits": _combine_digits,
    "lying digits": _lay_digits,
    "dark on bright": _invert_digits,
}
SHARES = {
    "letters": 0.25, "Greek letters": 0.1, "shapes": 0.2, "marked rings": 0.05, "scribbles": 0.1, "textures": 0.1, "blobs": 0.05,
    "several digits": 0.1, "lying digits": 0.04, "dark on bright": 0.01,
}  # fmt: skip


def draw_non_digits(count: int, seed: int, digits: Images, labels: NDArray[np.int64]) -> tuple[Images, list[str]]:
    """Draw images that are no digits, of all kinds by SHARES, in random order.

    Args:
        count: of images.
        seed: the same seed and digits give the same images.
        digits: uint8 (M, 28, 28), of which some are made.
        labels: int64 (M,); a 0 on its side is a 0 still, and an 8 may be one for the eye.
    Returns:
        uint8 (N, 28, 28), and the kind of each.
    """
    random = np.random.default_rng(seed)
    counts = random.multinomial(count, list(SHARES.values()))
    images, kinds = [], []
    lying = digits[~np.isin(labels, (0, 8))]
    for kind, number in zip(SHARES, counts, strict=True):
        if kind in KINDS:
            images.append(KINDS[kind](int(number), random))
        else:
            images.append(KINDS_OF_DIGITS[kind](lying if kind == "lying digits" else digits, int(number), random))
        kinds += [kind] * int(number)
    order = random.permutation(count)
    return np.concatenate(images)[order], [kinds[k] for k in order]
