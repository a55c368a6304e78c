"""What a file's own structure says: files as encoders write them pass, what asks for more is refused before it is decoded."""

import re
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from handler.errors import ClientError, ImageTooLarge, UnreadableImage
from handler.images.budget import DecodingBudget
from handler.images.decode import decode_image
from handler.images.structure import MAX_COEFFICIENTS, ImageFormat, read_structure
from handler.images.tiff_structure import GROWTH
from handler.limits import MAX_FRAMES
from scripts.bench.attacks import (
    EMPTY_COMMENT,
    build_attacks,
    deflate,
    encode,
    grey_tiff,
    noise,
    png,
    png_chunk,
    tiff,
    tiff_of_one_stream,
)

SIDES = [(1, 1), (28, 28), (300, 200)]  # width, height
TIFF_COMPRESSIONS = {
    **dict.fromkeys(
        ["raw", "tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_deflate", "zstd"], ("L", "RGB", "I;16", "F", "1")
    ),
    **dict.fromkeys(["tiff_ccitt", "group3", "group4"], ("1",)),
    "jpeg": ("L", "RGB"),
}


def of_mode(mode: str, width: int, height: int, *, is_noise: bool) -> Image.Image:
    """An image that does not compress at all, or one that does so nearly to nothing."""
    if mode in ("I;16", "F"):
        levels = np.random.default_rng(0).integers(0, 60_000, (height, width)) * is_noise
        return Image.fromarray(levels.astype(np.uint16 if mode == "I;16" else np.float32))
    return noise(width, height, "RGB").convert(mode) if is_noise else Image.new(mode, (width, height))


def written() -> Iterator[tuple[str, bytes, int]]:
    """Files as Pillow writes them: a name, the file, its pixels."""
    for is_noise in (True, False):
        for width, height in SIDES:
            kind = f"{'noise' if is_noise else 'plain'} {width}x{height}"
            for image_format in ImageFormat:
                for mode in ("L", "RGB"):
                    image = of_mode(mode, width, height, is_noise=is_noise)
                    yield f"{image_format} {mode} {kind}", encode(image, image_format), width * height
            colour = of_mode("RGB", width, height, is_noise=is_noise)
            for options in ({"progressive": True}, {"quality": 100}, {"restart_marker_rows": 1}):
                yield f"JPEG {next(iter(options))} {kind}", encode(colour, "JPEG", **options), width * height
            yield f"WEBP lossless {kind}", encode(colour, "WEBP", lossless=True), width * height
            for compression, modes in TIFF_COMPRESSIONS.items():
                for mode in modes:
                    image = of_mode(mode, width, height, is_noise=is_noise)
                    yield f"TIFF {compression} {mode} {kind}", encode(image, "TIFF", compression=compression), width * height


FILES = {name: (content, pixels) for name, content, pixels in written()}


@pytest.mark.parametrize("name", FILES)
def test_file_as_an_encoder_writes_it_passes(name: str) -> None:
    content, pixels = FILES[name]
    budget = DecodingBudget()
    structure = read_structure(content, budget)
    assert structure is not None
    assert structure.seconds < 0.2
    if not name.startswith("TIFF"):
        assert structure.pixels == pixels
    assert budget.steps_left == DecodingBudget().steps_left
    decode_image(content)  # which goes by its structure too


ANIMATED = {
    image_format: encode(Image.new("RGB", (60, 40)), image_format, save_all=True, append_images=[noise(60, 40, "RGB")] * count)
    for image_format, count in (("GIF", 20), ("WEBP", 3), ("TIFF", 3), ("PNG", 3))
}


@pytest.mark.parametrize("image_format", ANIMATED)
def test_frames_are_counted_as_far_as_they_are_looked_at(image_format: str) -> None:
    structure = read_structure(ANIMATED[image_format], DecodingBudget())
    assert structure is not None
    assert 2 * 2400 <= structure.pixels <= MAX_FRAMES * 2400 * 2
    assert not structure.is_plain
    assert decode_image(ANIMATED[image_format]).grey.shape == (40, 60)


@pytest.mark.parametrize("side", [16, 64, 256, 1024], ids=str)
def test_tiles_of_usual_sizes_pass_however_small_the_image(side: int) -> None:
    levels = np.arange(side * side, dtype=np.uint32).reshape(side, side).astype(np.uint8)
    content = tiff_of_one_stream(28, 20, side, 8, zlib.compress(levels.tobytes()))
    if side > 16:
        np.testing.assert_allclose(decode_image(content).grey * 255, levels[:20, :28], atol=0.01)
    else:
        with pytest.raises(UnreadableImage, match="some that share their data"):
            decode_image(content)


@pytest.mark.parametrize("sizes", ["right", "none", "zero"])
def test_pixels_without_compression_pass_without_right_sizes(sizes: str) -> None:
    levels = np.arange(28 * 28, dtype=np.uint32).reshape(28, 28).astype(np.uint8)
    entries = grey_tiff(28, 28, 1, t273=(4, [8]), t278=(4, [28]), t279=(4, [784 if sizes == "right" else 0]))
    if sizes == "none":
        del entries[279]
    assert read_structure(tiff(entries, levels.tobytes()), DecodingBudget()) is not None


def test_big_tiff_passes() -> None:
    content = encode(noise(50, 40), "TIFF", big_tiff=True)
    assert content[2:4] == b"+\0"
    structure = read_structure(content, DecodingBudget())
    assert structure is not None
    assert decode_image(content).grey.shape == (40, 50)


def changed(was: tuple[int, int, int], becomes: tuple[int, int, int]) -> bytes:
    """A small TIFF with another tag, type and count in the place of one."""
    content = tiff(grey_tiff(28, 28, 1, **ONE_STRIP), bytes(784))
    return content.replace(struct.pack("<HHI", *was), struct.pack("<HHI", *becomes))


ONE_STRIP: dict[str, Any] = {"t273": (4, [8]), "t278": (4, [28]), "t279": (4, [784])}
BAD_TIFFS = {
    "unknown compression": (tiff(grey_tiff(28, 28, 9, **ONE_STRIP), bytes(784)), "got compression 9"),
    "no width": (tiff(grey_tiff(0, 28, 1, **ONE_STRIP), bytes(784)), "with a width and a height"),
    "no strips": (tiff(grey_tiff(28, 28, 1), bytes(784)), "expected 1 strips or tiles in a TIFF, got 0"),
    "too few strips": (tiff(grey_tiff(28, 28, 5, **ONE_STRIP | {"t278": (4, [1])}), bytes(784)), "expected 28 strips"),
    "data beyond the end": (tiff(grey_tiff(28, 28, 5, **ONE_STRIP | {"t273": (4, [900])}), bytes(784)), "beyond its end"),
    "more data than there are bytes": (
        tiff(grey_tiff(28, 28, 5, **ONE_STRIP | {"t279": (4, [99_999])}), bytes(784)),
        "some that share their data",
    ),
    "many samples": (tiff(grey_tiff(28, 28, 1, **ONE_STRIP, t277=(3, [60_000])), bytes(784)), "up to 16 samples of 64 bits"),
    "a tag out of the file": (
        changed((273, 4, 1), (273, 4, 900)),
        "expected whole numbers once in a TIFF's tag 273",
    ),
    "numbers as text": (
        changed((273, 4, 1), (273, 2, 1)),
        "expected whole numbers once in a TIFF's tag 273",
    ),
    "the same tag twice": (
        changed((277, 3, 1), (273, 3, 1)),
        "expected whole numbers once in a TIFF's tag 273",
    ),
    "directory out of the file": (b"II*\0" + struct.pack("<I", 999), "whose offsets lead out of the file"),
    "cut": (encode(noise(30, 30), "TIFF", compression="tiff_lzw")[:-40], "out of the file|expected whole numbers|beyond its end"),
}


@pytest.mark.parametrize("name", BAD_TIFFS)
def test_tiff_that_is_no_web_of_sound_offsets_is_refused(name: str) -> None:
    content, message = BAD_TIFFS[name]
    with pytest.raises(UnreadableImage, match=message):
        read_structure(content, DecodingBudget())


def jpeg_of_frame(marker: int) -> bytes:
    content = bytearray(encode(noise(64, 64), "JPEG"))
    content[content.index(b"\xff\xc0") + 1] = marker
    return bytes(content)


@pytest.mark.parametrize("marker", [0xC9, 0xCA, 0xCB], ids=hex)
def test_arithmetic_coding_is_refused(marker: int) -> None:
    """A few bits of it can stand for thousands of decisions."""
    with pytest.raises(UnreadableImage, match="got one with arithmetic coding"):
        read_structure(jpeg_of_frame(marker), DecodingBudget())


def test_jpeg_of_two_frames_is_refused() -> None:
    content = encode(noise(64, 64), "JPEG")
    at = content.index(b"\xff\xc0")
    frame = content[at : at + 2 + int.from_bytes(content[at + 2 : at + 4])]
    with pytest.raises(UnreadableImage, match="expected a JPEG of one frame"):
        read_structure(content[:at] + frame + content[at:], DecodingBudget())


def test_padding_between_scans_counts() -> None:
    content = encode(noise(64, 64), "JPEG", progressive=True)
    at = content.index(b"\xff\xc4", content.index(b"\xff\xda"))
    read_structure(content[:at] + EMPTY_COMMENT * 90_000 + content[at:], DecodingBudget())
    with pytest.raises(ImageTooLarge, match="files of too many chunks, segments"):
        read_structure(content[:at] + EMPTY_COMMENT * 110_000 + content[at:], DecodingBudget())


def test_progressive_jpeg_is_bounded_by_what_it_keeps() -> None:
    """Colour at half the resolution adds a half to the pixels, at the full one it triples them."""
    side = int((MAX_COEFFICIENTS / 3) ** 0.5)
    for good_side, subsampling in ((side - 20, 0), (8000, 2)):
        image = Image.new("RGB", (good_side, good_side))
        structure = read_structure(encode(image, "JPEG", progressive=True, subsampling=subsampling), DecodingBudget())
        assert structure is not None
        assert not structure.is_plain
    with pytest.raises(ImageTooLarge, match="expected a progressive JPEG of at most 100,000,000 coefficients"):
        read_structure(
            encode(Image.new("RGB", (side + 20, side + 20)), "JPEG", progressive=True, subsampling=0), DecodingBudget()
        )


def test_data_of_a_png_are_bounded_by_its_pixels() -> None:
    raw = bytes(401 * 400)
    assert decode_image(png(400, 400, deflate(raw, 90_000))).grey.shape == (400, 400)
    with pytest.raises(UnreadableImage, match="expected a PNG whose data are about as long as its 160,400 bytes of pixels"):
        decode_image(png(400, 400, deflate(raw, 300_000)))
    with pytest.raises(ImageTooLarge, match="bytes of compressed profiles and texts"):
        decode_image(png(28, 28, zlib.compress(bytes(29 * 28)), *[png_chunk(b"zTXt", b"a\0\0" + deflate(b"b", 900_000))] * 3))


def test_plain_files_are_small_ones_that_are_bounded_closely() -> None:
    def is_plain(content: bytes) -> bool:
        structure = read_structure(content, DecodingBudget())
        return structure is not None and structure.is_plain

    photograph = noise(1000, 1000, "RGB")
    assert is_plain(encode(photograph, "JPEG"))
    assert is_plain(encode(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True))
    assert is_plain(encode(Image.new("L", (2000, 2000)), "PNG"))
    assert is_plain(encode(Image.new("L", (900, 900)), "BMP"))
    for other in (
        encode(photograph, "PNG"),
        encode(Image.new("L", (3000, 3000)), "PNG"),
        encode(Image.new("L", (28, 28)), "TIFF"),
    ):
        assert not is_plain(other)


@pytest.mark.parametrize("name", [name for name in build_attacks(0) if re.split("[, ]", name)[0] in list(ImageFormat)])
def test_attack_is_refused_without_memory_for_it(name: str) -> None:
    attack = build_attacks(400_000)[name]
    if not attack.status:
        return  # it may be answered: the server's test bounds it
    content = attack.body
    tracemalloc.start()
    try:
        with pytest.raises(ClientError) as refused:
            read_structure(content, DecodingBudget())
        assert type(refused.value).__name__ == attack.error
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


REFUSED = {
    6,
    32771,
    32809,
    34676,
    34677,
    50001,
}  # old JPEG, old scanners', and what libtiff has no decoder for


def test_every_compression_that_pillow_names_is_accepted_or_refused_on_purpose() -> None:
    assert TiffImagePlugin.COMPRESSION_INFO.keys() <= GROWTH.keys() | REFUSED
    assert not GROWTH.keys() & REFUSED
