"""A small copy of an image as it was sent, for drawings. Knows nothing of what is drawn on it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """An image as it was sent, made small, and where the network's pixels came from in it.

    Attributes:
        grey: float32 (H, W), brightness in [0, 1].
        window: left, top, right, bottom of the network's image, in pixels of `grey`; it may reach beyond.
    """

    grey: NDArray[np.float32]
    window: tuple[float, float, float, float]

    @classmethod
    def of(cls, grey: NDArray[np.float32], window: tuple[float, float, float, float], longest: int) -> "Thumbnail":
        """Shrink an image (H, W) to at most `longest` pixels a side by averaging; a smaller one stays as it is.

        Args:
            window: in pixels of that image.
        """
        height, width = grey.shape
        scale = longest / max(height, width)
        if scale >= 1:
            return cls(grey, window)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BOX))
        along_x, along_y = size[0] / width, size[1] / height
        left, top, right, bottom = window
        return cls(small, (left * along_x, top * along_y, right * along_x, bottom * along_y))
