"""A TorchServe row and its headers -> one frozen `Request`.

Reads every form in which TorchServe hands over a request (raw body, parsed or unparsed JSON, form fields) and every place in
which an option can stand (field, header). `kserve` takes the bodies of KServe's protocols apart for it. Knows nothing of images,
of torch or of TorchServe's classes.
"""

import base64
import binascii
import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

from handler.errors import (
    ClientError,
    EmptyRequest,
    InvalidOption,
    InvalidRequest,
    MalformedBase64,
    MalformedJSON,
    NotAcceptable,
    UnknownOption,
    shown,
)
from handler.gradients.methods import GRADIENT, METHODS, PARAMETERS, Method, Parameter
from handler.images.arrays import Tensor
from handler.limits import MAX_SIZE, MIN_PERCENTILE, MIN_SIZE
from handler.protocol.kserve import EXPLANATION_OUTPUTS, GAP_OUTPUT, INPUTS, INSTANCES, Infer, read_infer_body, split_instances
from handler.render.drawing import Colormap, Layout, Polarity, Style

IMAGE_FIELDS = ("data", "image", "body")  # a JSON or form field of one of these names holds the image
NPY_MAGIC = b"\x93NUMPY"  # how every .npy file starts; no JSON can
HEADER_PREFIX = "x-saliency-"  # an option's header is this and its name, in any letter case, with hyphens
DESCRIBE_HEADER = "describe"  # the frontend sets it to "True" on a row of its own, which has neither fields nor ROUTE_HEADER
CORRELATION_HEADERS = ("x-correlation-id", "x-request-id")  # of these, in any letter case, the first that holds a good id
CORRELATION_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CORRELATION_LENGTHS = {len(name) for name in CORRELATION_HEADERS}
ROUTE_HEADER = "explain"  # TorchServe's frontend sets it on each request: "True" came in by an explanation route


class Encoding(StrEnum):
    """How numbers of a map stand in JSON."""

    NESTED = "nested"
    BASE64 = "base64"


class Space(StrEnum):
    """Which pixels the score is differentiated by: what the network got, or the image as it was sent."""

    CANONICAL = "canonical"
    IMAGE = "image"


class Prepare(StrEnum):
    """How an image is made into what the network knows."""

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
    method: Method = GRADIENT
    space: Space = Space.CANONICAL
    prepare: Prepare | None = None  # as the form of the image suggests
    encoding: Encoding = Encoding.NESTED
    style: Style = dataclasses.field(default_factory=Style)

    @property
    def gradient_count(self) -> int:
        """How many gradients the maps take that are asked for: their cost."""
        return len(self.target.classes) * self.method.gradient_count if self.explain else 0


Payload = bytes | list[Any] | Tensor  # an image or .npy file, nested numbers, or a tensor; all of them unchecked


@dataclass(frozen=True, slots=True)
class Part:
    """An image, or the images of one array, and what is asked about each of them.

    Attributes:
        payload: the image or array.
        options: the options, `explain` being true as well where the route asks for an explanation.
    """

    payload: Payload
    options: Options


@dataclass(frozen=True, slots=True)
class Request:
    """What one client asks for.

    Attributes:
        parts: what to answer, in the reply's order, with an error in the place of an image that cannot be read. Where there is
            more than one part, each is one image.
        reply_format: media type of the reply.
        listed: the reply is a list, be it of one. (It also is one where the request's only part is an array of several.)
        infer: for a reply in the form of the Open Inference Protocol; None for any other.
    """

    parts: tuple[Part | ClientError, ...]
    reply_format: ReplyFormat
    listed: bool = False
    infer: Infer | None = None


def is_describe_request(row: object, headers: Mapping[str, object]) -> bool:
    """Whether TorchServe itself asks what this service does. A client's own `describe` header says nothing."""
    return row == {} and headers.get(DESCRIBE_HEADER) == "True" and ROUTE_HEADER not in headers


def read_correlation_id(headers: Mapping[str, object]) -> str | None:
    """Read by what a client wants to find its request again, in its own reply and in our log.

    What is no good id, and could be misread in a log, is no id at all: to follow requests must not make one of them fail.
    """
    given = {name.lower(): value for name, value in headers.items() if len(name) in _CORRELATION_LENGTHS}
    for name in CORRELATION_HEADERS:
        value = given.get(name)
        if isinstance(value, str) and CORRELATION_ID.fullmatch(value):
            return value
    return None


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
    reader = _Reader(_options_in(text_headers), class_count, explain_route=headers.get(ROUTE_HEADER) == "True")
    accept = text_headers.get("accept", "")
    if INSTANCES in fields and INPUTS in fields:
        raise InvalidRequest(f"got '{INSTANCES}' and '{INPUTS}'; one of them is accepted")
    if INSTANCES in fields:
        return _read_v1(fields, reader, accept)
    if INPUTS in fields:
        return _read_v2(fields, reader, accept)
    part = _read_part(fields, reader)
    return Request((part,), _negotiate(accept, explain=part.options.explain))


class _Reader:
    """Reads options once they are asked for, from the headers and from the fields that stand above them."""

    def __init__(self, given: Mapping[str, object], class_count: int, *, explain_route: bool) -> None:
        self.given = given
        self.class_count = class_count
        self.explain_route = explain_route

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """The options given, each converted by itself."""
        return _read_values(self.given, self.class_count)

    @functools.cached_property
    def options(self) -> Options:
        """All options, which fit each other."""
        if not self.given:  # as in most requests
            return _default_options(explain=self.explain_route)
        return _fit_options(self.values, explain_route=self.explain_route)

    def with_fields(self, fields: Mapping[str, object]) -> "_Reader":
        """Put fields above what is given so far."""
        if not fields:
            return self  # and what it has read
        return _Reader({**self.given, **fields}, self.class_count, explain_route=self.explain_route)


# --- the forms of a request


def _read_part(fields: Mapping[str, object], reader: _Reader) -> Part:
    """Read one image and its options from fields."""
    images = {name: value for name, value in fields.items() if name in IMAGE_FIELDS}
    options = reader.with_fields({name: value for name, value in fields.items() if name not in IMAGE_FIELDS}).options
    if len(images) > 1:
        raise InvalidRequest(f"got several images ({', '.join(images)}); one of these fields is accepted")
    if not images:
        raise EmptyRequest(
            "got no image; accepted: an image file as the body, a multipart field 'data', or JSON {\"data\": ...} sent with "
            "'Content-Type: application/json'"
        )
    ((name, value),) = images.items()
    return Part(_read_image(name, value), options)


def _read_part_or_error(fields: Mapping[str, object], reader: _Reader) -> Part | ClientError:
    try:
        return _read_part(fields, reader)
    except ClientError as error:
        return error


def _read_v1(fields: Mapping[str, object], reader: _Reader, accept: str) -> Request:
    """Read a body of KServe v1. A bad instance is an error in its place, so that the reply can name them all."""
    shared, instances = split_instances(fields)
    _refuse_images_beside(INSTANCES, shared)
    reader = reader.with_fields(shared)
    _ = reader.values  # a mistake in what all share is one error, not one for each instance
    parts = tuple(_read_part_or_error(instance, reader) for instance in instances)
    asked = [part.options for part in parts if isinstance(part, Part)]
    reply_format = _negotiate(accept, explain=all(options.explain for options in asked))
    if reply_format is ReplyFormat.NPY and len({_map_axes(options) for options in asked}) > 1:
        raise InvalidOption(f"got different numbers of targets for one array of {reply_format}; the same number is accepted")
    if reply_format is ReplyFormat.PNG and len({options.style for options in asked}) > 1:
        raise InvalidOption("got different options of drawing for one image; the same for all instances are accepted")
    return Request(parts, reply_format, listed=True)


def _read_v2(fields: Mapping[str, object], reader: _Reader, accept: str) -> Request:
    """Read a body of the Open Inference Protocol v2. Its options hold for all of its images."""
    body = read_infer_body(fields)
    _refuse_images_beside(INPUTS, body.options)
    reader = reader.with_fields(body.options)
    options = reader.options
    unexplained = [] if options.explain else [name for name in body.infer.outputs if name in EXPLANATION_OUTPUTS]
    if unexplained:
        raise InvalidRequest(f"got the output {shown(unexplained[0])} without an explanation; ask for one with 'explain'")
    if GAP_OUTPUT in body.infer.outputs and not options.method.has_gap:
        methods = ", ".join(method.name for method in METHODS.values() if method.has_gap)
        raise InvalidRequest(f"got the output '{GAP_OUTPUT}' with 'method' {options.method.name}; {methods} has it")
    parts: tuple[Part | ClientError, ...]
    if isinstance(body.images, Tensor):
        parts = (Part(body.images, reader.options),)
    else:
        parts = tuple(
            image if isinstance(image, ClientError) else _read_part_or_error({"data": image}, reader) for image in body.images
        )
    return Request(parts, _negotiate(accept, explain=reader.options.explain), listed=True, infer=body.infer)


def _refuse_images_beside(name: str, shared: Mapping[str, object]) -> None:
    beside = [field for field in IMAGE_FIELDS if field in shared]
    if beside:
        raise InvalidRequest(f"got {beside[0]!r} beside {name!r}; images in one of them are accepted")


def _map_axes(options: Options) -> int | None:
    """How many maps an image gets, None where it is one map without an axis for targets."""
    return len(options.target.classes) if options.target.several else None


# --- where things stand in a request


def _read_fields(row: object, headers: Mapping[str, str]) -> dict[str, object]:
    """Give every kind of row one form: an image under one of IMAGE_FIELDS, options under their names."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/x-www-form-urlencoded" and isinstance(row, dict) and not row.keys() & set(IMAGE_FIELDS):
        raise EmptyRequest(
            "got a form without an image, as 'curl -d' sends whatever it is given; accepted: an image with 'curl -T FILE' or "
            "'curl -F data=@FILE', JSON with 'curl --json'"
        )
    if isinstance(row, dict) and set(row) != {"body"}:
        return {str(name): value for name, value in row.items()}  # a form
    body = row["body"] if isinstance(row, dict) else row
    if isinstance(body, (bytes, bytearray, str)):
        content = body.encode() if isinstance(body, str) else bytes(body)
        is_json = media_type == "application/json" or media_type.endswith("+json") or content.lstrip()[:1] in (b"{", b"[")
        is_json = is_json and not content.startswith(NPY_MAGIC)
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


# --- the image


def _read_image(field: str, value: object) -> bytes | list[Any]:
    if isinstance(value, (bytes, bytearray)):
        if not value:
            raise EmptyRequest(f"got an empty field {field!r}; the bytes of an image file are accepted")
        return bytes(value)
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str):
        value = value["b64"]
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


def _read_values(given: Mapping[str, object], class_count: int) -> dict[str, Any]:
    """Check and convert options one by one."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in OPTION_PARSERS:
            raise UnknownOption(
                f"got the option {shown(name)}; accepted are {', '.join(OPTION_PARSERS)} (as headers X-Saliency-...), and "
                f"for the image {', '.join(IMAGE_FIELDS)}"
            )
        if isinstance(value, (bytes, bytearray)):
            try:
                value = bytes(value).decode()
            except UnicodeDecodeError as error:
                raise InvalidOption(f"got bytes in {name!r} that are no UTF-8 text") from error
        values[name] = OPTION_PARSERS[name](name, value.strip() if isinstance(value, str) else value, class_count)
    return values


def _fit_options(values: Mapping[str, Any], *, explain_route: bool) -> Options:
    """Make one value of those given, once they fit each other."""
    if explain_route:
        values = {**values, "explain": True}
    general = {name: value for name, value in values.items() if name not in STYLE_OPTIONS and name not in PARAMETERS}
    style = Style(**{name: values[name] for name in STYLE_OPTIONS if name in values})
    if not values.keys() & {"method", *PARAMETERS}:  # as in most requests
        return Options(**general, style=style)
    general["method"] = _fit_method(
        values.get("method", type(GRADIENT)), {name: value for name, value in values.items() if name in PARAMETERS}
    )
    options = Options(**general, style=style)
    if options.space is Space.IMAGE and not options.method.has_image_space:
        chosen = "".join(f" and {name!r} {value}" for name, value in options.method.values.items() if name in values)
        raise InvalidOption(
            f"got 'space' {options.space} with 'method' {options.method.name}{chosen}, whose maps have no meaning there; 'space' "
            f"{Space.CANONICAL} is accepted"
        )
    return options


@functools.cache
def _default_options(*, explain: bool) -> Options:
    """The options of a request that gives none; all such requests share them."""
    return Options(explain=explain)


def _fit_method(method: type[Method], parameters: Mapping[str, Any]) -> Method:
    """Give a method its parameters."""
    accepted = method.parameters()
    for name in parameters:
        if name not in accepted:
            takes = ", ".join(accepted) or "no parameters"
            of = ", ".join(other.name for other in METHODS.values() if name in other.parameters())
            raise InvalidOption(f"got {name!r} with 'method' {method.name}, which takes {takes}; {name!r} belongs to {of}")
    return method(**parameters)


class OptionParser(Protocol):
    """Reads the values of one option."""

    def __call__(self, name: str, value: object, class_count: int) -> object:
        """Convert a value, or raise InvalidOption."""

    def accepted(self, class_count: int) -> list[object]:
        """List the values that are accepted, for people to read."""


class _FlagParser:
    def __call__(self, name: str, value: object, class_count: int) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise InvalidOption(f"got {shown(value)} as {name!r}; true and false are accepted")

    def accepted(self, class_count: int) -> list[object]:
        return [True, False]


class _TargetParser:
    """Reads a class, "predicted", a list of these, or "all". In text, a list is JSON (`[3, 5]`) or has commas (`3,5`)."""

    def __call__(self, name: str, value: object, class_count: int) -> Targets:
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

    def accepted(self, class_count: int) -> list[object]:
        return [*range(class_count), "predicted", "a list of these", "all"]


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


class _IntegerParser:
    def __init__(self, lowest: int, highest: int) -> None:
        self.lowest = lowest
        self.highest = highest

    def __call__(self, name: str, value: object, class_count: int) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value):
            value = int(value)
        if type(value) is int and self.lowest <= value <= self.highest:
            return value
        raise InvalidOption(f"got {shown(value)} as {name!r}; {self.accepted(class_count)[0]} is accepted")

    def accepted(self, class_count: int) -> list[object]:
        return [f"an integer from {self.lowest} to {self.highest}"]


class _NumberParser:
    def __init__(self, lowest: float, highest: float) -> None:
        self.lowest = lowest
        self.highest = highest

    def __call__(self, name: str, value: object, class_count: int) -> float:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and self.lowest <= value <= self.highest:
            return float(value)
        raise InvalidOption(f"got {shown(value)} as {name!r}; {self.accepted(class_count)[0]} is accepted")

    def accepted(self, class_count: int) -> list[object]:
        return [f"a number from {self.lowest} to {self.highest}"]


Choice = TypeVar("Choice")


class _ChoiceParser(Generic[Choice]):
    """Reads the values of one enumeration, or the names of one table."""

    def __init__(self, choices: Mapping[str, Choice]) -> None:
        self.choices = choices

    def __call__(self, name: str, value: object, class_count: int) -> Choice:
        if isinstance(value, str) and value in self.choices:
            return self.choices[value]
        raise InvalidOption(f"got {shown(value)} as {name!r}; accepted: {', '.join(self.choices)}")

    def accepted(self, class_count: int) -> list[object]:
        return list(self.choices)


def _members(enumeration: type[StrEnum]) -> dict[str, StrEnum]:
    return {member.value: member for member in enumeration}


def _parameter_parser(parameter: Parameter) -> OptionParser:
    default = parameter.default
    if isinstance(default, StrEnum):
        return _ChoiceParser(_members(type(default)))
    if isinstance(default, int):
        return _IntegerParser(int(parameter.lowest), int(parameter.highest))
    return _NumberParser(parameter.lowest, parameter.highest)


OPTION_PARSERS: Mapping[str, OptionParser] = {
    "explain": _FlagParser(),
    "target": _TargetParser(),
    "method": _ChoiceParser(METHODS),
    "space": _ChoiceParser(_members(Space)),
    "prepare": _ChoiceParser(_members(Prepare)),
    "encoding": _ChoiceParser(_members(Encoding)),
    "size": _IntegerParser(MIN_SIZE, MAX_SIZE),
    "colormap": _ChoiceParser(_members(Colormap)),
    "polarity": _ChoiceParser(_members(Polarity)),
    "clip_percentile": _NumberParser(MIN_PERCENTILE, 100),
    "layout": _ChoiceParser(_members(Layout)),
    **{name: _parameter_parser(parameter) for name, parameter in PARAMETERS.items()},
}
STYLE_OPTIONS = tuple(field.name for field in dataclasses.fields(Style))  # the options of images


# --- the reply's format


@functools.lru_cache(maxsize=256)
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
