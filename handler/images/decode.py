"""Image bytes -> grey pixels in [0, 1].

The trust boundary: the input is hostile. What a decoder may be asked to do is read from the file's own structure first. Plain,
small files are decoded here, all others in a process that can be stopped. Knows nothing of TorchServe, HTTP or the network.
"""

import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handler.images.budget import DecodingBudget, Stopwatch
from handler.images.decoder_process import DECODER_PROCESS
from handler.images.file_decoder import DecodedFile, decode_file
from handler.images.structure import read_structure

# A PNG as most small ones are: 8 bits of grey, not interlaced, its pixels in one chunk right after its header.
PLAIN_PNG = re.compile(rb"\x89PNG\r\n\x1a\n\0\0\0\rIHDR.{8}\x08\0\0\0\0.{8}IDAT", re.DOTALL)
PNG_NUMBERS, PNG_NUMBERS_AT = struct.Struct(">II5xII"), 16  # width, height; the header's checksum, the data's size
PNG_DATA_AT, PNG_SUM_SIZE, PNG_END = 41, 4, b"\0\0\0\0IEND"
MAX_PLAIN_PIXELS = 65_536  # of larger ones the pixels cost, not how the file is opened
INTENSITIES = np.arange(256, dtype=np.float32) / np.float32(255)  # by grey level


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


def decode_image(content: bytes, budget: DecodingBudget | None = None) -> DecodedImage:
    """Decode an image file to grey: EXIF orientation applied, transparency laid over paper, of several frames the first with ink.

    Args:
        content: the file.
        budget: of the request that it came in, where others came with it.
    Raises:
        UnreadableImage: no image of an accepted format, a damaged one, or one that asks for more than its size explains.
        ImageTooLarge: it declares more than the budget's pixels, or takes more than the budget's steps, time or memory.
        Overloaded: there is no memory for it now.
    """
    budget = budget or DecodingBudget()
    if PLAIN_PNG.match(content) and len(content) <= budget.uncounted_bytes_left:
        plain = _decode_plain_png(content, budget)
        if plain is not None:
            return plain
    stopwatch = Stopwatch()
    structure = read_structure(content, budget)
    budget.require_seconds()
    if structure is None or structure.is_plain:
        decoded = decode_file(content, budget)
        budget.seconds_left -= stopwatch.seconds()
    else:
        decoded = DECODER_PROCESS.decode(content, budget)
    return DecodedImage(_intensities(decoded), f"{decoded.image_format} image", decoded.reduction)


def _intensities(decoded: DecodedFile) -> NDArray[np.float32]:
    if decoded.levels.dtype == np.float32:
        return np.asarray(decoded.levels, np.float32)
    return np.asarray(np.divide(decoded.levels, np.float32(255), dtype=np.float32))


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
