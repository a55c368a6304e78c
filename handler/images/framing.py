"""Whether images already have the framing that the network was trained on: size, place and darkness of the ink.

What has it goes to the network bit for bit; everything else is prepared, numbers and image files alike. Knows nothing of how an
image is prepared.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Framing:
    """What the images of a training set have in common, ink bright on dark. Lengths are in pixels.

    The defaults are MNIST's. Of its 60,000 training images the longer side of the ink is 18 to 20, the centre of mass is at most
    0.52 from (14.5, 14.5) along either axis, and the maximum is at least 254 of 255. The limits here leave about a pixel of room
    for what other programs make by MNIST's recipe: all 70,000 images of both sets are within them. That the paper is dark, and
    on all sides, follows: were it brighter than INK_LEVEL, it would count as ink and make the ink's box too large.

    Attributes:
        height, width: of the image.
        shortest_ink, longest_ink: longer side of the box of all pixels brighter than `ink_level`, at least and at most.
        ink_level: share of the image's maximum from which a pixel counts as ink.
        centre_y, centre_x: where the centre of mass is, in pixels from the upper left corner; pixel k lies from k to k + 1.
        farthest_centre: distance of the centre of mass from there along each axis, at most.
        least_maximum: intensity of the brightest pixel, at least.
    """

    height: int = 28
    width: int = 28
    shortest_ink: int = 17
    longest_ink: int = 21
    ink_level: float = 0.1
    centre_y: float = 14.5
    centre_x: float = 14.5
    farthest_centre: float = 1.0
    least_maximum: float = 0.9

    @classmethod
    def from_settings(cls, settings: object) -> "Framing":
        """Make a framing of an archive's settings: some of the attributes by name, MNIST's for the others, or for all with None.

        Raises:
            ValueError: a name is no attribute, a value no number above zero, or no ink can have the size.
        """
        if settings is None:
            return cls()
        if not isinstance(settings, Mapping):
            raise ValueError(f"expected settings of a framing by name, got {settings!r}")  # a value of a setting
        names = {field.name: field.type for field in fields(cls)}
        for name, value in settings.items():
            if name not in names:
                raise ValueError(f"expected settings of a framing among {', '.join(names)}, got {name!r}")
            accepted = (int,) if names[name] is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, accepted) or not 0 < value < float("inf"):
                raise ValueError(f"expected a number above zero as {name} of a framing, got {value!r}")
        framing = cls(**settings)
        if framing.shortest_ink > framing.longest_ink:
            raise ValueError(
                f"expected shortest_ink of a framing up to its longest_ink, {framing.longest_ink}, got {framing.shortest_ink}"
            )
        return framing


MNIST_FRAMING = Framing()


def has_framing(grey: Array, framing: Framing = MNIST_FRAMING) -> bool:
    """Say of one image, float32 (H, W), ink bright on dark, whether it has the framing.

    The same as `have_framing` of a batch of one, in less than half of its time.
    """
    if grey.shape != (framing.height, framing.width):
        return False
    rows, columns = np.maximum.reduce(grey, axis=1), np.maximum.reduce(grey, axis=0)
    maximum = np.maximum.reduce(rows)
    if maximum < framing.least_maximum:
        return False
    threshold = framing.ink_level * maximum
    inked_rows, inked_columns = (rows > threshold).tobytes(), (columns > threshold).tobytes()
    longer = max(inked_rows.rfind(1) - inked_rows.find(1), inked_columns.rfind(1) - inked_columns.find(1)) + 1
    if not framing.shortest_ink <= longer <= framing.longest_ink:
        return False
    mass, moment_y, moment_x = (grey.ravel() @ _weights(framing)).tolist()
    return bool(max(abs(moment_y), abs(moment_x)) <= framing.farthest_centre * mass)


def have_framing(images: Array, framing: Framing = MNIST_FRAMING) -> NDArray[np.bool_]:
    """Say of each image of a batch, ink bright on dark, whether it has the framing.

    Args:
        images: float32 (N, H, W), intensity in [0, 1], of the framing's size.
    Returns:
        bool (N,).
    """
    weights = _weights(framing)
    rows, columns = images.max(axis=2), images.max(axis=1)  # (N, H), (N, W)
    maximum = rows.max(axis=1, keepdims=True)  # (N, 1)
    threshold = framing.ink_level * maximum
    longer = np.maximum(_length(rows > threshold), _length(columns > threshold))
    moments = (
        images.reshape(len(images), -1) @ weights
    )  # (N, 3): mass, and mass times its distance from the centre, along y and x
    off_centre = np.abs(moments[:, 1:]).max(axis=1)
    is_framed: NDArray[np.bool_] = (
        (longer >= framing.shortest_ink)
        & (longer <= framing.longest_ink)
        & (off_centre <= framing.farthest_centre * moments[:, 0])
        & (maximum[:, 0] >= framing.least_maximum)
    )
    return is_framed


def _length(profiles: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Distance from the first to the last that is set, both included, in each row of (N, L); L where none is."""
    lengths: NDArray[np.intp] = profiles.shape[1] - profiles[:, ::-1].argmax(axis=1) - profiles.argmax(axis=1)
    return lengths


@functools.lru_cache(maxsize=8)
def _weights(framing: Framing) -> Array:
    """Weights (H * W, 3) of a pixel in the mass and in its two moments around the framing's centre."""
    y, x = np.mgrid[: framing.height, : framing.width] + 0.5
    weights: Array = np.stack([np.ones_like(y), y - framing.centre_y, x - framing.centre_x], axis=-1).reshape(-1, 3)
    return weights.astype(np.float32)
