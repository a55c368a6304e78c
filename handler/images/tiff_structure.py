"""A TIFF's own structure: where its directories, tags, strips and tiles lie, read without decoding anything.

A TIFF is a web of offsets. A decoder follows them wherever they lead, so that a small file can have one long stream decoded for
each of a thousand tiles, or a tag of a megabyte read for each of a thousand names. Here all of it has to lie in the file once.

Source: TIFF revision 6.0; BigTIFF as libtiff reads it.
"""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handler.errors import ImageTooLarge, UnreadableImage
from handler.images.budget import DecodingBudget
from handler.images.jpeg_structure import read_jpeg
from handler.limits import MAX_PIXELS, MAX_SIDE, MAX_TAG_BYTES

WIDTH, HEIGHT, BITS, COMPRESSION, SAMPLES, PLANAR = 256, 257, 258, 259, 277, 284
ROWS_A_STRIP, STRIP_OFFSETS, STRIP_SIZES = 278, 273, 279
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_SIZES = 322, 323, 324, 325
NUMBER_TAGS = frozenset(
    {WIDTH, HEIGHT, BITS, COMPRESSION, SAMPLES, PLANAR, ROWS_A_STRIP, STRIP_OFFSETS, STRIP_SIZES}
    | {TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_SIZES}
)
TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}  # of types that hold numbers here
JPEG, LZMA = 7, 34925
# By compression, how many bytes an encoder may need at most for each byte of pixels: more would be data that say nothing.
GROWTH: Mapping[int, float] = {
    **{1: math.inf, 2: 10, 3: 10, 4: 10, 5: 2, JPEG: 4, 8: 1.2, 32946: 1.2, 32773: 1.2, 50000: 1.2},
    **{LZMA: 1.2},  # refused by `decode`, with a better message
}
LEAST_BYTES = 4096  # that any strip or tile may have
MAX_DIRECTORIES = 1000  # pages
MAX_SAMPLES = 16  # of a pixel
MAX_BITS = 64  # of a sample
USUAL_TILE = 1024  # pixels a side: encoders write whole tiles, however small the image is


@dataclass(frozen=True, slots=True)
class TIFF:
    """What a TIFF's directories declare.

    Attributes:
        decoded_bytes: of the strips or tiles of all pages that are read, padding included.
        stream_bytes: of their compressed data.
        page_count: directories.
    """

    decoded_bytes: int
    stream_bytes: int
    page_count: int


def read_tiff(content: bytes, budget: DecodingBudget, page_limit: int) -> TIFF:
    """Walk a TIFF's directories, and check the strips and tiles of the first pages.

    Args:
        content: the file.
        budget: of its request.
        page_limit: of how many pages pixels may be decoded.
    Raises:
        UnreadableImage: an offset leads out of the file, or something lies in it twice or is larger than an encoder makes it.
        ImageTooLarge: it has more pixels, tags or pages than are read.
    """
    decoded_bytes = stream_bytes = page_count = 0
    for tags in _Directories(content, budget):
        if page_count < page_limit:
            page = _Page(content, tags)
            decoded_bytes += page.decoded_bytes
            stream_bytes += page.stream_bytes
            if page.compression == JPEG:
                for start, size in page.streams:
                    read_jpeg(content[start : start + size], budget)
        page_count += 1
    return TIFF(decoded_bytes, stream_bytes, page_count)


Tags = dict[int, Sequence[int]]  # the numbers of NUMBER_TAGS


class _Directories:
    """The directories of a file, one after the other."""

    def __init__(self, content: bytes, budget: DecodingBudget) -> None:
        self._content = content
        self._budget = budget
        self._order = "<" if content.startswith(b"II") else ">"
        self._is_big = content[2:4] in (b"+\0", b"\0+")

    def __iter__(self) -> Iterator[Tags]:
        """Read them.

        Raises:
            UnreadableImage, ImageTooLarge
        """
        count_code, entry_code, offset_code = ("Q", "HHQ8s", "Q") if self._is_big else ("H", "HHI4s", "I")
        entry = struct.Struct(self._order + entry_code)
        (at,) = self._unpack(offset_code, 8 if self._is_big else 4)
        seen: set[int] = set()
        tag_bytes = 0
        while at:
            if at in seen or len(seen) == MAX_DIRECTORIES:
                raise UnreadableImage(f"expected a TIFF of at most {MAX_DIRECTORIES} pages, each once, got others")
            seen.add(at)
            (count,) = self._unpack(count_code, at)
            at += struct.calcsize(self._order + count_code)
            self._budget.walk(count)
            tags: Tags = {}
            for place in range(at, at + count * entry.size, entry.size):
                tag, kind, length, value = self._unpack(entry, place)
                size = length * TYPE_SIZES.get(kind, 1)
                if size > MAX_TAG_BYTES:
                    raise UnreadableImage(f"expected tags of at most {MAX_TAG_BYTES:,} bytes in a TIFF, got a longer one")
                if size > len(value):
                    tag_bytes += size
                    (start,) = struct.unpack(self._order + offset_code, value)
                    value = self._content[start : start + size]
                if tag in NUMBER_TAGS:
                    if kind not in NUMBERS or not length or len(value) < size or tag in tags:  # of two, readers take either
                        raise UnreadableImage(f"expected whole numbers once in a TIFF's tag {tag}, got something else")
                    tags[tag] = struct.unpack_from(f"{self._order}{length}{NUMBERS[kind]}", value)
            if tag_bytes > len(self._content):
                raise UnreadableImage("expected a TIFF whose tags lie in it once, got tags that share their bytes")
            yield tags
            (at,) = self._unpack(offset_code, at + count * entry.size)

    def _unpack(self, code: str | struct.Struct, at: int) -> tuple[Any, ...]:
        layout = code if isinstance(code, struct.Struct) else struct.Struct(self._order + code)
        try:
            return layout.unpack_from(self._content, at)
        except (struct.error, OverflowError) as error:
            raise UnreadableImage("expected a whole TIFF, got one whose offsets lead out of the file") from error


class _Page:
    """The strips or tiles of one directory.

    Attributes:
        compression: as its tag has it.
        decoded_bytes: of all of them.
        streams: where each starts, and its size.
        stream_bytes: the sum of these sizes.
    """

    def __init__(self, content: bytes, tags: Tags) -> None:
        self.compression = _first(tags, COMPRESSION, 1)
        width, height = _first(tags, WIDTH, 0), _first(tags, HEIGHT, 0)
        if self.compression not in GROWTH:
            raise UnreadableImage(
                "expected a TIFF without compression, or with deflate, LZW, PackBits, CCITT, JPEG or Zstandard, got "
                f"compression {self.compression}"
            )
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise ImageTooLarge(
                f"expected at most {MAX_PIXELS:,} pixels and at most {MAX_SIDE:,} a side, got a TIFF of {width} x {height} pixels"
            )
        if not width or not height:
            raise UnreadableImage(f"expected a TIFF with a width and a height, got {width} x {height} pixels")
        is_tiled = TILE_OFFSETS in tags or TILE_WIDTH in tags
        if is_tiled:
            part_width, part_height = _first(tags, TILE_WIDTH, 0), _first(tags, TILE_HEIGHT, 0)
            offsets, sizes = tags.get(TILE_OFFSETS, ()), tags.get(TILE_SIZES, ())
            for part, side in ((part_width, width), (part_height, height)):
                if not 0 < part <= max(USUAL_TILE, side + 15):
                    raise UnreadableImage(f"expected tiles no larger than a TIFF of {width} x {height} pixels, got {part} a side")
        else:
            part_width, part_height = width, min(_first(tags, ROWS_A_STRIP, height) or height, height)
            offsets, sizes = tags.get(STRIP_OFFSETS, ()), tags.get(STRIP_SIZES, ())
        samples, bits = _first(tags, SAMPLES, 1), max(tags.get(BITS, (1,)), default=1)
        if not 0 < samples <= MAX_SAMPLES or not 0 < bits <= MAX_BITS:
            raise UnreadableImage(f"expected a TIFF of up to {MAX_SAMPLES} samples of {MAX_BITS} bits, got {samples} of {bits}")
        planes = samples if _first(tags, PLANAR, 1) == 2 else 1
        count = -(-width // part_width) * -(-height // part_height) * planes
        part_bytes = -(-part_width * samples // planes * bits // 8) * part_height
        self.decoded_bytes = count * part_bytes
        if count * part_width * part_height > planes * (MAX_PIXELS + 4 * USUAL_TILE**2):
            raise ImageTooLarge(f"expected at most {MAX_PIXELS:,} pixels in a TIFF, got tiles of more")
        self.streams = self._find_streams(content, count, offsets, sizes)
        self.stream_bytes = sum(size for _, size in self.streams)
        longest = max((size for _, size in self.streams), default=0)
        if longest > GROWTH[self.compression] * part_bytes + LEAST_BYTES:
            raise UnreadableImage(
                f"expected strips or tiles whose data are about as long as their {part_bytes:,} bytes of pixels at most, got one "
                f"of {longest:,} bytes"
            )

    def _find_streams(self, content: bytes, count: int, offsets: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Find where the data of each strip or tile lie: within the file, each in a place of its own."""
        if len(offsets) < count:
            raise UnreadableImage(f"expected {count} strips or tiles in a TIFF, got {len(offsets)}")
        if not sizes and (count == 1 or self.compression == 1):  # old files; libtiff counts for itself
            sizes = [len(content) - offsets[0]] if count == 1 else [0] * count
        if len(sizes) < count:
            raise UnreadableImage(f"expected the sizes of {count} strips or tiles in a TIFF, got {len(sizes)}")
        streams = list(zip(offsets[:count], sizes[:count], strict=True))
        used = [start for start, _ in streams if start]  # 0: a tile that was left out
        if len(set(used)) < len(used) or sum(size for _, size in streams) > len(content):
            raise UnreadableImage("expected strips or tiles each in its own place in a TIFF, got some that share their data")
        if any(start + size > len(content) for start, size in streams) and self.compression != 1:
            raise UnreadableImage("expected a whole TIFF, got one whose data lie beyond its end")
        return streams


def _first(tags: Tags, tag: int, default: int) -> int:
    values = tags.get(tag) or (default,)
    return values[0]
