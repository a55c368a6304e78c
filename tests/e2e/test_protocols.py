"""Several images in one request, KServe's protocols, gRPC and the description, through a real TorchServe.

Answers are compared with an independent computation, and requests of all protocols share batches.
"""

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from io import BytesIO
from typing import Any

import grpc
import numpy as np
import pytest
import requests
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from numpy.typing import NDArray
from PIL import Image

from handler.gradients.methods import METHODS
from handler.images.arrays import NUMPY_TYPES
from handler.protocol.options import OPTIONS, Encoding
from handler.render.drawing import Colormap
from scripts.packaging.package import read_archive
from scripts.serving.launcher import TorchServe
from tests.client import (
    BATCH_SIZE,
    JSON,
    TIMEOUT_S,
    V1_EXPLAIN,
    V1_PREDICT,
    V2_EXPLAIN,
    V2_INFER,
    Arguments,
    Sample,
    ask,
    ask_at_once,
    base64_of,
    check_explanation,
    check_prediction,
    error_of,
    explain,
    npy,
    predict,
)
from tests.oracle import Oracle, compute_probabilities
from tests.tolerance import require_close

NPY = {"Accept": "application/x-npy"}


def levels_of(samples: list[Sample]) -> NDArray[np.uint8]:
    return np.stack([sample.levels for sample in samples])


def post(server: TorchServe, route: str, **arguments: Any) -> requests.Response:
    return ask(server, {"route": route} | arguments)


def v2_body(data: Any, shape: list[int], datatype: str = "BYTES", **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "input-0", "shape": shape, "datatype": datatype, "data": data}]} | more


# --- what a right answer is


def as_http(content: dict[str, Any]) -> requests.Response:
    """Wrap a reply's JSON in the form that the checks take."""
    reply = requests.Response()
    reply.status_code, reply.headers["content-type"] = 200, "application/json"
    reply._content = json.dumps(content).encode()
    return reply


def check_list(
    reply: requests.Response, samples: list[Sample], explained: dict[int, int | list[int] | None] | None = None
) -> None:
    """Check a reply with several predictions. `explained`: the requested target of each image with an explanation."""
    assert reply.status_code == 200, reply.text
    content = reply.json()
    assert content.keys() == ({"predictions", "explanations"} if explained else {"predictions"})
    explanations = content.get("explanations", [None] * len(samples))
    for index, (sample, prediction, explanation) in enumerate(zip(samples, content["predictions"], explanations, strict=True)):
        assert "explanation" not in prediction
        assert (explanation is not None) == (index in (explained or {}))
        if explanation is None:
            check_prediction(as_http(prediction), sample)
        else:
            check_explanation(as_http(prediction | {"explanation": explanation}), sample, (explained or {})[index])


def check_tensors(
    reply: requests.Response,
    samples: list[Sample],
    request_id: str | None = None,
    target: int | list[int] | None = None,
    *,
    explained: bool = False,
    names: list[str] | None = None,
) -> None:
    """Check a reply of the Open Inference Protocol."""
    assert reply.status_code == 200, reply.text
    content = reply.json()
    assert content.keys() == {"model_name", "model_version", "parameters", "outputs"} | ({"id"} if request_id else set())
    assert (content["model_name"], content["model_version"], content.get("id")) == ("digits", "1.0", request_id)
    assert all(isinstance(value, (str, int, float, bool)) for value in content["parameters"].values())
    logits = np.stack([sample.logits for sample in samples])
    probabilities = compute_probabilities(logits)
    digits = logits.argmax(axis=1)
    targets = [sample.predicted if target is None else target for sample in samples]
    saliency = np.stack([sample.jacobian[one] for sample, one in zip(samples, targets, strict=True)])
    expected: dict[str, tuple[str, NDArray[Any]]] = {
        "digit": ("INT64", digits),
        "probability": ("FP32", probabilities.max(axis=1)),
        "probabilities": ("FP32", probabilities),
        "logits": ("FP32", logits),
    }
    if explained:
        expected |= {"target": ("INT64", np.array(targets)), "saliency": ("FP32", saliency)}
    assert [output["name"] for output in content["outputs"]] == (names or list(expected))
    for output in content["outputs"]:
        datatype, values = expected[output["name"]]
        assert output.keys() == {"name", "datatype", "shape", "data"}
        assert (output["datatype"], output["shape"]) == (datatype, list(values.shape))
        found = np.reshape(output["data"], values.shape)
        require_close(found, values, row_axes=2 if output["name"] == "saliency" else 1)


def check_array(reply: requests.Response, samples: list[Sample], target: int | list[int]) -> None:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/x-npy"
    array = np.load(BytesIO(reply.content))
    assert array.dtype == np.float32
    expected = np.stack([sample.jacobian[target] for sample in samples])
    assert array.shape == expected.shape
    require_close(array, expected, row_axes=2)
    assert reply.headers["X-Digit"] == ";".join(str(sample.predicted) for sample in samples)


def check_bad_images(reply: requests.Response, status: int, kind: str, indices: list[int]) -> None:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = error_of(reply)
    assert (error["code"], error["type"], error.get("indices", [])) == (status, kind, indices)
    assert error["message"].startswith(("expected ", "server overloaded"))
    if indices:
        assert f"at index {', '.join(map(str, indices))}; " in error["message"]


# --- npy


@pytest.mark.parametrize(
    "send",
    [
        lambda array: {"data": npy(array)},
        lambda array: {"data": npy(array), "headers": {"Content-Type": "application/x-npy"}},
        lambda array: {"data": npy(array), "headers": JSON},
        lambda array: {"data": npy(array), "headers": {"Content-Type": "text/plain"}},
        lambda array: {"data": npy(array), "headers": {"Content-Type": "image/png"}},
        lambda array: {"files": {"data": npy(array)}},
        lambda array: {"files": {"data": ("digits.npy", npy(array), "application/x-npy")}},
        lambda array: {"json": {"data": base64.b64encode(npy(array)).decode()}},
    ],
    ids=["no type", "its type", "JSON's type", "text's type", "PNG's type", "form", "form with a type", "base64"],
)
def test_npy_is_read_by_its_content_wherever_it_stands(
    server: TorchServe, samples: list[Sample], send: Callable[[NDArray[Any]], Arguments]
) -> None:
    check_prediction(ask(server, predict(**send(samples[0].levels))), samples[0])
    check_list(ask(server, predict(**send(levels_of(samples[:4])))), samples[:4])
    check_list(ask(server, explain(**send(levels_of(samples[:2])[:, None]))), samples[:2], {0: None, 1: None})


@pytest.mark.parametrize("dtype", ["u1", ">i2", "<i8", "<f4", ">f8"])
def test_npy_of_every_kind_of_number_is_read(server: TorchServe, samples: list[Sample], dtype: str) -> None:
    array = levels_of(samples[:3])
    check_list(ask(server, predict(data=npy((array / 255 if "f" in dtype else array).astype(dtype)))), samples[:3])


@pytest.mark.parametrize("target", [3, [5], [8, 1]], ids=str)
def test_npy_reply_to_several_images_is_one_array(server: TorchServe, samples: list[Sample], target: int | list[int]) -> None:
    headers = NPY | {"X-Saliency-Target": json.dumps(target)}
    check_array(ask(server, explain(data=npy(levels_of(samples[:5])), headers=headers)), samples[:5], target)
    check_array(ask(server, explain(data=npy(levels_of(samples[:1])), headers=headers)), samples[:1], target)


def test_as_many_images_as_are_allowed_are_answered(server: TorchServe, samples: list[Sample]) -> None:
    chosen = [samples[index % len(samples)] for index in range(1024)]
    reply = ask(server, explain(data=npy(levels_of(chosen)), headers=NPY | {"X-Saliency-Target": "3"}))
    assert reply.status_code == 200, reply.text
    require_close(np.load(BytesIO(reply.content)), np.stack([s.jacobian[3] for s in chosen]), row_axes=2)
    predictions = ask(server, predict(data=npy(levels_of(chosen)))).json()["predictions"]
    assert [prediction["digit"] for prediction in predictions] == [sample.predicted for sample in chosen]
    explanations = ask(server, explain(data=npy(levels_of(chosen)))).json()["explanations"]
    require_close(
        [explanation["saliency"] for explanation in explanations], [s.jacobian[s.predicted] for s in chosen], row_axes=2
    )


def test_batch_of_the_largest_requests_restarts_no_worker(
    server: TorchServe, samples: list[Sample], worker_pids: Callable[[], list[int]]
) -> None:
    """Their replies are more than TorchServe takes in time. Some are refused; a small neighbour is answered."""
    workers = worker_pids()
    chosen = [samples[index % len(samples)] for index in range(1024)]
    large = explain(data=npy(levels_of(chosen)))
    *replies, small = ask_at_once(server, [large] * (BATCH_SIZE - 1) + [explain(data=samples[0].png)])
    check_explanation(small, samples[0])
    answered = [reply for reply in replies if reply.status_code == 200]
    assert answered
    for reply in answered:
        assert [prediction["digit"] for prediction in reply.json()["predictions"]] == [sample.predicted for sample in chosen]
    for reply in replies:
        if reply not in answered:
            check_bad_images(reply, 503, "Overloaded", [])
    assert worker_pids() == workers


# --- KServe v1


def test_v1_predict_takes_every_form_of_instance(server: TorchServe, samples: list[Sample]) -> None:
    forms: list[Callable[[Sample], Any]] = [
        lambda s: {"data": base64_of(s)},
        lambda s: {"image": base64_of(s)},
        lambda s: {"data": s.levels.tolist()},
        lambda s: {"data": (s.levels / 255).tolist()},
        lambda s: s.levels.tolist(),
        lambda s: base64_of(s),
        lambda s: {"b64": base64_of(s)},
        lambda s: {"data": {"b64": base64_of(s)}},
        lambda s: {"data": base64.b64encode(npy(s.levels)).decode()},
    ]
    body = {"instances": [form(sample) for form, sample in zip(forms, samples, strict=False)]}
    check_list(post(server, V1_PREDICT, json=body), samples[: len(forms)])
    check_list(ask(server, predict(json=body)), samples[: len(forms)])
    check_list(post(server, V1_PREDICT, data=json.dumps(body)), samples[: len(forms)])


def test_v1_explain_answers_predictions_and_explanations(server: TorchServe, samples: list[Sample]) -> None:
    instances = [
        {"data": base64_of(samples[0]), "target": 0},
        {"data": base64_of(samples[1])},
        {"data": base64_of(samples[2]), "target": [1, 8]},
    ]
    for route in (V1_EXPLAIN, "/explanations/digits"):
        check_list(post(server, route, json={"instances": instances}), samples[:3], {0: 0, 1: None, 2: [1, 8]})
        shared = {"instances": instances, "target": 4, "parameters": {"encoding": "base64"}}
        check_list(post(server, route, json=shared), samples[:3], {0: 0, 1: 4, 2: [1, 8]})


def test_v1_instance_that_did_not_ask_gets_null(server: TorchServe, samples: list[Sample]) -> None:
    instances = [{"data": base64_of(samples[0])}, {"data": base64_of(samples[1]), "explain": True, "target": 6}]
    check_list(post(server, V1_PREDICT, json={"instances": instances}), samples[:2], {1: 6})


def test_v1_npy_reply_is_one_array(server: TorchServe, samples: list[Sample]) -> None:
    body = {"instances": [{"data": base64_of(sample)} for sample in samples[:3]], "target": "2,3"}
    check_array(post(server, V1_EXPLAIN, json=body, headers=NPY), samples[:3], [2, 3])


# --- Open Inference Protocol v2


@pytest.mark.parametrize("shape", [[3], [-1]], ids=str)
def test_v2_takes_images_as_bytes(server: TorchServe, samples: list[Sample], shape: list[int]) -> None:
    body = v2_body([base64_of(sample) for sample in samples[:3]], shape, id="d3b15cad")
    check_tensors(post(server, V2_INFER, json=body), samples[:3], "d3b15cad")
    check_tensors(post(server, V2_EXPLAIN, json=body), samples[:3], "d3b15cad", explained=True)
    check_tensors(ask(server, predict(json=body)), samples[:3], "d3b15cad")


@pytest.mark.parametrize("datatype", [name for name in NUMPY_TYPES if name not in ("INT8", "FP16")])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("shape", [[28, 28], [2, 28, 28], [2, 1, 28, 28]], ids=str)
def test_v2_takes_numbers_of_every_type(
    server: TorchServe, samples: list[Sample], datatype: str, nested: bool, shape: list[int]
) -> None:
    chosen = samples[: shape[0] if len(shape) > 2 else 1]
    values = levels_of(chosen) / (255 if datatype.startswith("FP") else 1)
    array = values.reshape(shape).astype(NUMPY_TYPES[datatype])
    body = v2_body((array if nested else array.ravel()).tolist(), shape, datatype)
    check_tensors(post(server, V2_INFER, json=body), chosen)


@pytest.mark.parametrize("target", [7, [7], [0, 4]], ids=str)
def test_v2_options_stand_in_parameters(server: TorchServe, samples: list[Sample], target: int | list[int]) -> None:
    data = [base64_of(sample) for sample in samples[:2]]
    parameters = {"explain": True, "target": json.dumps(target)}
    check_tensors(
        post(server, V2_INFER, json=v2_body(data, [2], parameters=parameters)), samples[:2], target=target, explained=True
    )
    check_tensors(post(server, V2_EXPLAIN, json=v2_body(data, [2], target=target)), samples[:2], target=target, explained=True)


def test_v2_answers_the_outputs_that_are_asked_for(server: TorchServe, samples: list[Sample]) -> None:
    body = v2_body([base64_of(samples[0])], [1])
    for route, names in ((V2_INFER, ["probability", "digit"]), (V2_EXPLAIN, ["saliency"]), (V2_EXPLAIN, ["target", "logits"])):
        reply = post(server, route, json=body | {"outputs": [{"name": name} for name in names]})
        check_tensors(reply, samples[:1], explained=route == V2_EXPLAIN, names=names)


def test_v2_base64_maps_hold_the_same_floats(server: TorchServe, samples: list[Sample]) -> None:
    body = v2_body(
        [base64_of(sample) for sample in samples[:2]], [2], encoding="base64", target=[1, 2], outputs=[{"name": "saliency"}]
    )
    (output,) = post(server, V2_EXPLAIN, json=body).json()["outputs"]
    layout = output["parameters"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2])
    assert layout == {"encoding": "base64", "dtype": "float32", "shape": "2,28,28"}
    for sample, text in zip(samples, output["data"], strict=False):
        maps = np.frombuffer(base64.b64decode(text), "<f4").reshape([int(length) for length in layout["shape"].split(",")])
        require_close(maps, sample.jacobian[[1, 2]], row_axes=2)


def test_v2_npy_reply_is_one_array(server: TorchServe, samples: list[Sample]) -> None:
    body = v2_body([base64_of(sample) for sample in samples[:2]], [2], target=9)
    check_array(post(server, V2_EXPLAIN, json=body, headers=NPY), samples[:2], 9)


# --- the requests that TorchServe and KServe publish for MNIST, in form and values


def as_published(pixels: NDArray[Any]) -> str:
    """Encode an image as those requests do: base64 of a 28x28 grey PNG."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_published_sample_requests_work_unchanged(server: TorchServe, samples: list[Sample], archive: Any) -> None:
    sample = samples[0]
    png = as_published(sample.levels)
    instances = {"instances": [{"data": png, "target": 0}]}
    check_list(post(server, V1_PREDICT, json=instances), [sample])
    check_list(post(server, V1_EXPLAIN, json=instances), [sample], {0: 0})
    texts = {"id": "d3b15cad-50a2", "inputs": [{"data": [png], "datatype": "BYTES", "name": "312a4eb0-0ca7", "shape": [-1]}]}
    check_tensors(post(server, V2_INFER, json=texts), [sample], "d3b15cad-50a2")
    check_tensors(post(server, V2_EXPLAIN, json=texts), [sample], "d3b15cad-50a2", explained=True)

    rounded = np.round(sample.levels / 255, 4)  # that sample's intensities have four digits
    answers = Oracle(read_archive(archive)["weights.safetensors"]).explain(rounded)
    floats = {
        "id": "d3b15cad-50a2",
        "inputs": [{"name": "input-0", "shape": [1, 28, 28], "datatype": "FP32", "data": [rounded.tolist()]}],
    }
    as_read = Sample(sample.digit, sample.levels, *answers)
    check_tensors(post(server, V2_INFER, json=floats), [as_read], "d3b15cad-50a2")
    check_tensors(post(server, V2_EXPLAIN, json=floats), [as_read], "d3b15cad-50a2", explained=True)


def test_curls_default_type_is_told_what_to_do(server: TorchServe, samples: list[Sample]) -> None:
    """The published commands say `curl -d @file`, with a misspelt header 'ContentType': TorchServe reads a form."""
    headers = {"ContentType": "application/json", "Content-Type": "application/x-www-form-urlencoded"}
    reply = post(server, V2_INFER, data=json.dumps(v2_body([base64_of(samples[0])], [1])), headers=headers)
    check_bad_images(reply, 400, "EmptyRequest", [])
    assert "JSON with 'curl --json'" in reply.json()["error"]["message"]


# --- errors


BAD: list[Any] = [
    pytest.param(lambda s: explain(data=npy(s.levels.astype(bool))), 400, "UnreadableArray", [], id="npy of bool"),
    pytest.param(lambda s: explain(data=npy(s.levels.astype(complex))), 400, "UnreadableArray", [], id="npy of complex"),
    pytest.param(lambda s: explain(data=npy(s.levels)[:-5]), 400, "UnreadableArray", [], id="npy truncated"),
    pytest.param(lambda s: explain(data=npy(s.levels.reshape(1, 784))), 400, "WrongShape", [], id="npy of another shape"),
    pytest.param(
        lambda s: explain(data=npy(s.levels).replace(b"(28, 28), }", b"(99999999999, 28, 28), }")),
        413,
        "RequestTooLarge",
        [],
        id="npy that declares too much",
    ),
    pytest.param(lambda s: explain(data=npy(np.zeros((1025, 28, 28), "u1"))), 413, "RequestTooLarge", [], id="too many images"),
    pytest.param(
        lambda s: explain(data=npy(np.zeros((500, 28, 28), "u1")), headers={"X-Saliency-Target": "all"}),
        413,
        "RequestTooLarge",
        [],
        id="too many maps",
    ),
    pytest.param(
        lambda s: explain(data=npy(np.stack([s.levels / 255, s.levels / 200]))), 400, "InvalidPixel", [1], id="npy pixel"
    ),
    pytest.param(lambda s: explain(data=npy(np.full((28, 28), np.nan))), 400, "InvalidPixel", [], id="npy of NaN"),
    pytest.param(
        lambda s: {"route": V1_EXPLAIN, "json": {"instances": ["x", base64_of(s), {"data": base64_of(s), "target": -1}]}},
        400,
        "MalformedBase64",
        [0, 2],
        id="v1 instances",
    ),
    pytest.param(lambda s: {"route": V1_PREDICT, "json": {"instances": []}}, 400, "EmptyRequest", [], id="v1 empty"),
    pytest.param(lambda s: {"route": V1_PREDICT, "json": {}}, 400, "EmptyRequest", [], id="v1 without instances"),
    pytest.param(
        lambda s: {"route": V1_PREDICT, "json": {"instances": ["bm8gaW1hZ2U="]}}, 400, "UnreadableImage", [0], id="v1, no image"
    ),
    pytest.param(
        lambda s: {
            "route": V1_EXPLAIN,
            "json": {"instances": [{"data": base64_of(s), "target": t} for t in (1, [1])]},
            "headers": NPY,
        },
        400,
        "InvalidOption",
        [],
        id="v1 uneven npy",
    ),
    pytest.param(
        lambda s: {"route": V2_INFER, "json": v2_body([base64_of(s), "x"], [2])}, 400, "MalformedBase64", [1], id="v2 bytes"
    ),
    pytest.param(lambda s: {"route": V2_INFER, "json": v2_body([base64_of(s)], [2])}, 400, "WrongShape", [], id="v2 shape"),
    pytest.param(
        lambda s: {"route": V2_INFER, "json": v2_body([0.5] * 783 + [1.5], [28, 28], "FP32")},
        400,
        "InvalidPixel",
        [0],
        id="v2 pixel",
    ),
    pytest.param(lambda s: {"route": V2_INFER, "json": {"inputs": []}}, 400, "InvalidRequest", [], id="v2 empty"),
    pytest.param(
        lambda s: {"route": V2_INFER, "json": v2_body([base64_of(s)], [1], outputs=[{"name": "x"}])},
        400,
        "InvalidRequest",
        [],
        id="v2 output",
    ),
    pytest.param(
        lambda s: {"route": V2_INFER, "data": json.dumps(v2_body([base64_of(s)], [1], id="\ud800")), "headers": JSON},
        400,
        "InvalidRequest",
        [],
        id="v2 id that cannot be sent back",
    ),
    pytest.param(
        lambda s: {"route": V2_INFER, "json": v2_body([base64_of(s)], [1], parameters={"x": 1})},
        400,
        "UnknownOption",
        [],
        id="v2 option",
    ),
]


@pytest.mark.parametrize(("make", "status", "kind", "indices"), BAD)
def test_bad_request_with_several_images_costs_its_neighbours_nothing(
    server: TorchServe,
    samples: list[Sample],
    batch_count: Callable[[], int],
    worker_pids: Callable[[], list[int]],
    make: Callable[[Sample], Arguments],
    status: int,
    kind: str,
    indices: list[int],
) -> None:
    """Send one bad request and seven good ones of all protocols at once until they share a batch; every round is right."""
    workers = worker_pids()
    pair = samples[4:6]
    instances = {"instances": [{"data": base64_of(sample)} for sample in pair]}
    texts = v2_body([base64_of(sample) for sample in pair], [2], id="7")
    good: list[tuple[Arguments, Callable[[requests.Response], object]]] = [
        (predict(data=samples[1].png), lambda reply: check_prediction(reply, samples[1])),
        (explain(data=samples[2].png), lambda reply: check_explanation(reply, samples[2])),
        (explain(data=npy(levels_of(samples[:3]))), lambda reply: check_list(reply, samples[:3], dict.fromkeys(range(3)))),
        (explain(data=npy(levels_of(pair)), headers=NPY | {"X-Saliency-Target": "3"}), lambda reply: check_array(reply, pair, 3)),
        ({"route": V1_PREDICT, "json": instances}, lambda reply: check_list(reply, pair)),
        ({"route": V1_EXPLAIN, "json": instances | {"target": 2}}, lambda reply: check_list(reply, pair, {0: 2, 1: 2})),
        ({"route": V2_EXPLAIN, "json": texts}, lambda reply: check_tensors(reply, pair, "7", explained=True)),
    ]
    for _ in range(10):
        batches_before = batch_count()
        bad_reply, *good_replies = ask_at_once(server, [make(samples[0]), *(arguments for arguments, _ in good)])
        check_bad_images(bad_reply, status, kind, indices)
        for reply, (_, check) in zip(good_replies, good, strict=True):
            check(reply)
        if batch_count() == batches_before + 1:
            break
    else:
        pytest.fail("the eight requests never shared one batch")
    assert worker_pids() == workers


# --- gRPC


def _declare_messages() -> tuple[type[message.Message], type[message.Message]]:
    """Declare request and reply of org.pytorch.serve.grpc.inference, with the fields used here."""
    text = descriptor_pb2.FieldDescriptorProto.TYPE_STRING
    raw = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    file = descriptor_pb2.FileDescriptorProto(name="inference.proto", package="org.pytorch.serve.grpc.inference", syntax="proto3")
    request = file.message_type.add(name="PredictionsRequest")
    request.field.add(name="model_name", number=1, type=text, label="LABEL_OPTIONAL")
    request.field.add(
        name="input",
        number=3,
        type="TYPE_MESSAGE",
        label="LABEL_REPEATED",
        type_name=".org.pytorch.serve.grpc.inference.PredictionsRequest.InputEntry",
    )
    entry = request.nested_type.add(name="InputEntry", options=descriptor_pb2.MessageOptions(map_entry=True))
    entry.field.add(name="key", number=1, type=text, label="LABEL_OPTIONAL")
    entry.field.add(name="value", number=2, type=raw, label="LABEL_OPTIONAL")
    file.message_type.add(name="PredictionResponse").field.add(name="prediction", number=1, type=raw, label="LABEL_OPTIONAL")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    declared = [pool.FindMessageTypeByName(f"{file.package}.{name}") for name in ("PredictionsRequest", "PredictionResponse")]
    request_class, reply_class = (message_factory.GetMessageClass(one) for one in declared)
    return request_class, reply_class


PredictionsRequest, PredictionResponse = _declare_messages()
Call = Callable[[dict[str, bytes]], dict[str, Any]]


@pytest.fixture(scope="module")
def call(server: TorchServe) -> Iterator[Call]:
    """Call Predictions with an input, and read the reply's JSON."""
    with grpc.insecure_channel(f"127.0.0.1:{server.settings.ports.grpc_inference}") as channel:
        predictions = channel.unary_unary(
            "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions",
            request_serializer=PredictionsRequest.SerializeToString,
            response_deserializer=PredictionResponse.FromString,
        )

        def called(fields: dict[str, bytes]) -> dict[str, Any]:
            reply = predictions(PredictionsRequest(model_name="digits", input=fields), timeout=TIMEOUT_S)
            content: dict[str, Any] = json.loads(reply.prediction)
            return content

        yield called


def test_grpc_predicts_and_explains(call: Call, samples: list[Sample]) -> None:
    for sample in samples[:3]:
        prediction = as_http(call({"data": sample.png}))
        assert "explanation" not in check_prediction(prediction, sample)
        check_explanation(as_http(call({"data": sample.png, "explain": b"true"})), sample)
        fields = {"image": sample.png, "explain": b"true", "target": b"3,8", "encoding": b"base64"}
        check_explanation(as_http(call(fields)), sample, [3, 8])


def test_grpc_takes_whatever_http_takes_as_a_body(call: Call, samples: list[Sample]) -> None:
    pair = samples[:2]
    check_list(as_http(call({"data": npy(levels_of(pair)), "explain": b"true"})), pair, {0: None, 1: None})
    instances = {"instances": [base64_of(sample) for sample in pair], "explain": True}
    check_list(as_http(call({"body": json.dumps(instances).encode()})), pair, {0: None, 1: None})
    check_tensors(as_http(call({"body": json.dumps(v2_body([base64_of(sample) for sample in pair], [2])).encode()})), pair)


@pytest.mark.parametrize(
    ("fields", "code", "kind"),
    [
        ({"data": b"no image"}, 400, "UnreadableImage"),
        ({"explain": b"true"}, 400, "EmptyRequest"),
        ({}, 400, "EmptyRequest"),
        ({"data": b"\x93NUMPY", "target": b"3"}, 400, "UnreadableArray"),
        ({"data": npy(np.zeros((28, 28))), "target": b"\xff"}, 400, "InvalidOption"),
        ({"data": npy(np.zeros((28, 28))), "colour": b"red"}, 400, "UnknownOption"),
        ({"data": npy(np.zeros((28, 28))), "describe": b"True"}, 400, "UnknownOption"),
        ({"data": npy(np.zeros((1025, 28, 28), "u1"))}, 413, "RequestTooLarge"),
    ],
    ids=["no image", "no image", "nothing", "damaged npy", "no text", "unknown option", "describe", "too many"],
)
def test_grpc_error_has_its_code_in_the_body(
    call: Call, samples: list[Sample], fields: dict[str, bytes], code: int, kind: str
) -> None:
    batch = [fields] + [{"data": sample.png, "explain": b"true"} for sample in samples[: BATCH_SIZE - 1]]
    with ThreadPoolExecutor(BATCH_SIZE) as pool:
        bad, *good = pool.map(call, batch)
    assert (bad["error"]["code"], bad["error"]["type"]) == (code, kind)
    for sample, content in zip(samples, good, strict=False):
        check_explanation(as_http(content), sample)


# --- the description


def describe(server: TorchServe) -> dict[str, Any]:
    reply = requests.get(f"{server.management_address}/models/digits?customized=true", timeout=TIMEOUT_S)
    assert reply.status_code == 200, reply.text
    (model,) = reply.json()
    description: dict[str, Any] = model["customizedMetadata"]
    return description


def test_management_api_describes_the_service(server: TorchServe, samples: list[Sample]) -> None:
    description = describe(server)
    model = ask(server, predict(data=samples[0].png)).json()["model"]
    assert description["model"] == model
    assert description["options"]["encoding"] == {
        "accepted": list(Encoding),
        "default": "nested",
        "header": "x-saliency-encoding",
        "description": OPTIONS["encoding"].description,
        "schema": {"enum": list(Encoding), "default": "nested"},
    }
    assert description["colormaps"].keys() == set(Colormap)
    assert description["class_names"] == [str(digit) for digit in range(10)]
    assert list(description["methods"]) == list(METHODS)
    assert description["limits"]["pictures_a_request"] == 1024
    assert description["versions"]["torchserve"] == version("torchserve")


# --- everything at once


def test_storm_by_all_protocols_gives_every_client_its_own_answer(
    server: TorchServe, samples: list[Sample], call: Call, batch_count: Callable[[], int], worker_pids: Callable[[], list[int]]
) -> None:
    random = np.random.default_rng(11)
    request_count = 400
    errors = [parameters.values for parameters in BAD]

    def http(arguments: Arguments, check: Callable[[requests.Response], object]) -> object:
        return check(ask(server, arguments))

    def grpc_call(fields: dict[str, bytes], check: Callable[[requests.Response], object]) -> object:
        return check(as_http(call(fields)))

    def described() -> None:
        assert describe(server)["model"]["name"] == "digits"

    def plan(number: int) -> Callable[[], object]:
        chosen = [samples[index] for index in random.integers(len(samples), size=random.integers(1, 5))]
        one, target = chosen[0], int(random.integers(10))
        instances = [{"data": base64_of(sample), "target": target} for sample in chosen]
        make, status, kind, indices = errors[random.integers(len(errors))]
        plans: list[Callable[[], object]] = [
            partial(http, predict(data=one.png, headers={"describe": "True"}), partial(check_prediction, sample=one)),
            partial(
                http, explain(data=npy(levels_of(chosen))), lambda r: check_list(r, chosen, dict.fromkeys(range(len(chosen))))
            ),
            partial(
                http,
                explain(data=npy(levels_of(chosen)), headers=NPY | {"X-Saliency-Target": str(target)}),
                lambda r: check_array(r, chosen, target),
            ),
            partial(http, {"route": V1_PREDICT, "json": {"instances": instances}}, lambda r: check_list(r, chosen)),
            partial(
                http,
                {"route": V1_EXPLAIN, "json": {"instances": instances}},
                lambda r: check_list(r, chosen, dict.fromkeys(range(len(chosen)), target)),
            ),
            partial(
                http,
                {"route": V2_EXPLAIN, "json": v2_body([base64_of(s) for s in chosen], [-1], id=str(number), target=target)},
                lambda r: check_tensors(r, chosen, str(number), target, explained=True),
            ),
            partial(
                http,
                {"route": V2_INFER, "json": v2_body(levels_of(chosen).ravel().tolist(), [len(chosen), 28, 28], "UINT8")},
                lambda r: check_tensors(r, chosen),
            ),
            partial(grpc_call, {"data": one.png, "explain": b"true"}, lambda r: check_explanation(r, one)),
            partial(http, make(one), lambda r: check_bad_images(r, status, kind, indices)),
            described,
        ]
        return plans[random.integers(len(plans))]

    planned = [plan(number) for number in range(request_count)]
    workers, batches_before = worker_pids(), batch_count()
    with ThreadPoolExecutor(4 * BATCH_SIZE) as pool:
        finished = [pool.submit(one) for one in planned]
        for one in finished:
            one.result()
    batches = batch_count() - batches_before
    assert batches < request_count / 2, f"{request_count} requests came in {batches} batches: too few shared one"
    assert worker_pids() == workers
