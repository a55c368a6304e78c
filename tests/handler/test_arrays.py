"""Arrays of pixels: every accepted type and shape exactly, every hostile one as a client error."""

import io
import pickle
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from handler.errors import ClientError, EmptyRequest, ImageTooLarge, InvalidPixel, RequestTooLarge, UnreadableArray, WrongShape
from handler.images.arrays import NUMPY_TYPES, Tensor, decode_npy, decode_numbers, decode_tensor
from handler.images.decode import DecodedImage
from handler.limits import MAX_IMAGES

LEVELS = np.random.default_rng(3).integers(0, 256, (3, 28, 28)).astype(np.uint8)
INTENSITIES = LEVELS.astype(np.float32) / np.float32(255)


def npy(array: NDArray[Any], version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version, allow_pickle=False)
    return file.getvalue()


def npy_with_header(header: str | bytes, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def declared(shape: str, descr: str = "'|u1'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def images_of(decoded: DecodedImage | list[DecodedImage | ClientError]) -> list[DecodedImage | ClientError]:
    return decoded if isinstance(decoded, list) else [decoded]


def grey(images: list[DecodedImage | ClientError]) -> NDArray[np.float32]:
    assert all(isinstance(image, DecodedImage) for image in images)
    return np.stack([image.grey for image in images if isinstance(image, DecodedImage)])


# --- .npy


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<i2", ">i4", "<i8", ">u8"])
def test_npy_of_integers_is_grey_levels(dtype: str) -> None:
    images = images_of(decode_npy(npy(LEVELS.astype(dtype)), 28, 28))
    np.testing.assert_array_equal(grey(images), INTENSITIES)
    assert grey(images).dtype == np.float32
    assert isinstance(images[0], DecodedImage)
    assert images[0].source == f"{np.dtype(dtype).name} array, 0-255"


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f4", "<f8", ">f8"])
def test_npy_of_floats_is_intensities(dtype: str) -> None:
    array = INTENSITIES.astype(dtype)
    np.testing.assert_array_equal(grey(images_of(decode_npy(npy(array), 28, 28))), array.astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "several"), [((28, 28), False), ((1, 28, 28), True), ((1, 1, 28, 28), True)], ids=["image", "list", "channel"]
)
def test_npy_of_one_image_is_a_list_where_its_shape_says_so(shape: tuple[int, ...], several: bool) -> None:
    decoded = decode_npy(npy(LEVELS[0].reshape(shape)), 28, 28)
    assert isinstance(decoded, list) is several
    np.testing.assert_array_equal(grey(images_of(decoded)), INTENSITIES[:1])


@pytest.mark.parametrize("shape", [(3, 28, 28), (3, 1, 28, 28)], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)], ids=str)
def test_npy_of_several_images_in_any_order_and_version(shape: tuple[int, ...], order: Any, version: tuple[int, int]) -> None:
    decoded = decode_npy(npy(np.array(LEVELS.reshape(shape), order=order), version), 28, 28)
    assert isinstance(decoded, list)
    np.testing.assert_array_equal(grey(images_of(decoded)), INTENSITIES)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (LEVELS.astype(np.int16) - 1, "expected integers from 0 to 255, got -1 at row "),
        (LEVELS.astype(np.int64) + 2**40, r"integers from 0 to 255, got 1099511\d+ at row 0, column 0"),
        (INTENSITIES * 2, "^expected floats from 0.0 to 1.0, got .* at row "),
        (INTENSITIES.astype(np.float64) + 1e-9, "floats from 0.0 to 1.0"),
    ],
    ids=["negative", "huge", "twice", "a little over"],
)
def test_npy_with_a_number_out_of_range_has_its_place(array: NDArray[Any], message: str) -> None:
    images = images_of(decode_npy(npy(array), 28, 28))
    (first, *_) = [image for image in images if not isinstance(image, DecodedImage)]
    with pytest.raises(InvalidPixel, match=message):
        raise first


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.5, -0.1, 1e300], ids=str)
def test_only_the_bad_images_of_an_npy_are_errors(value: float) -> None:
    array = INTENSITIES.astype(np.float64)
    array[1, 4, 7] = value
    first, bad, last = images_of(decode_npy(npy(array), 28, 28))
    assert isinstance(bad, InvalidPixel)
    assert bad.message.startswith(f"expected floats from 0.0 to 1.0, got {value} at row 4, column 7")
    np.testing.assert_array_equal(grey([first, last]), INTENSITIES[[0, 2]])


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((28, 28), bool), UnreadableArray, "expected an .npy of integers or floats, got one of 'bool'"),
        (np.zeros((28, 28), complex), UnreadableArray, "complex128"),
        (np.zeros((28, 28), "U3"), UnreadableArray, "<U3"),
        (np.zeros((28, 28), "S3"), UnreadableArray, "S3"),
        (np.zeros((28, 28), "M8[s]"), UnreadableArray, "datetime64"),
        (np.zeros((28, 28), [("grey", "u1")]), UnreadableArray, "grey"),
        (np.zeros(784, np.uint8), WrongShape, r"got \[784\]$"),
        (np.zeros((1, 784), np.uint8), WrongShape, r"got \[1, 784\]: give each image its rows and columns$"),
        (np.zeros((64, 784), np.uint8), WrongShape, r"got \[64, 784\]: give each image its rows and columns$"),
        (np.zeros((), np.uint8), WrongShape, r"got \[\]$"),
        (np.zeros((2, 4, 28, 28), np.uint8), WrongShape, r"got \[2, 4, 28, 28\]$"),
        (np.zeros((2, 0, 28, 28), np.uint8), WrongShape, r"got \[2, 0, 28, 28\]$"),
        (np.zeros((28, 0), np.uint8), WrongShape, r"got \[28, 0\]$"),
        (np.zeros((28, 3), np.uint8), WrongShape, r"got \[28, 3\]$"),
        (np.zeros((1, 1, 1, 28, 28), np.uint8), WrongShape, r"got \[1, 1, 1, 28, 28\]$"),
        (np.zeros((4, 16001), np.uint8), ImageTooLarge, "at most 16,000 a side"),
        (np.zeros((1024, 125, 126), np.uint8), ImageTooLarge, "at most 16,000,000 pixels in all"),
        (np.zeros((0, 28, 28), np.uint8), EmptyRequest, "expected a list of 1 to 1024 images, got an empty one"),
        (np.zeros((MAX_IMAGES + 1, 28, 28), np.uint8), RequestTooLarge, "expected at most 1024 images in one request, got 1025"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_npy_of_another_type_or_shape_is_refused(array: NDArray[Any], error: type[ClientError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        decode_npy(npy(array), 28, 28)
    assert len(caught.value.message) < 300


def test_as_many_images_as_are_allowed_are_read() -> None:
    assert len(images_of(decode_npy(npy(np.zeros((MAX_IMAGES, 28, 28), np.uint8)), 28, 28))) == MAX_IMAGES


GOOD_NPY = npy(LEVELS[0])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        pytest.param(GOOD_NPY[:-1], UnreadableArray, id="a byte short"),
        pytest.param(GOOD_NPY + b"\0", UnreadableArray, id="a byte more"),
        pytest.param(GOOD_NPY[:40], UnreadableArray, id="half a header"),
        pytest.param(b"\x93NUMPY", UnreadableArray, id="magic alone"),
        pytest.param(b"\x93NUMPY\x09\x00" + GOOD_NPY[8:], UnreadableArray, id="version 9"),
        pytest.param(npy_with_header(declared("(28, 28)", "'|O'"), pickle.dumps([1])), UnreadableArray, id="pickle"),
        pytest.param(npy_with_header(declared("(10000000000, 28, 28)")), RequestTooLarge, id="huge count"),
        pytest.param(npy_with_header(declared("(" + "9" * 400 + ", 28, 28)")), RequestTooLarge, id="count of 400 digits"),
        pytest.param(npy_with_header(declared("(28, 28)", "'|V2000000000'")), UnreadableArray, id="huge elements"),
        pytest.param(npy_with_header(declared("(1000, 28, 28)", "'<f8'")), UnreadableArray, id="more than there is"),
        pytest.param(npy_with_header(declared("(-1, 28, 28)")), WrongShape, id="negative count"),
        pytest.param(npy_with_header(declared("'28'")), UnreadableArray, id="shape that is no tuple"),
        pytest.param(npy_with_header(declared("(28, 28)", "'nonsense'")), UnreadableArray, id="no type"),
        pytest.param(npy_with_header("{'descr': '|u1'}"), UnreadableArray, id="header without shape"),
        pytest.param(npy_with_header("[" * 900), UnreadableArray, id="deep header"),
        pytest.param(npy_with_header("(" * 300 + ")" * 300), UnreadableArray, id="nested header"),
        pytest.param(npy_with_header("__import__('os').abort()"), UnreadableArray, id="code"),
        pytest.param(npy_with_header(b"\xff\xfe\0"), UnreadableArray, id="no text"),
        pytest.param(npy_with_header(" " * 60_000 + declared("(28, 28)"), bytes(784)), UnreadableArray, id="long header"),
        pytest.param(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", UnreadableArray, id="header of 4 GB"),
    ],
)
def test_hostile_npy_is_refused_before_anything_is_allocated(content: bytes, error: type[ClientError]) -> None:
    with pytest.raises(error, match=r"^expected .*, got ") as caught:
        decode_npy(content, 28, 28)
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 300


def test_header_that_python_2_wrote_is_read() -> None:
    content = npy_with_header(declared("(28L, 28L)"), LEVELS[0].tobytes())
    np.testing.assert_array_equal(grey(images_of(decode_npy(content, 28, 28))), INTENSITIES[:1])


# --- tensors


@pytest.mark.parametrize("datatype", NUMPY_TYPES)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("shape", [(28, 28), (3, 28, 28), (3, 1, 28, 28)], ids=str)
def test_tensor_of_every_type_and_shape_is_read(datatype: str, nested: bool, shape: tuple[int, ...]) -> None:
    source = INTENSITIES if datatype.startswith("FP") else np.minimum(LEVELS, 127)
    array = source[: shape[0] if len(shape) > 2 else 1].reshape(shape)
    decoded = decode_tensor(Tensor(datatype, shape, (array if nested else array.ravel()).tolist()), 28, 28)
    expected = array if datatype.startswith("FP") else array.astype(np.float32) / np.float32(255)
    assert isinstance(decoded, list)
    np.testing.assert_array_equal(grey(images_of(decoded)), expected.reshape(-1, 28, 28))


def test_float_tensor_may_be_written_without_points() -> None:
    (image,) = images_of(decode_tensor(Tensor("FP32", (28, 28), [0, 1] * 392), 28, 28))
    assert isinstance(image, DecodedImage)
    assert image.grey.max() == 1


ZEROS = [0] * 784


@pytest.mark.parametrize(
    ("datatype", "value", "message"),
    [
        ("UINT8", 256, "expected integers from 0 to 255, got 256 at row 0, column 5"),
        ("INT8", 128, "integers from 0 to 127"),
        ("INT64", -1, "integers from 0 to 255"),
        ("FP32", 1.01, "expected floats from 0.0 to 1.0, got 1.01 at row 0, column 5"),
        ("FP64", float("nan"), "got nan"),
        ("FP16", float("inf"), "got inf"),
    ],
)
def test_tensor_with_a_number_out_of_range_has_its_place(datatype: str, value: float, message: str) -> None:
    (bad,) = images_of(decode_tensor(Tensor(datatype, (28, 28), [*ZEROS[:5], value, *ZEROS[6:]]), 28, 28))
    assert isinstance(bad, InvalidPixel)
    assert message in bad.message


@pytest.mark.parametrize(
    ("datatype", "value"),
    [("UINT8", 0.5), ("UINT8", True), ("FP32", "1"), ("FP32", None), ("FP32", False), ("INT32", {}), ("UINT64", 10**400)],
    ids=lambda value: str(value)[:8],
)
def test_tensor_with_something_else_among_its_numbers_is_refused(datatype: str, value: object) -> None:
    with pytest.raises(InvalidPixel, match=r"^expected .*, got "):
        decode_tensor(Tensor(datatype, (28, 28), [*ZEROS[:5], value, *ZEROS[6:]]), 28, 28)


@pytest.mark.parametrize(
    ("shape", "data", "error"),
    [
        pytest.param((28, 28), ZEROS[1:], WrongShape, id="too few"),
        pytest.param((28, 28), [ZEROS], WrongShape, id="nested otherwise"),
        pytest.param((2, 28, 28), [[[0] * 28] * 28], WrongShape, id="fewer images"),
        pytest.param((28, 28), [[0] * 28] * 27 + [[0] * 27], WrongShape, id="ragged"),
        pytest.param((28, 28), [[0] * 28] * 27 + [7], WrongShape, id="ragged, with a number"),
        pytest.param((28, 28), [[[0]] * 28] * 28, WrongShape, id="too deep"),
        pytest.param((28, 28), [7] + [[0] * 28] * 783, WrongShape, id="a list among numbers"),
        pytest.param((1, 784), ZEROS, WrongShape, id="flat images"),
        pytest.param((-1, 28, 28), ZEROS, WrongShape, id="-1"),
        pytest.param((28, 28, 2), ZEROS * 2, WrongShape, id="two channels last"),
        pytest.param((), [], WrongShape, id="no shape"),
        pytest.param((0, 28, 28), [], EmptyRequest, id="none"),
        pytest.param((2**70, 28, 28), [], RequestTooLarge, id="huge"),
        pytest.param((28,) * 50, [], WrongShape, id="many dimensions"),
    ],
)
def test_tensor_of_another_shape_is_refused(shape: tuple[int, ...], data: list[Any], error: type[ClientError]) -> None:
    with pytest.raises(error, match=r"^expected .*, got ") as caught:
        decode_tensor(Tensor("FP32", shape, data), 28, 28)
    assert len(caught.value.message) < 300


# --- shapes, the same for all


IMAGES = np.arange(2 * 30 * 40).reshape(2, 30, 40) % 256  # of another size than the network's
COLOURS = np.stack([IMAGES, (IMAGES * 3) % 256, (IMAGES * 7) % 256], axis=3)  # (2, 30, 40, 3)
LUMINANCE = COLOURS @ np.array([0.299, 0.587, 0.114]) / 255


@pytest.mark.parametrize("form", ["npy", "tensor", "flat tensor", "binary tensor", "JSON"])
@pytest.mark.parametrize("kind", ["integers", "floats"])
@pytest.mark.parametrize(
    ("array", "expected"),
    [
        pytest.param(IMAGES[0], IMAGES[:1] / 255, id="(H, W)"),
        pytest.param(IMAGES[0, ..., None], IMAGES[:1] / 255, id="(H, W, 1)"),
        pytest.param(IMAGES[:1], IMAGES[:1] / 255, id="(1, H, W)"),
        pytest.param(IMAGES, IMAGES / 255, id="(N, H, W)"),
        pytest.param(IMAGES[:, None], IMAGES / 255, id="(N, 1, H, W)"),
        pytest.param(IMAGES[..., None], IMAGES / 255, id="(N, H, W, 1)"),
        pytest.param(COLOURS[0], LUMINANCE[:1], id="(H, W, 3)"),
        pytest.param(COLOURS, LUMINANCE, id="(N, H, W, 3)"),
        pytest.param(np.moveaxis(COLOURS, 3, 1), LUMINANCE, id="(N, 3, H, W)"),
    ],
)
def test_every_shape_is_read_alike_in_every_form(
    form: str, kind: str, array: NDArray[np.int64], expected: NDArray[np.float64]
) -> None:
    values = array.astype("u1") if kind == "integers" else (array / 255).astype("f4")
    datatype = "UINT8" if kind == "integers" else "FP32"
    if form == "npy":
        decoded = decode_npy(npy(values), 28, 28)
    elif form == "JSON":
        decoded = decode_numbers(values.tolist(), 28, 28)
    else:
        data = {"tensor": values.tolist(), "flat tensor": values.ravel().tolist(), "binary tensor": values.tobytes()}[form]
        decoded = list(decode_tensor(Tensor(datatype, values.shape, data), 28, 28))
    is_single = array.ndim == 2 or array.shape in ((30, 40, 1), (30, 40, 3))
    assert isinstance(decoded, list) is (not is_single or form.endswith("tensor"))
    np.testing.assert_allclose(grey(images_of(decoded)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("nested", "message"),
    [
        pytest.param([[0.0] * 28] * 27 + [[0.0] * 27], "got ragged lists$", id="ragged"),
        pytest.param([0.5] * 784, r"got \[784\]$", id="flat"),
        pytest.param([[[[[0.0]]]]], "got ragged lists$", id="deep"),
        pytest.param([[]], r"got \[1, 0\]$", id="empty row"),
    ],
)
def test_nested_numbers_of_another_shape_are_refused(nested: list[Any], message: str) -> None:
    with pytest.raises(WrongShape, match=message):
        decode_numbers(nested, 28, 28)


@pytest.mark.parametrize(
    ("pixels", "hint"),
    [
        pytest.param(LEVELS[0].astype(np.float32), "numbers up to 255 are sent as integers, or divided by 255$", id="0.0-255.0"),
        pytest.param((INTENSITIES[0] - 0.1307) / 0.3081, "normalisation is inside the network$", id="normalised"),
        pytest.param(INTENSITIES[0] * 2 - 1, "normalisation is inside the network$", id="-1 to 1"),
        pytest.param(INTENSITIES[0] - 100, r"got -\d[\d.]* at row 0, column 0$", id="neither"),
    ],
)
def test_numbers_out_of_range_are_told_what_they_look_like(pixels: NDArray[np.floating], hint: str) -> None:
    with pytest.raises(InvalidPixel, match=hint):
        decode_numbers(pixels.tolist(), 28, 28)


def test_binary_tensor_of_another_length_is_refused() -> None:
    with pytest.raises(WrongShape, match=r"expected 3,136 bytes for shape \[28, 28\] of FP32, got 784"):
        decode_tensor(Tensor("FP32", (28, 28), bytes(784)), 28, 28)
