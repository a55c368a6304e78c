"""Images of more than 8 bits a pixel, with transparency, or with several frames: read right, in every depth and byte order."""

import struct
import time
from io import BytesIO
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from handler.errors import ImageTooLarge
from handler.images.decode import decode_image
from handler.images.decoder_process import DECODER_PROCESS
from handler.limits import MAX_JPEG_PIXELS
from handler.preprocess import preprocess
from handler.protocol.request import parse_request
from scripts.paths import SAMPLE_IMAGE

DIGIT = np.kron(np.asarray(Image.open(SAMPLE_IMAGE), dtype=np.float64) / 255, np.ones((3, 3)))  # (84, 84), intensity in [0, 1]
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # a TIFF's SampleFormat
TYPES = {(8, 1): "u1", (16, 1): "u2", (16, 2): "i2", (32, 1): "u4", (32, 2): "i4", (32, 3): "f4"}


def tiff(values: NDArray[np.floating], order: Any, photometric: int, bits: int, sample_format: int) -> bytes:
    """Write a TIFF of one strip as the format's description has it, by no library whose reading is tested."""
    height, width = values.shape
    data = values.astype(np.dtype(TYPES[bits, sample_format]).newbyteorder(order)).tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, sample_format)]
    directory = struct.pack(f"{order}H", len(tags))
    for tag, value in tags:
        directory += struct.pack(f"{order}HHII", tag, 4, 1, value)
    header = b"II" if order == "<" else b"MM"
    return header + struct.pack(f"{order}HI", 42, 8 + len(data)) + data + directory + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is zero", "black is zero"])
@pytest.mark.parametrize(
    ("bits", "sample_format", "full"),
    [
        (8, UNSIGNED, 255),
        *((16, UNSIGNED, full) for full in (65535, 16383, 4095, 1023, 255)),
        (16, SIGNED, 32767),
        *((32, UNSIGNED, full) for full in (2**32 - 1, 65535, 1000)),
        (32, SIGNED, 2**31 - 1),
        *((32, FLOAT, full) for full in (1.0, 255.0, 65535.0, 0.003, 1e6)),
    ],
)
def test_tiff_of_every_depth_order_and_scale_is_read(
    order: Any, photometric: int, bits: int, sample_format: int, full: float
) -> None:
    values = DIGIT * full if photometric else (1 - DIGIT) * full
    grey = decode_image(tiff(values if sample_format == FLOAT else np.rint(values), order, photometric, bits, sample_format)).grey
    tolerance = 1e-6 if sample_format == FLOAT else 0.51 / min(full, 65535) + 1e-6
    expected = DIGIT * (1000 / 1023 if full == 1000 else 1) + (0 if photometric or full != 1000 else 1 - 1000 / 1023)
    np.testing.assert_allclose(grey, expected, rtol=0, atol=tolerance)


def test_tiff_of_floats_that_were_normalised_is_stretched() -> None:
    grey = decode_image(tiff((DIGIT - 0.1307) / 0.3081, "<", 1, 32, FLOAT)).grey
    np.testing.assert_allclose(grey, DIGIT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("full", [255, 1023, 4095, 65535])
def test_png_of_16_bits_that_holds_fewer_is_read(full: int) -> None:
    content = BytesIO()
    Image.fromarray(np.rint(DIGIT * full).astype(np.uint16)).save(content, format="PNG")
    np.testing.assert_allclose(decode_image(content.getvalue()).grey, DIGIT, rtol=0, atol=0.51 / full)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_image_whose_alpha_is_zero_everywhere_is_read_by_its_colour(mode: str) -> None:
    grey = Image.fromarray(np.rint(DIGIT * 255).astype(np.uint8))
    image = Image.merge(mode, [grey] * (len(mode) - 1) + [Image.new("L", grey.size, 0)])
    content = BytesIO()
    image.save(content, format="PNG")
    np.testing.assert_allclose(decode_image(content.getvalue()).grey, DIGIT, rtol=0, atol=0.01)


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_first_frame_with_ink_is_read(image_format: str) -> None:
    digit = Image.fromarray(np.rint(DIGIT * 255).astype(np.uint8))
    blank = Image.new("L", digit.size, 0)
    content = BytesIO()
    blank.save(content, format=image_format, save_all=True, append_images=[blank, digit, blank], duration=100)
    grey = decode_image(content.getvalue()).grey
    np.testing.assert_allclose(grey, DIGIT, rtol=0, atol=0.08 if image_format == "WEBP" else 1e-6)


def test_first_of_several_frames_with_ink_is_the_one() -> None:
    digit = Image.fromarray(np.rint(DIGIT * 255).astype(np.uint8))
    content = BytesIO()
    digit.save(content, format="GIF", save_all=True, append_images=[Image.eval(digit, lambda level: 255 - level)], duration=100)
    np.testing.assert_allclose(decode_image(content.getvalue()).grey, DIGIT, rtol=0, atol=1e-6)


def page(width: int, height: int) -> bytes:
    paper = Image.new("L", (width, height), 255)
    paper.paste(0, (width // 4, height // 4, width // 2, height // 2))
    content = BytesIO()
    paper.save(content, format="JPEG")
    return content.getvalue()


def test_page_of_600_dpi_is_decoded_smaller() -> None:
    decoded = decode_image(page(4962, 7014))
    assert decoded.reduction == 2
    assert decoded.grey.shape == (3507, 2481)
    assert decoded.grey[1500, 800] < 0.1
    assert decoded.grey[3000, 2000] > 0.9


def test_digit_on_a_page_of_600_dpi_takes_little_processor_time() -> None:
    """Both processes together took 0.15 s when this was written; the limit leaves ample room for any machine."""
    content = page(4962, 7014)
    DECODER_PROCESS.start()
    assert DECODER_PROCESS.pid is not None
    decoder = psutil.Process(DECODER_PROCESS.pid)

    def processor_seconds() -> float:
        times = decoder.cpu_times()
        return time.process_time() + times.user + times.system

    started = processor_seconds()
    request = parse_request({"data": bytearray(content)}, {"explain": "True"}, 10)
    (prepared,) = preprocess(request, 28, 28).images
    assert processor_seconds() - started < 4
    assert prepared.ink_box == pytest.approx((4962 // 4, 7014 // 4, 4962 // 2, 7014 // 2), abs=30)


def test_jpeg_beyond_the_limit_is_refused_by_its_header() -> None:
    content = bytearray(page(64, 64))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", 8001, 8001)
    with pytest.raises(ImageTooLarge, match=f"expected a JPEG of at most {MAX_JPEG_PIXELS:,} pixels .* got one of 8001 x 8001"):
        decode_image(bytes(content))
