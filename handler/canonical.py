"""A picture of any size -> the pixels that the network knows.

Knows nothing of image files, of HTTP or of TorchServe.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Canonical:
    """A prepared picture.

    Attributes:
        pixels: float32 (height, width) of the network's input, intensity in [0, 1].
        steps: what was done to the picture, in order; empty where it was canonical already.
    """

    pixels: NDArray[np.float32]
    steps: tuple[str, ...]


def canonicalise(grey: NDArray[np.float32], height: int, width: int) -> Canonical:
    """Scale a picture to the network's size. One that has it already passes through bit for bit.

    Args:
        grey: float32 (H, W), intensity in [0, 1], ink bright on dark.
    """
    if grey.shape == (height, width):
        return Canonical(grey, steps=())
    rows = resampling_matrix(grey.shape[0], height)  # (height, H)
    columns = resampling_matrix(grey.shape[1], width)  # (width, W)
    pixels: NDArray[np.float32] = np.clip(rows @ grey @ columns.T, 0, 1)
    return Canonical(pixels, steps=(f"scaled from {grey.shape[0]}x{grey.shape[1]} to {height}x{width}",))


def resampling_matrix(source: int, target: int) -> NDArray[np.float32]:
    """Weights that resample a line of `source` pixels to `target` pixels: linear, with antialiasing where it shrinks.

    Returns:
        float32 (target, source); each row sums to 1.
    """
    scale = source / target
    reach = max(scale, 1.0)  # half width of the triangle filter, in source pixels
    centres = (np.arange(target) + 0.5) * scale
    distances = np.abs(np.arange(source)[None, :] + 0.5 - centres[:, None])  # (target, source)
    weights = np.clip(1 - distances / reach, 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)
