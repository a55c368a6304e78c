"""Digits of habits that MNIST lacks, drawn for testing.

They share nothing with those that training sees (`model/strokes.py`): hand-placed points with a spline through them instead of
random curves, a broad nib that is held at an angle instead of a round pen with pressure, and the paper is warped instead of the
strokes. What comes out is ink at a resolution that shows the pen, to be framed, or photographed and preprocessed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.interpolate import make_interp_spline

Point = tuple[float, float]  # x and y, y downwards; a digit stands in a box of 1 by 1
Strokes = Sequence[Sequence[Point]]
Ink = NDArray[np.float64]  # (h, w), how much of each pixel is covered by ink, 0-1

HEIGHT = 120  # pixels of the digit, before it is warped
MARGIN = 40
NIB = (0.06, 0.17)  # its length, in heights of the digit
NIB_FLATNESS = (0.5, 1.0)  # its width by its length
UNSTEADINESS = 0.012  # standard deviation of each point, in heights of the digit
WARP = 0.035  # standard deviation of the paper's displacement, in heights of the digit
WARP_SCALE = 0.25  # how far apart places are that are displaced independently


@dataclass(frozen=True, slots=True)
class DrawnHabit:
    """One way of writing a digit, by some hands."""

    digit: int
    hands: tuple[Strokes, ...]


HABITS: dict[str, DrawnHabit] = {
    "0": DrawnHabit(0, (
        [[(0.55, 0.02), (0.3, 0.1), (0.2, 0.45), (0.28, 0.85), (0.5, 1.0), (0.72, 0.88), (0.8, 0.5), (0.72, 0.12), (0.5, 0.03)]],
        [[(0.66, 0.1), (0.4, 0.0), (0.18, 0.3), (0.16, 0.7), (0.4, 0.99), (0.7, 0.86), (0.84, 0.45), (0.7, 0.1), (0.48, 0.06)]],
    )),
    "1": DrawnHabit(1, (
        [[(0.52, 0.0), (0.5, 0.3), (0.5, 0.7), (0.48, 1.0)]],
        [[(0.6, 0.0), (0.54, 0.35), (0.46, 0.7), (0.42, 1.0)]],
    )),
    "1, long flag": DrawnHabit(1, (
        [[(0.14, 0.48), (0.36, 0.26), (0.58, 0.0)], [(0.58, 0.0), (0.58, 0.5), (0.57, 1.0)]],
        [[(0.2, 0.62), (0.42, 0.34), (0.6, 0.02)], [(0.6, 0.02), (0.56, 0.55), (0.52, 1.0)]],
        [[(0.08, 0.38), (0.34, 0.26), (0.6, 0.0)], [(0.6, 0.0), (0.6, 0.45), (0.62, 1.0)]],
        [[(0.28, 0.78), (0.44, 0.42), (0.58, 0.0)], [(0.58, 0.0), (0.6, 0.5), (0.62, 1.0)]],
        [[(0.1, 0.52), (0.34, 0.38), (0.62, 0.0)], [(0.62, 0.0), (0.6, 0.5), (0.6, 1.0)]],
        [[(0.12, 0.32), (0.42, 0.22), (0.56, 0.0)], [(0.56, 0.0), (0.52, 0.5), (0.46, 1.0)]],
    )),
    "1, foot": DrawnHabit(1, (
        [[(0.36, 0.18), (0.52, 0.0)], [(0.52, 0.0), (0.52, 0.5), (0.52, 0.98)], [(0.28, 0.99), (0.5, 1.0), (0.78, 0.98)]],
        [[(0.4, 0.1), (0.54, 0.02)], [(0.54, 0.02), (0.5, 0.5), (0.48, 0.96)], [(0.2, 0.98), (0.46, 0.95), (0.76, 0.96)]],
    )),
    "1, long flag and foot": DrawnHabit(1, (
        [[(0.16, 0.42), (0.36, 0.24), (0.54, 0.0)], [(0.54, 0.0), (0.54, 0.5), (0.54, 0.98)],
         [(0.26, 1.0), (0.54, 0.98), (0.84, 1.0)]],
        [[(0.2, 0.56), (0.42, 0.3), (0.58, 0.02)], [(0.58, 0.02), (0.54, 0.5), (0.5, 0.97)],
         [(0.3, 0.96), (0.5, 0.98), (0.74, 0.96)]],
    )),
    "2": DrawnHabit(2, (
        [[(0.2, 0.22), (0.4, 0.02), (0.68, 0.08), (0.74, 0.32), (0.5, 0.66), (0.18, 0.97)],
         [(0.18, 0.97), (0.5, 0.96), (0.84, 0.98)]],
        [[(0.24, 0.3), (0.3, 0.08), (0.58, 0.0), (0.76, 0.2), (0.62, 0.52), (0.36, 0.8), (0.16, 0.94), (0.24, 0.84), (0.44, 0.9),
          (0.66, 0.99), (0.86, 0.88)]],
    )),
    "3": DrawnHabit(3, (
        [[(0.22, 0.12), (0.48, 0.0), (0.72, 0.14), (0.66, 0.36), (0.4, 0.46)],
         [(0.4, 0.46), (0.7, 0.52), (0.8, 0.76), (0.56, 0.98), (0.2, 0.92)]],
        [[(0.22, 0.02), (0.5, 0.03), (0.74, 0.02)], [(0.74, 0.02), (0.58, 0.2), (0.42, 0.38)],
         [(0.42, 0.38), (0.7, 0.46), (0.8, 0.7), (0.6, 0.96), (0.2, 0.94)]],
    )),
    "4, open": DrawnHabit(4, (
        [[(0.28, 0.04), (0.24, 0.3), (0.18, 0.54)], [(0.18, 0.54), (0.5, 0.56), (0.86, 0.52)],
         [(0.68, 0.16), (0.68, 0.55), (0.66, 1.0)]],
        [[(0.22, 0.0), (0.18, 0.3), (0.28, 0.5), (0.5, 0.54), (0.7, 0.46)], [(0.74, 0.02), (0.72, 0.5), (0.7, 1.0)]],
    )),
    "4, closed": DrawnHabit(4, (
        [[(0.66, 0.02), (0.4, 0.36), (0.12, 0.68)], [(0.12, 0.68), (0.5, 0.68), (0.9, 0.67)],
         [(0.66, 0.02), (0.66, 0.5), (0.66, 1.0)]],
        [[(0.56, 0.0), (0.34, 0.3), (0.16, 0.6)], [(0.16, 0.6), (0.5, 0.62), (0.86, 0.58)],
         [(0.6, 0.04), (0.6, 0.5), (0.58, 1.0)]],
    )),
    "4, small loop": DrawnHabit(4, (
        [[(0.58, 0.0), (0.4, 0.16), (0.26, 0.36)], [(0.26, 0.36), (0.5, 0.38), (0.82, 0.36)],
         [(0.58, 0.0), (0.57, 0.5), (0.54, 1.0)]],
        [[(0.6, 0.04), (0.42, 0.18), (0.2, 0.44)], [(0.2, 0.44), (0.5, 0.44), (0.86, 0.4)],
         [(0.62, 0.02), (0.62, 0.5), (0.6, 1.0)]],
        [[(0.56, 0.02), (0.36, 0.22), (0.28, 0.4), (0.46, 0.42), (0.78, 0.34)], [(0.58, 0.0), (0.56, 0.5), (0.5, 1.0)]],
        [[(0.58, 0.0), (0.4, 0.1), (0.3, 0.26), (0.44, 0.32), (0.74, 0.26)], [(0.6, 0.0), (0.58, 0.5), (0.56, 1.0)]],
        [[(0.54, 0.0), (0.36, 0.2), (0.24, 0.46)], [(0.24, 0.46), (0.48, 0.5), (0.72, 0.44)],
         [(0.56, 0.02), (0.58, 0.5), (0.58, 1.0)]],
    )),
    "4, one stroke": DrawnHabit(4, (
        [[(0.36, 0.0), (0.24, 0.3), (0.2, 0.5), (0.5, 0.54), (0.8, 0.38), (0.76, 0.12), (0.64, 0.2), (0.6, 0.6), (0.56, 1.0)]],
        [[(0.3, 0.04), (0.16, 0.56)], [(0.16, 0.56), (0.56, 0.54), (0.86, 0.42), (0.84, 0.2), (0.7, 0.1), (0.62, 0.4),
         (0.6, 1.0)]],
    )),
    "5": DrawnHabit(5, (
        [[(0.76, 0.03), (0.52, 0.02), (0.32, 0.04)], [(0.32, 0.04), (0.28, 0.24), (0.26, 0.42)],
         [(0.26, 0.42), (0.52, 0.36), (0.76, 0.54), (0.72, 0.86), (0.44, 1.0), (0.18, 0.9)]],
        [[(0.82, 0.02), (0.52, 0.06), (0.36, 0.16), (0.3, 0.4), (0.54, 0.42), (0.76, 0.6), (0.66, 0.92), (0.36, 0.99),
         (0.16, 0.9)]],
    )),
    "6": DrawnHabit(6, (
        [[(0.66, 0.02), (0.38, 0.24), (0.22, 0.62), (0.34, 0.94), (0.62, 0.96), (0.76, 0.74), (0.58, 0.54), (0.26, 0.66)]],
        [[(0.5, 0.0), (0.3, 0.3), (0.2, 0.7), (0.32, 0.96), (0.58, 0.98), (0.72, 0.8), (0.62, 0.62), (0.4, 0.6), (0.22, 0.74)]],
    )),
    "7": DrawnHabit(7, (
        [[(0.16, 0.06), (0.5, 0.06), (0.84, 0.04)], [(0.84, 0.04), (0.62, 0.46), (0.44, 1.0)]],
        [[(0.18, 0.2), (0.2, 0.06)], [(0.2, 0.06), (0.5, 0.08), (0.82, 0.04)], [(0.82, 0.04), (0.66, 0.5), (0.6, 1.0)]],
    )),
    "7, cross bar": DrawnHabit(7, (
        [[(0.14, 0.06), (0.5, 0.06), (0.84, 0.04)], [(0.84, 0.04), (0.64, 0.46), (0.46, 1.0)],
         [(0.34, 0.52), (0.6, 0.5), (0.86, 0.5)]],
        [[(0.16, 0.1), (0.5, 0.02), (0.8, 0.06)], [(0.8, 0.06), (0.66, 0.5), (0.6, 1.0)],
         [(0.4, 0.48), (0.64, 0.5), (0.9, 0.46)]],
        [[(0.14, 0.22), (0.18, 0.06)], [(0.18, 0.06), (0.5, 0.08), (0.86, 0.04)], [(0.86, 0.04), (0.56, 0.52), (0.36, 1.0)],
         [(0.3, 0.48), (0.56, 0.5), (0.8, 0.46)]],
        [[(0.12, 0.16), (0.3, 0.03), (0.54, 0.1), (0.86, 0.02)], [(0.86, 0.02), (0.6, 0.42), (0.5, 0.7), (0.48, 1.0)],
         [(0.22, 0.58), (0.56, 0.52), (0.9, 0.46)]],
        [[(0.2, 0.04), (0.5, 0.05), (0.8, 0.02)], [(0.8, 0.02), (0.62, 0.5), (0.5, 1.0)],
         [(0.4, 0.36), (0.66, 0.37), (0.92, 0.34)]],
        [[(0.2, 0.08), (0.5, 0.05), (0.8, 0.04)], [(0.8, 0.04), (0.56, 0.5), (0.3, 1.0)],
         [(0.2, 0.64), (0.46, 0.62), (0.74, 0.6)]],
    )),
    "8": DrawnHabit(8, (
        [[(0.7, 0.14), (0.48, 0.0), (0.28, 0.16), (0.42, 0.4), (0.68, 0.62), (0.72, 0.86), (0.48, 1.0), (0.26, 0.86), (0.36, 0.6),
          (0.64, 0.38), (0.72, 0.14)]],
        [[(0.5, 0.0), (0.3, 0.12), (0.32, 0.36), (0.5, 0.46), (0.7, 0.34), (0.7, 0.1), (0.5, 0.0)],
         [(0.5, 0.46), (0.26, 0.6), (0.26, 0.88), (0.5, 1.0), (0.76, 0.88), (0.74, 0.6), (0.5, 0.46)]],
    )),
    "9": DrawnHabit(9, (
        [[(0.74, 0.18), (0.5, 0.02), (0.26, 0.2), (0.34, 0.44), (0.6, 0.44), (0.75, 0.2)],
         [(0.75, 0.2), (0.72, 0.6), (0.66, 1.0)]],
        [[(0.7, 0.1), (0.42, 0.04), (0.26, 0.28), (0.42, 0.5), (0.64, 0.4), (0.74, 0.1)],
         [(0.74, 0.1), (0.66, 0.55), (0.5, 1.0)]],
    )),
    "9, curled tail": DrawnHabit(9, (
        [[(0.74, 0.18), (0.5, 0.02), (0.26, 0.2), (0.34, 0.44), (0.6, 0.44), (0.75, 0.2)],
         [(0.75, 0.2), (0.78, 0.6), (0.7, 0.9), (0.46, 1.0), (0.24, 0.9)]],
        [[(0.72, 0.14), (0.44, 0.02), (0.24, 0.24), (0.4, 0.46), (0.66, 0.38), (0.75, 0.16)],
         [(0.75, 0.16), (0.76, 0.6), (0.6, 0.96), (0.36, 0.98), (0.22, 0.84), (0.26, 0.76)]],
        [[(0.78, 0.22), (0.54, 0.04), (0.28, 0.14), (0.26, 0.36), (0.5, 0.46), (0.76, 0.26)],
         [(0.76, 0.26), (0.82, 0.66), (0.76, 0.94), (0.5, 1.02), (0.16, 0.96)]],
        [[(0.7, 0.12), (0.45, 0.0), (0.25, 0.2), (0.42, 0.42), (0.68, 0.32), (0.72, 0.14)],
         [(0.72, 0.14), (0.82, 0.55), (0.78, 0.88), (0.5, 1.0), (0.2, 0.88), (0.16, 0.72)]],
        [[(0.66, 0.1), (0.44, 0.02), (0.3, 0.16), (0.42, 0.32), (0.64, 0.26), (0.68, 0.1)],
         [(0.68, 0.1), (0.84, 0.5), (0.8, 0.86), (0.48, 1.0), (0.12, 0.86)]],
        [[(0.76, 0.2), (0.48, 0.04), (0.24, 0.26), (0.4, 0.52), (0.7, 0.42), (0.78, 0.2)],
         [(0.78, 0.2), (0.8, 0.62), (0.66, 0.94), (0.42, 0.98), (0.3, 0.86)]],
    )),
}  # fmt: skip


def draw_habit(habit: str, seed: Sequence[int]) -> Ink:
    """Draw one digit.

    Args:
        habit: one of HABITS.
        seed: the same seed gives the same digit; it chooses the hand, the nib and the paper's warp.
    Returns:
        float64 (h, w), cropped to the ink; the digit is about HEIGHT pixels high.
    """
    hands = HABITS[habit].hands
    random = np.random.default_rng([sum(habit.encode()), *seed])
    return draw_ink(hands[random.integers(len(hands))], random)


def draw_ink(strokes: Strokes, random: np.random.Generator) -> Ink:
    """Draw smooth strokes through hand-placed points with a broad nib, and warp the paper: float64 (h, w), cropped to the ink."""
    width, slant, angle = random.uniform(0.65, 1.2), random.uniform(-0.12, 0.35), math.radians(random.uniform(-6, 6))
    cos, sin = math.cos(angle), math.sin(angle)
    hand = np.array([[width, 0], [-slant, 1]]) @ np.array([[cos, sin], [-sin, cos]])  # of a row (x, y), from the right
    drawn = [_smooth((np.array(points) - 0.5 + random.normal(0, UNSTEADINESS, (len(points), 2))) @ hand) for points in strokes]
    corner = np.vstack(drawn).min(axis=0)
    right, bottom = np.ceil((np.vstack(drawn).max(axis=0) - corner) * HEIGHT).astype(int) + 2 * MARGIN
    canvas = Image.new("L", (int(right), int(bottom)))
    pen = ImageDraw.Draw(canvas)
    nib = _nib(random)
    for points in drawn:
        for x, y in (points - corner) * HEIGHT + MARGIN:
            pen.polygon([(x + dx, y + dy) for dx, dy in nib], fill=255)
    return _crop(_warp(np.asarray(canvas) / 255, random))


def _nib(random: np.random.Generator) -> NDArray[np.float64]:
    """Corners of an ellipse, held at an angle: (24, 2), pixels."""
    length = random.uniform(*NIB) * HEIGHT
    radii = np.array([length, length * random.uniform(*NIB_FLATNESS)]) / 2
    angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    held = random.uniform(0, math.pi)
    x, y = radii[0] * np.cos(angles), radii[1] * np.sin(angles)
    return np.stack([x * math.cos(held) - y * math.sin(held), x * math.sin(held) + y * math.cos(held)], axis=1)


def _smooth(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The spline through some points, less than a pixel between its own: (n, 2) -> (m, 2)."""
    steps = np.maximum(np.linalg.norm(np.diff(points, axis=0), axis=1), 1e-6)
    along = np.concatenate([[0], np.cumsum(np.sqrt(steps))])  # centripetal: it does not overshoot
    spline = make_interp_spline(along, points, k=min(3, len(points) - 1))
    return np.asarray(spline(np.linspace(0, along[-1], 2 + int(1.5 * HEIGHT * steps.sum()))))


def _warp(cover: Ink, random: np.random.Generator) -> Ink:
    """Displace every place of the paper by a smooth random field."""
    sigma = WARP_SCALE * HEIGHT
    fields = [ndimage.gaussian_filter(random.normal(0, 1, cover.shape), sigma, mode="wrap") for _ in range(2)]
    amplitude = random.uniform(0, WARP) * HEIGHT
    places = [axis + amplitude * field / field.std() for axis, field in zip(np.indices(cover.shape), fields, strict=True)]
    return np.asarray(ndimage.map_coordinates(cover, places, order=1, mode="constant"))


def _crop(cover: Ink) -> Ink:
    ys, xs = np.nonzero(cover > 0.1)
    return cover[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
