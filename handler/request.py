"""A TorchServe row and its headers -> one frozen `Request`.

Reads every form in which TorchServe hands over a request (raw body, parsed or unparsed JSON, form fields) and every place in
which an option can stand (field, header). Knows nothing of images, of torch or of TorchServe's classes.
"""

import base64
import binascii
import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from handler.drawing import MAX_SIZE, MIN_PERCENTILE, MIN_SIZE, Colormap, Layout, Polarity, Style
from handler.errors import (
    EmptyRequest,
    InvalidOption,
    InvalidRequest,
    MalformedBase64,
    MalformedJSON,
    NotAcceptable,
    UnknownOption,
    shown,
)

PICTURE_FIELDS = ("data", "image", "body")  # a JSON or form field of one of these names holds the picture
HEADER_PREFIX = "x-saliency-"  # an option's header is this and its name, in any letter case, with hyphens
ROUTE_HEADER = "explain"  # TorchServe's frontend sets it on each request: "True" came in by an explanation route


class Encoding(StrEnum):
    """How numbers of a map stand in JSON."""

    NESTED = "nested"
    BASE64 = "base64"


class Method(StrEnum):
    """How the map is made."""

    GRADIENT = "gradient"


class Space(StrEnum):
    """Which pixels the score is differentiated by."""

    CANONICAL = "canonical"


class Prepare(StrEnum):
    """How a picture is made into what the network knows."""

    AUTO = "auto"
    NONE = "none"


class ReplyFormat(StrEnum):
    """Media type of the reply, the preferred one first."""

    JSON = "application/json"
    NPY = "application/x-npy"
    PNG = "image/png"


@dataclass(frozen=True, slots=True)
class Targets:
    """Which classes to explain.

    Attributes:
        classes: class indices; None stands for the predicted class.
        several: asked for as a list, so that the reply's shape starts with their number, even where that is 1.
    """

    classes: tuple[int | None, ...]
    several: bool


@dataclass(frozen=True, slots=True)
class Options:
    """All options of a request, with the defaults of those that it leaves out."""

    explain: bool = False
    target: Targets = Targets(classes=(None,), several=False)
    method: Method = Method.GRADIENT
    space: Space = Space.CANONICAL
    prepare: Prepare | None = None  # as the form of the picture suggests
    encoding: Encoding = Encoding.NESTED
    style: Style = dataclasses.field(default_factory=Style)


@dataclass(frozen=True, slots=True)
class Request:
    """What one client asks for.

    Attributes:
        picture: the bytes of an image file, or nested lists of numbers, unchecked.
        options: the options, `explain` being true as well where the route asks for an explanation.
        reply_format: media type of the reply.
    """

    picture: bytes | list[Any]
    options: Options
    reply_format: ReplyFormat


def parse_request(row: object, headers: Mapping[str, object], class_count: int) -> Request:
    """Read one request.

    Args:
        row: what TorchServe hands a handler for one request, such as `{"body": bytearray}` or `{field: bytearray}`.
        headers: the request's headers. Values that are no text (TorchServe adds one for each form field) are passed over.
        class_count: how many classes the network has.
    Raises:
        ClientError: the request cannot be answered; the message says what is accepted.
    """
    text_headers = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
    fields = _read_fields(row, text_headers)
    pictures = [(name, fields.pop(name)) for name in PICTURE_FIELDS if name in fields]
    options = _read_options(_options_in(text_headers) | fields, class_count, explain_route=headers.get(ROUTE_HEADER) == "True")
    reply_format = _negotiate(text_headers.get("accept", ""), explain=options.explain)
    if len(pictures) > 1:
        raise InvalidRequest(f"got several pictures ({', '.join(name for name, _ in pictures)}); one of these fields is accepted")
    if not pictures:
        raise EmptyRequest(
            "got no picture; accepted: an image file as the body, a multipart field 'data', or JSON {\"data\": ...} sent with "
            "'Content-Type: application/json'"
        )
    return Request(_read_picture(*pictures[0]), options, reply_format)


# --- where things stand in a request


def _read_fields(row: object, headers: Mapping[str, str]) -> dict[str, object]:
    """Give every kind of row one form: a picture under one of PICTURE_FIELDS, options under their names."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/x-www-form-urlencoded" and isinstance(row, dict) and not row.keys() & set(PICTURE_FIELDS):
        raise EmptyRequest(
            "got a form without a picture, as 'curl -d' sends whatever it is given; accepted: an image with 'curl -T FILE' or "
            "'curl -F data=@FILE', JSON with 'curl --json'"
        )
    if isinstance(row, dict) and set(row) != {"body"}:
        return {str(name): value for name, value in row.items()}  # a form
    body = row["body"] if isinstance(row, dict) else row
    if isinstance(body, (bytes, bytearray, str)):
        content = body.encode() if isinstance(body, str) else bytes(body)
        is_json = media_type == "application/json" or media_type.endswith("+json") or content.lstrip()[:1] in (b"{", b"[")
        if not content or not is_json:
            return {"body": content} if content else {}
        body = _parse_json(content)
    if not isinstance(body, dict):
        raise InvalidRequest(f'got JSON {shown(body)}; a JSON object such as {{"data": "<base64 image>"}} is accepted')
    return dict(body)


def _parse_json(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        where = f" at character {error.pos}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        raise MalformedJSON(f"got a body that is no JSON{where}; a JSON object in UTF-8 is accepted") from error


def _options_in(headers: Mapping[str, str]) -> dict[str, object]:
    """Find options among headers. A name has hyphens there, since many proxies drop headers with underscores."""
    prefixed = {name.removeprefix(HEADER_PREFIX): value for name, value in headers.items() if name.startswith(HEADER_PREFIX)}
    return {name.replace("-", "_"): value for name, value in prefixed.items()}


# --- the picture


def _read_picture(field: str, value: object) -> bytes | list[Any]:
    if isinstance(value, (bytes, bytearray)):
        if not value:
            raise EmptyRequest(f"got an empty field {field!r}; the bytes of an image file are accepted")
        return bytes(value)
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        return _decode_base64(field, value)
    raise InvalidRequest(f"got {shown(value)} in {field!r}; a base64 text or nested lists of numbers are accepted")


def _decode_base64(field: str, text: str) -> bytes:
    """Decode base64, with or without line breaks, also where it stands in a data URL (`data:image/png;base64,...`)."""
    payload = re.sub(r"\s", "", text.partition(",")[2] if text.startswith("data:") else text)
    if not payload:
        raise EmptyRequest(f"got an empty text in {field!r}; the base64 of an image file is accepted")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters outside ASCII
        raise MalformedBase64(f"got {shown(text)} in {field!r}; standard base64 with padding is accepted") from error


# --- the options


def _read_options(given: Mapping[str, object], class_count: int, *, explain_route: bool) -> Options:
    """Check and convert the options. A field stands above a header of the same name."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in OPTION_PARSERS:
            raise UnknownOption(
                f"got the option {shown(name)}; accepted are {', '.join(OPTION_PARSERS)} (as headers X-Saliency-...), and "
                f"for the picture {', '.join(PICTURE_FIELDS)}"
            )
        if isinstance(value, (bytes, bytearray)):
            try:
                value = bytes(value).decode()
            except UnicodeDecodeError as error:
                raise InvalidOption(f"got bytes in {name!r} that are no UTF-8 text") from error
        values[name] = OPTION_PARSERS[name](name, value.strip() if isinstance(value, str) else value, class_count)
    if explain_route:
        values["explain"] = True
    style = Style(**{name: values.pop(name) for name in STYLE_OPTIONS if name in values})
    return Options(**values, style=style)


def _parse_flag(name: str, value: object, _class_count: int) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise InvalidOption(f"got {shown(value)} as {name!r}; true and false are accepted")


def _parse_target(name: str, value: object, class_count: int) -> Targets:
    """Read a class, "predicted", a list of these, or "all". In text, a list is JSON (`[3, 5]`) or has commas (`3,5`)."""
    if value == "all":
        return Targets(tuple(range(class_count)), several=True)
    members: object = value
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            members = json.loads(value)
    elif isinstance(value, str) and "," in value:
        members = [part.strip() for part in value.split(",")]
    if not isinstance(members, list):
        return Targets((_parse_class(name, members, class_count),), several=False)
    if not 1 <= len(members) <= class_count:
        raise InvalidOption(f"got {len(members)} classes as {name!r}; a list of 1 to {class_count} is accepted")
    return Targets(tuple(_parse_class(name, member, class_count) for member in members), several=True)


def _parse_class(name: str, value: object, class_count: int) -> int | None:
    if value == "predicted":
        return None
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    if type(value) is int and 0 <= value < class_count:
        return value
    raise InvalidOption(
        f"got {shown(value)} as {name!r}; a class from 0 to {class_count - 1}, 'predicted', a list of these, or 'all' is accepted"
    )


def _parse_size(name: str, value: object, _class_count: int) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    if type(value) is int and MIN_SIZE <= value <= MAX_SIZE:
        return value
    raise InvalidOption(f"got {shown(value)} as {name!r}; an integer from {MIN_SIZE} to {MAX_SIZE} is accepted")


def _parse_percentile(name: str, value: object, _class_count: int) -> float:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and MIN_PERCENTILE <= value <= 100:
        return float(value)
    raise InvalidOption(f"got {shown(value)} as {name!r}; a number from {MIN_PERCENTILE} to 100 is accepted")


Choice = TypeVar("Choice", bound=StrEnum)


class _ChoiceParser(Generic[Choice]):
    """Parses the values of one enumeration."""

    def __init__(self, choices: type[Choice]) -> None:
        self.choices = choices

    def __call__(self, name: str, value: object, _class_count: int) -> Choice:
        if isinstance(value, str) and value in list(self.choices):
            return self.choices(value)
        raise InvalidOption(f"got {shown(value)} as {name!r}; accepted: {', '.join(self.choices)}")


OPTION_PARSERS: Mapping[str, Callable[[str, object, int], object]] = {
    "explain": _parse_flag,
    "target": _parse_target,
    "method": _ChoiceParser(Method),
    "space": _ChoiceParser(Space),
    "prepare": _ChoiceParser(Prepare),
    "encoding": _ChoiceParser(Encoding),
    "size": _parse_size,
    "colormap": _ChoiceParser(Colormap),
    "polarity": _ChoiceParser(Polarity),
    "clip_percentile": _parse_percentile,
    "layout": _ChoiceParser(Layout),
}
STYLE_OPTIONS = tuple(field.name for field in dataclasses.fields(Style))  # the options of pictures


# --- the reply's format


def _negotiate(accept: str, *, explain: bool) -> ReplyFormat:
    """Choose the reply's format by the Accept header (RFC 9110, section 12.5.1). Without one it is JSON."""
    if not accept.strip():
        return ReplyFormat.JSON
    ranges = dict(_media_ranges(accept))
    offered = list(ReplyFormat) if explain else [ReplyFormat.JSON]  # the others are maps, and only an explanation has one

    def quality(reply_format: ReplyFormat) -> float:
        type_range = reply_format.partition("/")[0] + "/*"
        return next((ranges[name] for name in (reply_format, type_range, "*/*") if name in ranges), 0.0)

    best = max(offered, key=quality)  # of equals the first
    if quality(best) > 0:
        return best
    hint = "" if explain else f" ({ReplyFormat.NPY} and {ReplyFormat.PNG} are formats of maps: ask for an explanation)"
    raise NotAcceptable(f"got Accept: {shown(accept)}; accepted: {', '.join(offered)}{hint}")


def _media_ranges(accept: str) -> Iterator[tuple[str, float]]:
    for member in accept.lower().split(","):
        name, *parameters = [part.strip() for part in member.split(";")]
        quality = next((parameter.removeprefix("q=") for parameter in parameters if parameter.startswith("q=")), "1")
        if name and not re.fullmatch(r"[01](\.[0-9]{0,3})?", quality):
            raise NotAcceptable(f"got Accept: {shown(accept)}; a quality is q=0 to q=1")
        if name:
            yield name, float(quality)
