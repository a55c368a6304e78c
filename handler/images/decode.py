"""Image bytes -> grey pixels in [0, 1].

The trust boundary: the input is hostile. Knows nothing of TorchServe, HTTP or the network.
"""

import logging
import re
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from handler.errors import ClientError, ImageTooLarge, UnreadableImage
from handler.images.sniff import describe_bytes
from handler.limits import MAX_DECODER_OPERATIONS, MAX_JPEG_PIXELS, MAX_JPEG_SCANS, MAX_PIXELS, MAX_SIDE, MAX_TAG_BYTES

ACCEPTED_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")  # no other decoder of Pillow's is ever tried


JPEG_START = b"\xff\xd8\xff"
JPEG_SCAN_MARKER = b"\xff\xda"  # among compressed data it cannot occur: there 0xff is followed by 0x00
JPEG_PROGRESSIVE_MARKER = b"\xff\xc2"

UNCOUNTED_BYTES = 16_384  # of a request's files: too few for reads that matter, and counting would double the time of a small one
STEPS_OF_PARTS = {  # by the file's first bytes: Photoshop resources, Exif that is put together, texts of up to 1 MB when inflated
    b"\xff\xd8": {b"8BIM": 1, b"Exif\0\0": 100},
    b"\x89PNG": {b"iCCP": 1000, b"zTXt": 1000, b"iTXt": 1000},
}
EXIF_BYTES_A_STEP = 20
PROGRESSIVE_BYTES_A_STEP = 80  # 8 MB in all: they take four times as long as the bytes of other JPEGs
SLOW_COMPRESSIONS = (1, 2, "lzma")  # BMP's run lengths, which Pillow decodes in Python, and a TIFF's LZMA: seconds at MAX_PIXELS

EXIF_HOLDERS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # names under which Pillow keeps what may say it
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # how an Exif orientation is made upright

# A PNG as most small ones are: 8 bits of grey, not interlaced, its pixels in one chunk right after its header.
PLAIN_PNG = re.compile(rb"\x89PNG\r\n\x1a\n\0\0\0\rIHDR.{8}\x08\0\0\0\0.{8}IDAT", re.DOTALL)
PNG_NUMBERS, PNG_NUMBERS_AT = struct.Struct(">II5xII"), 16  # width, height; the header's checksum, the data's size
PNG_DATA_AT, PNG_SUM_SIZE, PNG_END = 41, 4, b"\0\0\0\0IEND"
MAX_PLAIN_PIXELS = 65_536  # of larger ones the pixels cost, not how the file is opened
MAX_FRAMES = 10  # of an animation that are looked at for ink
BLANK_RANGE = 0.04  # of the grey scale: a frame with less is blank
USUAL_SCALES = (255, 1023, 4095, 16383, 32767, 65535, 2**24 - 1, 2**31 - 1, 2**32 - 1)  # of integers of more than 8 bits
USUAL_FLOAT_SCALES = (1, 255, 65535)
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1  # of a TIFF's PhotometricInterpretation; up to 8 bits Pillow itself inverts the former
INTENSITIES = np.arange(256, dtype=np.float32) / np.float32(255)  # by grey level

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # the reply says what is wrong with a file; the log need not

# Pillow's own guard, for sizes that only show while it decodes (a GIF frame larger than its screen). It raises at twice this.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
_LAYOUTS: Any = (
    TiffImagePlugin.OPEN_INFO
)  # byte order, photometric, sample format, fill order, bits, extra samples -> Pillow's modes
_LAYOUTS.setdefault((b"MM", BLACK_IS_ZERO, (1,), 1, (32,), ()), ("I", "I;32B"))
for (order, photometric, *layout), (mode, raw_mode) in list(_LAYOUTS.items()):
    if photometric == BLACK_IS_ZERO and layout[2] in ((16,), (32,)):
        # libtiff gives pixels in the machine's own order, and Pillow takes that into account for one of these types alone.
        own = (mode, raw_mode.replace("32B", "32N").replace("16BS", "16NS"))
        _LAYOUTS[order, photometric, *layout] = own
        _LAYOUTS.setdefault((order, WHITE_IS_ZERO, *layout), own)  # Pillow knows few deep TIFFs whose zero is white
_LAYOUTS[b"MM", WHITE_IS_ZERO, (3,), 1, (32,), ()] = ("F", "F;32NF")
TiffImagePlugin.READ_LIBTIFF = True  # also what is not compressed: Pillow's own loop over strips is in Python


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image as it was sent.

    Attributes:
        grey: float32 (H, W), intensity in [0, 1].
        source: what it was sent as, such as "PNG image" or "integers 0-255".
        reduction: by how much a large JPEG was made smaller while it was decoded: 1, 2, 4 or 8 times in width and height.
    """

    grey: NDArray[np.float32]
    source: str
    reduction: int = 1


class DecodingBudget:
    """Counts what one request's image files declare and take, so that many images cost no more time than one may."""

    def __init__(self) -> None:
        self.pixels_left = MAX_PIXELS
        self.steps_left = MAX_DECODER_OPERATIONS
        self.uncounted_bytes_left = UNCOUNTED_BYTES

    def take_pixels(self, width: int, height: int) -> None:
        """Count an image before it is decoded.

        Raises:
            ImageTooLarge: it is too large by itself, or together with those before it.
        """
        if width * height > self.pixels_left or max(width, height) > MAX_SIDE:
            together = "" if self.pixels_left == MAX_PIXELS else " in all images of a request together"
            raise ImageTooLarge(
                f"expected at most {MAX_PIXELS:,} pixels{together} and at most {MAX_SIDE:,} a side, got an image of {width} x "
                f"{height} pixels"
            )
        self.pixels_left -= width * height

    def take_steps(self, count: int) -> None:
        """Count steps before they are taken.

        Raises:
            ImageTooLarge: they are too many, by themselves or together with those before.
        """
        if count > self.steps_left:
            raise ImageTooLarge(
                "expected image files as encoders write them, got files of too many chunks, segments, tags or progressive bytes"
            )
        self.steps_left -= count

    def open_file(self, content: bytes) -> BytesIO:
        """Give a file for Pillow to read: one whose reads are counted, unless it is small."""
        self.uncounted_bytes_left -= len(content)
        return BytesIO(content) if self.uncounted_bytes_left >= 0 else _CountedFile(content, self)


class _CountedFile(BytesIO):
    """An image file that takes a step for each read."""

    def __init__(self, content: bytes, budget: DecodingBudget) -> None:
        super().__init__(content)
        self._budget = budget
        is_tiff = content.startswith((b"II", b"MM"))
        self._most_bytes = MAX_TAG_BYTES if is_tiff else sys.maxsize  # libtiff takes the pixels without a read

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes, all where it is negative.

        Raises:
            ImageTooLarge: this is one read too many.
            UnreadableImage: a tag is too long.
        """
        self._budget.take_steps(1)
        if size is not None and size > self._most_bytes:
            raise UnreadableImage(f"expected tags of at most {MAX_TAG_BYTES:,} bytes in a TIFF, got a longer one")
        return super().read(size)


def decode_image(content: bytes, budget: DecodingBudget | None = None) -> DecodedImage:
    """Decode an image file to grey: EXIF orientation applied, transparency laid over paper, of several frames the first with ink.

    Args:
        content: the file.
        budget: of the request that it came in, where others came with it.
    Raises:
        UnreadableImage: no image of an accepted format, or a damaged one.
        ImageTooLarge: its header declares more than the budget's pixels, or it takes more than the budget's steps.
    """
    budget = budget or DecodingBudget()
    if PLAIN_PNG.match(content) and len(content) <= budget.uncounted_bytes_left:
        plain = _decode_plain_png(content, budget)
        if plain is not None:
            return plain
    if content.count(JPEG_SCAN_MARKER) > MAX_JPEG_SCANS and content.startswith(b"\xff\xd8"):
        raise UnreadableImage(f"expected a JPEG of at most {MAX_JPEG_SCANS} scans, got more")
    budget.take_steps(_steps_of_parts(content))
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of damaged files, whose data they may show, and from half of MAX_PIXELS
            _open(budget.open_file(content), content) as image,
        ):
            reduction = _reduce_large_jpeg(image)
            budget.take_pixels(*image.size)
            if image.info.get("compression") in SLOW_COMPRESSIONS:
                raise UnreadableImage("expected another compression, got a BMP of run lengths or a TIFF with LZMA")
            budget.take_steps(_steps_of_data(image, content))
            if reduction == 1:
                image.draft("L", None)  # of a JPEG, which stores brightness apart from colour: decode no colour
            return DecodedImage(_first_with_ink(image, budget), f"{image.format} image", reduction)
    except ClientError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"expected at most {MAX_PIXELS:,} pixels, got an image that decodes to more") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"expected an image file ({', '.join(ACCEPTED_FORMATS)}), got {len(content):,} bytes of {describe_bytes(content)}"
        ) from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise UnreadableImage(
            f"expected a whole image file ({', '.join(ACCEPTED_FORMATS)}), got {len(content):,} bytes of a damaged one"
        ) from error


def _decode_plain_png(content: bytes, budget: DecodingBudget) -> DecodedImage | None:
    """Decode a file that is as plain as PLAIN_PNG says, in a third of the time that `Image.open` takes for it.

    Returns:
        the image; None where anything about the file is unusual, and `Image.open` has to say what it is.
    """
    width, height, header_sum, data_size = PNG_NUMBERS.unpack_from(content, PNG_NUMBERS_AT)
    end = PNG_DATA_AT + data_size
    is_whole = content.startswith(PNG_END, end + PNG_SUM_SIZE) and header_sum == zlib.crc32(content[12:29])
    if not is_whole or not 0 < width * height <= MAX_PLAIN_PIXELS:
        return None
    try:
        image = Image.frombytes("L", (width, height), content[PNG_DATA_AT:end], "zip", "L")
    except ValueError:  # pixels are missing, or no pixels
        return None
    budget.take_pixels(width, height)
    budget.uncounted_bytes_left -= len(content)
    levels = np.frombuffer(image.tobytes(), np.uint8).reshape(height, width)
    return DecodedImage(INTENSITIES.take(levels), source="PNG image")


def _steps_of_parts(content: bytes) -> int:
    """Count the costly parts of a file, and what by chance looks like one, which is improbable."""
    costs = next((costs for first_bytes, costs in STEPS_OF_PARTS.items() if content.startswith(first_bytes)), {})
    return sum(steps * content.count(part) for part, steps in costs.items())


def _steps_of_data(image: Image.Image, content: bytes) -> int:
    """Count the steps that an image's Exif data and its progressive scans will take."""
    exif_bytes = max(len(image.info.get(name, "")) for name in ("exif", "Raw profile type exif"))
    is_progressive = "progressive" in image.info or (
        image.info.get("compression") == "jpeg" and JPEG_PROGRESSIVE_MARKER in content  # in a TIFF
    )
    return exif_bytes // EXIF_BYTES_A_STEP + is_progressive * len(content) // PROGRESSIVE_BYTES_A_STEP


def _open(file: BytesIO, content: bytes) -> Image.Image:
    """Read a file's header. Large JPEGs pass by Pillow's guard: they are made smaller while they are decoded."""
    if content.startswith(JPEG_START):
        return JpegImagePlugin.JpegImageFile(file)
    return Image.open(file, formats=ACCEPTED_FORMATS)


def _reduce_large_jpeg(image: Image.Image) -> int:
    """Have a JPEG of more than MAX_PIXELS decoded at a half, a quarter or an eighth of its width and height.

    Returns:
        by how much; 1 where it is none, or small enough.
    Raises:
        ImageTooLarge: it has more than MAX_JPEG_PIXELS.
    """
    width, height = image.size
    if image.format != "JPEG" or width * height <= MAX_PIXELS:
        return 1
    if width * height > MAX_JPEG_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageTooLarge(
            f"expected a JPEG of at most {MAX_JPEG_PIXELS:,} pixels and at most {MAX_SIDE:,} a side, got one of {width} x "
            f"{height}"
        )
    reduction = next(factor for factor in (2, 4, 8) if width * height <= MAX_PIXELS * factor**2)
    image.draft("L", (width // reduction, height // reduction))
    return round(width / image.width)


def _first_with_ink(image: Image.Image, budget: DecodingBudget) -> NDArray[np.float32]:
    """Make an image grey; of an animation, or of a TIFF with pages, the first frame that is not blank, or else the first."""
    first = grey = _grey(image)
    for frame in range(1, min(getattr(image, "n_frames", 1), MAX_FRAMES)):
        if np.ptp(grey) > BLANK_RANGE:
            return grey
        image.seek(frame)
        budget.take_pixels(*image.size)
        grey = _grey(image)
    return grey if np.ptp(grey) > BLANK_RANGE else first


def _grey(image: Image.Image) -> NDArray[np.float32]:
    image.load()  # a TIFF turns itself upright then, and forgets its orientation
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1)) if any(map(image.info.get, EXIF_HOLDERS)) else None
    is_deep = image.mode.startswith(("I", "F"))  # 16 or 32 bits, integers or floats
    is_white_zero = is_deep and _tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    is_unsigned = _tag(image, TiffImagePlugin.SAMPLEFORMAT) in (None, (1,), 1)
    if not is_deep:
        image = _lay_over_paper(image.convert("LA")) if image.has_transparency_data else image
        image = image if image.mode == "L" else image.convert("L")
    if turn is not None:
        image = image.transpose(turn)
    levels: NDArray[Any] = np.asarray(image)
    if not is_deep:
        return np.asarray(np.divide(levels, np.float32(255), dtype=np.float32))
    if levels.dtype == np.int32 and is_unsigned:  # Pillow has no unsigned type of 32 bits
        levels = levels.view(np.uint32)
    scaled = _scale_deep(levels)
    return np.asarray(1 - scaled) if is_white_zero else scaled


def _tag(image: Image.Image, tag: int) -> object:
    """The value of a TIFF's tag; None of other files, or where it has none."""
    return image.tag_v2.get(tag) if isinstance(image, TiffImagePlugin.TiffImageFile) else None


def _scale_deep(levels: NDArray[Any]) -> NDArray[np.float32]:
    """Bring deep pixels into [0, 1], by the scale that they use.

    Integers: by the smallest usual full scale that holds them all, since 16-bit files often hold 8, 10, 12 or 14 bits. Floats: by
    1 or 255 where they look like it, else by their own largest; with negative ones, as after a normalisation, by their own range.
    """
    darkest, brightest = float(levels.min()), float(levels.max())
    if not np.isfinite((darkest, brightest)).all():
        raise ValueError("pixels that are not finite")
    if darkest < 0:
        span = max(brightest - darkest, float(np.finfo(np.float32).tiny))
        return np.asarray((levels.astype(np.float64) - darkest) / span, dtype=np.float32)
    if levels.dtype.kind == "f":
        usual = [scale for scale in USUAL_FLOAT_SCALES if scale / 2 <= brightest <= scale]
    else:
        usual = [scale for scale in USUAL_SCALES if brightest <= scale]
    limit = usual[0] if usual else brightest or 1.0
    return np.asarray(np.clip(levels.astype(np.float64) / limit, 0, 1), dtype=np.float32)


def _lay_over_paper(image: Image.Image) -> Image.Image:
    """Lay a transparent image (LA) over white paper, or over black where what is drawn is itself bright."""
    small = np.asarray(image.reduce(max(1, max(image.size) // 256)), dtype=np.float32)
    levels, alpha = small[..., 0], small[..., 1]
    drawn = float(alpha.sum())
    if not drawn and image.getchannel("A").getextrema() == (0, 0):
        return image.getchannel("L")  # a channel that nobody filled: the image is the colour under it
    brightness = float((levels * alpha).sum()) / (255 * drawn) if drawn else 0.0
    paper = Image.new("L", image.size, "black" if brightness > 0.5 and alpha.min() == 0 else "white")
    return Image.composite(image.getchannel("L"), paper, image.getchannel("A"))
