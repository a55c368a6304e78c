"""Bodies of KServe's protocols, through `parse_request`: which parts and options they make, and how each can be wrong."""

import base64
from typing import Any

import pytest

from handler.errors import (
    ClientError,
    EmptyRequest,
    InvalidOption,
    InvalidRequest,
    MalformedBase64,
    NotAcceptable,
    RequestTooLarge,
    UnknownOption,
    WrongShape,
)
from handler.images.arrays import Tensor
from handler.limits import MAX_ID_CHARACTERS, MAX_IMAGES
from handler.protocol.kserve import Infer
from handler.protocol.options import Encoding, Options, Targets
from handler.protocol.request import Part, ReplyFormat, Request, parse_request

IMAGE = b"\x89PNG any bytes"
BASE64 = base64.b64encode(IMAGE).decode()
EXPLAINED = Options(explain=True)


def parse(body: object, headers: dict[str, Any] | None = None) -> Request:
    return parse_request(
        {"body": body}, {"Content-Type": "application/json", "explain": "False"} | (headers or {}), class_count=10
    )


def parts_of(body: object, headers: dict[str, Any] | None = None) -> tuple[Part | ClientError, ...]:
    return parse(body, headers).parts


def options_of(body: object, headers: dict[str, Any] | None = None) -> list[Options]:
    return [part.options for part in parts_of(body, headers) if isinstance(part, Part)]


def target(k: int) -> Targets:
    return Targets((k,), several=False)


# --- v1


@pytest.mark.parametrize(
    ("instance", "payload"),
    [
        ({"data": BASE64}, IMAGE),
        ({"image": BASE64}, IMAGE),
        ({"data": {"b64": BASE64}}, IMAGE),
        ({"b64": BASE64}, IMAGE),
        (BASE64, IMAGE),
        ({"data": [[1, 2]]}, [[1, 2]]),
        ([[1, 2]], [[1, 2]]),
    ],
    ids=["data", "image", "data b64", "b64", "bare text", "data numbers", "bare numbers"],
)
def test_v1_instance_is_a_image_in_any_of_its_forms(instance: object, payload: object) -> None:
    request = parse({"instances": [instance, {"data": BASE64}]})
    assert request.parts == (Part(payload, Options()), Part(IMAGE, Options()))  # type: ignore[arg-type]
    assert (request.listed, request.infer, request.reply_format) == (True, None, ReplyFormat.JSON)


def test_v1_options_of_an_instance_stand_above_shared_ones_and_those_above_headers() -> None:
    body = {
        "parameters": {"encoding": "base64"},
        "target": 4,
        "instances": [{"data": BASE64, "target": 3}, {"data": BASE64}, {"data": BASE64, "explain": True, "encoding": "nested"}],
    }
    headers = {"X-Saliency-Target": "7", "X-Saliency-Encoding": "nested"}
    assert options_of(body, headers) == [
        Options(target=target(3), encoding=Encoding.BASE64),
        Options(target=target(4), encoding=Encoding.BASE64),
        Options(explain=True, target=target(4)),
    ]


def test_v1_explanation_route_explains_every_instance() -> None:
    assert options_of({"instances": [BASE64, BASE64]}, {"explain": "True"}) == [EXPLAINED, EXPLAINED]


def test_v1_bad_instances_are_errors_in_their_places() -> None:
    body = {"instances": [BASE64, "%", {"data": BASE64, "target": 10}, {"data": BASE64, "hue": 1}, {}, 7, None, {"b64": 5}]}
    good, *bad = parts_of(body)
    assert isinstance(good, Part)
    assert [type(error) for error in bad] == [
        *(MalformedBase64, InvalidOption, UnknownOption, EmptyRequest, InvalidRequest, EmptyRequest, InvalidRequest),
    ]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        pytest.param({"instances": []}, EmptyRequest, "expected a list of 1 to 1024 images, got an empty one", id="none"),
        pytest.param({"instances": BASE64}, InvalidRequest, "expected a list of images as 'instances'", id="no list"),
        pytest.param({"instances": None}, InvalidRequest, "expected a list of images as 'instances', got None", id="null"),
        pytest.param(
            {"instances": [BASE64] * (MAX_IMAGES + 1)},
            RequestTooLarge,
            "expected at most 1024 images in one request, got 1025",
            id="many",
        ),
        pytest.param({"instances": [BASE64], "inputs": []}, InvalidRequest, "got both$", id="v1 and v2"),
        pytest.param(
            {"instances": [BASE64], "data": BASE64},
            InvalidRequest,
            "expected images in 'instances' alone, got 'data' beside",
            id="data beside",
        ),
        pytest.param({"instances": [BASE64], "hue": 1}, UnknownOption, "got 'hue'$", id="unknown option"),
        pytest.param({"instances": [BASE64], "target": 10}, InvalidOption, "as 'target', got 10", id="shared bad option"),
        pytest.param({"instances": [BASE64], "parameters": {"target": 10}}, InvalidOption, "got 10", id="bad parameter"),
        pytest.param(
            {"instances": [BASE64], "parameters": [1]}, InvalidRequest, "as 'parameters'", id="parameters of another type"
        ),
        pytest.param(
            {"instances": [BASE64], "target": 1, "parameters": {"target": 2}},
            InvalidRequest,
            "expected each option in one place, got 'target' in two",
            id="option twice",
        ),
    ],
)
def test_v1_body_of_another_form_is_refused(body: object, error: type[ClientError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        parse(body)
    assert caught.value.indices == ()


def test_v1_npy_reply_needs_every_instance_explained_with_as_many_targets() -> None:
    accept = {"Accept": "application/x-npy", "explain": "True"}
    assert parse({"instances": [BASE64, BASE64]}, accept).reply_format is ReplyFormat.NPY
    with pytest.raises(NotAcceptable, match="ask for an explanation"):
        parse({"instances": [{"data": BASE64, "explain": True}, BASE64]}, accept | {"explain": "False"})
    for other in (5, [5], [5, 6, 7]):
        with pytest.raises(InvalidOption, match="expected the same number of targets for all maps of one array"):
            parse({"instances": [{"data": BASE64, "target": [1, 2]}, {"data": BASE64, "target": other}]}, accept)


# --- v2


def tensor(**changes: object) -> dict[str, object]:
    return {"name": "input-0", "shape": [-1], "datatype": "BYTES", "data": [BASE64]} | changes


def v2(**changes: object) -> dict[str, object]:
    return {"inputs": [tensor()]} | changes


@pytest.mark.parametrize("shape", [[2], [-1]], ids=str)
def test_v2_bytes_are_images(shape: list[int]) -> None:
    request = parse(
        v2(id="42", inputs=[tensor(shape=shape, data=[BASE64, BASE64])], outputs=[{"name": "logits"}, {"name": "digit"}])
    )
    assert request.parts == (Part(IMAGE, Options()),) * 2
    assert request.infer == Infer("42", ("logits", "digit"))
    assert request.listed


def test_v2_numbers_are_one_tensor() -> None:
    request = parse(v2(inputs=[tensor(shape=[1, 28, 28], datatype="FP32", data=[0.5])]))
    assert request.parts == (Part(Tensor("FP32", (1, 28, 28), [0.5]), Options()),)
    assert request.infer == Infer(None, ())


@pytest.mark.parametrize(
    "body",
    [
        v2(target="3,9"),
        v2(parameters={"target": "3,9"}),
        v2(inputs=[tensor(parameters={"target": "3,9"})]),
        v2(inputs=[tensor(parameters=None)], parameters={"target": [3, 9], "binary_data_output": False}, id=None, outputs=None),
    ],
    ids=["beside", "parameters", "the input's parameters", "nulls"],
)
def test_v2_options_stand_beside_or_in_parameters(body: dict[str, object]) -> None:
    assert options_of(body, {"X-Saliency-Target": "1"}) == [Options(target=Targets((3, 9), several=True))]


def test_v2_explanation_outputs_may_be_asked_for_with_an_explanation() -> None:
    outputs = [{"name": "saliency", "parameters": {"binary_data": False}}, {"name": "saliency"}]
    infer = parse(v2(outputs=outputs), {"explain": "True"}).infer
    assert infer == Infer(None, ("saliency",))


def test_v2_bad_texts_are_errors_in_their_places() -> None:
    good, *bad = parts_of(v2(inputs=[tensor(data=[BASE64, "%", 7, ""])]))
    assert isinstance(good, Part)
    assert [type(error) for error in bad] == [MalformedBase64, InvalidRequest, EmptyRequest]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        pytest.param({"inputs": []}, InvalidRequest, "expected a list of one tensor, .*got 0 inputs", id="no input"),
        pytest.param({"inputs": [tensor(), tensor()]}, InvalidRequest, "got 2 inputs", id="two inputs"),
        pytest.param({"inputs": tensor()}, InvalidRequest, "as 'inputs'", id="no list"),
        pytest.param({"inputs": [BASE64]}, InvalidRequest, "as 'inputs'", id="no tensor"),
        pytest.param(v2(inputs=[{"name": "x"}]), InvalidRequest, "without shape, datatype, data", id="fields missing"),
        pytest.param(v2(inputs=[tensor(hue=1)]), InvalidRequest, "in an input, got one with 'hue'", id="unknown field"),
        pytest.param(
            v2(inputs=[tensor(datatype="BOOL")]),
            InvalidRequest,
            "expected one of BYTES, UINT8.* as 'datatype', got 'BOOL'",
            id="bool",
        ),
        pytest.param(v2(inputs=[tensor(datatype="fp32")]), InvalidRequest, "got 'fp32'", id="lower case"),
        pytest.param(v2(inputs=[tensor(datatype=[])]), InvalidRequest, "as 'datatype'", id="datatype of another type"),
        pytest.param(v2(inputs=[tensor(shape=-1)]), InvalidRequest, "as 'shape'", id="shape of another type"),
        pytest.param(v2(inputs=[tensor(shape=[1.0])]), InvalidRequest, "as 'shape'", id="float in shape"),
        pytest.param(v2(inputs=[tensor(shape=[True])]), InvalidRequest, "as 'shape'", id="bool in shape"),
        pytest.param(v2(inputs=[tensor(data=BASE64)]), InvalidRequest, "expected a list as 'data'", id="data of another type"),
        pytest.param(v2(inputs=[tensor(shape=[2])]), WrongShape, r"for 1 BYTES, got \[2\]", id="count"),
        pytest.param(
            v2(inputs=[tensor(shape=[1, 2])]), WrongShape, r"expected shape \[1\] or \[-1\] for 1 BYTES", id="two dimensions"
        ),
        pytest.param(
            v2(inputs=[tensor(data=[])]), EmptyRequest, "expected a list of 1 to 1024 images, got an empty one", id="no bytes"
        ),
        pytest.param(
            v2(inputs=[tensor(data=[BASE64] * 1025)]),
            RequestTooLarge,
            "expected at most 1024 images in one request, got 1025",
            id="many",
        ),
        pytest.param(v2(id=7), InvalidRequest, "as 'id', got 7", id="id that is no text"),
        pytest.param(v2(id="\ud800"), InvalidRequest, "as 'id'", id="id that cannot be sent back"),
        pytest.param(v2(id="x" * (MAX_ID_CHARACTERS + 1)), InvalidRequest, "at most 1000 characters", id="long id"),
        pytest.param(
            v2(parameters=7), InvalidRequest, "expected a JSON object as 'parameters', got 7", id="parameters of another type"
        ),
        pytest.param(v2(parameters={"hue": 1}), UnknownOption, "got 'hue'$", id="unknown parameter"),
        pytest.param(v2(data=BASE64), InvalidRequest, "expected images in 'inputs' alone, got 'data' beside", id="data beside"),
        pytest.param(v2(outputs="digit"), InvalidRequest, "as 'outputs'", id="outputs of another type"),
        pytest.param(
            v2(outputs=[{"name": "score"}]), InvalidRequest, "expected one of the outputs digit, prob.* got 'score'", id="output"
        ),
        pytest.param(
            v2(outputs=[{"name": ["digit"]}]),
            InvalidRequest,
            "expected one of the outputs .* got",
            id="output's name of another type",
        ),
        pytest.param(
            v2(outputs=[{"name": "digit", "hue": 1}]), InvalidRequest, "of the output 'digit', got 'hue'", id="output's field"
        ),
        pytest.param(
            v2(outputs=[{"name": "digit", "parameters": {"hue": 1}}]),
            InvalidRequest,
            "of the output 'digit', got 'hue'",
            id="output's parameter",
        ),
        pytest.param(
            v2(outputs=[{"name": "saliency"}]),
            InvalidRequest,
            "expected an explanation .* for the output 'saliency'",
            id="saliency unasked",
        ),
        pytest.param(
            v2(parameters={"target": 1}, inputs=[tensor(parameters={"target": 1})]),
            InvalidRequest,
            "expected each option in one place, got 'target' in two",
            id="option twice",
        ),
    ],
)
def test_v2_body_of_another_form_is_refused(body: object, error: type[ClientError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        parse(body)
    assert caught.value.message.startswith("expected ")
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 400


def test_form_field_named_as_a_protocols_list_is_refused() -> None:
    for name in ("instances", "inputs"):
        with pytest.raises(InvalidRequest, match=f"as '{name}'"):
            parse_request({name: bytearray(b"[1]")}, {}, class_count=10)
