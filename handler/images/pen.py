"""Ink of any pen -> strokes as MNIST's pens drew them. Knows neither where they will be placed nor what they were drawn on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from handler.images.preparation import Array

FINEST_STROKE, BOLDEST_STROKE = 2.5, 4.0  # pixels of the network's image: others are drawn as wide; MNIST's are 2 to 4
RIDGE_SLOPE = 0.6  # of depth into the ink: 0 on a stroke's middle line, 0.7 towards a right-angled corner, 1 elsewhere
MARGIN = 20  # pixels of the working copy: hair lines at its border are drawn beyond it
CLEARANCE = 1.5  # pixels of the network's image around the ink that still count as its soft edge
CLEAN_SHARE = 0.1  # of full contrast: less is paper, so that neither its grain nor its light leaves a trace

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Strokes:
    """Strokes in a working copy that is MARGIN wider on each side.

    Attributes:
        intensity: float32 (h', w'), in [0, 1], with their soft edges.
        mask: bool (h', w'), without the edges.
        weight: float32 (h', w'), derivative of the intensity by the contrast's share of full contrast: 0 where a pixel is
            saturated, cleaned away or drawn anew.
    """

    intensity: Array
    mask: Mask
    weight: Array


def draw_strokes(mask: Mask, others: Mask, contrast: Array, full: float, size: float) -> Strokes:
    """Draw the digit with a pen like those of MNIST: hair lines as wide and as dark as its finest, bold strokes peeled.

    Args:
        mask: bool (h', w'), the digit's ink.
        others: bool (h', w'), ink that is not the digit's.
        contrast: float32 (h', w'), to the paper.
        full: contrast that becomes 1.
        size: of the digit in the network's image, in its pixels.
    """
    mask, others = np.pad(mask, MARGIN), np.pad(others, MARGIN)
    contrast = np.pad(contrast, MARGIN)
    depth = ndimage.distance_transform_edt(mask)
    slope_y, slope_x = np.gradient(depth)
    middle = mask & ((np.hypot(slope_y, slope_x) < RIDGE_SLOPE) | (depth >= ndimage.maximum_filter(depth, 3)))
    length = extent(middle)  # a stroke of width w ends w / 2 beyond its middle line
    finest, boldest = (width / 2 * length / (size - width) for width in (FINEST_STROKE, BOLDEST_STROKE))
    outside = ndimage.distance_transform_edt(~mask)
    hair = (ndimage.distance_transform_edt(~middle) < finest) & ~_hearts_of_loops(mask, outside)
    peel = float(np.median(depth[middle])) - boldest
    edge = -peel if peel > 0 else max(CLEARANCE * extent(mask) / size, 1)
    kept = (outside - depth <= edge) & ~others & ~hair
    share = (contrast / full - CLEAN_SHARE) / (1 - CLEAN_SHARE)
    intensity = np.where(kept, np.clip(share, 0, 1), hair)
    weight = np.where(kept & (share > 0) & (share < 1), 1 / (1 - CLEAN_SHARE), 0)
    return Strokes(intensity.astype(np.float32), hair | (mask & kept), weight.astype(np.float32))


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
