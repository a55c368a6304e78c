"""The errors that a client can get. Each class owns its HTTP status; its name is the error's `type` in the reply.

    ServiceError               500
    +-- InternalError          500  a defect of ours; the row alone fails
    +-- ClientError            400
        +-- EmptyRequest       400  no picture in the request
        +-- InvalidRequest     400  well-formed, but not what the API takes
        +-- MalformedJSON      400
        +-- MalformedBase64    400
        +-- UnknownOption      400
        +-- InvalidOption      400  a known option with a value that it does not take
        +-- WrongShape         400  numbers that do not have the shape of a picture
        +-- InvalidPixel       400  a number that is no intensity: out of range, NaN, infinite, not a number
        +-- UnreadableImage    400  not an image of an accepted format, or a damaged one
        +-- BlankPicture       422  there is no ink in the picture
        +-- NotAcceptable      406  the Accept header allows no reply that could be given
        +-- ImageTooLarge      413  more pixels than are decoded

A message says what was got and what is accepted, in ASCII, with the client's own values shortened.
"""

from typing import ClassVar

SHOWN_CHARACTERS = 60  # of a client's value, in a message


class ServiceError(Exception):
    """What a reply can say went wrong."""

    status: ClassVar[int] = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InternalError(ServiceError):
    """A defect of the service itself."""


class ClientError(ServiceError):
    """A request that cannot be answered as it stands."""

    status = 400


class EmptyRequest(ClientError):
    """There is no picture in the request."""


class InvalidRequest(ClientError):
    """The request is well-formed, but not what the API takes."""


class MalformedJSON(ClientError):
    """The body is meant to be JSON and is not."""


class MalformedBase64(ClientError):
    """The picture is meant to be base64 and is not."""


class UnknownOption(ClientError):
    """No such option."""


class InvalidOption(ClientError):
    """The option does not take this value."""


class WrongShape(ClientError):
    """The numbers do not have the shape of a picture."""


class InvalidPixel(ClientError):
    """A number is no intensity."""


class UnreadableImage(ClientError):
    """The bytes are no image of an accepted format, or a damaged one."""


class BlankPicture(ClientError):
    """There is no ink in the picture."""

    status = 422


class NotAcceptable(ClientError):
    """The Accept header allows no reply that could be given."""

    status = 406


class ImageTooLarge(ClientError):
    """The image has more pixels than are decoded."""

    status = 413


def shown(value: object) -> str:
    """Render a client's value for a message: ASCII, one line, at most 60 characters."""
    text = ascii(value[:SHOWN_CHARACTERS] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
