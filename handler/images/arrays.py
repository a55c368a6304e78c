"""Arrays of pixels (nested numbers, .npy files, tensors of the Open Inference Protocol) -> grey images.

As `decode` part of the trust boundary: what a header declares is checked before anything is allocated, and no pickle is read.
Shapes are the same wherever numbers may stand. Knows nothing of TorchServe, HTTP or the network.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.errors import (
    ClientError,
    EmptyRequest,
    ImageTooLarge,
    InvalidPixel,
    RequestTooLarge,
    UnreadableArray,
    WrongShape,
    shown,
)
from handler.images.decode import DecodedImage
from handler.limits import MAX_HEADER_BYTES, MAX_IMAGES, MAX_PIXELS, MAX_SIDE

NPY_MAGIC = b"\x93NUMPY"  # how every .npy file starts; no JSON can
NUMPY_TYPES = {  # the protocol's number types -> numpy's
    **{f"UINT{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
SHAPES = ("(H, W)", "(H, W, 1)", "(H, W, 3)", "(N, H, W)", "(N, 1, H, W)", "(N, H, W, 1)", "(N, 3, H, W)", "(N, H, W, 3)")
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue, as Pillow makes colour grey (ITU-R 601)
MIN_SIDE = 4  # pixels: in less no digit can be seen
MAX_DEPTH = 4  # of nested lists
# What numbers look like that were normalised by a mean and a deviation: MNIST's lie between -0.43 and 2.83.
NORMALISED_RANGE = (-5.0, -0.1, 5.0)  # of the lowest, least and most, and of the highest, most

Decoded = DecodedImage | ClientError  # an error in the place of a bad image


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of numbers as it was sent, unchecked but for its types.

    Attributes:
        datatype: one of NUMPY_TYPES.
        shape: as declared.
        data: numbers, flat or nested; or all of them as they came in binary.
    """

    datatype: str
    shape: tuple[int, ...]
    data: list[Any] | bytes


def require_image_count(count: int) -> None:
    """Refuse a request with no image or with more than MAX_IMAGES.

    Raises:
        EmptyRequest, RequestTooLarge
    """
    if count < 1:
        raise EmptyRequest(f"expected a list of 1 to {MAX_IMAGES} images, got an empty one")
    if count > MAX_IMAGES:
        raise RequestTooLarge(f"expected at most {MAX_IMAGES} images in one request, got {shown(count)}")


def decode_npy(content: bytes, height: int, width: int) -> DecodedImage | list[Decoded]:
    """Read an .npy of one of SHAPES. Integers are 0-255, floats 0-1.

    Args:
        content: the file.
        height, width: of the network's input, which flat images are told by.
    Returns:
        the image; of an array that is a list of images (be it of one) the list, with an error in the place of a bad one.
    Raises:
        UnreadableArray: it is damaged, truncated, or its elements are neither integers nor floats.
        WrongShape: it has another shape.
        EmptyRequest, RequestTooLarge, ImageTooLarge: it has no images, or too many, or too large ones.
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
    layout = _Layout.of(shape, height * width)
    size = math.prod(shape) * dtype.itemsize
    if len(content) - file.tell() != size:
        raise UnreadableArray(
            f"expected the whole file of an .npy that declares {size:,} bytes of pixels, got {len(content) - file.tell():,}"
        )
    values = np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran_order else "C")
    limit = 1 if dtype.kind == "f" else 255
    return layout.images(values, limit, f"{dtype.name} array, 0-{limit}")


def decode_tensor(tensor: Tensor, height: int, width: int) -> list[Decoded]:
    """Read a tensor of one of SHAPES: integers 0-255 or floats 0-1.

    Returns:
        a list, be it of one, with an error in the place of a bad image.
    Raises:
        WrongShape: it has another shape, or its data are neither flat nor nested in that shape.
        InvalidPixel: there is something other than numbers among its data, or a number with a fraction among integers.
        EmptyRequest, RequestTooLarge, ImageTooLarge: it has no images, or too many, or too large ones.
    """
    layout = _Layout.of(tensor.shape, height * width)
    dtype = np.dtype(NUMPY_TYPES[tensor.datatype])
    limit = 1 if dtype.kind == "f" else min(255, np.iinfo(dtype).max)
    size = math.prod(tensor.shape)
    if isinstance(tensor.data, bytes):
        if len(tensor.data) != size * dtype.itemsize:
            raise WrongShape(
                f"expected {size * dtype.itemsize:,} bytes for shape {shown(list(tensor.shape))} of {tensor.datatype}, got "
                f"{len(tensor.data):,}"
            )
        values: NDArray[Any] = np.frombuffer(tensor.data, dtype.newbyteorder("<"))
    else:
        flat, shape = _flatten(tensor.data)
        if shape not in (tensor.shape, (size,)):
            raise WrongShape(
                f"expected data of shape {shown(list(tensor.shape))} or [{size}], got "
                f"{'ragged lists' if shape is None else list(shape)}"
            )
        odd = set(map(type, flat)) - ({int, float} if dtype.kind == "f" else {int})
        if odd:
            value = next(value for value in flat if type(value) in odd)
            raise InvalidPixel(f"expected numbers as the data of a tensor of {tensor.datatype}, got {shown(value)} among them")
        values = _as_floats(flat, limit)
    return layout.list_images(values, limit, f"{tensor.datatype} tensor, 0-{limit}")


def decode_numbers(nested: list[Any], height: int, width: int) -> DecodedImage | list[Decoded]:
    """Check nested numbers of one of SHAPES and make them intensities: integers are 0-255; where there is a float, all are 0-1.

    Returns:
        the image; of a list of images (be it of one) the list, with an error in the place of a bad one.
    Raises:
        WrongShape: the lists have another shape.
        InvalidPixel: a value is no number, or of a single image NaN, infinite or out of range.
        EmptyRequest, RequestTooLarge, ImageTooLarge: there are no images, or too many, or too large ones.
    """
    flat, shape = _flatten(nested)
    if shape is None:
        raise WrongShape(f"expected evenly nested numbers of shape {' or '.join(SHAPES)}, got ragged lists")
    layout = _Layout.of(shape, height * width)
    kinds = set(map(type, flat))
    if not kinds <= {int, float}:
        odd = next(value for value in flat if type(value) not in (int, float))
        raise InvalidPixel(f"expected numbers as pixels, got {shown(odd)} among them")
    limit, source = (1, "floats 0-1") if float in kinds else (255, "integers 0-255")
    return layout.images(_as_floats(flat, limit).reshape(shape), limit, source)


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the axes of an array are.

    Attributes:
        count, height, width: of its images.
        several: whether it is a list of images, be it of one.
        colour_axis: of red, green and blue, 1 or 3, once there is an axis of images before; None of grey images.
    """

    count: int
    height: int
    width: int
    several: bool
    colour_axis: int | None = None

    @classmethod
    def of(cls, shape: Sequence[int], flat_length: int) -> "_Layout":
        """Read a shape. Where it could be two things, (3, H, W) is three images, and (1, H, W) a list of one.

        Args:
            shape: of the array.
            flat_length: pixels of the network's input: rows as long are images without their shape, and no image.
        Raises:
            WrongShape, EmptyRequest, RequestTooLarge, ImageTooLarge
        """
        match tuple(shape):
            case (height, width) | (height, width, 1):
                layout = cls(1, height, width, several=False)
            case (height, width, 3) if height > 3:
                layout = cls(1, height, width, several=False, colour_axis=3)
            case (count, height, width) | (count, 1, height, width) | (count, height, width, 1):
                layout = cls(count, height, width, several=True)
            case (count, 3, height, width):
                layout = cls(count, height, width, several=True, colour_axis=1)
            case (count, height, width, 3):
                layout = cls(count, height, width, several=True, colour_axis=3)
            case other:
                raise WrongShape(f"expected shape {' or '.join(SHAPES)}, got {shown(list(other))}")
        if flat_length in (height, width):
            raise WrongShape(
                f"expected shape {' or '.join(SHAPES)}, got {shown(list(shape))}: give each image its rows and columns"
            )
        if min(height, width) < MIN_SIDE or layout.count < 0:
            raise WrongShape(f"expected shape {' or '.join(SHAPES)}, got {shown(list(shape))}")
        require_image_count(layout.count)
        if layout.count * height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
            raise ImageTooLarge(
                f"expected at most {MAX_PIXELS:,} pixels in all and at most {MAX_SIDE:,} a side, got an array of shape "
                f"{shown(list(shape))}"
            )
        return layout

    def images(self, values: NDArray[Any], limit: int, source: str) -> DecodedImage | list[Decoded]:
        """Give the images as the shape has them: a list, or one."""
        images = self.list_images(values, limit, source)
        if self.several:
            return images
        if isinstance(images[0], ClientError):
            raise images[0]
        return images[0]

    def list_images(self, values: NDArray[Any], limit: int, source: str) -> list[Decoded]:
        """Check the pixels and make them intensities.

        Args:
            values: numbers, in row-major order, as many as the shape has.
            limit: the value of full intensity.
            source: what they were sent as.
        """
        grey_shape = (self.count, self.height, self.width)
        if self.colour_axis is None:
            pixels = values.reshape(grey_shape)
        else:
            colour_shape = (*grey_shape[: self.colour_axis], 3, *grey_shape[self.colour_axis :])
            pixels = np.moveaxis(values.reshape(colour_shape), self.colour_axis, 3)  # (N, H, W, 3)
        bad = ~((pixels >= 0) & (pixels <= limit))  # NaN is in no range
        bad_images = set(np.flatnonzero(bad.reshape(self.count, -1).any(axis=1)).tolist())
        with np.errstate(over="ignore", invalid="ignore"):  # of bad pixels
            grey_values = pixels if self.colour_axis is None else pixels.astype(np.float64) @ LUMINANCE
            grey = grey_values.astype(np.float32) / np.float32(limit if limit == 1 else 255)  # (N, H, W)
        return [
            _bad_pixel(pixels[index], bad[index], limit) if index in bad_images else DecodedImage(one, source)
            for index, one in enumerate(grey)
        ]


def _flatten(nested: list[Any]) -> tuple[list[Any], tuple[int, ...] | None]:
    """Give nested lists as one list, in row-major order, and their shape: None where they are ragged or too deep."""
    level = nested
    shape = [len(level)]
    while level and any(type(member) is list for member in level):
        lengths = {len(member) if type(member) is list else -1 for member in level}
        if len(lengths) > 1 or len(shape) == MAX_DEPTH:
            return [], None
        shape.append(lengths.pop())
        level = list(itertools.chain.from_iterable(level))
    return level, tuple(shape)


def _as_floats(flat: list[Any], limit: int) -> NDArray[np.float64]:
    try:
        return np.array(flat, dtype=np.float64)
    except OverflowError as error:  # an integer of more than 300 digits
        raise InvalidPixel(f"expected {_accepted(limit)}, got an integer of hundreds of digits") from error


def _bad_pixel(values: NDArray[Any], bad: NDArray[np.bool_], limit: int) -> InvalidPixel:
    """Say which pixel is bad, and what its image looks like as a whole."""
    row, column = np.argwhere(bad)[0][:2].tolist()
    value = values[tuple(np.argwhere(bad)[0])].item()
    message = f"expected {_accepted(limit)}, got {shown(value if limit == 1 else int(value))} at row {row}, column {column}"
    lowest, highest = float(values.min()), float(values.max())  # NaN where there is one
    if limit == 1 and lowest >= 0 and 1 < highest <= 255:
        message += "; numbers up to 255 are sent as integers, or divided by 255"
    elif limit == 1 and NORMALISED_RANGE[0] <= lowest <= NORMALISED_RANGE[1] and highest <= NORMALISED_RANGE[2]:
        message += "; these look normalised by a mean and a deviation: send the intensities, normalisation is inside the network"
    return InvalidPixel(message)


def _accepted(limit: int) -> str:
    return "floats from 0.0 to 1.0" if limit == 1 else f"integers from 0 to {limit}"
