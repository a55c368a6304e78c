"""A request -> its pictures, ready for the network.

Knows neither torch nor TorchServe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.arrays import Pictures, decode_npy, decode_tensor
from handler.canonical import Preparation, prepare, prepare_nothing, prepare_scaling
from handler.decode import MAX_PIXELS, DecodingBudget, Picture, decode_image, decode_numbers
from handler.errors import BlankPicture, ClientError, InvalidOption, RequestTooLarge, WrongShape, join_errors
from handler.kserve import MAX_PICTURES, Tensor
from handler.request import NPY_MAGIC, Options, Payload, Prepare, ReplyFormat, Request, Space

# A request's pictures times their targets. As nested JSON a map has up to 12.5 KB, and a reply over TorchServe's limit (32 MiB,
# serve_config/config.properties) would kill the worker. And a CPU needs a second for so many: a full batch of such requests stays
# inside the worker's time limit.
MAX_MAPS = 1024
# Gradients of one picture that a request's maps take: pictures x targets x points of the method. A CPU needs 0.15 ms for each:
# more than half a second together, and a full batch of such requests stays inside the worker's time limit too.
MAX_GRADIENTS = 4096
# Numbers in all maps of a request in the pixels of its pictures, where the reply holds them: 1200 x 1200. As nested JSON they
# have up to 20 MB. A reply that only draws them may have MAX_PIXELS.
MAX_IMAGE_MAP_NUMBERS = 1_440_000
# Pictures of a request in which the digit has to be looked for, found or not. Each takes a CPU about 10 ms, and of more than 200
# pixels a side 50: three seconds together. Canonical ones do not count.
MAX_PREPARED_PICTURES = 64


@dataclass(frozen=True, slots=True)
class Question:
    """One picture, ready for the network.

    Attributes:
        source: what the picture was sent as.
        sent: float32 (H', W'), the grey levels of the picture as it was sent, where maps are asked for in its pixels, else None.
        options: what is asked about it.
        preparation: what was done to the picture; it holds the pixels for the network.
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
        """Say for the reply what was done to the picture."""
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
    """A request whose pictures are all ready.

    Attributes:
        request: as it was read.
        questions: one a picture.
        listed: the reply is a list, be it of one.
    """

    request: Request
    questions: tuple[Question, ...]
    listed: bool


def prepare_pictures(request: Request, height: int, width: int, *, has_mean: bool = True) -> Prepared:
    """Decode all pictures of a request and make them canonical.

    Args:
        request: as it was read.
        height, width: of the network's input.
        has_mean: whether the network says the mean of its pixels, which some methods need.
    Raises:
        ClientError: a picture is bad; where there are several, one error names all bad ones.
        InvalidOption: a method needs the mean, and there is none.
        RequestTooLarge: more than MAX_PREPARED_PICTURES have to be prepared, more than MAX_MAPS maps were asked for, maps that
            take more than MAX_GRADIENTS, or maps of too many pixels.
    """
    pictures, options, listed = _decode_all(request, height, width)
    questions: list[Question | ClientError] = []
    prepared_count = 0
    for picture, asked in zip(pictures, options, strict=True):
        question = _question(picture, asked, height, width)
        questions.append(question)
        prepared_count += isinstance(question, BlankPicture) or (
            isinstance(question, Question) and question.preparation.ink_box is not None
        )
        if prepared_count > MAX_PREPARED_PICTURES:
            raise RequestTooLarge(
                f"got more than {MAX_PREPARED_PICTURES} pictures to prepare; up to that are accepted in one request, and up to "
                f"{MAX_PICTURES} that are canonical ({height}x{width}, ink bright on dark) or have 'prepare' 'none'"
            )
    errors = {index: question for index, question in enumerate(questions) if isinstance(question, ClientError)}
    if errors:
        raise join_errors(errors, len(pictures)) if listed else errors[0]
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
        raise RequestTooLarge(f"got {len(explained)} pictures with {map_count} targets in all; up to {MAX_MAPS} are accepted")
    _require_gradients(explained)
    if not has_mean and any(asked.method.needs_mean for asked in explained):
        raise InvalidOption("got a method that needs the mean picture, and this network does not say it; another is accepted")


def _require_gradients(explained: Sequence[Options]) -> None:
    """Refuse work that would hold the worker for too long, before it starts."""
    count = sum(asked.gradient_count for asked in explained)
    if count > MAX_GRADIENTS:
        raise RequestTooLarge(
            f"got {len(explained)} pictures whose maps take {count:,} gradients in all (targets x samples, or steps); up to "
            f"{MAX_GRADIENTS:,} are accepted: ask for fewer samples, steps, targets or pictures"
        )


def _require_map_numbers(questions: Sequence[Question], limit: int) -> None:
    """Refuse maps in the pixels of pictures that are too large for that."""
    asked = [(question.sent.size, len(question.options.target.classes)) for question in questions if question.sent is not None]
    numbers = sum(pixel_count * target_count for pixel_count, target_count in asked)
    if numbers > limit:
        raise RequestTooLarge(
            f"got pictures of {sum(pixel_count for pixel_count, _ in asked):,} pixels, whose maps in the space "
            f"'{Space.IMAGE}' have {numbers:,} numbers; up to {limit:,} are accepted: send smaller pictures or fewer targets, or "
            f"use the space '{Space.CANONICAL}'"
        )


def _decode_all(request: Request, height: int, width: int) -> tuple[list[Picture | ClientError], list[Options], bool]:
    """Decode every part of a request.

    Returns:
        the pictures, with an error in the place of a bad one; their options; whether they are a list.
    """
    budget = DecodingBudget()
    first = request.parts[0]
    if not isinstance(first, ClientError) and (not request.listed or isinstance(first.payload, Tensor)):  # the only part
        decoded = _decode(first.payload, budget, height, width)
        return decoded.pictures, [first.options] * len(decoded.pictures), request.listed or decoded.several
    pictures = [
        part if isinstance(part, ClientError) else _decode_one(part.payload, budget, height, width) for part in request.parts
    ]
    return pictures, [Options() if isinstance(part, ClientError) else part.options for part in request.parts], True


def _decode(payload: Payload, budget: DecodingBudget, height: int, width: int) -> Pictures:
    """Decode a picture, or an array of them."""
    if isinstance(payload, Tensor):
        return decode_tensor(payload, height, width)
    if isinstance(payload, list):
        return Pictures([decode_numbers(payload, height, width)], several=False)
    if payload.startswith(NPY_MAGIC):
        return decode_npy(payload, height, width)
    return Pictures([decode_image(payload, budget)], several=False)


def _decode_one(payload: Payload, budget: DecodingBudget, height: int, width: int) -> Picture | ClientError:
    """Decode a picture that is one of several."""
    try:
        pictures = _decode(payload, budget, height, width).pictures
    except ClientError as error:
        return error
    if len(pictures) != 1:
        return WrongShape(f"got an array of {len(pictures)} pictures as one of several; one picture is accepted")
    return pictures[0]


def _question(picture: Picture | ClientError, asked: Options, height: int, width: int) -> Question | ClientError:
    if isinstance(picture, ClientError):
        return picture
    try:
        preparation = _choose_preparation(picture, asked.prepare, height, width)
    except ClientError as error:
        return error
    sent = picture.grey if asked.explain and asked.space is Space.IMAGE else None
    return Question(picture.source, sent, asked, preparation)


def _choose_preparation(picture: Picture, wanted: Prepare | None, height: int, width: int) -> Preparation:
    """Numbers count as canonical unless the request says how to prepare them; images are prepared unless it says not to."""
    if picture.is_canonical and wanted is None:
        return prepare_nothing(picture.grey)
    if wanted is Prepare.NONE:
        return prepare_scaling(picture.grey, height, width)
    return prepare(picture.grey, height, width)
