"""A JPEG's own structure: its frame, its scans and how its bytes are spent, read without decoding anything.

Source: ITU-T T.81, annex B.
"""

import re
import struct
from dataclasses import dataclass

from handler.errors import UnreadableImage
from handler.images.budget import DecodingBudget
from handler.limits import MAX_JPEG_SCANS

START, END, SCAN = 0xD8, 0xD9, 0xDA
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # other than tables and extensions
BASELINE, PROGRESSIVE = frozenset({0xC0, 0xC1}), 0xC2
ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length: TEM and restarts
ARITHMETIC = frozenset(range(0xC9, 0xD0))
NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # among a scan's data, where a zero follows each 0xff that is none
LENGTH, FRAME = struct.Struct(">H"), struct.Struct(">BHHB")  # of a segment; depth, height, width, components
MAX_COMPONENTS = 4  # of a frame: of print


@dataclass(frozen=True, slots=True)
class JPEG:
    """What a JPEG declares.

    Attributes:
        width, height: of its frame; 0 where it has none.
        scan_count: passes over the image.
        coefficients: of all components, subsampled ones fewer; kept in memory where there are several scans.
        is_sequential: Huffman-coded and not progressive: each bit is read once.
    """

    width: int
    height: int
    scan_count: int
    coefficients: int
    is_sequential: bool


def read_jpeg(content: bytes, budget: DecodingBudget) -> JPEG:
    """Walk a JPEG's markers up to its end, or as far as they go: a step for each, and for each byte between them.

    Raises:
        UnreadableImage: it has more scans or frames than an encoder writes, or a coding that takes long.
        ImageTooLarge: there are too many markers, or there is too much padding between them.
    """
    width = height = coefficients = scan_count = 0
    frame = None
    at = 2
    while 0 <= at < len(content) - 1:
        if content[at] != 0xFF:  # garbage before a marker: a decoder looks for the next one
            found = content.find(b"\xff", at)
            budget.walk((found if found >= 0 else len(content)) - at)
            at = found
        elif content[at + 1] == 0xFF:  # padding
            budget.walk(1)
            at += 1
        else:
            budget.walk(1)
            marker = content[at + 1]
            at += 2
            if marker == END:
                break
            if marker in ALONE or marker in (START, 0):
                continue
            if at + LENGTH.size > len(content):
                break
            (length,) = LENGTH.unpack_from(content, at)
            if marker in FRAMES and at + LENGTH.size + FRAME.size <= len(content):
                if frame is not None:
                    raise UnreadableImage("expected a JPEG of one frame, got more")
                frame = marker
                _, height, width, count = FRAME.unpack_from(content, at + LENGTH.size)
                start = at + LENGTH.size + FRAME.size + 1
                factors = content[start : start + 3 * min(count, MAX_COMPONENTS) : 3]
                coefficients = _count_coefficients(width, height, factors)
            at += max(length, LENGTH.size)
            if marker == SCAN:
                scan_count += 1
                following = NEXT_MARKER.search(content, at)
                at = following.start() if following else len(content)
    if scan_count > MAX_JPEG_SCANS:
        raise UnreadableImage(f"expected a JPEG of at most {MAX_JPEG_SCANS} scans, got more")
    if frame in ARITHMETIC:  # a few bytes of it can say as much as thousands
        raise UnreadableImage("expected a JPEG with Huffman coding, as nearly all are, got one with arithmetic coding")
    return JPEG(width, height, scan_count, coefficients, frame in BASELINE)


def _count_coefficients(width: int, height: int, factors: bytes) -> int:
    """Count the numbers that a frame's components have. Each factor is two of four bits: samples across and down."""
    sides = [(factor >> 4, factor & 15) for factor in factors]
    widest, highest = max((across for across, _ in sides), default=1), max((down for _, down in sides), default=1)
    return sum(width * across * height * down for across, down in sides) // max(1, widest * highest)
