"""How MNIST's makers framed a digit, and how to measure that on any images.

They fitted the ink into 20x20 with its aspect kept, and put its centre of mass into the middle of pixel 14 of 28x28. What all
images of a set have in common is measured in a few numbers; an image outside of them was framed in another way.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 28  # pixels of a side
INK_SIDE = 20.0  # pixels of the ink's longer side
CENTRE = 14.5  # of mass, along both axes; a pixel's middle is its index and a half
INK_LEVEL = 0.1  # of an image's maximum: brighter pixels are ink


@dataclass(frozen=True, slots=True)
class Framing:
    """What all images of a set have in common; an image that is outside is framed in another way.

    Attributes:
        ink_level: share of an image's maximum, above which a pixel is ink.
        centre: pixels, from which centres of mass are measured; a pixel's middle is its index and a half.
        shortest_side, longest_side: pixels of the longer side of the ink's box.
        centre_distance: pixels between `centre` and the centre of mass, the larger of the two axes, at most.
        lowest_maximum: intensity of the brightest pixel, at least.
        highest_margin_median, highest_margin: intensity of the outermost pixels: their median and the brightest, at most.
    """

    ink_level: float
    centre: float
    shortest_side: int
    longest_side: int
    centre_distance: float
    lowest_maximum: float
    highest_margin_median: float
    highest_margin: float

    @classmethod
    def of(cls, images: NDArray[np.uint8]) -> "Framing":
        """Measure a set of images: uint8 (N, 28, 28), ink bright on dark, none of them empty."""
        sides, distances, maxima, medians, margins = _measure(images)
        return cls(
            INK_LEVEL,
            CENTRE,
            int(sides.min()),
            int(sides.max()),
            float(distances.max()),
            float(maxima.min()),
            float(medians.max()),
            float(margins.max()),
        )

    def holds(self, images: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Whether each image is framed so: uint8 (N, 28, 28) -> bool (N,). An empty image is not."""
        sides, distances, maxima, medians, margins = _measure(images)
        return np.asarray(
            (sides >= self.shortest_side)
            & (sides <= self.longest_side)
            & (distances <= self.centre_distance)
            & (maxima >= self.lowest_maximum)
            & (medians <= self.highest_margin_median)
            & (margins <= self.highest_margin)
        )


Numbers = NDArray[np.float64]


def _measure(images: NDArray[np.uint8]) -> tuple[Numbers, Numbers, Numbers, Numbers, Numbers]:
    """Longer side, distance of the centre, maximum, median and maximum of the margin of each image, all (N,)."""
    pixels = images / np.float64(255)
    maxima = pixels.max(axis=(1, 2))
    is_ink = pixels > INK_LEVEL * maxima[:, None, None]
    sides = np.maximum(_extent(is_ink.any(axis=1)), _extent(is_ink.any(axis=2)))
    mass = np.maximum(pixels.sum(axis=(1, 2)), 1e-9)
    places = np.arange(pixels.shape[1]) + 0.5
    centres = np.stack([pixels.sum(axis=1) @ places, pixels.sum(axis=2) @ places]) / mass  # (2, N)
    distances = np.abs(centres - CENTRE).max(axis=0)
    margin = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], axis=1)  # (N, 4 * side - 4)
    return sides, distances, maxima, np.median(margin, axis=1), margin.max(axis=1)


def _extent(is_set: NDArray[np.bool_]) -> Numbers:
    """From the first to the last that is set, both counted, in each row: (N, n) -> (N,); 0 for none."""
    first, last = is_set.argmax(axis=1), is_set.shape[1] - is_set[:, ::-1].argmax(axis=1)
    return np.where(is_set.any(axis=1), last - first, 0).astype(np.float64)


def frame_ink(cover: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Frame a large image of ink as MNIST's makers did: (h, w) in [0, 1], cropped to its ink -> uint8 (28, 28)."""
    scale = INK_SIDE / max(cover.shape)
    ys, xs = (np.arange(side) + 0.5 for side in cover.shape)
    mass = cover.sum()
    rows = _place(len(ys), float(cover.sum(axis=1) @ ys / mass), scale)
    columns = _place(len(xs), float(cover.sum(axis=0) @ xs / mass), scale)
    placed = rows @ cover @ columns.T
    return np.asarray(np.rint(255 * placed / placed.max()), dtype=np.uint8)


def _place(side: int, centre: float, scale: float) -> NDArray[np.float64]:
    """Weights (28, side) that shrink a line by area, with `centre` at CENTRE, but with all of it inside."""
    target = min(max(CENTRE, centre * scale), SIZE - (side - centre) * scale)
    starts = (np.arange(side) - centre) * scale + target  # where each pixel begins in the result; it is `scale` wide
    edges = np.arange(SIZE)[:, None]
    overlap = np.minimum(starts + scale, edges + 1) - np.maximum(starts, edges)
    return np.asarray(np.clip(overlap, 0, None))
