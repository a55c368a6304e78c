"""A request -> its images, ready for the network, or one error that names the bad ones.

Knows neither torch nor TorchServe.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from handler.errors import (
    BlankImage,
    ClientError,
    ImageTooLarge,
    InvalidOption,
    RequestTooLarge,
    ServiceError,
    WrongShape,
    join_errors,
)
from handler.images.arrays import NPY_MAGIC, Decoded, Tensor, decode_npy, decode_numbers, decode_tensor
from handler.images.budget import UNCOUNTED_BYTES, DecodingBudget, Stopwatch
from handler.images.decode import DecodedImage, decode_image
from handler.images.digits import prepare_digit
from handler.images.framing import MNIST_FRAMING, Framing
from handler.images.preparation import Prepare, PreparedImage, scale_image
from handler.images.structure import read_structure
from handler.images.thumbnail import Thumbnail
from handler.limits import (
    MAX_DECODE_SECONDS,
    MAX_GRADIENTS,
    MAX_IMAGE_MAP_NUMBERS,
    MAX_IMAGE_MAP_NUMBERS_NPY,
    MAX_IMAGES,
    MAX_MAPS,
    MAX_PIXELS,
    MAX_PREPARED_IMAGES,
    MAX_REQUEST_SECONDS,
    SECONDS_A_GRADIENT,
    SECONDS_A_NUMBER,
    SECONDS_TO_PREPARE,
    SECONDS_TO_PREPARE_SMALL,
    SMALL_SIDE,
)
from handler.protocol.options import Options, Space
from handler.protocol.request import Part, Payload, ReplyFormat, Request
from handler.render.drawing import Background

PNG_MAGIC, PNG_SIDES, PNG_SIDES_END = b"\x89PNG", struct.Struct(">II"), 24
MAP_NUMBERS = {
    ReplyFormat.JSON: MAX_IMAGE_MAP_NUMBERS,
    ReplyFormat.NPY: MAX_IMAGE_MAP_NUMBERS_NPY,
    ReplyFormat.PNG: MAX_PIXELS,
}  # that all maps of a request may have in the pixels of its images


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request whose images are all ready.

    Attributes:
        request: as it was read.
        images: ready for the network.
        options: what is asked about each image.
        listed: the reply is a list, be it of one.
    """

    request: Request
    images: tuple[PreparedImage, ...]
    options: tuple[Options, ...]
    listed: bool


def preprocess(
    request: Request, height: int, width: int, *, has_mean: bool = True, framing: Framing = MNIST_FRAMING
) -> PreparedRequest:
    """Decode all images of a request and prepare them.

    Args:
        request: as it was read.
        height, width: of the network's input.
        has_mean: whether the network says the mean of its pixels, which some methods need.
        framing: of the network's training set; images that have it are not prepared.
    Raises:
        ClientError: an image is bad; where there are several, one error names all bad ones.
        InvalidOption: a method needs the mean, and there is none.
        RequestTooLarge: more than MAX_PREPARED_IMAGES have to be prepared, more than MAX_MAPS maps were asked for, maps that
            take more than MAX_GRADIENTS, or maps of too many pixels.
    """
    try:
        return _preprocess(request, height, width, has_mean=has_mean, framing=framing)
    except ServiceError as error:
        error.as_text = request.infer is not None
        raise


def estimate_seconds(request: Request, height: int, width: int) -> float:
    """Estimate the processor time that a request will take, from what its images declare. Nothing is decoded.

    Args:
        request: as it was read.
        height, width: of the network's input.
    """
    parts = [part for part in request.parts if isinstance(part, Part)]
    gradient_count = sum(part.options.gradient_count for part in parts)
    return gradient_count * SECONDS_A_GRADIENT + sum(_estimate_payload(part.payload, height * width) for part in parts)


def _estimate_payload(payload: Payload, network_pixels: int) -> float:
    seconds = 0.0
    if not isinstance(payload, bytes) or payload.startswith(NPY_MAGIC):
        pixels = _count_numbers(payload)
        seconds = pixels * SECONDS_A_NUMBER
    elif payload.startswith(PNG_MAGIC) and PNG_SIDES_END <= len(payload) <= UNCOUNTED_BYTES:  # most images, in most requests
        pixels = math.prod(PNG_SIDES.unpack_from(payload, PNG_SIDES_END - PNG_SIDES.size))
    else:
        try:
            structure = read_structure(payload, DecodingBudget())
        except ClientError:  # it will be refused as soon as it is looked at
            structure = None
        pixels, seconds = (structure.pixels, structure.seconds) if structure else (0, 0.0)
    if pixels <= network_pixels:
        return seconds
    return seconds + (SECONDS_TO_PREPARE_SMALL if pixels <= SMALL_SIDE**2 else SECONDS_TO_PREPARE)


def _count_numbers(payload: Payload) -> int:
    """Count the numbers of an array, of nested lists by the first of each."""
    if isinstance(payload, bytes):
        return len(payload)
    count, level = 1, payload.data if isinstance(payload, Tensor) else payload
    if isinstance(level, bytes):
        return len(level)
    while isinstance(level, list) and level:
        count *= len(level)
        level = level[0]
    return count


def _preprocess(request: Request, height: int, width: int, *, has_mean: bool, framing: Framing) -> PreparedRequest:
    stopwatch = Stopwatch()
    budget = DecodingBudget()
    decoded, options, listed = _decode_all(request, budget, height, width)
    decoding_seconds = stopwatch.seconds() + MAX_DECODE_SECONDS - budget.seconds_left
    _require_few_maps([asked for asked in options if asked.explain], has_mean=has_mean)
    _require_little_work(decoded, options, decoding_seconds, height * width)
    images: list[PreparedImage] = []
    errors: dict[int, ClientError] = {}
    prepared_count = 0
    for index, (one, asked) in enumerate(zip(decoded, options, strict=True)):
        try:
            image = _prepare(one, asked, height, width, framing)
        except ClientError as error:
            errors[index] = error
            prepared_count += isinstance(error, BlankImage)
        else:
            images.append(image)
            prepared_count += image.ink_box is not None
        if prepared_count > MAX_PREPARED_IMAGES:
            raise RequestTooLarge(
                f"expected at most {MAX_PREPARED_IMAGES} images to preprocess in one request, and at most {MAX_IMAGES} that need "
                "no preprocessing (with the framing of the training set, or 'prepare' 'none'), got more"
            )
    if errors:
        raise join_errors(errors, len(decoded)) if listed else errors[0]
    _require_map_numbers(images, options, MAP_NUMBERS[request.reply_format])
    return PreparedRequest(request, tuple(images), tuple(options), listed)


def _require_few_maps(explained: Sequence[Options], *, has_mean: bool) -> None:
    """Refuse more maps than a reply can hold, work that would hold the worker for too long, and maps that cannot be made."""
    map_count = sum(len(asked.target.classes) for asked in explained)
    if map_count > MAX_MAPS:
        raise RequestTooLarge(f"expected at most {MAX_MAPS} maps, got {len(explained)} images with {map_count} targets in all")
    gradient_count = sum(asked.gradient_count for asked in explained)
    if gradient_count > MAX_GRADIENTS:
        raise RequestTooLarge(
            f"expected maps of at most {MAX_GRADIENTS:,} gradients in all (targets x samples, or steps), got {len(explained)} "
            f"images whose maps take {gradient_count:,}: ask for fewer samples, steps, targets or images"
        )
    if not has_mean and any(asked.method.needs_mean for asked in explained):
        raise InvalidOption("expected a method that works without the mean image, which this network does not say, got another")


def _require_little_work(
    decoded: Sequence[Decoded], options: Sequence[Options], decoding_seconds: float, network_pixels: int
) -> None:
    """Refuse what would hold the worker for more than MAX_REQUEST_SECONDS, with what decoding has taken already."""
    sizes = [
        one.grey.size
        for one, asked in zip(decoded, options, strict=True)
        if isinstance(one, DecodedImage) and asked.prepare is not Prepare.NONE and one.grey.size > network_pixels
    ]
    small_count = sum(size <= SMALL_SIDE**2 for size in sizes)
    seconds = small_count * SECONDS_TO_PREPARE_SMALL + (len(sizes) - small_count) * SECONDS_TO_PREPARE
    seconds += sum(asked.gradient_count for asked in options) * SECONDS_A_GRADIENT + decoding_seconds
    if seconds > MAX_REQUEST_SECONDS and len(decoded) > 1:
        raise RequestTooLarge(
            f"expected a request that takes at most {MAX_REQUEST_SECONDS} s of processor time, got one that takes about "
            f"{seconds:.1f} s: send its {len(decoded)} images in several requests, or smaller, or ask for fewer gradients"
        )


def _require_map_numbers(images: Sequence[PreparedImage], options: Sequence[Options], limit: int) -> None:
    """Refuse maps in the pixels of images that are too large for that."""
    counts = [
        (image.sent.size, len(asked.target.classes))
        for image, asked in zip(images, options, strict=True)
        if image.sent is not None
    ]
    numbers = sum(pixel_count * target_count for pixel_count, target_count in counts)
    if numbers > limit:
        raise RequestTooLarge(
            f"expected maps of at most {limit:,} numbers in the space '{Space.IMAGE}', got images of "
            f"{sum(pixel_count for pixel_count, _ in counts):,} pixels, whose maps have {numbers:,}: send smaller images or "
            f"fewer targets, or use the space '{Space.CANONICAL}'"
        )


def _decode_all(request: Request, budget: DecodingBudget, height: int, width: int) -> tuple[list[Decoded], list[Options], bool]:
    """Decode every part of a request.

    Returns:
        the images, with an error in the place of a bad one; their options; whether they are a list.
    """
    first = request.parts[0]
    if not isinstance(first, ClientError) and (not request.listed or isinstance(first.payload, Tensor)):  # the only part
        decoded = _decode(first.payload, budget, height, width)
        if isinstance(decoded, list):
            return decoded, [first.options] * len(decoded), True
        return [decoded], [first.options], request.listed
    images = [
        part if isinstance(part, ClientError) else _decode_one(part.payload, budget, height, width) for part in request.parts
    ]
    return images, [Options() if isinstance(part, ClientError) else part.options for part in request.parts], True


def _decode(payload: Payload, budget: DecodingBudget, height: int, width: int) -> DecodedImage | list[Decoded]:
    """Decode an image, or an array that is a list of them."""
    if isinstance(payload, Tensor):
        return decode_tensor(payload, height, width)
    if isinstance(payload, list):
        return decode_numbers(payload, height, width)
    if payload.startswith(NPY_MAGIC):
        return decode_npy(payload, height, width)
    return decode_image(payload, budget)


def _decode_one(payload: Payload, budget: DecodingBudget, height: int, width: int) -> Decoded:
    """Decode an image that is one of several."""
    try:
        decoded = _decode(payload, budget, height, width)
    except ClientError as error:
        return error
    if not isinstance(decoded, list):
        return decoded
    if len(decoded) != 1:
        return WrongShape(f"expected one image as one of several, got an array of {len(decoded)}")
    return decoded[0]


def _prepare(decoded: Decoded, asked: Options, height: int, width: int, framing: Framing) -> PreparedImage:
    """Prepare one image as it was asked for. Maps in its own pixels need these."""
    if isinstance(decoded, ClientError):
        raise decoded
    if asked.prepare is Prepare.NONE:
        image = scale_image(decoded.grey, height, width, decoded.source)
    else:
        image = prepare_digit(decoded.grey, height, width, decoded.source, framing)
    if asked.explain and asked.style.background is Background.SENT and asked.space is Space.CANONICAL:
        image = replace(image, thumbnail=Thumbnail.of(decoded.grey, image.window, asked.style.size))
    if decoded.reduction > 1 and image.ink_box is not None:  # back to the pixels of the file
        left, top, right, bottom = (side * decoded.reduction for side in image.ink_box)
        x0, y0, x1, y1 = (side * decoded.reduction for side in image.window)
        image = replace(image, ink_box=(left, top, right, bottom), window=(x0, y0, x1, y1))
    if not (asked.explain and asked.space is Space.IMAGE):
        return image
    if decoded.reduction > 1:
        raise ImageTooLarge(
            f"expected an image of at most {MAX_PIXELS:,} pixels for maps in the space '{Space.IMAGE}', got a larger JPEG"
        )
    return replace(image, sent=decoded.grey)
