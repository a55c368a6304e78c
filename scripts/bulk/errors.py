"""What can go wrong with a job as a whole, and with one image before the service's own code sees it."""

from dataclasses import dataclass


class BulkError(RuntimeError):
    """The job cannot begin or go on; the message says why and what to do, for a person."""


class Stopped(Exception):
    """The job was ended elsewhere."""


@dataclass(frozen=True, slots=True)
class ImageProblem:
    """Why an image has no answer, for the error column.

    Attributes:
        type: `UnreadableFile`, `RequestTooLarge`, `ProcessDied`, or `ProcessTimeout`.
        message: for people.
        code: the HTTP status of the service for it; None where the service would never have seen the image.
    """

    type: str
    message: str
    code: int | None = None
