"""An image file -> its grey levels, by Pillow: EXIF orientation applied, transparency laid over paper.

`decode` calls it for plain files, `decoder_process` for all others, in a process that can be stopped. It imports Pillow and numpy
alone, so that this process is small. Knows nothing of TorchServe, HTTP or the network.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from handler.errors import ClientError, ImageTooLarge, Overloaded, UnreadableImage
from handler.images.budget import DecodingBudget
from handler.images.sniff import describe_bytes
from handler.images.structure import ImageFormat
from handler.limits import MAX_FRAMES, MAX_JPEG_PIXELS, MAX_JPEG_SCANS, MAX_PIXELS, MAX_SIDE

ACCEPTED_FORMATS = tuple(ImageFormat)

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

BYTES_A_PIXEL = 8  # that any decoder takes at least, with what is made of its pixels
MAX_SCALED_AT_ONCE = 1_000_000  # deep pixels
BLANK_RANGE = 0.04  # of the grey scale: a frame with less is blank
USUAL_SCALES = (255, 1023, 4095, 16383, 32767, 65535, 2**24 - 1, 2**31 - 1, 2**32 - 1)  # of integers of more than 8 bits
USUAL_FLOAT_SCALES = (1, 255, 65535)
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1  # of a TIFF's PhotometricInterpretation; up to 8 bits Pillow itself inverts the former

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
class DecodedFile:
    """What a file holds.

    Attributes:
        levels: (H, W), uint8 of 0-255, or float32 in [0, 1] of a file with more than 8 bits.
        image_format: as Pillow names it.
        reduction: by how much a large JPEG was made smaller while it was decoded: 1, 2, 4 or 8 times in width and height.
    """

    levels: NDArray[np.uint8] | NDArray[np.float32]
    image_format: str
    reduction: int


def decode_file(content: bytes, budget: DecodingBudget) -> DecodedFile:
    """Decode an image file: of several frames the first with ink.

    Args:
        content: the file.
        budget: of the request that it came in.
    Raises:
        UnreadableImage: no image of an accepted format, or a damaged one.
        ImageTooLarge: its header declares more than the budget's pixels, or it takes more than the budget's steps.
        Overloaded: there is no memory for it.
    """
    if content.count(JPEG_SCAN_MARKER) > MAX_JPEG_SCANS and content.startswith(b"\xff\xd8"):
        raise UnreadableImage(f"expected a JPEG of at most {MAX_JPEG_SCANS} scans, got more")
    budget.take_steps(_steps_of_parts(content))
    size: tuple[int, int] | None = None
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of damaged files, whose data they may show, and from half of MAX_PIXELS
            _open(budget.open_file(content), content) as image,
        ):
            reduction = _reduce_large_jpeg(image)
            size = image.size
            budget.take_pixels(*size)
            if image.info.get("compression") in SLOW_COMPRESSIONS:
                raise UnreadableImage("expected another compression, got a BMP of run lengths or a TIFF with LZMA")
            budget.take_steps(_steps_of_data(image, content))
            if reduction == 1:
                image.draft("L", None)  # of a JPEG, which stores brightness apart from colour: decode no colour
            return DecodedFile(_first_with_ink(image, budget), f"{image.format}", reduction)
    except ClientError:
        raise
    except MemoryError as error:
        raise _too_little_memory(size) from error
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"expected at most {MAX_PIXELS:,} pixels, got an image that decodes to more") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"expected an image file ({', '.join(ACCEPTED_FORMATS)}), got {len(content):,} bytes of {describe_bytes(content)}"
        ) from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        if is_out_of_memory(error, size):
            raise _too_little_memory(size) from error
        raise UnreadableImage(
            f"expected a whole image file ({', '.join(ACCEPTED_FORMATS)}), got {len(content):,} bytes of a damaged one"
        ) from error


def is_out_of_memory(error: Exception, size: tuple[int, int] | None) -> bool:
    """Whether a decoder failed because of memory: it says so, or there is not even enough for the pixels now."""
    if "out of memory" in str(error) or "allocat" in str(error):
        return True
    try:
        bytearray((size[0] * size[1] if size else 0) * BYTES_A_PIXEL)
    except MemoryError:
        return True
    return False


def _too_little_memory(size: tuple[int, int] | None) -> Overloaded:
    what = f"an image of {size[0]} x {size[1]} pixels" if size else "an image"
    return Overloaded(f"expected memory for {what}, got too little: retry later, or send fewer pixels")


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


def _first_with_ink(image: Image.Image, budget: DecodingBudget) -> NDArray[Any]:
    """Make an image grey; of an animation, or of a TIFF with pages, the first frame that is not blank, or else the first."""
    first = levels = _levels(image)
    for frame in range(1, min(getattr(image, "n_frames", 1), MAX_FRAMES)):
        if _has_ink(levels):
            return levels
        image.seek(frame)
        budget.take_pixels(*image.size)
        levels = _levels(image)
    return levels if _has_ink(levels) else first


def _has_ink(levels: NDArray[Any]) -> bool:
    full = 255 if levels.dtype == np.uint8 else 1
    return bool(int(levels.max()) - int(levels.min()) > BLANK_RANGE * full if full > 1 else np.ptp(levels) > BLANK_RANGE)


def _levels(image: Image.Image) -> NDArray[Any]:
    """Make the frame that an image is at grey: uint8, or float32 in [0, 1] where it has more than 8 bits."""
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
        return levels
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
        return _by_rows(levels, lambda rows: (rows - darkest) / span)
    if levels.dtype.kind == "f":
        usual = [scale for scale in USUAL_FLOAT_SCALES if scale / 2 <= brightest <= scale]
    else:
        usual = [scale for scale in USUAL_SCALES if brightest <= scale]
    limit = usual[0] if usual else brightest or 1.0
    return _by_rows(levels, lambda rows: np.clip(rows / limit, 0, 1))


def _by_rows(levels: NDArray[Any], scale: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float32]:
    """Scale levels in float64, some rows at a time: as a whole they would take six times their own memory."""
    scaled = np.empty(levels.shape, np.float32)
    step = max(1, MAX_SCALED_AT_ONCE // levels.shape[1])
    for start in range(0, len(levels), step):
        rows = slice(start, start + step)
        scaled[rows] = scale(levels[rows].astype(np.float64))
    return scaled


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
