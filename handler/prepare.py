"""A request -> its pictures, ready for the network.

Knows neither torch nor TorchServe.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.arrays import Pictures, decode_npy, decode_tensor
from handler.canonical import canonicalise
from handler.decode import Picture, PixelBudget, decode_image, decode_numbers
from handler.errors import ClientError, RequestTooLarge, WrongShape, join_errors
from handler.kserve import Tensor
from handler.request import NPY_MAGIC, Options, Payload, Request

# A request's pictures times their targets. As nested JSON a map has up to 12.5 KB, and a reply over TorchServe's limit (32 MiB,
# serve_config/config.properties) would kill the worker. And a CPU needs a second for so many: a full batch of such requests stays
# inside the worker's time limit.
MAX_MAPS = 1024


@dataclass(frozen=True, slots=True)
class Question:
    """One picture, ready for the network.

    Attributes:
        pixels: float32 (H, W) of the network's input, intensity in [0, 1].
        options: what is asked about it.
        preparation: what was done to the picture, for the reply.
    """

    pixels: NDArray[np.float32]
    options: Options
    preparation: dict[str, Any]


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


def prepare_pictures(request: Request, height: int, width: int) -> Prepared:
    """Decode all pictures of a request and make them canonical.

    Args:
        request: as it was read.
        height, width: of the network's input.
    Raises:
        ClientError: a picture is bad; where there are several, one error names all bad ones.
        RequestTooLarge: more than MAX_MAPS maps were asked for.
    """
    pictures, options, listed = _decode_all(request, height, width)
    errors = {index: picture for index, picture in enumerate(pictures) if isinstance(picture, ClientError)}
    if errors:
        raise join_errors(errors, len(pictures)) if listed else errors[0]
    map_count = sum(len(asked.target.classes) for asked in options if asked.explain)
    if map_count > MAX_MAPS:
        raise RequestTooLarge(f"got {len(pictures)} pictures with {map_count} targets in all; up to {MAX_MAPS} are accepted")
    return Prepared(request, tuple(_questions(pictures, options, height, width)), listed)


def _decode_all(request: Request, height: int, width: int) -> tuple[list[Picture | ClientError], list[Options], bool]:
    """Decode every part of a request.

    Returns:
        the pictures, with an error in the place of a bad one; their options; whether they are a list.
    """
    budget = PixelBudget()
    first = request.parts[0]
    if not isinstance(first, ClientError) and (not request.listed or isinstance(first.payload, Tensor)):  # the only part
        decoded = _decode(first.payload, budget, height, width)
        return decoded.pictures, [first.options] * len(decoded.pictures), request.listed or decoded.several
    pictures = [
        part if isinstance(part, ClientError) else _decode_one(part.payload, budget, height, width) for part in request.parts
    ]
    return pictures, [Options() if isinstance(part, ClientError) else part.options for part in request.parts], True


def _decode(payload: Payload, budget: PixelBudget, height: int, width: int) -> Pictures:
    """Decode a picture, or an array of them."""
    if isinstance(payload, Tensor):
        return decode_tensor(payload, height, width)
    if isinstance(payload, list):
        return Pictures([decode_numbers(payload, height, width)], several=False)
    if payload.startswith(NPY_MAGIC):
        return decode_npy(payload, height, width)
    return Pictures([decode_image(payload, budget)], several=False)


def _decode_one(payload: Payload, budget: PixelBudget, height: int, width: int) -> Picture | ClientError:
    """Decode a picture that is one of several."""
    try:
        pictures = _decode(payload, budget, height, width).pictures
    except ClientError as error:
        return error
    if len(pictures) != 1:
        return WrongShape(f"got an array of {len(pictures)} pictures as one of several; one picture is accepted")
    return pictures[0]


def _questions(pictures: list[Picture | ClientError], options: list[Options], height: int, width: int) -> Iterator[Question]:
    for picture, asked in zip(pictures, options, strict=True):
        assert isinstance(picture, Picture)
        canonical = canonicalise(picture.grey, height, width)
        yield Question(canonical.pixels, asked, {"source": picture.source, "steps": list(canonical.steps)})
