"""Arrays of pixels (nested numbers, .npy files, tensors of the Open Inference Protocol) -> grey images.

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

NPY_MAGIC = b"\x93NUMPY"  # how every .npy file starts; no JSON can
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


def require_image_count(count: int) -> None:
    """Refuse a request with no image or with more than MAX_IMAGES.

    Raises:
        EmptyRequest, RequestTooLarge
    """
    if count < 1:
        raise EmptyRequest(f"expected a list of 1 to {MAX_IMAGES} images, got an empty one")
    if count > MAX_IMAGES:
        raise RequestTooLarge(f"expected at most {MAX_IMAGES} images in one request, got {shown(count)}")


def decode_npy(content: bytes, height: int, width: int) -> DecodedImage | list[DecodedImage | ClientError]:
    """Read an .npy of shape (height, width), (N, height, width) or (N, 1, height, width).

    Integers are 0-255, floats 0-1.

    Returns:
        the image; of an array that is a list of images (be it of one) the list, with an error in the place of a bad one.
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
        raise UnreadableArray("expected an .npy as numpy.save writes it, got one with a damaged header") from error
    if dtype.kind not in "uif":
        raise UnreadableArray(f"expected an .npy of integers or floats, got one of {shown(str(dtype))}")
    count, several = _image_count(shape, height, width)
    size = count * height * width * dtype.itemsize
    if len(content) - file.tell() != size:
        raise UnreadableArray(
            f"expected the whole file of an .npy that declares {size:,} bytes of pixels, got {len(content) - file.tell():,}"
        )
    values = np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran_order else "C")
    limit = 1 if dtype.kind == "f" else 255
    images = _read_pixels(values.reshape(count, height, width), limit, f"{dtype.name} array, 0-{limit}")
    if several:
        return images
    if isinstance(images[0], ClientError):
        raise images[0]
    return images[0]


def decode_tensor(tensor: Tensor, height: int, width: int) -> list[DecodedImage | ClientError]:
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
        raise InvalidPixel(f"expected numbers as the data of a tensor of {tensor.datatype}, got {shown(value)} among them")
    limit = 1 if dtype.kind == "f" else min(255, np.iinfo(dtype).max)
    try:
        values = np.array(flat, dtype=np.float64)
    except OverflowError as error:  # an integer of more than 300 digits
        raise InvalidPixel(f"expected {_accepted(limit)}, got an integer of hundreds of digits") from error
    return _read_pixels(values.reshape(count, height, width), limit, f"{tensor.datatype} tensor, 0-{limit}")


def _image_count(shape: tuple[int, ...], height: int, width: int) -> tuple[int, bool]:
    """Say how many images an array of this shape holds, and whether it is a list of them."""
    if shape == (height, width):
        return 1, False
    if len(shape) in (3, 4) and shape[-2:] == (height, width) and shape[1:-2] in ((), (1,)) and shape[0] >= 0:
        require_image_count(shape[0])
        return shape[0], True
    raise WrongShape(
        f"expected shape [{height}, {width}], [N, {height}, {width}] or [N, 1, {height}, {width}], got {shown(list(shape))}"
    )


def _flatten(tensor: Tensor) -> list[Any]:
    """Give the data of a tensor as one list, in row-major order."""
    level = tensor.data
    lengths = [len(level)]
    while level and isinstance(level[0], list) and len(lengths) < len(tensor.shape):
        inner = {len(member) if isinstance(member, list) else -1 for member in level}
        if len(inner) > 1:
            raise WrongShape(f"expected flat or evenly nested lists for shape {shown(list(tensor.shape))}, got ragged data")
        lengths.append(inner.pop())
        level = list(itertools.chain.from_iterable(level))
    size = int(np.prod(tensor.shape))
    if lengths != list(tensor.shape) and lengths != [size]:
        raise WrongShape(f"expected data of shape {shown(list(tensor.shape))} or [{size}], got {lengths}")
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
        f"expected {_accepted(limit)}, got {shown(value if limit == 1 else int(value))} at row {row}, column {column}"
    )


def _accepted(limit: int) -> str:
    return "floats from 0.0 to 1.0" if limit == 1 else f"integers from 0 to {limit}"


def decode_numbers(rows: list[Any], height: int, width: int) -> DecodedImage:
    """Check nested numbers and make them intensities: integers are 0-255; where there is a float, all are 0-1.

    Args:
        rows: `height` lists of `width` numbers each.
    Raises:
        WrongShape: the lists have another shape.
        InvalidPixel: a value is no number, NaN, infinite or out of range.
    """
    if len(rows) != height or any(not isinstance(row, list) or len(row) != width for row in rows):
        raise WrongShape(f"expected numbers of shape ({height}, {width}), got {_describe_shape(rows)}")
    kinds = {kind for row in rows for kind in set(map(type, row))}
    if not kinds <= {int, float}:
        odd = next(value for row in rows for value in row if type(value) not in (int, float))
        raise InvalidPixel(f"expected numbers as pixels, got {shown(odd)} among them")
    limit, source = (1, "floats 0-1") if float in kinds else (255, "integers 0-255")
    values = _as_floats(rows)
    if not np.all((values >= 0) & (values <= limit)):  # false for NaN as well
        y, x = next(place for place in np.ndindex(height, width) if not 0 <= rows[place[0]][place[1]] <= limit)
        raise InvalidPixel(
            f"expected integers from 0 to 255, or floats from 0.0 to 1.0, got {shown(rows[y][x])} at row {y}, column {x}"
        )
    return DecodedImage(values.astype(np.float32) / np.float32(limit), source, is_canonical=True)


def _as_floats(rows: list[Any]) -> NDArray[np.float64]:
    try:
        return np.array(rows, dtype=np.float64)
    except OverflowError:  # an integer of more than 300 digits
        return np.full((len(rows), len(rows[0])), np.nan)


def _describe_shape(value: object) -> str:
    """Render the shape of nested lists, "ragged" where their lengths differ."""
    shape: list[str] = []
    level = [value]
    while level and len(shape) < 5 and all(isinstance(member, list) for member in level):
        lengths = {len(member) for member in level if isinstance(member, list)}
        shape.append(str(lengths.pop()) if len(lengths) == 1 else "ragged")
        level = list(itertools.islice(itertools.chain.from_iterable(m for m in level if isinstance(m, list)), 10_000))
    return f"({', '.join(shape)})"
