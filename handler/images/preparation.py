"""A preparation: an affine map with a transpose, from the image as it was sent to the network's pixels, and back.

    pixels = placement(slope * (rows @ image @ columns.T)) + offset

The image is resampled, and what of it counts is placed among the network's pixels; see `Placement`. The map is the derivative of
what was done to this image: where a pixel was saturated, cleaned away or drawn anew, its weight is 0, and no gradient goes back.

Holds the type and the two preparations that look for nothing: the image as it is, and the image scaled. `digits` finds the digit
in an image. Knows nothing of image files, of HTTP or of TorchServe.
"""

import functools
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from handler.images.thumbnail import Thumbnail

Array = NDArray[np.float32]

DENSE_PIXELS = 4096  # of smaller images the zeros among the weights cost less than leaving them out


class Prepare(StrEnum):
    """Whether an image is preprocessed into what the network knows."""

    AUTO = "auto"
    NONE = "none"


WARNING_TYPES = ("FrameRemoved", "Inverted", "OtherInk", "TouchesBorder", "UnlikeTraining")


@dataclass(frozen=True, slots=True)
class ImageWarning:
    """What may make an answer wrong, and cannot be known here.

    Attributes:
        type: one of WARNING_TYPES, for programs.
        message: for people.
    """

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where resampled pixels go among the network's: target_weight * (rows @ (weight * working[source]) @ columns.T).

    Attributes:
        rows: float32 (h, h''), weights along y, of a drawing that may be larger than what was resampled.
        columns: float32 (w, w''), along x.
        source: intp (h'', w''), index of the resampled pixel that decides about one of the drawing: that in its place, or in the
            middle of the stroke that was thickened.
        weight: float32 (h'', w''), share of that pixel's change that goes on: 0 where it is saturated or cleaned away.
        target_weight: float32 (h, w), the same of the network's pixels: 0 where one is saturated.
    """

    rows: Array
    columns: Array
    source: NDArray[np.intp]
    weight: Array
    target_weight: Array

    def apply(self, working: Array) -> Array:
        """Place resampled pixels: (h', w') -> (h, w)."""
        drawn = self.weight * working.ravel()[self.source]
        return np.asarray(self.target_weight * (self.rows @ drawn @ self.columns.T), dtype=np.float32)

    def pull_back(self, gradient: Array, shape: tuple[int, int]) -> Array:
        """Take the transpose: (h, w) -> resampled pixels of this shape."""
        drawn = self.weight * (self.rows.T @ (self.target_weight * gradient) @ self.columns)
        working = np.bincount(self.source.ravel(), drawn.ravel(), math.prod(shape))
        return np.asarray(working.reshape(shape), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image, ready for the network, and what was done to it: pixels = placement(slope * (rows @ grey @ columns.T)) + offset.

    Attributes:
        rows: float32 (h', H), resampling along y.
        columns: float32 (w', W), along x.
        slope: intensity per unit of grey; negative where the image is inverted.
        offset: float32 (h, w): the paper's level, and all that cleaning and clipping changed at this image.
        pixels: float32 (h, w): the prepared image, intensity in [0, 1].
        steps: what was done, in words and in order; empty where the image has the framing already.
        window: left, top, right, bottom of the network's image, in pixels of the image as sent; it may reach beyond that image.
        placement: of the resampled pixels among the network's; None where they are the network's.
        ink_box: left, top, right, bottom of the ink, in pixels of the image; None where it was not looked for.
        threshold: contrast to the paper, 0-1, from which a pixel was taken for ink; None likewise.
        source: what the image was sent as, such as "PNG image".
        sent: float32 (H, W), its grey levels as sent, where maps are asked for in its own pixels.
        thumbnail: the image as sent, made small, where maps are drawn on it.
        warnings: what was met on the way that may make the answer wrong.
    """

    rows: Array
    columns: Array
    slope: float
    offset: Array
    pixels: Array
    steps: tuple[str, ...]
    window: tuple[float, float, float, float]
    placement: Placement | None = None
    ink_box: tuple[int, int, int, int] | None = None
    threshold: float | None = None
    source: str = "pixels"
    sent: Array | None = None
    thumbnail: Thumbnail | None = None
    warnings: tuple[ImageWarning, ...] = ()

    @property
    def inverted(self) -> bool:
        """Whether dark ink was made bright."""
        return self.slope < 0

    def describe(self) -> dict[str, Any]:
        """Say for people what was done: the reply's `preparation`."""
        description: dict[str, Any] = {"source": self.source, "steps": list(self.steps), "inverted": self.inverted}
        if self.ink_box is not None:
            description |= {"ink_box": list(self.ink_box), "threshold": self.threshold}
        return description

    def apply(self, grey: Array) -> Array:
        """Prepare an image: (H, W) grey levels -> (h, w) intensities, with everything but the grey levels treated as constant."""
        working = np.float32(self.slope) * resample_both(self.rows, grey, self.columns)
        return np.asarray((self.placement.apply(working) if self.placement else working) + self.offset, dtype=np.float32)

    def pull_back(self, gradient: Array) -> Array:
        """Carry gradients by the network's pixels back to the image's grey levels: (..., h, w) -> (..., H, W).

        The chain rule through placement, saturation, cleaning, inversion and resampling. What was decided by looking at the whole
        image (geometry, stretch, the paper's level, which pixels are ink) is treated as constant.
        """
        maps = np.empty((*gradient.shape[:-2], self.rows.shape[1], self.columns.shape[1]), dtype=np.float32)
        for index in np.ndindex(gradient.shape[:-2]):
            shape = (self.rows.shape[0], self.columns.shape[0])
            working = self.placement.pull_back(gradient[index], shape) if self.placement else gradient[index]  # (h', w')
            maps[index] = np.float32(self.slope) * resample_both(self.rows.T, working, self.columns.T)
        return maps


def leave_unchanged(grey: Array, source: str = "pixels") -> PreparedImage:
    """Give an image that has the framing already: it goes to the network bit for bit."""
    rows, columns, offset = _identity(*grey.shape)
    return PreparedImage(rows, columns, slope=1.0, offset=offset, pixels=grey, steps=(), window=whole(grey), source=source)


def whole(grey: Array) -> tuple[float, float, float, float]:
    """The box of a whole image: left, top, right, bottom."""
    return 0.0, 0.0, float(grey.shape[1]), float(grey.shape[0])


@functools.lru_cache(maxsize=16)
def _identity(height: int, width: int) -> tuple[Array, Array, Array]:
    """Rows, columns and offset of the map that changes nothing; all requests share them."""
    parts = np.eye(height, dtype=np.float32), np.eye(width, dtype=np.float32), np.zeros((height, width), dtype=np.float32)
    for part in parts:
        part.flags.writeable = False
    return parts


def scale_image(grey: Array, height: int, width: int, source: str = "pixels") -> PreparedImage:
    """Scale an image to the network's size, and nothing else."""
    if grey.shape == (height, width):
        return leave_unchanged(grey, source)
    rows, columns = resample(grey.shape[0], 0, grey.shape[0], height), resample(grey.shape[1], 0, grey.shape[1], width)
    step = f"scaled from {grey.shape[1]}x{grey.shape[0]} to {width}x{height}"
    pixels: Array = np.clip(resample_both(rows, grey, columns), 0, 1)  # rounding may leave the range
    return PreparedImage(
        rows, columns, slope=1.0, offset=np.zeros_like(pixels), pixels=pixels, steps=(step,), window=whole(grey), source=source
    )


def resample_both(rows: Array, image: Array, columns: Array) -> Array:
    """Take rows @ image @ columns.T in which nearly all weights are zero: (h, H), (H, W), (w, W) -> (h, w)."""
    if image.size <= DENSE_PIXELS:
        return np.asarray(rows @ image @ columns.T, dtype=np.float32)
    return np.ascontiguousarray((sparse.csr_array(columns) @ (sparse.csr_array(rows) @ image).T).T, dtype=np.float32)


def resample(source: int, start: float, stop: float, target: int) -> Array:
    """Weights (target, source) that resample a part of a line: linear, with antialiasing where it shrinks. Rows sum to 1."""
    scale = (stop - start) / target
    reach = max(scale, 1.0)  # half width of the triangle filter, in source pixels
    wanted = start + (np.arange(target) + 0.5) * scale
    distances = np.abs(np.arange(source)[None, :] + 0.5 - wanted[:, None])
    weights = np.clip(1 - distances / reach, 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)
