"""A request -> its images, ready for the network, or one error that names the bad ones.

Knows neither torch nor TorchServe.
"""

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
from handler.images.budget import DecodingBudget
from handler.images.decode import DecodedImage, decode_image
from handler.images.digits import prepare_digit
from handler.images.preparation import Prepare, PreparedImage, scale_image
from handler.limits import (
    MAX_GRADIENTS,
    MAX_IMAGE_MAP_NUMBERS,
    MAX_IMAGE_MAP_NUMBERS_NPY,
    MAX_IMAGES,
    MAX_MAPS,
    MAX_PIXELS,
    MAX_PREPARED_IMAGES,
)
from handler.protocol.options import Options, Space
from handler.protocol.request import Payload, ReplyFormat, Request

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


def preprocess(request: Request, height: int, width: int, *, has_mean: bool = True) -> PreparedRequest:
    """Decode all images of a request and prepare them.

    Args:
        request: as it was read.
        height, width: of the network's input.
        has_mean: whether the network says the mean of its pixels, which some methods need.
    Raises:
        ClientError: an image is bad; where there are several, one error names all bad ones.
        InvalidOption: a method needs the mean, and there is none.
        RequestTooLarge: more than MAX_PREPARED_IMAGES have to be prepared, more than MAX_MAPS maps were asked for, maps that
            take more than MAX_GRADIENTS, or maps of too many pixels.
    """
    try:
        return _preprocess(request, height, width, has_mean=has_mean)
    except ServiceError as error:
        error.as_text = request.infer is not None
        raise


def _preprocess(request: Request, height: int, width: int, *, has_mean: bool) -> PreparedRequest:
    decoded, options, listed = _decode_all(request, height, width)
    _require_few_maps([asked for asked in options if asked.explain], has_mean=has_mean)
    images: list[PreparedImage] = []
    errors: dict[int, ClientError] = {}
    prepared_count = 0
    for index, (one, asked) in enumerate(zip(decoded, options, strict=True)):
        try:
            image = _prepare(one, asked, height, width)
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


def _decode_all(request: Request, height: int, width: int) -> tuple[list[Decoded], list[Options], bool]:
    """Decode every part of a request.

    Returns:
        the images, with an error in the place of a bad one; their options; whether they are a list.
    """
    budget = DecodingBudget()
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


def _prepare(decoded: Decoded, asked: Options, height: int, width: int) -> PreparedImage:
    """Prepare one image as it was asked for. Maps in its own pixels need these."""
    if isinstance(decoded, ClientError):
        raise decoded
    prepare = scale_image if asked.prepare is Prepare.NONE else prepare_digit
    image = prepare(decoded.grey, height, width, decoded.source)
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
