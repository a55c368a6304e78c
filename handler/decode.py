"""Image bytes, or nested numbers -> grey pixels in [0, 1].

The trust boundary: the input is hostile. Knows nothing of TorchServe, HTTP or the network.
"""

import itertools
import logging
import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from handler.errors import ImageTooLarge, InvalidPixel, UnreadableImage, WrongShape, shown

ACCEPTED_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")  # no other decoder of Pillow's is ever tried
MAX_PIXELS = 16_000_000  # 4000 x 4000; read from the header, before any pixel is allocated

# A progressive JPEG may have any number of scans, and each costs a pass over all pixels, however few bytes it has. Encoders write
# about ten.
MAX_JPEG_SCANS = 100
JPEG_SCAN_MARKER = b"\xff\xda"  # among compressed data it cannot occur: there 0xff is followed by 0x00

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # the reply says what is wrong with a file; the log need not

# Pillow's own guard, for sizes that only show while it decodes (a GIF frame larger than its screen). It raises at twice this.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as it was sent.

    Attributes:
        grey: float32 (H, W), intensity in [0, 1].
        source: what it was sent as, such as "PNG image" or "integers 0-255".
        is_canonical: sent as numbers, which are taken as what the network knows already.
    """

    grey: NDArray[np.float32]
    source: str
    is_canonical: bool = False


class PixelBudget:
    """Counts the pixels that one request's image files declare, so that many pictures cost no more time than one may."""

    def __init__(self) -> None:
        self.left = MAX_PIXELS

    def take(self, width: int, height: int) -> None:
        """Count an image before it is decoded.

        Raises:
            ImageTooLarge: it is too large by itself, or together with those before it.
        """
        if width * height > self.left:
            together = "" if self.left == MAX_PIXELS else ", in all images of a request together,"
            raise ImageTooLarge(f"got an image of {width} x {height} pixels; up to {MAX_PIXELS:,} pixels{together} are accepted")
        self.left -= width * height


def decode_image(content: bytes, budget: PixelBudget | None = None) -> Picture:
    """Decode an image file to grey: EXIF orientation applied, transparency laid over paper, first frame of several.

    Args:
        content: the file.
        budget: of the request that it came in, where others came with it.
    Raises:
        UnreadableImage: no image of an accepted format, or a damaged one.
        ImageTooLarge: its header declares more than the budget's pixels.
    """
    if content.count(JPEG_SCAN_MARKER) > MAX_JPEG_SCANS and content.startswith(b"\xff\xd8"):
        raise UnreadableImage(f"got a JPEG of more than {MAX_JPEG_SCANS} scans; up to that are accepted")
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of damaged files, whose data they may show, and from half of MAX_PIXELS
            Image.open(BytesIO(content), formats=ACCEPTED_FORMATS) as image,
        ):
            (budget or PixelBudget()).take(*image.size)
            return Picture(_grey(ImageOps.exif_transpose(image)), source=f"{image.format} image")
    except ImageTooLarge:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"got an image that decodes to too many pixels; up to {MAX_PIXELS:,} are accepted") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"got {len(content):,} bytes that are no image; accepted formats: {', '.join(ACCEPTED_FORMATS)}"
        ) from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise UnreadableImage(
            f"got {len(content):,} bytes of a damaged or truncated image; whole files are accepted, of the formats "
            f"{', '.join(ACCEPTED_FORMATS)}"
        ) from error


def _grey(image: Image.Image) -> NDArray[np.float32]:
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, integers or floats
        return _scale_deep(np.asarray(image).astype(np.float32), full_scale=65535 if image.mode.startswith("I;16") else None)
    if image.has_transparency_data:
        image = _lay_over_paper(image.convert("RGBA"))
    return np.asarray(image.convert("L")).astype(np.float32) / np.float32(255)


def _scale_deep(levels: NDArray[np.float32], full_scale: int | None) -> NDArray[np.float32]:
    """Bring deep pixels into [0, 1]: by their type's full scale, else by the smallest usual one that holds them all."""
    if not np.isfinite(levels).all():
        raise ValueError("pixels that are not finite")
    brightest = float(levels.max())
    limit = full_scale or next((usual for usual in (1, 255, 65535) if brightest <= usual), brightest)
    scaled: NDArray[np.float32] = np.clip(levels / np.float32(limit), 0, 1)
    return scaled


def _lay_over_paper(image: Image.Image) -> Image.Image:
    """Lay a transparent picture over white paper, or over black where what is drawn is itself bright."""
    small = image.reduce(max(1, max(image.size) // 256))
    levels, alpha = (np.asarray(band, dtype=np.float32) for band in (small.convert("L"), small.getchannel("A")))
    drawn = float(alpha.sum())
    brightness = float((levels * alpha).sum()) / (255 * drawn) if drawn else 0.0
    paper = Image.new("RGBA", image.size, "black" if brightness > 0.5 and alpha.min() == 0 else "white")
    return Image.alpha_composite(paper, image)


def decode_numbers(rows: list[Any], height: int, width: int) -> Picture:
    """Check nested numbers and make them intensities: integers are 0-255; where there is a float, all are 0-1.

    Args:
        rows: `height` lists of `width` numbers each.
    Raises:
        WrongShape: the lists have another shape.
        InvalidPixel: a value is no number, NaN, infinite or out of range.
    """
    if len(rows) != height or any(not isinstance(row, list) or len(row) != width for row in rows):
        raise WrongShape(f"got numbers of shape {_describe_shape(rows)}; ({height}, {width}) is accepted")
    kinds = {kind for row in rows for kind in set(map(type, row))}
    if not kinds <= {int, float}:
        odd = next(value for row in rows for value in row if type(value) not in (int, float))
        raise InvalidPixel(f"got {shown(odd)} among the pixels; numbers are accepted")
    limit, source = (1, "floats 0-1") if float in kinds else (255, "integers 0-255")
    values = _as_floats(rows)
    if not np.all((values >= 0) & (values <= limit)):  # false for NaN as well
        y, x = next(place for place in np.ndindex(height, width) if not 0 <= rows[place[0]][place[1]] <= limit)
        raise InvalidPixel(
            f"got {shown(rows[y][x])} at row {y}, column {x}; integers from 0 to 255, or floats from 0.0 to 1.0, are accepted"
        )
    return Picture(values.astype(np.float32) / np.float32(limit), source, is_canonical=True)


def _as_floats(rows: list[Any]) -> NDArray[np.float64]:
    try:
        return np.array(rows, dtype=np.float64)
    except OverflowError:  # an integer of more than 300 digits
        return np.full((len(rows), len(rows[0])), np.nan)


def _describe_shape(value: object) -> str:
    """Render the shape of nested lists, "ragged" where their lengths differ."""
    shape: list[str] = []
    level = [value]
    while level and len(shape) < 5 and all(isinstance(member, list) for member in level):
        lengths = {len(member) for member in level if isinstance(member, list)}
        shape.append(str(lengths.pop()) if len(lengths) == 1 else "ragged")
        level = list(itertools.islice(itertools.chain.from_iterable(m for m in level if isinstance(m, list)), 10_000))
    return f"({', '.join(shape)})"
