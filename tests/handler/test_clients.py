"""Requests as real clients send them: lenient where the meaning is plain, refused where something is there twice."""

import gzip
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handler.errors import ClientError, InvalidRequest, RequestTooLarge, ServiceError
from handler.gradients.explain import Explanation
from handler.gradients.methods import softmax
from handler.images.arrays import Tensor
from handler.images.preparation import ImageWarning, leave_unchanged
from handler.limits import MAX_BODY_BYTES
from handler.protocol.options import Options, Space, Targets
from handler.protocol.reply import Result, render_error, render_results
from handler.protocol.request import SENT_TWICE_HEADER, Part, ReplyFormat, Request, parse_request
from scripts.paths import SAMPLE_IMAGE

PNG = SAMPLE_IMAGE.read_bytes()
JSON = {"Content-Type": "application/json"}
ZEROS = [[0] * 28] * 28


def parse(body: object, headers: dict[str, str] | None = None) -> Request:
    return parse_request({"body": body}, {"explain": "True", **(headers or {})}, 10)


def part_of(body: object, headers: dict[str, str] | None = None) -> Part:
    (part,) = parse(body, headers).parts
    assert isinstance(part, Part)
    return part


def as_json(content: object) -> bytearray:
    return bytearray(json.dumps(content).encode())


# --- what is plain is taken


@pytest.mark.parametrize(
    ("options", "attribute", "expected"),
    [
        ({"target": None}, "target", Targets((None,), several=False)),
        ({"target": 3.0}, "target", Targets((3,), several=False)),
        ({"target": "3.0"}, "target", Targets((3,), several=False)),
        ({"target": [3.0, "predicted"]}, "target", Targets((3, None), several=True)),
        ({"target": [3]}, "target", Targets((3,), several=True)),
        ({"space": ["image"]}, "space", "image"),
        ({"explain": [True]}, "explain", True),
        ({"encoding": None, "space": None}, "encoding", "nested"),
    ],
    ids=str,
)
def test_option_is_read_where_its_meaning_is_plain(options: dict[str, Any], attribute: str, expected: object) -> None:
    assert getattr(part_of({"data": ZEROS, **options}).options, attribute) == expected


@pytest.mark.parametrize("value", [25.0, "25", "25.0", [25], ["25.0"]], ids=str)
def test_whole_numbers_may_be_written_with_a_point(value: object) -> None:
    options = part_of({"data": ZEROS, "method": "smoothgrad", "samples": value}).options
    assert options.method.values["samples"] == 25
    assert type(options.method.values["samples"]) is int


def test_text_in_a_list_of_one_is_the_text() -> None:
    assert part_of({"data": ["iVBORw=="]}).payload == b"\x89PNG"


def test_null_stands_for_what_is_not_there() -> None:
    part = part_of({"data": ZEROS, "image": None, "method": None}, {"X-Saliency-Method": "loss_gradient"})
    assert part.options.method.name == "loss_gradient"


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "GZIP", "identity", ""])
def test_compressed_body_is_read(encoding: str) -> None:
    by_name: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}
    compress = by_name.get(encoding.lower(), bytes)
    assert part_of(bytearray(compress(PNG)), {"Content-Encoding": encoding}).payload == PNG
    assert part_of(bytearray(compress(bytes(as_json({"data": ZEROS})))), {"Content-Encoding": encoding, **JSON}).payload == ZEROS


@pytest.mark.parametrize(
    ("content", "encoding", "error", "message"),
    [
        (PNG, "gzip", InvalidRequest, "expected a body in gzip, as its 'Content-Encoding' says, got other bytes"),
        (gzip.compress(PNG)[:-9], "gzip", InvalidRequest, "got one that ends early"),
        (PNG, "br", InvalidRequest, "expected gzip or deflate as 'Content-Encoding', got 'br'"),
        (gzip.compress(bytes(MAX_BODY_BYTES + 1)), "gzip", RequestTooLarge, "once it is decompressed"),
    ],
    ids=["not compressed", "cut short", "another encoding", "bomb"],
)
def test_compressed_body_that_cannot_be_read_is_refused(
    content: bytes, encoding: str, error: type[ClientError], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse(bytearray(content), {"Content-Encoding": encoding})


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf", b"  \n"], ids=["none", "byte order mark", "space"])
def test_json_is_read_behind_a_byte_order_mark(prefix: bytes) -> None:
    assert part_of(bytearray(prefix + as_json({"data": ZEROS})), JSON).payload == ZEROS


@pytest.mark.parametrize(
    "accept",
    [
        "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2",  # Java's HttpURLConnection, up to JDK 17
        "application/json;q=0.8500",
        'application/json;q="0.5"',
        "application/json; charset=utf-8; q=1.000",
        "application/json;q=many",
        "*",
    ],
)
def test_accept_of_browsers_and_old_clients_is_understood(accept: str) -> None:
    assert parse(bytearray(PNG), {"Accept": accept}).reply_format is ReplyFormat.JSON


def test_quality_still_decides() -> None:
    assert parse(bytearray(PNG), {"Accept": 'application/json;q=.2, image/png;q=".9"'}).reply_format is ReplyFormat.PNG


# --- what is there twice is refused


@pytest.mark.parametrize(
    "text",
    [
        '{"data": [[0]], "data": [[1]]}',
        '{"data": [[0]], "target": 3, "target": 4}',
        '{"instances": [{"data": [[0]], "target": 3, "target": 3}]}',
        '{"inputs": [{"name": "x", "name": "y", "shape": [1], "datatype": "BYTES", "data": ["aa=="]}]}',
        '{"instances": [[[0]]], "instances": [[[0]]]}',
    ],
    ids=["image", "option", "in an instance", "in an input", "instances"],
)
def test_key_of_json_that_is_there_twice_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"expected each key of a JSON object once, got '.*' twice"):
        parse(bytearray(text.encode()), JSON)


def test_field_or_header_that_the_receiver_saw_twice_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="expected each field and each option once, got 'data' twice"):
        parse_request({"data": bytearray(PNG)}, {SENT_TWICE_HEADER: "data"}, 10)


# --- the binary extension of the Open Inference Protocol

PIXELS = (np.arange(784).reshape(1, 28, 28) % 256).astype(np.uint8)


def binary_body(tensor: dict[str, Any], content: bytes, **more: Any) -> tuple[bytearray, dict[str, str]]:
    tensor = {"name": "x", **tensor, "parameters": {"binary_data_size": len(content)}}
    header = json.dumps({"inputs": [tensor], **more}).encode()
    return bytearray(header + content), {"Inference-Header-Content-Length": str(len(header))}


@pytest.mark.parametrize("datatype", ["UINT8", "INT64", "FP32", "FP64", "FP16"])
def test_binary_tensor_is_read(datatype: str) -> None:
    dtype = {"UINT8": "<u1", "INT64": "<i8", "FP32": "<f4", "FP64": "<f8", "FP16": "<f2"}[datatype]
    values = (PIXELS if "INT" in datatype else PIXELS / 255).astype(dtype)
    body, headers = binary_body({"shape": [1, 28, 28], "datatype": datatype}, values.tobytes())
    payload = part_of(body, headers).payload
    assert isinstance(payload, Tensor)
    assert payload == Tensor(datatype, (1, 28, 28), values.tobytes())


def test_binary_bytes_are_images_themselves() -> None:
    content = b"".join(struct.pack("<I", len(one)) + one for one in (PNG, PNG[:50]))
    body, headers = binary_body({"shape": [2, 1], "datatype": "BYTES"}, content)
    parts = parse(body, headers).parts
    assert [part.payload for part in parts if isinstance(part, Part)] == [PNG, PNG[:50]]


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        pytest.param(*binary_body({"shape": [1], "datatype": "BYTES"}, b"\x09\0\0\0abc"), "end within one", id="short element"),
        pytest.param(bytearray(b"{}"), {"Inference-Header-Content-Length": "9"}, "up to the body's 2 bytes", id="length"),
        pytest.param(bytearray(b"{}"), {"Inference-Header-Content-Length": "-1"}, "got '-1'", id="negative length"),
        pytest.param(bytearray(b"{} "), {"Inference-Header-Content-Length": "x"}, "got 'x'", id="no length"),
        pytest.param(
            binary_body({"shape": [1, 28, 28], "datatype": "UINT8", "data": [0]}, bytes(784))[0],
            binary_body({"shape": [1, 28, 28], "datatype": "UINT8", "data": [0]}, bytes(784))[1],
            "got both",
            id="data twice",
        ),
    ],
)
def test_binary_body_of_another_form_is_refused(body: bytearray, headers: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse(body, headers)


def test_binary_body_that_ends_early_is_refused() -> None:
    body, headers = binary_body({"shape": [1, 28, 28], "datatype": "UINT8"}, bytes(784))
    with pytest.raises(InvalidRequest, match=r"expected 784 bytes .* behind the JSON, got 780"):
        parse(body[:-4], headers)


def test_parameters_of_the_protocol_that_mean_nothing_here_are_passed_over() -> None:
    parameters: dict[str, Any] = {
        "priority": 0,
        "timeout": 5,
        "sequence_id": 1,
        "sequence_start": True,
        "binary_data_output": False,
    }
    parameters |= {"triton_enable_empty_final_response": False, "content_type": "np", "target": 4}
    tensor = {"name": "x", "shape": [28, 28], "datatype": "UINT8", "data": ZEROS, "parameters": {"content_type": "np"}}
    request = parse(as_json({"inputs": [tensor], "parameters": parameters, "model_name": "digits", "model_version": "1"}), JSON)
    (part,) = request.parts
    assert isinstance(part, Part)
    assert part.options.target == Targets((4,), several=False)


def result_of(*warnings: ImageWarning) -> Result:
    logits = np.arange(10, dtype=np.float32)
    maps = np.linspace(-1, 1, 784, dtype=np.float32).reshape(1, 28, 28)
    explanation = Explanation((9,), maps, maps)
    return Result(Options(explain=True), leave_unchanged(maps[0]), logits, softmax(logits), explanation, warnings)


MODEL = {"name": "digits", "version": "1.0", "weights_sha256": "0" * 64}


@pytest.mark.parametrize(
    ("outputs", "parameters", "expected"),
    [
        (None, {"binary_data_output": True}, {"digit", "probability", "probabilities", "logits", "target", "saliency"}),
        ([{"name": "saliency", "parameters": {"binary_data": True}}, {"name": "digit"}], {}, {"saliency"}),
        ([{"name": "digit", "parameters": {"binary_data": False}}, {"name": "logits"}], {"binary_data_output": True}, {"logits"}),
    ],
    ids=["all", "one by its own", "all but one"],
)
def test_binary_reply_holds_what_was_asked_for_in_binary(
    outputs: list[dict[str, Any]] | None, parameters: dict[str, Any], expected: set[str]
) -> None:
    tensor = {"name": "x", "shape": [1, 28, 28], "datatype": "UINT8", "data": PIXELS.ravel().tolist()}
    body: dict[str, Any] = {"inputs": [tensor], "parameters": parameters, **({} if outputs is None else {"outputs": outputs})}
    request = parse(as_json(body), JSON)
    reply = render_results([result_of()], request.reply_format, MODEL, listed=True, infer=request.infer)
    assert reply.content_type == "application/octet-stream"
    header_length = int(reply.headers["Inference-Header-Content-Length"])
    header, rest = json.loads(reply.body[:header_length]), reply.body[header_length:]
    found = {}
    for output in header["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is not None:
            assert "data" not in output
            dtype = {"INT64": "<i8", "FP32": "<f4"}[output["datatype"]]
            found[output["name"]], rest = np.frombuffer(rest[:size], dtype).reshape(output["shape"]), rest[size:]
    assert rest == b""
    assert found.keys() == expected
    if "saliency" in found:
        np.testing.assert_array_equal(found["saliency"][0], np.linspace(-1, 1, 784, dtype=np.float32).reshape(28, 28))
    if "logits" in found:
        np.testing.assert_array_equal(found["logits"], np.arange(10, dtype=np.float32)[None])


def test_error_of_the_open_inference_protocol_is_a_text() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(as_json({"inputs": []}), JSON)
    content = json.loads(render_error(caught.value).body)
    assert content["error"].startswith("expected a list of one tensor")
    assert (content["code"], content["type"]) == (400, "InvalidRequest")


def test_error_of_other_protocols_is_an_object() -> None:
    error = ServiceError("text", (1, 2))
    assert json.loads(render_error(error).body) == {
        "error": {"code": 500, "type": "ServiceError", "message": "text", "indices": [1, 2]}
    }


# --- warnings


WARNINGS = (ImageWarning("OtherInk", "expected one digit"), ImageWarning("TouchesBorder", "expected a margin"))


def test_warnings_stand_in_json_where_there_are_some() -> None:
    reply = render_results([result_of(*WARNINGS)], ReplyFormat.JSON, MODEL, listed=False, infer=None)
    assert json.loads(reply.body)["warnings"] == [
        {"type": "OtherInk", "message": "expected one digit"},
        {"type": "TouchesBorder", "message": "expected a margin"},
    ]
    assert reply.warnings == ("OtherInk", "TouchesBorder")
    assert "warnings" not in json.loads(render_results([result_of()], ReplyFormat.JSON, MODEL, listed=False, infer=None).body)


@pytest.mark.parametrize("reply_format", [ReplyFormat.NPY, ReplyFormat.PNG])
def test_warnings_of_a_binary_reply_stand_in_a_header(reply_format: ReplyFormat) -> None:
    results = [result_of(*WARNINGS), result_of(), result_of(WARNINGS[0])]
    reply = render_results(results, reply_format, MODEL, listed=True, infer=None)
    assert reply.headers["X-Saliency-Warnings"] == "OtherInk,TouchesBorder;;OtherInk"
    plain = render_results([result_of()], reply_format, MODEL, listed=True, infer=None)
    assert "X-Saliency-Warnings" not in plain.headers


def test_warnings_stand_among_the_parameters_of_the_open_inference_protocol() -> None:
    request = parse(as_json({"inputs": [{"name": "x", "shape": [1, 28, 28], "datatype": "UINT8", "data": [0] * 784}]}), JSON)
    reply = render_results([result_of(*WARNINGS)], request.reply_format, MODEL, listed=True, infer=request.infer)
    assert json.loads(reply.body)["parameters"]["warnings"] == "OtherInk,TouchesBorder"


# --- drawings


@pytest.mark.parametrize("inverted", [False, True], ids=["bright ink", "dark ink"])
def test_red_is_where_more_ink_raises_the_score_in_the_space_of_the_image_too(inverted: bool) -> None:
    """The derivative by brightness of dark ink has the other sign, and is drawn by darkness."""
    brightness = np.zeros((1, 28, 28), dtype=np.float32)
    brightness[0, 10:18, 10:18] = -1 if inverted else 1  # more ink raises the score
    sent = np.full((28, 28), 1.0 if inverted else 0.0, dtype=np.float32)
    image = replace(leave_unchanged(sent), slope=-1.0 if inverted else 1.0, sent=sent)
    logits = np.arange(10, dtype=np.float32)
    result = Result(
        Options(explain=True, space=Space.IMAGE), image, logits, softmax(logits), Explanation((9,), brightness, brightness)
    )
    reply = render_results([result], ReplyFormat.PNG, MODEL, listed=False, infer=None)
    with Image.open(BytesIO(reply.body)) as drawing:
        red, _, blue = np.asarray(drawing.convert("RGB").resize((28, 28)), dtype=int)[14, 14]
    assert red > blue + 50
    assert float(reply.headers["X-Saliency-Min" if inverted else "X-Saliency-Max"]) == (-1 if inverted else 1)  # numbers stay


# --- fields of a form that say what they are


@pytest.mark.parametrize(
    ("value", "content_type", "payload"),
    [
        (b"iVBORw==", "text/plain", b"\x89PNG"),
        (b"iVBORw==", "text/plain; charset=utf-8", b"\x89PNG"),
        (json.dumps(ZEROS).encode(), "application/json", ZEROS),
        (PNG, "image/png", PNG),
        (PNG, "text/plain", PNG),  # it is none
        (PNG, None, PNG),
    ],
    ids=["base64", "base64 with a charset", "numbers", "image", "image as text", "no type"],
)
def test_field_of_a_form_is_read_by_its_own_type(value: bytes, content_type: str | None, payload: object) -> None:
    headers: dict[str, object] = {"explain": "True", "data": {"content-type": content_type}}
    (part,) = parse_request({"data": bytearray(value)}, headers, 10).parts
    assert isinstance(part, Part)
    assert part.payload == payload
