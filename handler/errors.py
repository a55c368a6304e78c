"""The errors that a client can get. Each class owns its HTTP status; its name is the error's `type` in the reply.

    ServiceError               500
    +-- InternalError          500  a defect of ours; the row alone fails
    +-- Overloaded             503  too much work, or too large a reply, beside others; the same request may do later
    +-- ClientError            400
        +-- EmptyRequest       400  no image in the request
        +-- InvalidRequest     400  well-formed, but not what the API takes
        +-- MalformedJSON      400
        +-- MalformedBase64    400
        +-- UnknownOption      400
        +-- InvalidOption      400  a known option with a value that it does not take
        +-- WrongShape         400  numbers that do not have the shape of an image
        +-- InvalidPixel       400  a number that is no intensity: out of range, NaN, infinite, not a number
        +-- UnreadableImage    400  not an image of an accepted format, or a damaged one
        +-- UnreadableArray    400  an .npy that is damaged, or whose elements are no pixels
        +-- BlankImage       422  there is no ink in the image
        +-- SeveralDigits      422  more than one digit in the image
        +-- NotAcceptable      406  the Accept header allows no reply that could be given
        +-- ImageTooLarge      413  more pixels, or more parts of a file, than are decoded
        +-- RequestTooLarge    413  more images, maps or gradients than one request may ask for

A message says what was expected and what was got, in ASCII, with the client's own values shortened.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from handler.limits import RETRY_AFTER_SECONDS

OVERLOADED = "server overloaded: retry, or send a smaller request"
SHOWN_CHARACTERS = 60  # of a client's value, in a message
SHOWN_ERRORS = 5  # different ones, in the message for a request with several images


class ServiceError(Exception):
    """What a reply can say went wrong.

    Attributes:
        indices: in a request with several images, which of them are bad, from 0.
        headers: of the reply, beside its content type.
        as_text: whether the reply's `error` is the message alone, as the Open Inference Protocol has it.
    """

    status: ClassVar[int] = 500
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(self, message: str, indices: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.indices = indices
        self.as_text = False


class InternalError(ServiceError):
    """A defect of the service itself."""


class Overloaded(ServiceError):
    """What shares a batch is too much together, or there is too little memory."""

    status = 503
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": str(RETRY_AFTER_SECONDS)}


class ClientError(ServiceError):
    """A request that cannot be answered as it stands."""

    status = 400


class EmptyRequest(ClientError):
    """There is no image in the request."""


class InvalidRequest(ClientError):
    """The request is well-formed, but not what the API takes."""


class MalformedJSON(ClientError):
    """The body is meant to be JSON and is not."""


class MalformedBase64(ClientError):
    """The image is meant to be base64 and is not."""


class UnknownOption(ClientError):
    """No such option."""


class InvalidOption(ClientError):
    """The option does not take this value."""


class WrongShape(ClientError):
    """The numbers do not have the shape of an image."""


class InvalidPixel(ClientError):
    """A number is no intensity."""


class UnreadableImage(ClientError):
    """The bytes are no image of an accepted format, or a damaged one."""


class UnreadableArray(ClientError):
    """The bytes are a damaged .npy, or one whose elements are no pixels."""


class BlankImage(ClientError):
    """There is no ink in the image."""

    status = 422


class SeveralDigits(ClientError):
    """There is more than one digit in the image."""

    status = 422


class NotAcceptable(ClientError):
    """The Accept header allows no reply that could be given."""

    status = 406


class ImageTooLarge(ClientError):
    """The image has more pixels than are decoded."""

    status = 413


class RequestTooLarge(ClientError):
    """The request asks for more images, maps or gradients than one may."""

    status = 413


def join_errors(errors: Mapping[int, ClientError], image_count: int) -> ClientError:
    """Make one error of those of single images. Its class, and so its status, is that of the first bad image.

    Args:
        errors: at least one, by the image's index, in ascending order.
        image_count: of the whole request.
    """
    by_message: dict[str, list[int]] = {}
    for index, error in errors.items():
        by_message.setdefault(error.message, []).append(index)
    details = [f"at {_listed(indices)}: {message}" for message, indices in by_message.items()][:SHOWN_ERRORS]
    message = f"expected {image_count} good images, got {len(errors)} bad, at index {_listed(list(errors))}; {'; '.join(details)}"
    if len(by_message) > SHOWN_ERRORS:
        message += f"; and {len(by_message) - SHOWN_ERRORS} more errors"
    return type(next(iter(errors.values())))(message, tuple(errors))


def _listed(indices: list[int]) -> str:
    return ", ".join(str(index) for index in indices)


def shown(value: object) -> str:
    """Render a client's value for a message: ASCII, one line, at most 60 characters.

    No more of it is looked at than is shown, however long or deep it is.
    """
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > SHOWN_CHARACTERS:
            return text[: SHOWN_CHARACTERS - 3] + "..."
    return text


def _pieces(value: object) -> Iterator[str]:
    """Render a value of JSON piece by piece, as `ascii` does as a whole. Each level begins with a piece of its own."""
    if isinstance(value, dict):
        yield "{"
        for number, (key, member) in enumerate(value.items()):
            yield ", " if number else ""
            yield from _pieces(key)
            yield ": "
            yield from _pieces(member)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for number, member in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(member)
        yield "]"
    else:
        yield ascii(value[: SHOWN_CHARACTERS + 1] if isinstance(value, str | bytes | bytearray) else value)
