"""Digits of habits that MNIST lacks, drawn stroke by stroke for training: a 1 with a long flag, a 7 with a cross bar.

Each habit is a recipe: lines, Bezier curves and arcs whose points are drawn at random, in a box of 1 by 1, y downwards. They are
slanted, stretched, turned and bent at random, drawn with a thin, normal or bold pen, and framed as MNIST's makers framed theirs:
the longer side of the ink is 20 pixels, its centre of mass lies at 14.5. Knows nothing of MNIST's images. The digits that tests
draw (`model/drawn_digits.py`) share nothing with these.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.framing import CENTRE, INK_SIDE, SIZE

Stroke = NDArray[np.float64]  # (n, 2), x and y
Random = np.random.Generator

PENS = {"thin": (1.5, 2.2), "normal": (2.2, 3.4), "bold": (3.4, 4.8)}  # width of the stroke, in pixels of the result
PEN_SHARES = (0.25, 0.5, 0.25)  # share of each pen
ASPECT = (0.6, 1.25)  # factor on the width
SLANT = (-0.15, 0.4)  # tangent; most hands slant to the right
MAX_ROTATION = math.radians(7)
MAX_BEND = 0.025  # amplitude of a slow wave through the whole digit, in units of the box
MAX_PRESSURE = 0.2  # relative change of the pen's width along the strokes, at most
SOFTNESS = (1.0, 1.8)  # pixels from full ink to none, across an edge
POINTS = 176  # discs of ink for an image, spread evenly along its strokes: less than half a pixel apart
CURVE_POINTS = 24
BATCH_SIZE = 64  # images drawn at once: 35 MB


@dataclass(frozen=True, slots=True)
class Habit:
    """One way of writing a digit."""

    digit: int
    draw: Callable[[Random], list[Stroke]]


def _line(*points: tuple[float, float]) -> Stroke:
    return np.array(points)


def _curve(*controls: tuple[float, float]) -> Stroke:
    """The Bezier curve of these control points."""
    degree = len(controls) - 1
    t = np.linspace(0, 1, CURVE_POINTS)[:, None]
    weights = np.hstack([math.comb(degree, k) * t**k * (1 - t) ** (degree - k) for k in range(degree + 1)])
    return np.asarray(weights @ np.array(controls))


def _arc(centre: tuple[float, float], radii: tuple[float, float], start: float, sweep: float, *, shrink: float = 1.0) -> Stroke:
    """A part of an ellipse. Angles in degrees, 0 to the right, growing clockwise; `shrink` is the last radius by the first."""
    angles = np.radians(np.linspace(start, start + sweep, 2 * CURVE_POINTS))
    scale = np.linspace(1, shrink, len(angles))
    x, y = (centre[k] + radii[k] * scale * part for k, part in enumerate((np.cos(angles), np.sin(angles))))
    return np.stack([x, y], axis=1)


def _join(*paths: Stroke) -> Stroke:
    """Paths without lifting the pen: where one ends and the next begins, a straight line joins them."""
    return np.vstack(paths)


# --- the recipes, digit by digit


def _zero(random: Random) -> list[Stroke]:
    u = random.uniform
    sweep = u(335, 400) * random.choice([-1, 1])
    return [_arc((0.5, 0.5), (u(0.3, 0.45), 0.5), u(-140, -40), sweep, shrink=u(0.85, 1))]


def _flag(random: Random, *, long: bool) -> Stroke:
    """The up-stroke of a 1, which ends at the top of its stem. Steeper than a 7's bar."""
    u = random.uniform
    length, angle = (u(0.4, 0.85), math.radians(u(22, 55))) if long else (u(0.12, 0.35), math.radians(u(25, 70)))
    x, y = 0.5 - length * math.sin(angle), length * math.cos(angle)
    bow = u(-0.06, 0.1)
    return _curve((x, y), ((x + 0.5) / 2 + bow, y / 2 + bow), (0.5, 0))


def _stem(random: Random) -> Stroke:
    u = random.uniform
    return _curve((0.5, 0), (0.5 + u(-0.04, 0.04), 0.5), (0.5 + u(-0.05, 0.05), 1))


def _foot(random: Random) -> Stroke:
    u = random.uniform
    return _line((0.5 - u(0.12, 0.38), 1 + u(-0.03, 0.03)), (0.5 + u(0.12, 0.38), 1 + u(-0.04, 0.03)))


def _one(random: Random) -> list[Stroke]:
    return [_stem(random)]


def _one_with_short_flag(random: Random) -> list[Stroke]:
    return [_join(_flag(random, long=False), _stem(random))]


def _one_with_long_flag(random: Random) -> list[Stroke]:
    return [_join(_flag(random, long=True), _stem(random))]


def _one_with_foot(random: Random) -> list[Stroke]:
    return [*_one_with_short_flag(random), _foot(random)]


def _one_with_long_flag_and_foot(random: Random) -> list[Stroke]:
    return [*_one_with_long_flag(random), _foot(random)]


def _two_to_its_base(random: Random) -> Stroke:
    u = random.uniform
    turn = (u(0.78, 0.95), u(0.24, 0.4))
    top = _curve((u(0.05, 0.2), u(0.15, 0.35)), (u(0.05, 0.25), u(-0.15, 0)), (u(0.75, 1.05), u(-0.15, 0)), turn)
    return _join(top, _curve(turn, (turn[0] - 0.02, u(0.5, 0.65)), (u(0.3, 0.55), u(0.65, 0.85)), (u(0.05, 0.15), u(0.92, 1))))


def _two(random: Random) -> list[Stroke]:
    u = random.uniform
    return [_join(_two_to_its_base(random), _curve((0.1, 0.98), (0.5, u(0.88, 1.02)), (u(0.8, 1.05), u(0.92, 1.02))))]


def _two_with_loop(random: Random) -> list[Stroke]:
    u = random.uniform
    across, down = u(0.1, 0.2), u(0.06, 0.14)
    loop = _arc((0.12 + across * 0.6, 0.93), (across, down), 60, u(220, 300))
    return [_join(_two_to_its_base(random), loop, _curve((0.35, 0.9), (0.55, u(0.95, 1.1)), (u(0.85, 1.05), u(0.88, 1))))]


def _lower_bowl(random: Random, start: tuple[float, float]) -> Stroke:
    u = random.uniform
    return _curve(
        start, (u(0.85, 1.15), u(0.4, 0.55)), (u(0.85, 1.1), u(1, 1.12)), (u(0.3, 0.5), 1.05), (u(0, 0.15), u(0.8, 0.95))
    )


def _three(random: Random) -> list[Stroke]:
    u = random.uniform
    waist = (u(0.35, 0.55), u(0.42, 0.5))
    top = _curve((u(0.05, 0.2), u(0.06, 0.2)), (u(0.3, 0.45), u(-0.15, -0.05)), (u(0.85, 1.1), u(-0.05, 0.1)), (0.8, 0.42), waist)
    return [_join(top, _lower_bowl(random, waist))]


def _three_with_flat_top(random: Random) -> list[Stroke]:
    u = random.uniform
    waist = (u(0.35, 0.5), u(0.35, 0.45))
    return [_join(_line((u(0.05, 0.2), u(0, 0.05)), (u(0.75, 0.9), u(0, 0.04)), waist), _lower_bowl(random, waist))]


def _four_open(random: Random) -> list[Stroke]:
    u = random.uniform
    corner, stem = (u(0.05, 0.2), u(0.48, 0.68)), u(0.6, 0.8)
    left = _curve((u(0.15, 0.35), u(0, 0.1)), (corner[0] + u(-0.06, 0.1), 0.3), corner)
    bar = _curve(corner, (0.5, corner[1] + u(-0.05, 0.08)), (u(0.85, 1.05), corner[1] + u(-0.08, 0.04)))
    return [_join(left, bar), _line((stem, u(0, 0.3)), (stem + u(-0.1, 0.04), 1))]


def _four_closed(random: Random) -> list[Stroke]:
    u = random.uniform
    stem, bar = u(0.6, 0.75), u(0.58, 0.75)
    sides = _line((stem, 0), (u(0, 0.15), bar), (u(0.85, 1.05), bar + u(-0.04, 0.04)))
    return [sides, _line((stem, 0), (stem + u(-0.05, 0.03), 1))]


def _four_with_small_loop(random: Random) -> list[Stroke]:
    """The bar is high, so that what it closes is small and the stem below it long, as in a 9."""
    u = random.uniform
    stem, bar, left = u(0.55, 0.72), u(0.22, 0.52), u(0.08, 0.34)
    side = _curve((stem, 0), (left + u(0, 0.15), bar * u(0.4, 0.7)), (left, bar))
    across = _curve((left, bar), (0.5, bar + u(-0.03, 0.06)), (stem + u(0.08, 0.32), bar + u(-0.07, 0.04)))
    return [_join(side, across), _line((stem, u(0, 0.05)), (stem + u(-0.1, 0.04), 1))]


def _four_with_tiny_loop(random: Random) -> list[Stroke]:
    """The same with a loop that a bold pen fills, and rounded, as if it was drawn without stopping."""
    u = random.uniform
    stem, bar, left = u(0.5, 0.65), u(0.16, 0.36), u(0.15, 0.34)
    loop = _curve(
        (stem, 0), (left, bar * u(0.1, 0.5)), (left - 0.12, bar * 1.1), (left + 0.1, bar * u(1.1, 1.4)), (stem, bar * 1.05)
    )
    across = _line((stem, bar * 1.05), (stem + u(0.12, 0.35), bar * u(0.8, 1.05)))
    return [_join(loop, across), _line((stem, u(0, 0.05)), (stem + u(-0.12, 0.04), 1))]


def _four_in_one_stroke(random: Random) -> list[Stroke]:
    """From the left down, across, and back in a loop to the top of the stem."""
    u = random.uniform
    corner, stem = (u(0.05, 0.2), u(0.5, 0.68)), u(0.55, 0.7)
    left = _line((u(0.25, 0.45), u(0, 0.1)), corner)
    loop = _curve(corner, (1.0, corner[1] + u(-0.05, 0.05)), (u(0.95, 1.1), u(0.1, 0.3)), (stem, u(0, 0.2)))
    return [_join(left, loop, _line((stem, u(0.15, 0.3)), (stem + u(-0.08, 0.03), 1)))]


def _five(random: Random) -> list[Stroke]:
    u = random.uniform
    top, waist = (u(0.2, 0.35), u(0, 0.06)), (u(0.12, 0.26), u(0.36, 0.48))
    bowl = _curve(
        waist, (u(0.5, 0.7), u(0.2, 0.35)), (u(0.95, 1.15), u(0.4, 0.6)), (u(0.8, 1), 1.08), (0.35, 1.08), (u(0, 0.12), 0.88)
    )
    hat = _line((u(0.75, 1), u(-0.04, 0.06)), (top[0] + u(-0.02, 0.06), top[1]))
    return [_join(_line(top, waist), bowl), hat]


def _five_in_one_stroke(random: Random) -> list[Stroke]:
    u = random.uniform
    down = _curve((u(0.75, 1), u(0, 0.08)), (u(0.3, 0.5), u(-0.05, 0.05)), (u(0.2, 0.3), u(0, 0.15)), (u(0.15, 0.25), 0.45))
    bowl = _curve(
        (0.2, 0.45), (u(0.5, 0.7), u(0.25, 0.4)), (u(0.95, 1.15), 0.5), (u(0.8, 1), 1.08), (0.35, 1.08), (u(0, 0.12), 0.9)
    )
    return [_join(down, bowl)]


def _six(random: Random) -> list[Stroke]:
    u = random.uniform
    height, width = u(0.18, 0.28), u(0.28, 0.38)
    loop = _arc((0.46, 1 - height), (width, height), 180, -u(320, 390))
    down = _curve((u(0.55, 0.9), u(0, 0.08)), (u(0.25, 0.5), u(0, 0.25)), (u(0, 0.12), 0.5), (0.46 - width, 1 - height))
    return [_join(down, loop)]


def _seven_bar(random: Random) -> Stroke:
    u = random.uniform
    return _curve((u(0, 0.15), u(0, 0.1)), (0.45, u(-0.02, 0.12)), (0.88, u(0, 0.05)))


def _seven_stem(random: Random) -> Stroke:
    u = random.uniform
    return _curve((0.88, 0.03), (u(0.55, 0.78), u(0.35, 0.55)), (u(0.25, 0.6), 1))


def _seven(random: Random) -> list[Stroke]:
    return [_join(_seven_bar(random), _seven_stem(random))]


def _cross(random: Random, stem: Stroke) -> Stroke:
    """A bar through the middle of a stem."""
    u = random.uniform
    x, y = stem[int(len(stem) * u(0.35, 0.65))]
    tilt = u(-0.25, 0.08)
    left, right = u(0.14, 0.38), u(0.12, 0.36)
    return _line((x - left, y - left * tilt), (x + right, y + right * tilt))


def _seven_with_cross_bar(random: Random) -> list[Stroke]:
    stem = _seven_stem(random)
    return [_join(_seven_bar(random), stem), _cross(random, stem)]


def _hook(random: Random) -> Stroke:
    """The serif at the left end of a 7's bar."""
    u = random.uniform
    return _line((u(0, 0.1), u(0.14, 0.3)), (u(0.04, 0.12), 0.05))


def _seven_with_hook(random: Random) -> list[Stroke]:
    return [_join(_hook(random), _seven_bar(random), _seven_stem(random))]


def _seven_with_hook_and_cross_bar(random: Random) -> list[Stroke]:
    stem = _seven_stem(random)
    return [_join(_hook(random), _seven_bar(random), stem), _cross(random, stem)]


def _eight(random: Random) -> list[Stroke]:
    """One stroke that crosses itself, closed or open at its top."""
    u = random.uniform
    t = np.linspace(u(-0.1, 0.35), 2 * math.pi - u(-0.1, 0.35), 3 * CURVE_POINTS)
    y = 0.5 - 0.5 * np.cos(t) + u(-0.04, 0.04) * np.sin(t) ** 2
    width = u(0.24, 0.36) * (1 + u(-0.1, 0.5) * (y - 0.5))
    return [np.stack([0.5 + width * np.sin(2 * t), y], axis=1)]


def _eight_of_two_rings(random: Random) -> list[Stroke]:
    u = random.uniform
    upper = u(0.2, 0.25)
    rings = ((0.5 + u(-0.06, 0.06), upper, u(0.22, 0.32)), (0.5, 0.5 + upper, u(0.28, 0.38)))
    return [_arc((x, y), (width, min(y, 1 - y)), u(0, 360), u(345, 380)) for x, y, width in rings]


def _nine_loop(random: Random, heights: tuple[float, float] = (0.18, 0.3)) -> Stroke:
    u = random.uniform
    height, width = u(*heights), u(0.2, 0.38)
    return _arc((0.82 - width, height), (width, height), u(-50, 0), -u(330, 370), shrink=u(0.92, 1.0))


def _nine(random: Random) -> list[Stroke]:
    u = random.uniform
    return [_join(_nine_loop(random), _curve((0.82, u(0.15, 0.25)), (u(0.76, 0.86), 0.6), (u(0.55, 0.85), 1)))]


def _nine_with_curled_tail(random: Random) -> list[Stroke]:
    u = random.uniform
    end = (u(0, 0.35), u(0.68, 0.97))
    tail = _curve((0.82, 0.2), (u(0.75, 0.98), u(0.5, 0.8)), (u(0.75, 0.98), u(1.0, 1.18)), (u(0.1, 0.5), u(1, 1.16)), end)
    return [_join(_nine_loop(random), tail)]


def _nine_with_small_head_and_curled_tail(random: Random) -> list[Stroke]:
    """The tail is as wide as the loop or wider, and ends to the left of it."""
    u = random.uniform
    end = (u(-0.15, 0.3), u(0.74, 0.98))
    tail = _curve((0.82, 0.14), (u(0.8, 1.0), u(0.5, 0.8)), (u(0.8, 1.0), u(1.0, 1.18)), (u(0.1, 0.5), u(1, 1.16)), end)
    return [_join(_nine_loop(random, (0.11, 0.2)), tail)]


HABITS: dict[str, Habit] = {
    "0": Habit(0, _zero),
    "1": Habit(1, _one),
    "1, short flag": Habit(1, _one_with_short_flag),
    "1, long flag": Habit(1, _one_with_long_flag),
    "1, foot": Habit(1, _one_with_foot),
    "1, long flag and foot": Habit(1, _one_with_long_flag_and_foot),
    "2": Habit(2, _two),
    "2, looped": Habit(2, _two_with_loop),
    "3": Habit(3, _three),
    "3, flat top": Habit(3, _three_with_flat_top),
    "4, open": Habit(4, _four_open),
    "4, closed": Habit(4, _four_closed),
    "4, small loop": Habit(4, _four_with_small_loop),
    "4, tiny loop": Habit(4, _four_with_tiny_loop),
    "4, one stroke": Habit(4, _four_in_one_stroke),
    "5": Habit(5, _five),
    "5, one stroke": Habit(5, _five_in_one_stroke),
    "6": Habit(6, _six),
    "7": Habit(7, _seven),
    "7, cross bar": Habit(7, _seven_with_cross_bar),
    "7, hook": Habit(7, _seven_with_hook),
    "7, hook and cross bar": Habit(7, _seven_with_hook_and_cross_bar),
    "8": Habit(8, _eight),
    "8, two rings": Habit(8, _eight_of_two_rings),
    "9": Habit(9, _nine),
    "9, curled tail": Habit(9, _nine_with_curled_tail),
    "9, small head and curled tail": Habit(9, _nine_with_small_head_and_curled_tail),
}


def draw_strokes(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw digits, every habit equally often.

    Args:
        count: of images; the habits take turns.
        seed: the same seed gives the same images.
    Returns:
        uint8 (N, 28, 28), ink bright on dark, in the order of HABITS again and again; int64 (N,), the digits.
    """
    random = np.random.default_rng(seed)
    habits = list(itertools.islice(itertools.cycle(HABITS.values()), count))
    images = render([habit.draw(random) for habit in habits], random)
    return images, np.array([habit.digit for habit in habits], dtype=np.int64)


def render(drawings: Sequence[list[Stroke]], random: Random) -> NDArray[np.uint8]:
    """Draw strokes as one hand might: slanted, stretched, turned and bent at random, with one of PENS.

    Args:
        drawings: for each image its strokes, in a box of about 1 by 1.
    Returns:
        uint8 (N, 28, 28), ink bright on dark, framed as MNIST's images.
    """
    images = [np.zeros((0, SIZE, SIZE), dtype=np.uint8)]
    for first in range(0, len(drawings), BATCH_SIZE):
        points = np.stack([_spread(drawing) for drawing in drawings[first : first + BATCH_SIZE]])
        images.append(_draw(_distort(points, random), random))
    return np.concatenate(images)


def _spread(drawing: list[Stroke]) -> NDArray[np.float64]:
    """Points at equal distances along all strokes: (POINTS, 2)."""
    corners = np.vstack(drawing)
    steps = np.linalg.norm(np.diff(corners, axis=0), axis=1)
    steps[np.cumsum([len(path) for path in drawing])[:-1] - 1] = 0  # the pen is lifted
    along = np.concatenate([[0], np.cumsum(steps)])
    wanted = (np.arange(POINTS) + 0.5) / POINTS * along[-1]
    return np.stack([np.interp(wanted, along, corners[:, axis]) for axis in (0, 1)], axis=1)


def _distort(points: NDArray[np.float64], random: Random) -> NDArray[np.float64]:
    """Slant, stretch, turn and bend each drawing: (n, POINTS, 2) -> the same."""
    count = len(points)
    points = points - 0.5
    for axis in (0, 1):  # a slow wave along each axis moves the other
        phase, waves = random.uniform(0, 2 * math.pi, (count, 1)), random.uniform(0.5, 1.2, (count, 1))
        wave = np.sin(phase + 2 * math.pi * waves * points[:, :, 1 - axis])
        points[:, :, axis] += random.uniform(0, MAX_BEND, (count, 1)) * wave
    aspect, slant = random.uniform(*ASPECT, count), random.uniform(*SLANT, count)
    angle = random.uniform(-MAX_ROTATION, MAX_ROTATION, count)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.empty((count, 2, 2))  # of a row (x, y), from the right: stretched, slanted, then turned
    matrix[:, 0, 0], matrix[:, 0, 1] = cos * aspect, sin * aspect
    matrix[:, 1, 0], matrix[:, 1, 1] = -sin - slant * cos, cos - slant * sin
    return np.asarray(points @ matrix)


def _draw(points: NDArray[np.float64], random: Random) -> NDArray[np.uint8]:
    """Choose a pen for each drawing, frame it, draw it: (n, POINTS, 2) -> (n, 28, 28)."""
    count = len(points)
    widths = np.array(list(PENS.values()))[random.choice(len(PENS), count, p=PEN_SHARES)]
    radius = random.uniform(widths[:, 0], widths[:, 1])[:, None] / 2  # (n, 1)
    phase, waves = random.uniform(0, 2 * math.pi, (count, 1)), random.uniform(0.5, 1.5, (count, 1))
    pressure = random.uniform(0, MAX_PRESSURE, (count, 1)) * np.sin(phase + waves * np.linspace(0, 2 * math.pi, POINTS))
    softness = random.uniform(*SOFTNESS, (count, 1))
    reach = radius + softness / 2  # of the ink around a point

    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    scale = (INK_SIDE - 2 * reach) / (high - low).max(axis=2)  # (n, 1)
    points = (points - (low + high) / 2) * scale[:, :, None] + SIZE / 2
    cover = _cover(points, radius * (1 + pressure), softness)
    places = np.arange(SIZE) + 0.5
    mass = cover.sum(axis=(1, 2))[:, None]
    centre = np.stack([cover.sum(axis=1) @ places, cover.sum(axis=2) @ places], axis=1) / mass  # (n, 2)
    room = (SIZE - (high - low)[:, 0] * scale) / 2 - reach  # further, and the ink would leave the image
    points += np.clip(CENTRE - centre, -room, room)[:, None]
    cover = _cover(points, radius * (1 + pressure), softness)
    return np.asarray(np.rint(255 * cover / cover.max(axis=(1, 2), keepdims=True)).astype(np.uint8))


def _cover(points: NDArray[np.float64], radii: NDArray[np.float64], softness: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of each pixel discs of ink cover: (n, POINTS, 2), (n, POINTS), (n, 1) -> (n, 28, 28) in [0, 1]."""
    places = np.arange(SIZE, dtype=np.float32) + 0.5
    across, down = (np.square(places[:, None] - points[:, None, :, axis].astype(np.float32)) for axis in (0, 1))
    distances = np.sqrt(down[:, :, None] + across[:, None])  # (n, 28, 28, POINTS)
    depth = (radii[:, None, None].astype(np.float32) - distances).max(axis=3)
    return np.asarray(np.clip(depth / softness[:, :, None] + 0.5, 0, 1))
