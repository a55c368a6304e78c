"""A TorchServe row and its headers -> one frozen `Request`.

Reads every form in which TorchServe hands over a request: raw body, parsed or unparsed JSON, form fields. `options` reads what is
asked about an image, `kserve` takes the bodies of KServe's protocols apart. Knows nothing of images, of torch or of TorchServe's
classes.
"""

import base64
import contextlib
import functools
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from handler.errors import (
    OVERLOADED,
    ClientError,
    EmptyRequest,
    InvalidOption,
    InvalidRequest,
    MalformedBase64,
    NotAcceptable,
    Overloaded,
    RequestTooLarge,
    shown,
)
from handler.gradients.methods import METHODS
from handler.images.arrays import NPY_MAGIC, Tensor
from handler.limits import MAX_BODY_BYTES, MAX_COMPRESSED_BYTES, MAX_FORM_FIELDS
from handler.protocol.json_body import parse_json
from handler.protocol.kserve import (
    EXPLANATION_OUTPUTS,
    GAP_OUTPUT,
    HEADER_LENGTH,
    INPUTS,
    INSTANCES,
    Infer,
    read_infer_body,
    split_binary_body,
    split_instances,
)
from handler.protocol.options import IMAGE_FIELDS, Options, fit_options, options_in, read_values

DESCRIBE_HEADER = "describe"  # the frontend sets it to "True" on a row of its own, which has neither fields nor ROUTE_HEADER
CORRELATION_HEADERS = ("x-correlation-id", "x-request-id")  # of these, in any letter case, the first that holds a good id
CORRELATION_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CORRELATION_LENGTHS = {len(name) for name in CORRELATION_HEADERS}
SENT_TWICE_HEADER = "x-sent-twice"  # set by `torchserve`, whose receiver alone sees what is there twice
# Set by the same: it has dropped fields beyond MAX_FORM_FIELDS, or a body beyond MAX_BATCH_BODY_BYTES of a batch.
TOO_MANY_FIELDS_HEADER, TOO_LARGE_BATCH_HEADER = "x-too-many-fields", "x-too-large-batch"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
START_OF_JSON = re.compile(rb"\s*+[\[{]")
WHITE_SPACE = b" \t\n\r\v\f"
WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # for zlib, by content encoding
ROUTE_HEADER = "explain"  # TorchServe's frontend sets it on each request: "True" came in by an explanation route


class ReplyFormat(StrEnum):
    """Media type of the reply, the preferred one first."""

    JSON = "application/json"
    NPY = "application/x-npy"
    PNG = "image/png"


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
        ClientError: the request cannot be answered; the message says what was expected.
    """
    text_headers = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
    _refuse_dropped(text_headers)
    fields, binary = _read_fields(row, text_headers, headers)
    asked = _Asked(options_in(text_headers), text_headers.get("accept", ""), class_count, headers.get(ROUTE_HEADER) == "True")
    if INSTANCES in fields and INPUTS in fields:
        raise InvalidRequest(f"expected '{INSTANCES}' or '{INPUTS}', got both")
    if INSTANCES in fields:
        return _read_v1(fields, asked)
    if INPUTS in fields:
        try:
            return _read_v2(fields, binary, asked)
        except ClientError as error:
            error.as_text = True
            raise
    image_fields, option_fields = _split_fields(fields)
    options = asked.options(_over(asked.given, option_fields))
    part = Part(_read_image(image_fields), options)
    return Request((part,), _negotiate(asked.accept, explain=options.explain))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the headers of a request ask for.

    Attributes:
        given: options, as they were sent.
        accept: the Accept header.
        class_count: how many classes the network has.
        explain_route: whether the request came in by a route that explains.
    """

    given: dict[str, object]
    accept: str
    class_count: int
    explain_route: bool

    def options(self, given: Mapping[str, object]) -> Options:
        """Read all options of one image."""
        return fit_options(read_values(given, self.class_count), explain_route=self.explain_route)


# --- the forms of a request


def _split_fields(fields: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Tell the fields of the image from those of its options."""
    image_fields = {name: value for name, value in fields.items() if name in IMAGE_FIELDS and value is not None}
    return image_fields, {name: value for name, value in fields.items() if name not in IMAGE_FIELDS}


def _read_v1(fields: Mapping[str, object], asked: _Asked) -> Request:
    """Read a body of KServe v1. A bad instance is an error in its place, so that the reply can name them all."""
    shared, instances = split_instances(fields)
    _refuse_images_beside(INSTANCES, shared)
    values = read_values(_over(asked.given, shared), asked.class_count)  # a mistake in what all share is one error

    def read_instance(instance: Mapping[str, object]) -> Part | ClientError:
        image_fields, option_fields = _split_fields(instance)
        try:
            own = {**values, **read_values(option_fields, asked.class_count)}
            options = fit_options(own, explain_route=asked.explain_route)
            return Part(_read_image(image_fields), options)
        except ClientError as error:
            return error

    parts = tuple(read_instance(instance) for instance in instances)
    read = [part.options for part in parts if isinstance(part, Part)]
    reply_format = _negotiate(asked.accept, explain=all(options.explain for options in read))
    if reply_format is ReplyFormat.NPY and len({_map_axes(options) for options in read}) > 1:
        raise InvalidOption(
            f"expected the same number of targets for all maps of one array of {reply_format}, got different ones"
        )
    if reply_format is ReplyFormat.PNG and len({options.style for options in read}) > 1:
        raise InvalidOption("expected the same options of drawing for all instances of one PNG, got different ones")
    return Request(parts, reply_format, listed=True)


def _read_v2(fields: Mapping[str, object], binary: bytes, asked: _Asked) -> Request:
    """Read a body of the Open Inference Protocol v2. Its options hold for all of its images."""
    body = read_infer_body(fields, binary)
    _refuse_images_beside(INPUTS, body.options)
    options = asked.options(_over(asked.given, body.options))
    unexplained = [] if options.explain else [name for name in body.infer.outputs if name in EXPLANATION_OUTPUTS]
    if unexplained:
        raise InvalidRequest(f"expected an explanation ('explain') for the output {shown(unexplained[0])}, got a prediction")
    if GAP_OUTPUT in body.infer.outputs and not options.method.has_convergence_delta:
        methods = ", ".join(method.name for method in METHODS.values() if method.has_convergence_delta)
        raise InvalidRequest(f"expected 'method' {methods} for the output '{GAP_OUTPUT}', got {options.method.name}")

    def read_image(image: str | bytes | ClientError) -> Part | ClientError:
        try:
            return image if isinstance(image, ClientError) else Part(_read_image({"data": image}), options)
        except ClientError as error:
            return error

    parts = (Part(body.images, options),) if isinstance(body.images, Tensor) else tuple(map(read_image, body.images))
    return Request(parts, _negotiate(asked.accept, explain=options.explain), listed=True, infer=body.infer)


def _refuse_images_beside(name: str, shared: Mapping[str, object]) -> None:
    beside = [field for field in IMAGE_FIELDS if field in shared]
    if beside:
        raise InvalidRequest(f"expected images in {name!r} alone, got {beside[0]!r} beside it")


def _map_axes(options: Options) -> int | None:
    """How many maps an image gets, None where it is one map without an axis for targets."""
    return len(options.target.classes) if options.target.several else None


# --- where things stand in a request


def _read_fields(row: object, headers: Mapping[str, str], field_headers: Mapping[str, object]) -> tuple[dict[str, object], bytes]:
    """Give every kind of row one form: an image under one of IMAGE_FIELDS, options under their names.

    Args:
        row: as TorchServe hands it over.
        headers: the request's, in lower case.
        field_headers: where TorchServe puts the content type of each field of a form, by its name.

    Returns:
        the fields; and what stands behind them, in a body of the Open Inference Protocol's binary extension.
    """
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/x-www-form-urlencoded" and isinstance(row, dict) and not row.keys() & set(IMAGE_FIELDS):
        raise EmptyRequest(
            "expected an image with 'curl -T FILE' or 'curl -F data=@FILE', or JSON with 'curl --json', got a form without an "
            "image, as 'curl -d' sends whatever it is given"
        )
    if isinstance(row, dict) and len(row) > MAX_FORM_FIELDS:
        raise RequestTooLarge(f"expected at most {MAX_FORM_FIELDS} fields in a form, got more")
    if isinstance(row, dict) and set(row) != {"body"}:
        return {str(name): _read_field(value, field_headers.get(name)) for name, value in row.items()}, b""  # a form
    body = row["body"] if isinstance(row, dict) else row
    binary = b""
    if isinstance(body, (bytes, bytearray, str)):
        content = decompress(body.encode() if isinstance(body, str) else bytes(body), headers.get("content-encoding", ""))
        is_binary = HEADER_LENGTH in headers
        if is_binary:
            content, binary = split_binary_body(content, headers[HEADER_LENGTH])
        content = content.removeprefix(BYTE_ORDER_MARK) if content[3:4] in (b"{", b"[") else content
        is_json = media_type == "application/json" or media_type.endswith("+json") or bool(START_OF_JSON.match(content))
        is_json = is_binary or (is_json and not content.startswith(NPY_MAGIC))
        if not content or not is_json:
            return ({"body": content} if content else {}), b""
        body = parse_json(content)
    if not isinstance(body, dict):
        raise InvalidRequest(f'expected a JSON object such as {{"data": "<base64 image>"}}, got {shown(body)}')
    return dict(body), binary


def _read_field(value: object, headers: object) -> object:
    """Read a form's field by its own content type: text and JSON, where it says so."""
    content_type = headers.get("content-type") if isinstance(headers, Mapping) else None
    if not isinstance(value, (bytes, bytearray)) or not isinstance(content_type, str) or not value:
        return value
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json":
        return parse_json(bytes(value))
    if media_type.startswith("text/"):
        with contextlib.suppress(UnicodeDecodeError):  # then it is no text, whatever its type says
            return bytes(value).decode()
    return value


def decompress(content: bytes, encoding: str) -> bytes:
    """Undo a body's Content-Encoding.

    Raises:
        InvalidRequest: it is another than gzip and deflate, or the body is not encoded so.
        RequestTooLarge: it has more than MAX_COMPRESSED_BYTES, or more than MAX_BODY_BYTES once it is decompressed.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return content
    if name not in WINDOW_BITS:
        raise InvalidRequest(f"expected gzip or deflate as 'Content-Encoding', got {shown(encoding)}")
    if len(content) > MAX_COMPRESSED_BYTES:
        raise RequestTooLarge(f"expected at most {MAX_COMPRESSED_BYTES:,} bytes of a compressed body, got {len(content):,}")
    decoder = zlib.decompressobj(WINDOW_BITS[name])
    try:
        plain = decoder.decompress(content, MAX_BODY_BYTES + 1)
    except zlib.error as error:
        raise InvalidRequest(f"expected a body in {name}, as its 'Content-Encoding' says, got other bytes") from error
    if len(plain) > MAX_BODY_BYTES:
        raise RequestTooLarge(f"expected at most {MAX_BODY_BYTES:,} bytes in a body, got more once it is decompressed")
    if not decoder.eof:
        raise InvalidRequest(f"expected a whole body in {name}, got one that ends early")
    return plain


def _refuse_dropped(headers: Mapping[str, str]) -> None:
    """Refuse what the worker's receiver has dropped, or seen twice: a form's field, or an option's header in two spellings."""
    if TOO_LARGE_BATCH_HEADER in headers:
        raise Overloaded(OVERLOADED)
    if TOO_MANY_FIELDS_HEADER in headers:
        raise RequestTooLarge(f"expected at most {MAX_FORM_FIELDS} fields in a form, got more")
    if SENT_TWICE_HEADER in headers:
        raise InvalidRequest(f"expected each field and each option once, got {shown(headers[SENT_TWICE_HEADER])} twice")


def _over(headers: Mapping[str, object], fields: Mapping[str, object]) -> dict[str, object]:
    """Put options of the body above those of the headers. JSON's null says nothing."""
    return {**headers, **{name: value for name, value in fields.items() if value is not None}}


# --- the image


def _read_image(fields: Mapping[str, object]) -> bytes | list[Any]:
    """Read the one image among fields of IMAGE_FIELDS."""
    if len(fields) > 1:
        raise InvalidRequest(f"expected the image in one field, got several ({', '.join(fields)})")
    if not fields:
        raise EmptyRequest(
            "expected an image file as the body, a multipart field 'data', or JSON {\"data\": ...} sent with 'Content-Type: "
            "application/json', got no image"
        )
    ((field, value),) = fields.items()
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]  # some languages write every scalar so
    if isinstance(value, (bytes, bytearray)):
        if not value:
            raise EmptyRequest(f"expected the bytes of an image file in {field!r}, got an empty field")
        return bytes(value)
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str):
        value = value["b64"]
    if isinstance(value, str):
        return _decode_base64(field, value)
    raise InvalidRequest(f"expected base64 text or nested lists of numbers in {field!r}, got {shown(value)}")


def _decode_base64(field: str, text: str) -> bytes:
    """Decode base64, with or without line breaks, also where it stands in a data URL (`data:image/png;base64,...`)."""
    try:
        encoded = (text.partition(",")[2] if text.startswith("data:") else text).encode("ascii").translate(None, WHITE_SPACE)
        if encoded:
            return base64.b64decode(encoded, validate=True)
    except ValueError as error:  # binascii.Error and UnicodeEncodeError are ValueErrors
        raise MalformedBase64(f"expected standard base64 with padding in {field!r}, got {shown(text)}") from error
    raise EmptyRequest(f"expected the base64 of an image file in {field!r}, got an empty text")


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
    raise NotAcceptable(f"expected one of {', '.join(offered)} in Accept{hint}, got {shown(accept)}")


def _media_ranges(accept: str) -> Iterator[tuple[str, float]]:
    """Take an Accept header apart, as leniently as browsers and old clients need: each range, and how much it is wanted."""
    for member in accept.lower().split(","):
        name, *parameters = [part.strip() for part in member.split(";")]
        quality = next((parameter.removeprefix("q=").strip('" ') for parameter in parameters if parameter.startswith("q=")), "1")
        if name:
            yield ("*/*" if name == "*" else name), _read_quality(quality)


def _read_quality(text: str) -> float:
    """Read a quality; what is none counts as 1."""
    try:
        quality = float(text)
    except ValueError:
        return 1.0
    return min(max(quality, 0.0), 1.0) if quality == quality else 1.0  # NaN is not itself
