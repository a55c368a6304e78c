"""Ink of any pen -> strokes as MNIST's pens drew them. Knows neither where they will be placed nor what they were drawn on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from handler.images.preparation import Array

FINEST_STROKE, BOLDEST_STROKE = 2.4, 4.0  # pixels of the network's image; MNIST's are 2 to 4
RIDGE_SLOPE = 0.6  # of depth into the ink: 0 on a stroke's middle line, 0.7 towards a right-angled corner, 1 elsewhere
MARGIN = 20  # pixels of the working copy: hair lines at its border are drawn beyond it
CLEARANCE = 1.0  # pixels of the network's image around the ink that still count as its soft edge
CLEAN_SHARE = 0.1  # of full contrast: less is paper, so that neither its grain nor its light leaves a trace
STEEPEST_SHARE = 0.3  # of full contrast, where the intensity rises most; from there on it saturates softly

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Strokes:
    """Strokes in a working copy that is MARGIN wider on each side.

    Attributes:
        intensity: float32 (h', w'), in [0, 1], with their soft edges.
        weight: float32 (h', w'), its derivative by the share of full contrast: 0 where a pixel is saturated or cleaned away.
        source: intp (h', w'), index of the working copy's pixel whose contrast that is: its own, or one near by where strokes
            were made bolder or finer.
        mask: bool (h', w'), without the edges.
    """

    intensity: Array
    weight: Array
    source: NDArray[np.intp]
    mask: Mask


def draw_strokes(mask: Mask, others: Mask, contrast: Array, full: float, size: float) -> Strokes:
    """Draw the digit with a pen like those of MNIST: hair lines as wide as its finest, and dark; bold strokes peeled.

    Args:
        mask: bool (h', w'), the digit's ink.
        others: bool (h', w'), ink that is not the digit's.
        contrast: float32 (h', w'), to the paper.
        full: contrast that becomes 1.
        size: of the digit in the network's image, in its pixels.
    """
    mask, others = np.pad(mask, MARGIN), np.pad(others, MARGIN)
    share = np.pad(contrast, MARGIN) / full
    depth = ndimage.distance_transform_edt(mask)
    slope_y, slope_x = np.gradient(depth)
    middle = mask & ((np.hypot(slope_y, slope_x) < RIDGE_SLOPE) | (depth >= ndimage.maximum_filter(depth, 3)))
    length = extent(middle)  # a stroke of width w ends w / 2 beyond its middle line
    finest, boldest = (width / 2 * length / (size - width) for width in (FINEST_STROKE, BOLDEST_STROKE))
    outside = ndimage.distance_transform_edt(~mask)
    edge = max(CLEARANCE * extent(mask) / size, 1)
    kept = (outside - depth <= edge) & ~others
    soft, slope = _soft(share)
    intensity, weight = (np.where(kept, part, 0).astype(np.float32) for part in (soft, slope))
    height, width = mask.shape[0] - 2 * MARGIN, mask.shape[1] - 2 * MARGIN
    y, x = np.ogrid[: mask.shape[0], : mask.shape[1]]  # the margin is paper, whose weight is 0
    source = np.clip(y - MARGIN, 0, height - 1) * width + np.clip(x - MARGIN, 0, width - 1)
    usual = float(np.median(depth[middle])) - 0.5  # half of the stroke's width
    pixels = max(0, round(finest - usual)) or min(0, round(boldest - usual))
    if not pixels:
        return Strokes(intensity, weight, source, mask)
    origin = _widen(intensity, pixels)
    drawn = outside <= pixels if pixels > 0 else depth > -pixels
    if pixels > 0:
        hearts = _hearts_of_loops(mask, outside)
        origin = np.where(hearts, np.arange(mask.size).reshape(mask.shape), origin)
        drawn &= ~hearts
    return Strokes(intensity.ravel()[origin], weight.ravel()[origin], source.ravel()[origin], drawn)


def _widen(intensity: Array, pixels: int) -> NDArray[np.intp]:
    """Find for each pixel the largest intensity within an octagon around it. Unlike a mask this follows every small change.

    Args:
        pixels: radius of the octagon; where it is negative, the smallest intensity counts: strokes become finer.
    Returns:
        intp (h', w'), its index.
    """
    value, origin = (intensity if pixels > 0 else -intensity), np.arange(intensity.size).reshape(intensity.shape)
    for step in range(abs(pixels)):
        if pixels < 0 and step % 2 == 0:  # a cross: of what was there before, so that no corner is reached
            before = value, origin
            for axes in ((0,), (1,)):
                for shift in (1, -1):
                    value, origin = _larger(value, origin, *before, shift, axes)
        else:  # a square, and for bolder strokes every second time its diagonals too: also of what this step has moved
            for along in [(0,), (1,)] if step % 2 else [(0,), (1,), (0, 1)]:
                for shift in (1, -1):
                    value, origin = _larger(value, origin, value, origin, shift, along)
    return origin


def _larger(
    value: Array, origin: NDArray[np.intp], other: Array, other_origin: NDArray[np.intp], shift: int, axes: tuple[int, ...]
) -> tuple[Array, NDArray[np.intp]]:
    """Take for each pixel the larger of its value and the one that is shifted to it, with its origin."""
    moved = np.roll(other, [shift] * len(axes), axes)
    wins = moved > value
    return np.where(wins, moved, value), np.where(wins, np.roll(other_origin, [shift] * len(axes), axes), origin)


def _soft(share: Array) -> tuple[Array, Array]:
    """Clean and saturate without a kink: a small change of grey then does what the derivative says.

    Args:
        share: (h', w'), of full contrast.
    Returns:
        the intensity, from 0 at CLEAN_SHARE and below to 1 at full contrast and above, in two parabolas, and its derivative.
    """
    width, rise, fall = 1 - CLEAN_SHARE, STEEPEST_SHARE - CLEAN_SHARE, 1 - STEEPEST_SHARE
    below, above = np.clip(share - CLEAN_SHARE, 0, rise), np.clip(1 - share, 0, fall)
    intensity = np.where(share < STEEPEST_SHARE, below**2 / (rise * width), 1 - above**2 / (fall * width))
    return intensity, 2 / width * np.minimum(below / rise, above / fall)


def _hearts_of_loops(mask: Mask, outside: Array) -> Mask:
    """What stays paper in closed loops, however fine they are: all that is farther from their line than half of the farthest.

    Args:
        mask: bool (h', w'), ink that does not touch the border.
        outside: (h', w'), distance from the ink.
    """
    holes, count = ndimage.label(~mask)
    farthest = np.asarray(ndimage.maximum(outside, holes, np.arange(count + 1)))
    farthest[[0, holes[0, 0]]] = np.inf  # the ink itself, and the paper around the digit
    hearts: Mask = outside > farthest[holes] / 2
    return hearts


def extent(mask: Mask) -> int:
    """The longer side of what is set."""
    return max(int(np.ptp(np.flatnonzero(mask.any(axis=axis)))) + 1 for axis in (0, 1))
