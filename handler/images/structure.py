"""An image file -> what its decoder will be asked to do, read from the file's own structure, without decoding anything.

A decoder does what a file says: so many chunks, frames, tiles, bytes that inflate to nothing. Here that is bounded by the file's
size and its pixels, for each accepted format, before Pillow sees the file. What is damaged otherwise is Pillow's to find.

Sources: PNG third edition; GIF89a; RIFF container of WebP; BMP headers as Windows writes them.
"""

import struct
from dataclasses import dataclass
from enum import StrEnum

from handler.errors import ImageTooLarge, UnreadableImage
from handler.images.budget import DecodingBudget
from handler.images.jpeg_structure import read_jpeg
from handler.images.tiff_structure import read_tiff
from handler.limits import MAX_FRAMES, MAX_JPEG_PIXELS, MAX_PIXELS, MAX_SIDE

PNG_CHUNK = struct.Struct(">I4s")  # size, name
PNG_HEADER = struct.Struct(">IIBBxxB")  # width, height, bits, colour, interlacing
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour
PNG_DATA, PNG_INFLATED = frozenset({b"IDAT", b"fdAT"}), frozenset({b"iCCP", b"zTXt", b"iTXt"})
MAX_INFLATED_BYTES = 2_000_000  # of a PNG's profile and texts, compressed; a profile for print has a million
DEFLATE_GROWTH, LEAST_BYTES = 1.1, 65_536  # compressed bytes for each of the pixels' at most, and of any file
GIF_SCREEN, GIF_FRAME = struct.Struct("<HHB"), struct.Struct("<HHHHB")
RIFF_CHUNK = struct.Struct("<4sI")
BMP_SIZES = struct.Struct("<iiHHI")  # width, height, planes, bits, compression
MAX_BMP_BITS = 32

PLAIN_BYTES, PLAIN_PIXELS = 1_000_000, 4_000_000  # of files that are decoded in tens of milliseconds, whatever is in them
PLAIN_VISITS = 60_000_000  # of a progressive JPEG's coefficients
# Processor seconds that decoding takes, for each pixel (with that, making it grey) and for each byte of the file.
SECONDS_A_PIXEL = {"PNG": 16e-9, "JPEG": 8e-9, "GIF": 16e-9, "BMP": 16e-9, "TIFF": 30e-9, "WEBP": 20e-9}
SECONDS_A_BYTE = {"PNG": 40e-9, "TIFF": 40e-9}  # deflate's, at worst; of the others OTHER_SECONDS_A_BYTE
OTHER_SECONDS_A_BYTE = 15e-9
SECONDS_A_SCAN_COEFFICIENT = 0.5e-9  # of a progressive JPEG
MAX_COEFFICIENTS = 100_000_000  # of a progressive JPEG, which a decoder keeps, two bytes each


class ImageFormat(StrEnum):
    """The accepted formats: no other decoder of Pillow's is ever tried."""

    PNG = "PNG"
    JPEG = "JPEG"
    GIF = "GIF"
    BMP = "BMP"
    TIFF = "TIFF"
    WEBP = "WEBP"


@dataclass(frozen=True, slots=True)
class Structure:
    """What decoding a file takes.

    Attributes:
        pixels: of all frames that are looked at.
        seconds: of processor time, about.
        is_plain: bounded so closely by its size and pixels that it takes tens of milliseconds at most.
    """

    pixels: int
    seconds: float
    is_plain: bool


def format_of(content: bytes) -> ImageFormat | None:
    """Tell a file's format by its first bytes, as Pillow does."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return ImageFormat.PNG
    if content.startswith(b"\xff\xd8\xff"):
        return ImageFormat.JPEG
    if content.startswith((b"GIF87a", b"GIF89a")):
        return ImageFormat.GIF
    if content.startswith(b"BM"):
        return ImageFormat.BMP
    if content.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*")):
        return ImageFormat.TIFF
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return ImageFormat.WEBP
    return None


def read_structure(content: bytes, budget: DecodingBudget) -> Structure | None:
    """Walk a file's structure.

    Args:
        content: the file.
        budget: of its request; a step is taken for each chunk, segment, block or tag.
    Returns:
        what decoding takes; None of a file of no accepted format.
    Raises:
        UnreadableImage: the file asks for more than its size and its pixels explain.
        ImageTooLarge: it has too many pixels, parts or frames.
    """
    image_format = format_of(content)
    if image_format is None:
        return None
    pixels, extra_seconds, is_plain = _READERS[image_format](content, budget)
    seconds = pixels * SECONDS_A_PIXEL[image_format] + extra_seconds
    seconds += len(content) * SECONDS_A_BYTE.get(image_format, OTHER_SECONDS_A_BYTE)
    return Structure(pixels, seconds, is_plain and pixels <= PLAIN_PIXELS and len(content) <= PLAIN_BYTES)


# --- the formats: pixels, seconds beside those of pixels and bytes, and whether a decoder of this kind is plain


def _require_few_pixels(width: int, height: int) -> int:
    """Refuse sides that the budget would refuse too, for whatever Pillow does before it tells them."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageTooLarge(
            f"expected at most {MAX_PIXELS:,} pixels and at most {MAX_SIDE:,} a side, got an image of {width} x {height} pixels"
        )
    return width * height


def _read_png(content: bytes, budget: DecodingBudget) -> tuple[int, float, bool]:
    raw_bytes = pixels = data_bytes = inflated_bytes = frame_count = 0
    at = 8
    while at + PNG_CHUNK.size <= len(content):
        budget.walk(1)
        size, name = PNG_CHUNK.unpack_from(content, at)
        if name == b"IHDR" and not pixels and len(content) >= at + PNG_CHUNK.size + PNG_HEADER.size:
            width, height, bits, colour, interlacing = PNG_HEADER.unpack_from(content, at + PNG_CHUNK.size)
            pixels = _require_few_pixels(width, height)
            row_bytes = -(-width * bits * PNG_SAMPLES.get(colour, 4) // 8) + 1  # with the filter's
            raw_bytes = row_bytes * height + (15 * height if interlacing else 0)
        data_bytes += size if name in PNG_DATA else 0
        inflated_bytes += size if name in PNG_INFLATED else 0
        frame_count += name == b"fcTL"
        if name == b"IEND":
            break
        at += PNG_CHUNK.size + size + 4
    frame_count = max(1, frame_count)
    if data_bytes > frame_count * raw_bytes * DEFLATE_GROWTH + LEAST_BYTES:
        raise UnreadableImage(
            f"expected a PNG whose data are about as long as its {raw_bytes:,} bytes of pixels at most, got {data_bytes:,} bytes"
        )
    if inflated_bytes > MAX_INFLATED_BYTES:
        raise ImageTooLarge(
            f"expected at most {MAX_INFLATED_BYTES:,} bytes of compressed profiles and texts in a PNG, got {inflated_bytes:,}: "
            "files of too many chunks, segments, tags or progressive bytes"
        )
    return pixels * min(frame_count, MAX_FRAMES), 0.0, frame_count == 1 and raw_bytes <= 2 * PLAIN_PIXELS


def _read_jpeg(content: bytes, budget: DecodingBudget) -> tuple[int, float, bool]:
    jpeg = read_jpeg(content, budget)
    pixels = jpeg.width * jpeg.height
    if pixels > MAX_JPEG_PIXELS or max(jpeg.width, jpeg.height) > MAX_SIDE:
        raise ImageTooLarge(
            f"expected a JPEG of at most {MAX_JPEG_PIXELS:,} pixels and at most {MAX_SIDE:,} a side, got one of {jpeg.width} x "
            f"{jpeg.height}"
        )
    if jpeg.is_sequential and jpeg.scan_count <= 1:
        return min(pixels, MAX_PIXELS), 0.0, True
    # All coefficients are kept, and gone through for each scan.
    if jpeg.coefficients > MAX_COEFFICIENTS:
        raise ImageTooLarge(
            f"expected a progressive JPEG of at most {MAX_COEFFICIENTS:,} coefficients, got one of {jpeg.width} x {jpeg.height} "
            f"pixels with {jpeg.coefficients:,}: send a baseline JPEG"
        )
    visits = jpeg.coefficients * jpeg.scan_count
    return min(pixels, MAX_PIXELS), visits * SECONDS_A_SCAN_COEFFICIENT, visits <= PLAIN_VISITS


def _read_gif(content: bytes, budget: DecodingBudget) -> tuple[int, float, bool]:
    if len(content) < 6 + GIF_SCREEN.size + 2:
        return 0, 0.0, False
    width, height, flags = GIF_SCREEN.unpack_from(content, 6)
    screen = _require_few_pixels(width, height)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    frame_count = 0
    while at < len(content) and content[at] != 0x3B:
        budget.walk(1)
        introducer = content[at]
        at += 1
        if introducer == 0x21:
            at = _skip_gif_blocks(content, at + 1, budget)
        elif introducer == 0x2C and at + GIF_FRAME.size <= len(content):
            *_, frame_width, frame_height, flags = GIF_FRAME.unpack_from(content, at)
            if frame_width * frame_height > MAX_PIXELS:
                raise ImageTooLarge(f"expected at most {MAX_PIXELS:,} pixels, got an image that decodes to more")
            frame_count += 1
            at += GIF_FRAME.size + (3 << (flags & 7) + 1 if flags & 0x80 else 0) + 1
            at = _skip_gif_blocks(content, at, budget)
    return screen * max(1, min(frame_count, MAX_FRAMES)), 0.0, False


def _skip_gif_blocks(content: bytes, at: int, budget: DecodingBudget) -> int:
    """Go behind blocks that each have their size before them, up to one of none."""
    while at < len(content) and content[at]:
        budget.walk(1)
        at += 1 + content[at]
    return at + 1


def _read_bmp(content: bytes, _budget: DecodingBudget) -> tuple[int, float, bool]:
    if len(content) < 18 + BMP_SIZES.size or content[14:18] == b"\x0c\0\0\0":  # the latter OS/2's, of two bytes a side
        return 0, 0.0, True
    width, height, _, bits, _ = BMP_SIZES.unpack_from(content, 18)
    if bits > MAX_BMP_BITS:
        raise UnreadableImage(f"expected a BMP of at most {MAX_BMP_BITS} bits, got {bits}")
    return _require_few_pixels(abs(width), abs(height)), 0.0, True


def _read_webp(content: bytes, budget: DecodingBudget) -> tuple[int, float, bool]:
    pixels = frame_count = 0
    at = 12
    while at + RIFF_CHUNK.size <= len(content):
        budget.walk(1)
        name, size = RIFF_CHUNK.unpack_from(content, at)
        start = content[at + RIFF_CHUNK.size : at + RIFF_CHUNK.size + 10].ljust(10, b"\0")
        if name == b"VP8X":
            sides = int.from_bytes(start[4:7], "little") + 1, int.from_bytes(start[7:10], "little") + 1
            pixels = max(pixels, _require_few_pixels(*sides))
        elif name == b"VP8L":
            packed = int.from_bytes(start[1:5], "little")
            pixels = max(pixels, _require_few_pixels((packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1))
        elif name == b"VP8 ":
            sides = int.from_bytes(start[6:8], "little") & 0x3FFF, int.from_bytes(start[8:10], "little") & 0x3FFF
            pixels = max(pixels, _require_few_pixels(*sides))
        frame_count += name == b"ANMF"
        at += RIFF_CHUNK.size + size + size % 2
    return pixels * max(1, min(frame_count, MAX_FRAMES)), 0.0, False


def _read_tiff(content: bytes, budget: DecodingBudget) -> tuple[int, float, bool]:
    found = read_tiff(content, budget, MAX_FRAMES)
    return found.decoded_bytes // 2, 0.0, False


_READERS = {
    ImageFormat.PNG: _read_png,
    ImageFormat.JPEG: _read_jpeg,
    ImageFormat.GIF: _read_gif,
    ImageFormat.BMP: _read_bmp,
    ImageFormat.WEBP: _read_webp,
    ImageFormat.TIFF: _read_tiff,
}
