"""A client of the served model: requests, and checks of their replies.

Replies are compared with an independent computation from the archive's weights (tests/oracle.py).
"""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import requests
from numpy.typing import NDArray
from PIL import Image

from scripts.serving.launcher import TorchServe
from tests.hostile import png_header
from tests.oracle import compute_probabilities
from tests.tolerance import require_close

BATCH_SIZE = 8
TIMEOUT_S = 30
JSON = {"Content-Type": "application/json"}
V1_PREDICT = "/v1/models/digits:predict"
V1_EXPLAIN = "/v1/models/digits:explain"
V2_INFER = "/v2/models/digits/infer"
V2_EXPLAIN = "/v2/models/digits/explain"

Arguments = dict[str, Any]  # of requests.request


@dataclass(frozen=True)
class Sample:
    """A digit as a client has it, with the answers of an independent computation."""

    digit: int
    levels: NDArray[np.uint8]  # (28, 28)
    logits: NDArray[np.float64]  # (10,)
    jacobian: NDArray[np.float64]  # (10, 28, 28)

    @property
    def png(self) -> bytes:
        content = BytesIO()
        Image.fromarray(self.levels).save(content, format="PNG")
        return content.getvalue()

    @property
    def predicted(self) -> int:
        return int(self.logits.argmax())


# --- requests


def ask(server: TorchServe, arguments: Arguments) -> requests.Response:
    arguments = {"method": "POST", "timeout": TIMEOUT_S, **arguments}
    return requests.request(url=server.address + arguments.pop("route"), **arguments)


def predict(**arguments: Any) -> Arguments:
    return {"route": "/predictions/digits"} | arguments


def explain(**arguments: Any) -> Arguments:
    return {"route": "/explanations/digits"} | arguments


def base64_of(sample: Sample) -> str:
    return base64.b64encode(sample.png).decode()


def ask_at_once(server: TorchServe, batch: list[Arguments]) -> list[requests.Response]:
    barrier = Barrier(len(batch))

    def wait_and_ask(arguments: Arguments) -> requests.Response:
        barrier.wait()
        return ask(server, arguments)

    with ThreadPoolExecutor(len(batch)) as pool:
        return list(pool.map(wait_and_ask, batch))


def npy(array: NDArray[Any]) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


# --- replies


def check_prediction(reply: requests.Response, sample: Sample) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/json"
    content: dict[str, Any] = reply.json()
    require_close(content["logits"], sample.logits)
    require_close(content["probabilities"], compute_probabilities(sample.logits))
    assert content["digit"] == sample.predicted
    assert content["probability"] == content["probabilities"][sample.predicted]
    return content


def check_explanation(reply: requests.Response, sample: Sample, target: int | list[int] | None = None) -> None:
    explanation = check_prediction(reply, sample)["explanation"]
    expected_target = sample.predicted if target is None else target
    expected = sample.jacobian[expected_target]
    assert explanation["target"] == expected_target
    assert explanation["target_source"] == ("predicted" if target is None else "request")
    assert explanation["shape"] == list(expected.shape)
    saliency = explanation["saliency"]
    if explanation["encoding"] == "base64":
        saliency = np.frombuffer(base64.b64decode(saliency), dtype="<f4").reshape(explanation["shape"])
    require_close(saliency, expected, row_axes=2)


def error_of(reply: requests.Response) -> dict[str, Any]:
    """Code, type, message and indices of an error; on the routes of the Open Inference Protocol `error` is the message."""
    content: dict[str, Any] = reply.json()
    if reply.request.path_url.startswith("/v2/") and isinstance(content["error"], str):
        return {**content, "message": content["error"]}
    error: dict[str, Any] = content["error"]
    return error


def check_error(reply: requests.Response, status: int, kind: str) -> None:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    content = reply.json()
    assert content.keys() == {"error"}
    assert content["error"].keys() == {"code", "type", "message"}
    assert (content["error"]["code"], content["error"]["type"]) == (status, kind)
    assert content["error"]["message"].startswith("expected ")


# --- mistakes


def grid(value: object) -> list[list[object]]:
    rows: list[list[object]] = [[0.5] * 28 for _ in range(28)]
    rows[0][0] = value
    return rows


ERRORS = [
    pytest.param(lambda s: explain(data=b"no image"), 400, "UnreadableImage", id="not an image"),
    pytest.param(lambda s: explain(data=s.png[:-60]), 400, "UnreadableImage", id="truncated image"),
    pytest.param(lambda s: explain(files={"data": b"no image"}), 400, "UnreadableImage", id="form, not an image"),
    pytest.param(lambda s: explain(data=b""), 400, "EmptyRequest", id="empty body"),
    pytest.param(lambda s: predict(method="GET"), 400, "EmptyRequest", id="GET"),
    pytest.param(lambda s: explain(json={}), 400, "EmptyRequest", id="no image"),
    pytest.param(
        lambda s: explain(data=json.dumps({"data": base64_of(s)}), headers={"Content-Type": "application/x-www-form-urlencoded"}),
        400,
        "EmptyRequest",
        id="curl -d",
    ),
    pytest.param(lambda s: explain(data="{'data': 1}", headers=JSON), 400, "MalformedJSON", id="malformed JSON"),
    pytest.param(lambda s: explain(data="[" * 100_000, headers=JSON), 400, "MalformedJSON", id="deep JSON"),
    pytest.param(lambda s: explain(json=[1]), 400, "InvalidRequest", id="JSON list"),
    pytest.param(lambda s: explain(json={"data": "@@@"}), 400, "MalformedBase64", id="malformed base64"),
    pytest.param(lambda s: explain(json={"data": [[0.5] * 784]}), 400, "WrongShape", id="wrong shape"),
    pytest.param(lambda s: explain(json={"data": grid(1.5)}), 400, "InvalidPixel", id="out of range"),
    pytest.param(lambda s: explain(json={"data": grid(-1)}), 400, "InvalidPixel", id="negative"),
    pytest.param(lambda s: explain(data=json.dumps({"data": grid(np.nan)}), headers=JSON), 400, "InvalidPixel", id="NaN"),
    pytest.param(lambda s: explain(data=json.dumps({"data": grid(np.inf)}), headers=JSON), 400, "InvalidPixel", id="infinity"),
    pytest.param(lambda s: explain(json={"data": grid("1")}), 400, "InvalidPixel", id="text among numbers"),
    pytest.param(lambda s: explain(data=png_header(65_000, 65_000)), 413, "ImageTooLarge", id="bomb"),
    *(
        pytest.param(lambda s, t=t: explain(json={"data": base64_of(s), "target": t}), 400, "InvalidOption", id=f"target {t}")
        for t in (-1, 10, True, 3.5, "seven", [], [3, 10])
    ),
    pytest.param(lambda s: explain(data=s.png, headers={"X-Saliency-Target": "-1"}), 400, "InvalidOption", id="header target -1"),
    pytest.param(lambda s: explain(files={"data": s.png}, data={"target": "10"}), 400, "InvalidOption", id="form target 10"),
    pytest.param(lambda s: predict(files={"data": s.png}, data={"target": "10"}), 400, "InvalidOption", id="unused target 10"),
    pytest.param(lambda s: explain(json={"data": base64_of(s), "method": "magic"}), 400, "InvalidOption", id="unknown method"),
    pytest.param(lambda s: explain(json={"data": base64_of(s), "colour": 1}), 400, "UnknownOption", id="unknown field"),
    pytest.param(lambda s: explain(data=s.png, headers={"X-Saliency-Colour": "1"}), 400, "UnknownOption", id="unknown header"),
    pytest.param(
        lambda s: explain(data=json.dumps({"data": base64_of(s), "\ud800": 1}), headers=JSON),
        400,
        "UnknownOption",
        id="lone surrogate",
    ),
    pytest.param(lambda s: explain(data=s.png, headers={"Accept": "text/csv"}), 406, "NotAcceptable", id="unknown Accept"),
    pytest.param(lambda s: predict(data=s.png, headers={"Accept": "application/x-npy"}), 406, "NotAcceptable", id="npy, no map"),
]
