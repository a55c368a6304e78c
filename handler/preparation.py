"""A request -> its images, ready for the network.

Knows neither torch nor TorchServe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.errors import BlankImage, ClientError, InvalidOption, RequestTooLarge, WrongShape, join_errors
from handler.images.arrays import DecodedImages, Tensor, decode_npy, decode_tensor
from handler.images.decode import DecodedImage, DecodingBudget, decode_image, decode_numbers
from handler.images.digits import Preparation, prepare, prepare_nothing, prepare_scaling
from handler.limits import MAX_GRADIENTS, MAX_IMAGE_MAP_NUMBERS, MAX_IMAGES, MAX_MAPS, MAX_PIXELS, MAX_PREPARED_IMAGES
from handler.protocol.request import NPY_MAGIC, Options, Payload, Prepare, ReplyFormat, Request, Space


@dataclass(frozen=True, slots=True)
class Question:
    """One image, ready for the network.

    Attributes:
        source: what the image was sent as.
        sent: float32 (H', W'), the grey levels of the image as it was sent, where maps are asked for in its pixels, else None.
        options: what is asked about it.
        preparation: what was done to the image; it holds the pixels for the network.
    """

    source: str
    sent: NDArray[np.float32] | None
    options: Options
    preparation: Preparation

    @property
    def pixels(self) -> NDArray[np.float32]:
        """For the network: float32 (H, W), intensity in [0, 1]."""
        return self.preparation.pixels

    def describe_preparation(self) -> dict[str, Any]:
        """Say for the reply what was done to the image."""
        preparation = self.preparation
        description: dict[str, Any] = {
            "source": self.source,
            "steps": list(preparation.steps),
            "inverted": preparation.inverted,
        }
        if preparation.ink_box is not None:
            description["ink_box"] = list(preparation.ink_box)  # left, top, right, bottom in the client's pixels
            description["threshold"] = preparation.threshold
        return description


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request whose images are all ready.

    Attributes:
        request: as it was read.
        questions: one an image.
        listed: the reply is a list, be it of one.
    """

    request: Request
    questions: tuple[Question, ...]
    listed: bool


def prepare_images(request: Request, height: int, width: int, *, has_mean: bool = True) -> Prepared:
    """Decode all images of a request and make them canonical.

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
    images, options, listed = _decode_all(request, height, width)
    questions: list[Question | ClientError] = []
    prepared_count = 0
    for image, asked in zip(images, options, strict=True):
        question = _question(image, asked, height, width)
        questions.append(question)
        prepared_count += isinstance(question, BlankImage) or (
            isinstance(question, Question) and question.preparation.ink_box is not None
        )
        if prepared_count > MAX_PREPARED_IMAGES:
            raise RequestTooLarge(
                f"got more than {MAX_PREPARED_IMAGES} images to prepare; up to that are accepted in one request, and up to "
                f"{MAX_IMAGES} that are canonical ({height}x{width}, ink bright on dark) or have 'prepare' 'none'"
            )
    errors = {index: question for index, question in enumerate(questions) if isinstance(question, ClientError)}
    if errors:
        raise join_errors(errors, len(images)) if listed else errors[0]
    good = tuple(question for question in questions if isinstance(question, Question))
    explained = [asked for asked in options if asked.explain]
    if explained:
        _require_few_maps(explained, has_mean=has_mean)
        _require_map_numbers(good, MAX_PIXELS if request.reply_format is ReplyFormat.PNG else MAX_IMAGE_MAP_NUMBERS)
    return Prepared(request, good, listed)


def _require_few_maps(explained: Sequence[Options], *, has_mean: bool) -> None:
    """Refuse more maps than a reply can hold, and such as cannot be made."""
    map_count = sum(len(asked.target.classes) for asked in explained)
    if map_count > MAX_MAPS:
        raise RequestTooLarge(f"got {len(explained)} images with {map_count} targets in all; up to {MAX_MAPS} are accepted")
    _require_gradients(explained)
    if not has_mean and any(asked.method.needs_mean for asked in explained):
        raise InvalidOption("got a method that needs the mean image, and this network does not say it; another is accepted")


def _require_gradients(explained: Sequence[Options]) -> None:
    """Refuse work that would hold the worker for too long, before it starts."""
    count = sum(asked.gradient_count for asked in explained)
    if count > MAX_GRADIENTS:
        raise RequestTooLarge(
            f"got {len(explained)} images whose maps take {count:,} gradients in all (targets x samples, or steps); up to "
            f"{MAX_GRADIENTS:,} are accepted: ask for fewer samples, steps, targets or images"
        )


def _require_map_numbers(questions: Sequence[Question], limit: int) -> None:
    """Refuse maps in the pixels of images that are too large for that."""
    asked = [(question.sent.size, len(question.options.target.classes)) for question in questions if question.sent is not None]
    numbers = sum(pixel_count * target_count for pixel_count, target_count in asked)
    if numbers > limit:
        raise RequestTooLarge(
            f"got images of {sum(pixel_count for pixel_count, _ in asked):,} pixels, whose maps in the space "
            f"'{Space.IMAGE}' have {numbers:,} numbers; up to {limit:,} are accepted: send smaller images or fewer targets, or "
            f"use the space '{Space.CANONICAL}'"
        )


def _decode_all(request: Request, height: int, width: int) -> tuple[list[DecodedImage | ClientError], list[Options], bool]:
    """Decode every part of a request.

    Returns:
        the images, with an error in the place of a bad one; their options; whether they are a list.
    """
    budget = DecodingBudget()
    first = request.parts[0]
    if not isinstance(first, ClientError) and (not request.listed or isinstance(first.payload, Tensor)):  # the only part
        decoded = _decode(first.payload, budget, height, width)
        return decoded.images, [first.options] * len(decoded.images), request.listed or decoded.several
    images = [
        part if isinstance(part, ClientError) else _decode_one(part.payload, budget, height, width) for part in request.parts
    ]
    return images, [Options() if isinstance(part, ClientError) else part.options for part in request.parts], True


def _decode(payload: Payload, budget: DecodingBudget, height: int, width: int) -> DecodedImages:
    """Decode an image, or an array of them."""
    if isinstance(payload, Tensor):
        return decode_tensor(payload, height, width)
    if isinstance(payload, list):
        return DecodedImages([decode_numbers(payload, height, width)], several=False)
    if payload.startswith(NPY_MAGIC):
        return decode_npy(payload, height, width)
    return DecodedImages([decode_image(payload, budget)], several=False)


def _decode_one(payload: Payload, budget: DecodingBudget, height: int, width: int) -> DecodedImage | ClientError:
    """Decode an image that is one of several."""
    try:
        images = _decode(payload, budget, height, width).images
    except ClientError as error:
        return error
    if len(images) != 1:
        return WrongShape(f"got an array of {len(images)} images as one of several; one image is accepted")
    return images[0]


def _question(image: DecodedImage | ClientError, asked: Options, height: int, width: int) -> Question | ClientError:
    if isinstance(image, ClientError):
        return image
    try:
        preparation = _choose_preparation(image, asked.prepare, height, width)
    except ClientError as error:
        return error
    sent = image.grey if asked.explain and asked.space is Space.IMAGE else None
    return Question(image.source, sent, asked, preparation)


def _choose_preparation(image: DecodedImage, wanted: Prepare | None, height: int, width: int) -> Preparation:
    """Numbers count as canonical unless the request says how to prepare them; images are prepared unless it says not to."""
    if image.is_canonical and wanted is None:
        return prepare_nothing(image.grey)
    if wanted is Prepare.NONE:
        return prepare_scaling(image.grey, height, width)
    return prepare(image.grey, height, width)
