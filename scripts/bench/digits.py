"""The committed sample digits: as files, as grey levels, as pixels, and with a little noise.

Noise matters where maps are compared: in a flat area inputs of a max pool tie, and there the gradient is one of several right
answers.
"""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scripts.paths import SAMPLE_FILES

NOISE_LEVELS = 14  # noise that `dither` adds is below this, of 255
MAX_MAP_DIFFERENCE = 2e-5  # of a map's largest number, between maps that count as the same
SAME_MAPS_SHARE = 0.9  # of the images; the others may hold ties, where either gradient is right


def read_files() -> list[bytes]:
    """Read the PNG files of all digits."""
    return [file.read_bytes() for file in SAMPLE_FILES]


def read_levels() -> NDArray[np.uint8]:
    """Read the grey levels of all digits: (50, 28, 28)."""
    levels = []
    for file in SAMPLE_FILES:
        with Image.open(file) as image:
            levels.append(np.asarray(image))
    return np.stack(levels)


def read_pixels() -> NDArray[np.float32]:
    """Read all digits as the network takes them: (50, 1, 28, 28), intensity in [0, 1]."""
    return read_levels()[:, None].astype(np.float32) / np.float32(255)


def dither(png: bytes, seed: int) -> bytes:
    """Add a little noise to a digit's PNG file."""
    with Image.open(BytesIO(png)) as image:
        levels = np.asarray(image)
    noise = np.random.default_rng(seed).integers(0, NOISE_LEVELS, levels.shape)
    content = BytesIO()
    Image.fromarray(np.clip(levels + noise, 0, 255).astype(np.uint8)).save(content, format="PNG")
    return content.getvalue()


def largest_difference(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """Compare maps (N, ...): the largest of the `relative_differences` in the SAME_MAPS_SHARE of the maps that agree best."""
    differences = relative_differences(found, expected, row_axes=expected.ndim - 1)
    return float(np.quantile(differences, SAME_MAPS_SHARE, method="higher"))


def relative_differences(found: NDArray[np.floating], expected: NDArray[np.floating], row_axes: int) -> NDArray[np.floating]:
    """Compare rows, each of the last `row_axes` axes: the largest difference, as a share of the row's largest expected number.

    Returns:
        an array of the remaining axes; 0 where nothing differs, NaN where a number is NaN.
    """
    axes = tuple(range(-row_axes, 0))
    differences, largest = (np.abs(rows).max(axis=axes) for rows in (found - expected, expected))
    with np.errstate(divide="ignore", invalid="ignore"):
        shares: NDArray[np.floating] = np.where(differences == 0, differences, differences / largest)
    return shares  # a row of zeros that agrees is not 0 / 0
