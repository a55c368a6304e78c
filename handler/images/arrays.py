"""Arrays of pixels (.npy files, tensors of the Open Inference Protocol) -> grey images.

As `decode` part of the trust boundary: what a header declares is checked before anything is allocated, and no pickle is read.
Knows nothing of TorchServe, HTTP or the network.
"""

import itertools
import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.errors import ClientError, EmptyRequest, InvalidPixel, RequestTooLarge, UnreadableArray, WrongShape, shown
from handler.images.decode import DecodedImage
from handler.limits import MAX_HEADER_BYTES, MAX_IMAGES

NUMPY_TYPES = {  # the protocol's number types -> numpy's
    **{f"UINT{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of numbers as it was sent, unchecked but for its types.

    Attributes:
        datatype: one of NUMPY_TYPES.
        shape: as declared.
        data: numbers, flat or nested.
    """

    datatype: str
    shape: tuple[int, ...]
    data: list[Any]


@dataclass(frozen=True, slots=True)
class DecodedImages:
    """The images of one array.

    Attributes:
        images: in the array's order, with an error in the place of one that has a bad pixel.
        several: the array is a list of images, be it of one.
    """

    images: list[DecodedImage | ClientError]
    several: bool


def require_image_count(count: int) -> None:
    """Refuse a request with no image or with more than MAX_IMAGES.

    Raises:
        EmptyRequest, RequestTooLarge
    """
    if count < 1:
        raise EmptyRequest(f"got a list of no images; 1 to {MAX_IMAGES} are accepted")
    if count > MAX_IMAGES:
        raise RequestTooLarge(f"got {shown(count)} images in one request; up to {MAX_IMAGES} are accepted")


def decode_npy(content: bytes, height: int, width: int) -> DecodedImages:
    """Read an .npy of shape (height, width), (N, height, width) or (N, 1, height, width).

    Integers are 0-255, floats 0-1.

    Raises:
        UnreadableArray: it is damaged, truncated, or its elements are neither integers nor floats.
        WrongShape: it has another shape.
        EmptyRequest, RequestTooLarge: it has no images, or too many.
    """
    file = BytesIO(content)
    try:
        with warnings.catch_warnings(action="ignore"):  # numpy's, of headers that Python 2 wrote
            version = np.lib.format.read_magic(file)
            # 3.0 has the layout of 2.0, and other characters only in the names of fields, which are refused below.
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read_header(file, max_header_size=MAX_HEADER_BYTES)
    except Exception as error:  # numpy evaluates the header, and raises whatever a damaged one leads it to
        raise UnreadableArray("got an .npy with a damaged header; one that numpy.save wrote is accepted") from error
    if dtype.kind not in "uif":
        raise UnreadableArray(f"got an .npy of {shown(str(dtype))}; arrays of integers or floats are accepted")
    count, several = _image_count(shape, height, width)
    size = count * height * width * dtype.itemsize
    if len(content) - file.tell() != size:
        raise UnreadableArray(
            f"got {len(content) - file.tell():,} bytes of pixels in an .npy that declares {size:,}; a whole file is accepted"
        )
    values = np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran_order else "C")
    limit = 1 if dtype.kind == "f" else 255
    return DecodedImages(_read_pixels(values.reshape(count, height, width), limit, f"{dtype.name} array, 0-{limit}"), several)


def decode_tensor(tensor: Tensor, height: int, width: int) -> DecodedImages:
    """Read a tensor of shape [height, width], [N, height, width] or [N, 1, height, width]: integers 0-255 or floats 0-1.

    Raises:
        WrongShape: it has another shape, or its data are neither flat nor nested in that shape.
        InvalidPixel: there is something other than numbers among its data, or a number with a fraction among integers.
        EmptyRequest, RequestTooLarge: it has no images, or too many.
    """
    count, _ = _image_count(tensor.shape, height, width)
    flat = _flatten(tensor)
    dtype = np.dtype(NUMPY_TYPES[tensor.datatype])
    accepted = (int, float) if dtype.kind == "f" else (int,)
    odd = set(map(type, flat)) - set(accepted)
    if odd:
        value = next(value for value in flat if type(value) in odd)
        raise InvalidPixel(f"got {shown(value)} among the data of a tensor of {tensor.datatype}; such numbers are accepted")
    limit = 1 if dtype.kind == "f" else min(255, np.iinfo(dtype).max)
    try:
        values = np.array(flat, dtype=np.float64)
    except OverflowError as error:  # an integer of more than 300 digits
        raise InvalidPixel(f"got an integer of hundreds of digits; {_accepted(limit)} are accepted") from error
    images = _read_pixels(values.reshape(count, height, width), limit, f"{tensor.datatype} tensor, 0-{limit}")
    return DecodedImages(images, several=True)


def _image_count(shape: tuple[int, ...], height: int, width: int) -> tuple[int, bool]:
    """Say how many images an array of this shape holds, and whether it is a list of them."""
    if shape == (height, width):
        return 1, False
    if len(shape) in (3, 4) and shape[-2:] == (height, width) and shape[1:-2] in ((), (1,)) and shape[0] >= 0:
        require_image_count(shape[0])
        return shape[0], True
    raise WrongShape(
        f"got shape {shown(list(shape))}; [{height}, {width}], [N, {height}, {width}] or [N, 1, {height}, {width}] is accepted"
    )


def _flatten(tensor: Tensor) -> list[Any]:
    """Give the data of a tensor as one list, in row-major order."""
    level = tensor.data
    lengths = [len(level)]
    while level and isinstance(level[0], list) and len(lengths) < len(tensor.shape):
        inner = {len(member) if isinstance(member, list) else -1 for member in level}
        if len(inner) > 1:
            raise WrongShape(f"got ragged data for shape {shown(list(tensor.shape))}; flat or evenly nested lists are accepted")
        lengths.append(inner.pop())
        level = list(itertools.chain.from_iterable(level))
    size = int(np.prod(tensor.shape))
    if lengths != list(tensor.shape) and lengths != [size]:
        raise WrongShape(f"got data of shape {lengths} for shape {shown(list(tensor.shape))}; that, or [{size}], is accepted")
    return level


def _read_pixels(values: NDArray[Any], limit: int, source: str) -> list[DecodedImage | ClientError]:
    """Check the pixels and make them intensities.

    Args:
        values: numbers (N, H, W).
        limit: the value of full intensity.
    """
    bad = ~((values >= 0) & (values <= limit))  # NaN is in no range
    bad_images = set(np.flatnonzero(bad.any(axis=(1, 2))).tolist())
    with np.errstate(over="ignore", invalid="ignore"):  # of bad pixels
        grey = values.astype(np.float32) / np.float32(limit if limit == 1 else 255)  # (N, H, W)
    return [
        _bad_pixel(values[index], bad[index], limit) if index in bad_images else DecodedImage(pixels, source, is_canonical=True)
        for index, pixels in enumerate(grey)
    ]


def _bad_pixel(values: NDArray[Any], bad: NDArray[np.bool_], limit: int) -> InvalidPixel:
    row, column = np.argwhere(bad)[0].tolist()
    value = values[row, column].item()
    return InvalidPixel(
        f"got {shown(value if limit == 1 else int(value))} at row {row}, column {column}; {_accepted(limit)} are accepted"
    )


def _accepted(limit: int) -> str:
    return "floats from 0.0 to 1.0" if limit == 1 else f"integers from 0 to {limit}"
