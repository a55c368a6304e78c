"""The trust boundary: good images come out exact, hostile ones as client errors."""

import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from handler.errors import ClientError, ImageTooLarge, InvalidPixel, UnreadableImage, WrongShape
from handler.images import decode
from handler.images.arrays import decode_numbers
from handler.images.budget import DecodingBudget
from handler.images.decode import DecodedImage, decode_image
from handler.images.file_decoder import ACCEPTED_FORMATS
from handler.limits import MAX_DECODER_OPERATIONS, MAX_PIXELS, MAX_SIDE
from scripts.paths import SAMPLE_FILES
from tests.hostile import png_chunk, png_header

LOSSLESS = ("PNG", "GIF", "BMP", "TIFF")


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    content = BytesIO()
    image.save(content, format=image_format, **options)
    return content.getvalue()


@pytest.mark.parametrize("image_format", LOSSLESS)
def test_grey_levels_come_out_exact(image_format: str) -> None:
    levels = np.arange(784, dtype=np.uint8).reshape(28, 28)
    image = decode_image(encode(Image.fromarray(levels), image_format))
    assert image.grey.dtype == np.float32
    np.testing.assert_array_equal(image.grey, levels / np.float32(255))
    assert image.source == f"{image_format} image"


@pytest.mark.parametrize("image_format", ACCEPTED_FORMATS)
def test_every_accepted_format_is_read(image_format: str) -> None:
    with Image.open(SAMPLE_FILES[0]) as image:
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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_every_orientation_is_made_upright_as_pillow_does(image_format: str, orientation: int) -> None:
    levels = np.zeros((24, 40), np.uint8)
    levels[:8, :16], levels[8:, :8] = 255, 120
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encode(Image.fromarray(levels).convert("RGB"), image_format, exif=exif)
    with Image.open(BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image).convert("L")
    assert upright.size == ((40, 24) if orientation < 5 else (24, 40))
    np.testing.assert_allclose(decode_image(content).grey * 255, np.asarray(upright), atol=2)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_half_transparent_ink_is_mixed_with_white_paper(mode: str) -> None:
    """Level 60 at an opacity of 102 / 255 over white is 255 - 0.4 * 195."""
    image = Image.new("RGBA", (30, 20), (60, 60, 60, 102))
    content = encode(image.convert(mode), "PNG")
    np.testing.assert_allclose(decode_image(content).grey, (255 - 0.4 * 195) / 255, atol=1.5 / 255)


@pytest.mark.parametrize(
    ("array", "scale"),
    [
        pytest.param(np.arange(784).reshape(28, 28) % 2 == 0, 1, id="one bit"),
        pytest.param(np.arange(784, dtype=np.uint8).reshape(28, 28), 255, id="8 bits"),
        pytest.param(np.arange(784, dtype=np.uint16).reshape(28, 28) * 80, 65535, id="16 bits"),
        pytest.param(np.arange(784, dtype=np.int32).reshape(28, 28) * 80, 65535, id="32 bits"),
        pytest.param(np.arange(784, dtype=np.float32).reshape(28, 28) / 784, 1, id="floats"),
    ],
)
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_every_depth_of_a_tiff_is_read_exactly(array: NDArray[np.generic], scale: int, compression: str) -> None:
    grey = decode_image(encode(Image.fromarray(array), "TIFF", compression=compression)).grey
    np.testing.assert_allclose(grey, array.astype(np.float32) / np.float32(scale), atol=1e-6)


def test_colour_jpeg_has_pillows_brightness() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    content = encode(Image.fromarray(colours), "JPEG", quality=95, subsampling=0)
    expected = np.asarray(Image.fromarray(colours).convert("L")) / 255
    assert np.abs(decode_image(content).grey - expected).mean() < 0.01


def test_first_frame_of_several_is_taken() -> None:
    frames = [Image.new("L", (5, 5), level) for level in (200, 10)]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(decode_image(content).grey, 200 / 255, atol=1e-6)


GOOD_PNG = SAMPLE_FILES[0].read_bytes()
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
    with pytest.raises(
        UnreadableImage, match=r"^expected an? .*image file \(PNG, JPEG, GIF, BMP, TIFF, WEBP\), got [\d,]+ bytes of "
    ):
        decode_image(content)


@pytest.mark.parametrize(
    ("width", "height"),
    [(4001, 4000), (65_000, 65_000), (2**31 - 1, 2**31 - 1), (1, MAX_PIXELS + 1), (MAX_SIDE + 1, 1)],
    ids=lambda n: str(n),
)
def test_decompression_bomb_is_judged_by_its_header(width: int, height: int) -> None:
    """At 2**62 pixels any allocation would fail: the answer is about the size, so none was tried."""
    with pytest.raises(ImageTooLarge, match="at most 16,000,000 pixels") as caught:
        decode_image(png_header(width, height))
    assert caught.value.status == 413


def test_gif_frame_larger_than_its_screen_is_judged_too() -> None:
    content = bytearray(encode(Image.new("L", (4, 4)), "GIF"))
    frame = content.index(b"\x2c")
    content[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(ImageTooLarge, match="decodes to more"):
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
    image = decode_numbers(numbers(value, rest=rest), 28, 28)
    assert isinstance(image, DecodedImage)
    assert image.grey.dtype == np.float32
    assert image.grey[3, 5] == expected
    assert image.source == source


@pytest.mark.parametrize(
    ("value", "rest"),
    [(256, 0), (-1, 0), (1.5, 0.0), (2, 0.5), (-0.01, 0.0), (float("nan"), 0.0), (float("inf"), 0.0), (10**400, 0)],
    ids=lambda value: str(value)[:12],
)
def test_number_out_of_range_is_refused_with_its_place(value: float, rest: float) -> None:
    with pytest.raises(
        InvalidPixel,
        match=r"^expected (integers from 0 to 255|floats from 0.0 to 1.0), got .*( at row 3, column 5|hundreds of digits)",
    ):
        decode_numbers(numbers(value, rest=rest), 28, 28)


@pytest.mark.parametrize("value", [True, None, "3", {}], ids=str)
def test_pixel_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(InvalidPixel, match=r"expected numbers as pixels, got .* among them"):
        decode_numbers(numbers(value), 28, 28)


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        ([], r"\[0\]"),
        ([0] * 784, r"\[784\]"),
        ([[0] * 784], r"\[1, 784\]"),
        ([[0] * 28] * 27 + [[0]], "ragged lists"),
        ([[0] * 28] * 27 + [7], "ragged lists"),
        (numbers([1]), "ragged lists"),
    ],
    ids=["empty", "flat", "flat in a list", "ragged", "row that is no list", "pixel that is a list"],
)
def test_numbers_of_another_shape_are_refused(rows: list[object], shape: str) -> None:
    with pytest.raises(WrongShape, match=rf"^expected .*, got {shape}"):
        decode_numbers(rows, 28, 28)


def test_jpeg_of_very_many_scans_is_refused() -> None:
    """Each scan is a pass over all pixels, and takes a few bytes: a small file could hold a worker for hours."""
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x00"
    decode_image(GOOD_JPEG)
    with pytest.raises(UnreadableImage, match="expected a JPEG of at most 20 scans, got more"):
        decode_image(GOOD_JPEG[:-2] + 20 * scan + GOOD_JPEG[-2:])


def gif_with(extension: bytes) -> bytes:
    """A small GIF with more between its header and its image."""
    content = encode(Image.new("L", (10, 10)), "GIF")
    place = content.index(b"\x2c", 13)
    return content[:place] + extension + content[place:]


def tiff_with_tag(value_bytes: int) -> bytes:
    """A small TIFF whose description has so many bytes."""
    return encode(Image.new("L", (10, 10)), "TIFF", description="a" * value_bytes)


INFLATING = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000)))
COSTLY = {
    "segments of a JPEG": GOOD_JPEG[:2] + b"\xff\xfe\x00\x02" * 60_000 + GOOD_JPEG[2:],
    "fill bytes of a JPEG": GOOD_JPEG[:2] + b"\xff" * 120_000 + GOOD_JPEG[2:],
    "resources of a JPEG": GOOD_JPEG[:2] + 30 * (b"\xff\xed\xea\x70" + b"8BIM".ljust(12, b"\0") * 5000)[:60_018] + GOOD_JPEG[2:],
    "chunks of a PNG": GOOD_PNG[:33] + png_chunk(b"abCd", b"") * 60_000 + GOOD_PNG[33:],
    "data chunks of a PNG": GOOD_PNG[:33] + png_chunk(b"IDAT", b"") * 60_000 + GOOD_PNG[33:],
    "profiles of a PNG that inflate": GOOD_PNG[:33] + INFLATING * 120 + GOOD_PNG[33:],
    "blocks of a GIF": gif_with(b"\x21\xfe" + b"\x01a" * 60_000 + b"\0"),
    "junk in a GIF": gif_with(b"\x01" * 120_000),
    "Exif of a WebP": encode(Image.new("L", (10, 10)), "WEBP", exif=b"Exif\0\0" + tiff_with_tag(2_100_000)),
    "bytes of a progressive JPEG": encode(Image.new("L", (10, 10)), "JPEG", progressive=True) + bytes(8_100_000),
}


@pytest.mark.parametrize("name", COSTLY)
def test_file_that_takes_too_many_steps_is_refused(name: str) -> None:
    """Pillow loops in Python over all of these: at the limit of a body they would hold a worker for many seconds."""
    with pytest.raises(ImageTooLarge, match="got files of too many chunks, segments, tags or progressive bytes"):
        decode_image(COSTLY[name])


def test_steps_of_several_files_are_counted_together() -> None:
    budget = DecodingBudget()
    content = GOOD_PNG[:33] + INFLATING * 40 + GOOD_PNG[33:]
    for _ in range(2):
        decode_image(content, budget)
    assert 10_000 < budget.steps_left < MAX_DECODER_OPERATIONS - 80_000
    with pytest.raises(ImageTooLarge):
        decode_image(content, budget)


def test_ordinary_files_take_few_steps() -> None:
    """A thousand images fit into one request."""
    for image_format in ACCEPTED_FORMATS:
        budget = DecodingBudget()
        decode_image(encode(Image.new("L", (28, 28), 9), image_format), budget)
        assert MAX_DECODER_OPERATIONS - budget.steps_left < MAX_DECODER_OPERATIONS / 1024, image_format


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(tiff_with_tag(1_100_000), "expected tags of at most 1,000,000 bytes in a TIFF", id="long tag"),
        pytest.param(
            encode(Image.new("L", (9, 9)), "TIFF", compression="lzma"), "got a BMP of run lengths or a TIFF with LZMA", id="LZMA"
        ),
        pytest.param(
            b"BM"
            + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 1078, 40, 9, 9, 1, 8, 1, 0, 0, 0, 256, 0)
            + bytes(1024)
            + b"\x09\x01" * 9,
            "got a BMP of run lengths",
            id="run lengths",
        ),
    ],
)
def test_encoding_that_is_slow_to_decode_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(UnreadableImage, match=message):
        decode_image(content)


def test_foreign_errors_are_chained() -> None:
    with pytest.raises(ClientError) as caught:
        decode_image(GOOD_PNG[:-40])
    assert isinstance(caught.value.__cause__, OSError)


def outcome_of(content: bytes) -> object:
    """What comes of a file: its pixels, or the error's type and message."""
    try:
        return decode_image(content).grey.tolist()
    except ClientError as error:
        return type(error), error.message


@pytest.mark.parametrize("file", SAMPLE_FILES[:3], ids=lambda file: file.stem)
def test_plain_png_is_read_as_pillow_reads_it_whatever_byte_is_wrong(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = file.read_bytes()
    assert decode.PLAIN_PNG.match(good)
    changed = [good[:at] + bytes([good[at] ^ flipped]) + good[at + 1 :] for at in range(len(good)) for flipped in (1, 0x80)]
    cases = [good, good + b"more", *changed, *(good[:end] for end in range(len(good)))]
    outcomes = [outcome_of(content) for content in cases]
    monkeypatch.setattr(decode, "PLAIN_PNG", re.compile(rb"(?!)"))  # matches nothing
    for content, outcome in zip(cases, outcomes, strict=True):
        assert outcome == outcome_of(content)


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (300, 200), (256, 256), (257, 256)], ids=str)
def test_plain_png_of_any_size_and_row_filter_comes_out_exact(size: tuple[int, int]) -> None:
    levels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    levels[size[0] // 2 :] //= 8  # rows that other filters suit
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(levels), "PNG")).grey, levels / np.float32(255))


def test_plain_pngs_of_one_request_share_its_budget() -> None:
    budget = DecodingBudget()
    content = encode(Image.new("L", (200, 100)), "PNG")
    assert decode.PLAIN_PNG.match(content)
    decode_image(content, budget)
    assert budget.pixels_left == MAX_PIXELS - 20_000
    budget.take_pixels(MAX_PIXELS // 4000 - 6, 4000)
    with pytest.raises(ImageTooLarge, match="in all images of a request together"):
        decode_image(encode(Image.new("L", (200, 101)), "PNG"), budget)
