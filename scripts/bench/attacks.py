"""Bodies that cost far more than they look like: image files of every format, compressed bodies, JSON.

Each is made by its structure, not by trial: a loop that a decoder runs through for each of a few bytes.
"""

import base64
import gzip
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
from PIL import Image

EMPTY_COMMENT = b"\xff\xfe\x00\x02"  # a JPEG segment without content
# What one attack may cost. The service's own bounds are half of these seconds, on a processor that nobody else uses.
MAX_ACCEPTED_SECONDS, MAX_REFUSED_SECONDS = 3.0, 1.5
MAX_PEAK_MIB = 400  # over what an idle worker has
OPEN_STATUSES = (200, 400, 413, 422)  # of an attack that may be answered as well as refused


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


# --- PNG and GIF


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


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
    return Image.fromarray(levels[..., 0] if bands == 1 else levels)


# --- requests


@dataclass(frozen=True, slots=True)
class Attack:
    """A request that looks cheap.

    Attributes:
        make: writes the body.
        route: with {model} in it.
        headers: beside those of HTTP itself.
        status, error: of the refusal; 0 and nothing where it may be answered, or stopped by the clock of a processor.
    """

    make: Callable[[], bytes]
    route: str = "/explanations/{model}"
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/octet-stream"})
    status: int = 0
    error: str = ""

    @property
    def body(self) -> bytes:
        """What is sent."""
        return self.make()

    def allows(self, status: int, error: str) -> bool:
        """Whether it may end in this status and this type of error."""
        return (status, error) == (self.status, self.error) if self.status else status in OPEN_STATUSES


def max_seconds(status: int) -> float:
    """The most that an attack with this answer may take."""
    return MAX_ACCEPTED_SECONDS if status == 200 else MAX_REFUSED_SECONDS


def error_type(body: bytes) -> str:
    """Read the type of a refusal; "" where the body is none. The Open Inference Protocol v2 has it beside `error`."""
    try:
        content = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(content, dict) or "error" not in content:
        return ""
    error = content["error"]
    return str((error if isinstance(error, dict) else content).get("type", ""))


def _json(make: Callable[[], bytes], status: int, error: str, route: str = "/explanations/{model}") -> Attack:
    return Attack(make, route, {"Content-Type": "application/json"}, status, error)


def _list_of(value: bytes, byte_count: int, before: bytes = b'{"data":[', after: bytes = b"]}") -> bytes:
    count = byte_count // (len(value) + 1)
    return before + b",".join([value]) + (b"," + value) * (count - 1) + after


def _tiff_without_end() -> bytes:
    """A TIFF whose directory is the next one after itself."""
    content = bytearray(tiff(grey_tiff(28, 28, 1, t273=(4, [8]), t278=(4, [28]), t279=(4, [784])), bytes(784)))
    directory_at = int.from_bytes(content[4:8], "little")
    next_at = directory_at + 2 + 12 * int.from_bytes(content[directory_at : directory_at + 2], "little")
    content[next_at : next_at + 4] = directory_at.to_bytes(4, "little")
    return bytes(content)


def _tiff_of_shared_tags(tag_count: int, tag_bytes: int) -> bytes:
    """A TIFF with many tags that all have the same megabyte."""
    entries = grey_tiff(28, 28, 1, t273=(4, [8]), t278=(4, [28]), t279=(4, [784]))
    content = bytearray(tiff({**entries, **{50_000 + number: (4, [8]) for number in range(tag_count)}}, bytes(tag_bytes)))
    directory_at = int.from_bytes(content[4:8], "little")
    for at in range(directory_at + 2 + 12 * len(entries), directory_at + 2 + 12 * (len(entries) + tag_count), 12):
        struct.pack_into("<HI", content, at + 2, 1, tag_bytes)
    return bytes(content)


def _instances(image: bytes, count: int, **more: object) -> bytes:
    return json.dumps({"instances": [base64.b64encode(image).decode()] * count, **more}).encode()


V1, V2 = "/v1/models/{model}:explain", "/v2/models/{model}/infer"
TENSOR = b'{"inputs":[{"name":"x","shape":[1],"datatype":"%s","data":['
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
DEEP = b"[" * 989 + b"]" * 989


def build_attacks(size: int) -> dict[str, Attack]:
    """Make attacks whose bodies have about so many bytes, where more of them do more.

    Returns:
        by name; their bodies are written when they are asked for.
    """
    small, large = noise(16, 16), noise(400, 400)

    def unreadable(body: Callable[[], bytes]) -> Attack:
        return Attack(body, status=400, error="UnreadableImage")

    def too_large(body: Callable[[], bytes]) -> Attack:
        return Attack(body, status=413, error="ImageTooLarge")

    def in_tiles(compression: int, stream: bytes, side: int = 16, *, distinct: bool = False) -> bytes:
        return tiff_of_one_stream(400, 400, side, compression, stream, distinct)

    return {
        "TIFF, tiles share padded JPEG": unreadable(lambda: in_tiles(7, padded_jpeg(small, size))),
        "TIFF, tiles share empty deflate blocks": unreadable(lambda: in_tiles(8, deflate(small.tobytes(), size))),
        "TIFF, a tile of empty deflate blocks": unreadable(lambda: in_tiles(8, deflate(large.tobytes(), size), 400)),
        "TIFF, tiles with padding of their own": Attack(
            lambda: in_tiles(8, deflate(small.tobytes(), size // 625), distinct=True)
        ),
        "TIFF, a strip of LZW clear codes": unreadable(
            lambda: tiff(grey_tiff(28, 28, 5, t273=(4, [8]), t278=(4, [28]), t279=(4, [size])), b"\x80\x40\x20\x10" * (size // 4))
        ),
        "TIFF, a tile of 40,000 x 40,000": unreadable(
            lambda: tiff(grey_tiff(28, 28, 5, t322=(4, [40_000]), t323=(4, [40_000]), t324=(4, [8]), t325=(4, [100])), bytes(100))
        ),
        "TIFF, strips share their data": unreadable(
            lambda: tiff(grey_tiff(4000, 4000, 5, t273=(4, [8] * 4000), t278=(4, [1]), t279=(4, [100] * 4000)), bytes(100))
        ),
        "TIFF, a page after itself": unreadable(lambda: _tiff_without_end()),
        "TIFF, tags share a megabyte": unreadable(lambda: _tiff_of_shared_tags(3000, 990_000)),
        "PNG of empty deflate blocks": unreadable(lambda: png(400, 400, deflate(bytes(401 * 400), size))),
        "large PNG of empty deflate blocks": Attack(lambda: png(4000, 4000, deflate(bytes(16_001 * 4000), size), colour=6)),
        "PNG, profile of empty deflate blocks": too_large(
            lambda: png(28, 28, zlib.compress(bytes(29 * 28)), png_chunk(b"iCCP", b"a\0\0" + deflate(b"a", size + 2_000_000)))
        ),
        "JPEG, empty comments in its scans": too_large(lambda: comments_in_scan(large, size + 500_000)),
        "JPEG, fill bytes": too_large(lambda: encode(large, "JPEG")[:2] + b"\xff" * (size + 200_000) + encode(large, "JPEG")[2:]),
        "JPEG, 64 million pixels, progressive, full colour": too_large(
            lambda: encode(Image.new("RGB", (8000, 8000)), "JPEG", progressive=True, subsampling=0)
        ),
        "GIF, blocks of one byte": too_large(
            lambda: b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b"\x21\xfe" + b"\x01a" * (size // 2 + 110_000) + b"\0;"
        ),
        "GIF, a frame larger than its screen": too_large(lambda: gif(9, 9, [(60_000, 60_000, b"\0")])),
        "WebP of 16,384 x 16,384": too_large(lambda: b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0ANMF\0\0\0\0"),
        "gzip of empty deflate blocks": Attack(
            lambda: deflate(b"a", size, 31),
            headers={"Content-Encoding": "gzip", "Content-Type": "application/octet-stream"},
            status=400 if size < 8_000_000 else 413,
            error="UnreadableImage" if size < 8_000_000 else "RequestTooLarge",
        ),
        "gzip of lists": Attack(
            lambda: gzip.compress(_list_of(b"[]", 30_000_000)),
            headers={"Content-Encoding": "gzip", "Content-Type": "application/octet-stream"},
            status=413,
            error="RequestTooLarge",
        ),
        "JSON, empty lists": _json(lambda: _list_of(b"[]", size + 3_200_000), 413, "RequestTooLarge"),
        "JSON, a million empty lists": _json(lambda: _list_of(b"[]", 2_900_000), 400, "WrongShape"),
        "JSON, lists in a tensor": _json(
            lambda: _list_of(b"[[]]", size + 2_600_000, TENSOR % b"UINT8", b"]}]}"), 413, "RequestTooLarge", V2
        ),
        "JSON, keys": _json(
            lambda: b"{" + b",".join(b'"%x":1' % number for number in range(size // 10 + 60_000)) + b"}", 413, "RequestTooLarge"
        ),
        "JSON, an option of numbers": _json(
            lambda: _list_of(b"1", size + 8_300_000, b'{"data":"","samples":['), 413, "RequestTooLarge"
        ),
        "JSON, an option of four million numbers": _json(
            lambda: _list_of(b"1", 8_000_000, b'{"data":"","samples":['), 400, "InvalidOption"
        ),
        "JSON, a shape of many axes": _json(
            lambda: _list_of(
                b"9", min(size, 8_000_000), b'{"inputs":[{"name":"x","datatype":"BYTES","data":["a"],"shape":[', b"]}]}"
            ),
            400,
            "InvalidRequest",
            V2,
        ),
        "JSON, deep target": _json(lambda: b'{"data":"","target":' + DEEP + b"}", 400, "MalformedJSON"),
        "JSON, deep samples": _json(lambda: b'{"data":"","samples":' + DEEP + b"}", 400, "MalformedJSON"),
        "JSON, deep objects": _json(lambda: b'{"noise":' * 988 + b"1" + b"}" * 988, 400, "MalformedJSON"),
        "JSON, digits": _json(lambda: b'{"data":[[' + b"9" * size + b"]]}", 400, "MalformedJSON"),
        "JSON, numbers of 4,300 digits": _json(lambda: _list_of(b"9" * 4300, size), 400, "WrongShape"),
        "JSON, base64 of line breaks": _json(lambda: b'{"data":"' + b"\\n" * (size // 2) + b'"}', 400, "EmptyRequest"),
        "JSON, base64 with an emoji": _json(lambda: '{"data":"\U0001f600'.encode() + b"a" * size + b'"}', 400, "MalformedBase64"),
        "JSON, texts": _json(lambda: _list_of(b'""', size + 400_000), 413, "RequestTooLarge"),
        "form of many fields": Attack(
            lambda: b"&".join(b"f%d=1" % number for number in range(min(size // 8, 100_000))),
            headers=FORM,
            status=413,
            error="RequestTooLarge",
        ),
        "form, a target of many numbers": Attack(
            lambda: b"data=x&target=" + b"1," * (size // 2), headers=FORM, status=400, error="InvalidOption"
        ),
        "64 progressive JPEGs with smoothgrad": Attack(
            lambda: _instances(encode(large, "JPEG", progressive=True), 64, method="smoothgrad"),
            V1,
            {"Content-Type": "application/json"},
            413,
            "RequestTooLarge",
        ),
    }
