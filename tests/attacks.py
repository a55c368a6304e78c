"""Bodies that cost far more than they look like: image files of every format, compressed bodies, JSON.

Each is made by its structure, not by trial: a loop that a decoder runs through for each of a few bytes.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO

import numpy as np
from PIL import Image

from tests.hostile import png_chunk

EMPTY_COMMENT = b"\xff\xfe\x00\x02"  # a JPEG segment without content


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    """Write an image as a file."""
    content = BytesIO()
    image.save(content, format=image_format, **options)
    return content.getvalue()


# --- deflate


class Bits:
    """Bits as deflate packs them: the least significant of a byte first."""

    def __init__(self) -> None:
        self.value = 0
        self.count = 0

    def add(self, value: int, count: int) -> None:
        """Append a number of so many bits, its least significant first."""
        self.value |= value << self.count
        self.count += count

    def add_code(self, code: str) -> None:
        """Append a Huffman code, its first bit first."""
        self.add(int(code[::-1], 2), len(code))


def _empty_block() -> Bits:
    """A deflate block with tables of its own and nothing in it: some fifteen bytes, for which a decoder builds three tables."""
    bits = Bits()
    bits.add(0, 1)  # not the last
    bits.add(2, 2)  # with tables
    bits.add(286 - 257, 5)
    bits.add(30 - 1, 5)
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
    lengths = {8: 2, 9: 2, 16: 2, 4: 3, 5: 3}  # of the codes by which the tables' lengths are told
    codes = {8: "00", 9: "01", 16: "10", 4: "110", 5: "111"}
    bits.add(12 - 4, 4)  # up to the length 4
    for symbol in order[:12]:
        bits.add(lengths.get(symbol, 0), 3)
    literal_lengths = [8] * 226 + [9] * 60  # a complete set: 226/256 + 60/512
    assert sum(2.0**-length for length in literal_lengths) == 1
    distance_lengths = [4] * 2 + [5] * 28
    literals = literal_lengths + distance_lengths
    at = 0
    while at < len(literals):  # runs of 3 to 6 by the code 16
        run = 1
        while at + run < len(literals) and literals[at + run] == literals[at] and run < 7:
            run += 1
        bits.add_code(codes[literals[at]])
        if run >= 4:
            bits.add_code(codes[16])
            bits.add(run - 1 - 3, 2)
            at += run
        else:
            at += 1
    symbol = 256  # the end of the block: among codes of length 9, which follow those of length 8
    code = (226 << 1) + (symbol - 226)
    bits.add_code(f"{code:09b}")
    return bits


def empty_blocks(byte_count: int) -> bytes:
    """Deflate's empty blocks, about so many bytes of them, that end at a byte's border; a stream goes on after them."""
    block = _empty_block()
    eight = Bits()
    for _ in range(8):  # at a byte's border again
        eight.add(block.value, block.count)
    packed = eight.value.to_bytes(eight.count // 8, "little")
    return packed * max(1, byte_count // len(packed))


def deflate(content: bytes, padding: int, window_bits: int = 15) -> bytes:
    """Compress, with so many bytes of empty blocks before the first that is not."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = compressor.compress(content) + compressor.flush()
    blocks = empty_blocks(padding) if padding else b""
    if window_bits == 31:
        ending = struct.pack("<II", zlib.crc32(content), len(content) & 0xFFFFFFFF)
        return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + blocks + body + ending
    return b"\x78\xda" + blocks + body + struct.pack(">I", zlib.adler32(content))


# --- TIFF

Entries = dict[int, tuple[int, Sequence[int]]]  # of a TIFF, by tag: its type (3: two bytes, 4: four bytes), and its numbers


def tiff(entries: Entries, data: bytes) -> bytes:
    """A little-endian TIFF of one directory, behind its data, which starts at byte 8."""
    sizes = {1: ("B", 1), 2: ("B", 1), 3: ("H", 2), 4: ("I", 4), 16: ("Q", 8)}
    directory_at = 8 + len(data) + len(data) % 2
    extra_at = directory_at + 2 + 12 * len(entries) + 4
    directory, extra = struct.pack("<H", len(entries)), b""
    for tag, (kind, values) in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}{sizes[kind][0]}", *values)
        if len(packed) <= 4:
            place = packed.ljust(4, b"\0")
        else:
            place = struct.pack("<I", extra_at + len(extra))
            extra += packed + b"\0" * (len(packed) % 2)
        directory += struct.pack("<HHI", tag, kind, len(values)) + place
    return struct.pack("<2sHI", b"II", 42, directory_at) + data + b"\0" * (len(data) % 2) + directory + b"\0" * 4 + extra


def grey_tiff(
    width: int, height: int, compression: int, **more: tuple[int, Sequence[int]]
) -> dict[int, tuple[int, Sequence[int]]]:
    """The entries of a grey TIFF of 8 bits, with others by their tags (`t322=...`)."""
    return {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [8]),
        259: (3, [compression]),
        262: (3, [1]),
        277: (3, [1]),
        **{int(name[1:]): entry for name, entry in more.items()},
    }


def tiff_of_one_stream(width: int, height: int, side: int, compression: int, stream: bytes, distinct: bool = False) -> bytes:
    """A TIFF in tiles that all have the same stream."""
    count = -(-width // side) * -(-height // side)
    offsets = [8 + at * len(stream) for at in range(count)] if distinct else [8] * count
    data = stream * count if distinct else stream
    return tiff(
        grey_tiff(
            width, height, compression, t322=(4, [side]), t323=(4, [side]), t324=(4, offsets), t325=(4, [len(stream)] * count)
        ),
        data,
    )


def padded_jpeg(image: Image.Image, padding: int) -> bytes:
    """A JPEG with empty comments before its scan."""
    content = encode(image, "JPEG")
    return content[:2] + EMPTY_COMMENT * (padding // 4) + content[2:]


def comments_in_scan(image: Image.Image, padding: int) -> bytes:
    """A JPEG with empty comments behind its first scan."""
    content = encode(image, "JPEG", progressive=True)
    end = content.index(b"\xff\xc4", content.index(b"\xff\xda"))
    return content[:end] + EMPTY_COMMENT * (padding // 4) + content[end:]


# --- PNG, GIF, WebP


def png(width: int, height: int, idat: bytes, *chunks: bytes, depth: int = 8, colour: int = 0, interlaced: int = 0) -> bytes:
    """A PNG of these compressed data, with other chunks before them."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IDAT", idat) + png_chunk(b"IEND", b"")


def gif(width: int, height: int, frames: Sequence[tuple[int, int, bytes]], code_size: int = 8) -> bytes:
    """A GIF of frames: width, height, and their LZW codes."""
    content = b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF7, 0, 0) + bytes(range(256)) * 3
    for frame_width, frame_height, codes in frames:
        content += b"\x2c" + struct.pack("<HHHHB", 0, 0, frame_width, frame_height, 0) + bytes([code_size])
        content += b"".join(bytes([len(part)]) + part for part in _parts(codes, 255)) + b"\0"
    return content + b"\x3b"


def _parts(content: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(content), size):
        yield content[at : at + size]


def clear_codes(byte_count: int) -> bytes:
    """LZW codes of nine bits that all clear the table."""
    return (sum(256 << (9 * at) for at in range(8))).to_bytes(9, "little") * (byte_count // 9)


def noise(width: int, height: int, mode: str = "L") -> Image.Image:
    """An image that does not compress."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    levels = np.random.default_rng(0).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(levels.squeeze(), mode)
