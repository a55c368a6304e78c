"""The trust boundary: good pictures come out exact, hostile ones as client errors."""

import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from handler.decode import ACCEPTED_FORMATS, MAX_PIXELS, decode_image, decode_numbers
from handler.errors import ClientError, ImageTooLarge, InvalidPixel, UnreadableImage, WrongShape
from tests.conftest import DIGIT_FILES
from tests.hostile import png_header

LOSSLESS = ("PNG", "GIF", "BMP", "TIFF")


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    content = BytesIO()
    image.save(content, format=image_format, **options)
    return content.getvalue()


@pytest.mark.parametrize("image_format", LOSSLESS)
def test_grey_levels_come_out_exact(image_format: str) -> None:
    levels = np.arange(784, dtype=np.uint8).reshape(28, 28)
    picture = decode_image(encode(Image.fromarray(levels), image_format))
    assert picture.grey.dtype == np.float32
    np.testing.assert_array_equal(picture.grey, levels / np.float32(255))
    assert picture.source == f"{image_format} image"


@pytest.mark.parametrize("image_format", ACCEPTED_FORMATS)
def test_every_accepted_format_is_read(image_format: str) -> None:
    with Image.open(DIGIT_FILES[0]) as image:
        content = encode(image.convert("RGB"), image_format)
        expected = np.asarray(image) / 255
    assert np.abs(decode_image(content).grey - expected).mean() < 0.03


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_png_mode_is_read_at_its_full_scale(mode: str) -> None:
    """Left half black, right half white."""
    grey = np.zeros((28, 28), dtype=np.uint8)
    grey[:, 14:] = 255
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    np.testing.assert_array_equal(decode_image(encode(image, "PNG")).grey, (grey // 255).astype(np.float32))


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 2), (0, 0, 0, 255))
    grey = decode_image(encode(image, "PNG")).grey
    assert grey[2, 1] == 0
    assert grey.sum() == 15


def test_exif_orientation_is_applied() -> None:
    image = Image.new("L", (6, 3))
    image.putpixel((5, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    grey = decode_image(encode(image, "PNG", exif=exif)).grey
    assert grey.shape == (6, 3)
    assert np.argwhere(grey > 0.5).tolist() == [[5, 2]]


def test_first_frame_of_several_is_taken() -> None:
    frames = [Image.new("L", (5, 5), level) for level in (200, 10)]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(decode_image(content).grey, 200 / 255, atol=1e-6)


GOOD_PNG = DIGIT_FILES[0].read_bytes()
GOOD_JPEG = encode(Image.effect_noise((64, 64), 50), "JPEG")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"hello", id="text"),
        pytest.param(b"\x00" * 1000, id="zeros"),
        pytest.param(GOOD_PNG[:-40], id="truncated PNG"),
        pytest.param(GOOD_PNG[:20], id="PNG header cut"),
        pytest.param(GOOD_PNG[:60] + bytes(len(GOOD_PNG) - 60), id="PNG overwritten"),
        pytest.param(GOOD_JPEG[: len(GOOD_JPEG) // 2], id="truncated JPEG"),
        pytest.param(png_header(28, 28), id="PNG with too little data"),
        pytest.param(png_header(0, 28), id="PNG of no width"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", id="EPS, which runs a program"),
        pytest.param(b"P5 2 2 255 abcd", id="PGM, which is not accepted"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", id="SVG"),
    ],
)
def test_bytes_that_are_no_whole_image_are_refused(content: bytes) -> None:
    with pytest.raises(UnreadableImage, match=r"^got [\d,]+ bytes .* PNG, JPEG, GIF, BMP, TIFF, WEBP$"):
        decode_image(content)


@pytest.mark.parametrize(
    ("width", "height"), [(4001, 4000), (65_000, 65_000), (2**31 - 1, 2**31 - 1), (1, MAX_PIXELS + 1)], ids=lambda n: str(n)
)
def test_decompression_bomb_is_judged_by_its_header(width: int, height: int) -> None:
    """At 2**62 pixels any allocation would fail: the answer is about the size, so none was tried."""
    with pytest.raises(ImageTooLarge, match="up to 16,000,000") as caught:
        decode_image(png_header(width, height))
    assert caught.value.status == 413


def test_gif_frame_larger_than_its_screen_is_judged_too() -> None:
    content = bytearray(encode(Image.new("L", (4, 4)), "GIF"))
    frame = content.index(b"\x2c")
    content[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(ImageTooLarge, match="decodes to too many pixels"):
        decode_image(bytes(content))


def test_largest_accepted_image_is_read() -> None:
    content = encode(Image.new("L", (4000, 4000), 7), "PNG")
    assert decode_image(content).grey.shape == (4000, 4000)


# --- numbers


def numbers(value: object, *, at: tuple[int, int] = (3, 5), rest: object = 0) -> list[list[object]]:
    rows = [[rest] * 28 for _ in range(28)]
    rows[at[0]][at[1]] = value
    return rows


@pytest.mark.parametrize(
    ("value", "rest", "expected", "source"),
    [
        pytest.param(255, 0, 1.0, "integers 0-255", id="white integer"),
        pytest.param(51, 0, np.float32(51) / np.float32(255), "integers 0-255", id="grey integer"),
        pytest.param(1, 0, np.float32(1) / np.float32(255), "integers 0-255", id="integer one is dark"),
        pytest.param(1.0, 0.0, 1.0, "floats 0-1", id="white float"),
        pytest.param(0.25, 0, 0.25, "floats 0-1", id="one float makes all floats"),
        pytest.param(-0.0, 1, 0.0, "floats 0-1", id="negative zero"),
    ],
)
def test_numbers_become_intensities(value: float, rest: int, expected: float, source: str) -> None:
    picture = decode_numbers(numbers(value, rest=rest), 28, 28)
    assert picture.grey.dtype == np.float32
    assert picture.grey[3, 5] == expected
    assert picture.source == source


@pytest.mark.parametrize(
    ("value", "rest"),
    [(256, 0), (-1, 0), (1.5, 0.0), (2, 0.5), (-0.01, 0.0), (float("nan"), 0.0), (float("inf"), 0.0), (10**400, 0)],
    ids=lambda value: str(value)[:12],
)
def test_number_out_of_range_is_refused_with_its_place(value: float, rest: float) -> None:
    with pytest.raises(InvalidPixel, match=r"^got .* at row 3, column 5; integers from 0 to 255, or floats from 0.0 to 1.0"):
        decode_numbers(numbers(value, rest=rest), 28, 28)


@pytest.mark.parametrize("value", [True, None, "3", [1], {}], ids=str)
def test_pixel_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(InvalidPixel, match="among the pixels; numbers are accepted"):
        decode_numbers(numbers(value), 28, 28)


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        ([], r"\(0\)"),
        ([0] * 784, r"\(784\)"),
        ([[0] * 27] * 28, r"\(28, 27\)"),
        ([[0] * 28] * 27, r"\(27, 28\)"),
        ([[0] * 28] * 27 + [[0]], r"\(28, ragged\)"),
        ([[[0] * 28] * 28], r"\(1, 28, 28\)"),
        ([[0] * 28] * 27 + [7], r"\(28\)"),
    ],
    ids=["empty", "flat", "narrow", "short", "ragged", "three deep", "row that is no list"],
)
def test_numbers_of_another_shape_are_refused(rows: list[object], shape: str) -> None:
    with pytest.raises(WrongShape, match=rf"^got numbers of shape {shape}; \(28, 28\) is accepted$"):
        decode_numbers(rows, 28, 28)


def test_jpeg_of_very_many_scans_is_refused() -> None:
    """Each scan is a pass over all pixels, and takes a few bytes: a small file could hold a worker for hours."""
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x00"
    decode_image(GOOD_JPEG)
    with pytest.raises(UnreadableImage, match="got a JPEG of more than 100 scans"):
        decode_image(GOOD_JPEG[:-2] + 100 * scan + GOOD_JPEG[-2:])


def test_foreign_errors_are_chained() -> None:
    with pytest.raises(ClientError) as caught:
        decode_image(GOOD_PNG[:-40])
    assert isinstance(caught.value.__cause__, OSError)
