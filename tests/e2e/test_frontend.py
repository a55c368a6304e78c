"""What TorchServe's frontend does with odd requests and with replies, in a real server: no request costs another one anything.

The frontend trusts its workers. What it cannot read of a reply is an exception in the thread that keeps the worker: the batch
loses its answers, and the worker is started again, or never. So each request here goes beside good ones, which get right answers,
and the worker stays the same process. The server is configured as for KServe: with an envelope, and the Open Inference Protocol
by gRPC.
"""

import contextlib
import json
import random
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.client import HTTPResponse
from pathlib import Path
from threading import Barrier, Event
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
import requests
from numpy.typing import NDArray

from scripts.paths import SERVE_CONFIG
from scripts.serving.launcher import Ports, Settings, TorchServe
from tests.client import (
    BATCH_SIZE,
    TIMEOUT_S,
    V1_EXPLAIN,
    V1_PREDICT,
    V2_EXPLAIN,
    Arguments,
    Sample,
    ask,
    ask_at_once,
    base64_of,
    check_explanation,
    check_prediction,
    explain,
    predict,
)
from tests.grpc_messages import INFERENCE, MANAGEMENT, MESSAGES, OPEN_INFERENCE, asking, inferring
from tests.oracle import compute_probabilities
from tests.tolerance import require_close

T = TypeVar("T")

ROUNDS = 2  # of each request among its neighbours


@pytest.fixture(scope="module")
def frontend(archive: Path, device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """One worker, and a long wait for neighbours, so that what is sent at once shares a batch."""
    folder = tmp_path_factory.mktemp("frontend")
    configuration = folder / "config.properties"
    configuration.write_text((SERVE_CONFIG / "config.properties").read_text() + "\nservice_envelope=kserve\n")
    settings = Settings(
        archive=archive,
        ports=Ports.free(),
        device=device,
        log_dir=folder / "logs",
        configuration=configuration,
        model_config={
            **{"minWorkers": 1, "maxWorkers": 1, "batchSize": BATCH_SIZE, "maxBatchDelay": 60},
            "handler": {"torch_threads": 1, "log_batches": True},
        },
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TS_OPEN_INFERENCE_PROTOCOL", "oip")
        with TorchServe(settings) as running:
            yield running


def pids_of(server: TorchServe) -> list[int]:
    reply = requests.get(f"{server.management_address}/models/digits", timeout=TIMEOUT_S)
    return [worker["pid"] for worker in reply.json()[0]["workers"] if worker["status"] == "READY"]


def as_http(content: dict[str, Any]) -> requests.Response:
    """JSON in the form that the checks of replies take."""
    reply = requests.Response()
    reply.status_code, reply.headers["content-type"] = 200, "application/json"
    reply._content = json.dumps(content).encode()
    return reply


def check_instances(reply: requests.Response, samples: Sequence[Sample], *, explained: bool) -> None:
    """Check a reply of KServe v1."""
    assert reply.status_code == 200, reply.text
    predictions = reply.json()["predictions"]
    if not explained:
        for prediction, sample in zip(predictions, samples, strict=True):
            check_prediction(as_http(prediction), sample)
        return
    for prediction, explanation, sample in zip(predictions, reply.json()["explanations"], samples, strict=True):
        check_explanation(as_http(prediction | {"explanation": explanation}), sample)


def check_outputs(outputs: Sequence[Mapping[str, Any]], samples: Sequence[Sample], *, explained: bool = False) -> None:
    """Check the tensors of a reply of the Open Inference Protocol."""
    logits = np.stack([sample.logits for sample in samples])
    probabilities = compute_probabilities(logits)
    digits = logits.argmax(axis=1)
    expected: dict[str, tuple[str, NDArray[Any]]] = {
        "digit": ("INT64", digits),
        "probability": ("FP32", probabilities.max(axis=1)),
        "probabilities": ("FP32", probabilities),
        "logits": ("FP32", logits),
    }
    if explained:
        maps = np.stack([sample.jacobian[sample.predicted] for sample in samples])
        expected |= {"target": ("INT64", digits), "saliency": ("FP32", maps)}
    assert [output["name"] for output in outputs] == list(expected)
    for output in outputs:
        datatype, values = expected[output["name"]]
        assert (output["datatype"], output["shape"]) == (datatype, list(values.shape))
        require_close(np.reshape(output["data"], values.shape), values, row_axes=2 if output["name"] == "saliency" else 1)


@contextlib.contextmanager
def undisturbed(server: TorchServe, samples: Sequence[Sample]) -> Iterator[None]:
    """Check that the worker is the same process afterwards, and answers."""
    workers = pids_of(server)
    assert len(workers) == 1
    yield
    check_prediction(ask(server, predict(data=samples[0].png)), samples[0])
    assert pids_of(server) == workers


def beside(server: TorchServe, samples: Sequence[Sample], odd: Callable[[], T]) -> T:
    """Do something at the same time as neighbours ask, and check their answers and the worker. Returns what it gave."""
    instances = {"instances": [base64_of(sample) for sample in samples[:2]]}
    tensor = {"name": "input-0", "shape": [1], "datatype": "BYTES", "data": [base64_of(samples[3])]}
    good: list[tuple[Arguments, Callable[[requests.Response], object]]] = [
        (predict(data=samples[0].png), lambda reply: check_prediction(reply, samples[0])),
        (explain(data=samples[1].png), lambda reply: check_explanation(reply, samples[1])),
        (explain(files={"data": samples[2].png}), lambda reply: check_explanation(reply, samples[2])),
        ({"route": V1_EXPLAIN, "json": instances}, lambda reply: check_instances(reply, samples[:2], explained=True)),
        (
            {"route": V2_EXPLAIN, "json": {"inputs": [tensor]}},
            lambda reply: check_outputs(reply.json()["outputs"], [samples[3]], explained=True),
        ),
    ]
    barrier = Barrier(len(good) + 1)

    def wait_and_ask(arguments: Arguments) -> requests.Response:
        barrier.wait()
        return ask(server, arguments)

    def do() -> T:
        barrier.wait()
        return odd()

    with undisturbed(server, samples), ThreadPoolExecutor(len(good) + 1) as pool:
        given = pool.submit(do)
        replies = [pool.submit(wait_and_ask, arguments) for arguments, _ in good]
        for reply, (_, check) in zip(replies, good, strict=True):
            check(reply.result())
        return given.result()


# --- gRPC


@dataclass(frozen=True)
class Calls:
    """TorchServe's gRPC calls. A request is a message, or the bytes of one."""

    predictions: Any
    stream: Any
    stream2: Any
    infer: Any
    describe: Any


@pytest.fixture(scope="module")
def calls(frontend: TorchServe) -> Iterator[Calls]:
    ports = frontend.settings.ports

    def write(message: Any) -> bytes:
        content: bytes = message if isinstance(message, bytes) else message.SerializeToString()
        return content

    with (
        grpc.insecure_channel(f"127.0.0.1:{ports.grpc_inference}") as inference,
        grpc.insecure_channel(f"127.0.0.1:{ports.grpc_management}") as management,
    ):
        read = MESSAGES["PredictionResponse"].FromString
        yield Calls(
            inference.unary_unary(f"{INFERENCE}/Predictions", write, read),
            inference.unary_stream(f"{INFERENCE}/StreamPredictions", write, read),
            inference.stream_stream(f"{INFERENCE}/StreamPredictions2", write, read),
            inference.unary_unary(f"{OPEN_INFERENCE}/ModelInfer", write, MESSAGES["ModelInferResponse"].FromString),
            management.unary_unary(f"{MANAGEMENT}/DescribeModel", write, MESSAGES["ManagementResponse"].FromString),
        )


def raw_request(key: bytes, value: bytes) -> bytes:
    """A PredictionsRequest with one field, whose name may be any bytes."""

    def field(number: int, content: bytes) -> bytes:
        length = len(content)
        return bytes([number << 3 | 2, length & 127 | 128, length >> 7]) + content

    return field(1, b"digits") + field(3, field(1, key) + field(2, value))


def pixels_of(samples: Sequence[Sample]) -> NDArray[np.uint8]:
    """All pixels of several images, one after the other."""
    return np.concatenate([sample.levels.ravel() for sample in samples])


def check_infer_reply(reply: Any, samples: list[Sample], request_id: str = "7") -> None:
    """Check a ModelInferResponse."""
    assert (reply.model_name, reply.model_version, reply.id) == ("digits", "1.0", request_id)
    outputs = []
    for output in reply.outputs:
        data = output.contents.int64_contents if output.datatype == "INT64" else output.contents.fp32_contents
        outputs.append({"name": output.name, "datatype": output.datatype, "shape": list(output.shape), "data": list(data)})
    check_outputs(outputs, samples)


def stream_of(calls: Calls, fields: Mapping[str, bytes]) -> list[Any]:
    """The replies of StreamPredictions."""
    return list(calls.stream(asking(fields), timeout=TIMEOUT_S))


def test_stream_gives_one_answer_and_ends(frontend: TorchServe, calls: Calls, samples: list[Sample]) -> None:
    for _ in range(ROUNDS):
        for sample in samples[:3]:
            fields = {"data": sample.png, "explain": b"true"}
            (reply,) = beside(frontend, samples, partial(stream_of, calls, fields))
            check_explanation(as_http(json.loads(reply.prediction)), sample)


@pytest.mark.parametrize("fields", [{"data": b"no image"}, {}], ids=["no image", "no input"])
def test_stream_ends_with_an_error_too(
    frontend: TorchServe, calls: Calls, samples: list[Sample], fields: dict[str, bytes]
) -> None:
    (reply,) = beside(frontend, samples, partial(stream_of, calls, fields))
    assert json.loads(reply.prediction)["error"]["code"] == 400


@pytest.mark.parametrize(
    ("make", "request_id"),
    [
        (lambda s, i: inferring("BYTES", [len(s)], request_id=i, bytes_contents=[one.png for one in s]), "7"),
        (lambda s, i: inferring("BYTES", [-1], request_id=i, bytes_contents=[one.png for one in s]), ""),
        (
            lambda s, i: inferring("UINT8", [len(s), 28, 28], request_id=i, uint_contents=pixels_of(s).tolist()),
            "\u20ac",
        ),
        (
            lambda s, i: inferring("FP32", [len(s), 1, 28, 28], "", i, fp32_contents=(pixels_of(s) / 255).tolist()),
            "x" * 1000,
        ),
    ],
    ids=["image files", "without an id", "integers", "floats"],
)
def test_model_infer_answers(
    frontend: TorchServe,
    calls: Calls,
    samples: list[Sample],
    make: Callable[[list[Sample], str], Any],
    request_id: str,
) -> None:
    """As KServe's clients send it, with the environment variable that makes TorchServe take it."""
    for chosen in (samples[:1], samples[2:5]):
        reply = beside(frontend, samples, partial(calls.infer, make(chosen, request_id), timeout=TIMEOUT_S))
        check_infer_reply(reply, chosen, request_id)


PIXELS = [0.0] * 783 + [1.0]
MODEL_INFER_ERRORS: list[Any] = [
    pytest.param(inferring("BYTES", [1], bytes_contents=[b"no image"]), 400, "UnreadableImage", id="no image"),
    pytest.param(inferring("FP32", [28, 28], fp32_contents=[*PIXELS[:783], 1.5]), 400, "InvalidPixel", id="pixel"),
    pytest.param(inferring("UINT8", [1, 28, 28], uint_contents=[2**32 - 1] * 784), 400, "InvalidPixel", id="negative in Java"),
    pytest.param(inferring("FP32", [1, 28, 28]), 400, "WrongShape", id="raw contents, which the frontend drops"),
    pytest.param(inferring("FP16", [1, 28, 28]), 400, "InvalidRequest", id="a datatype whose data the frontend drops"),
    pytest.param(inferring("\u20ac", [1]), 400, "InvalidRequest", id="unknown datatype"),
    pytest.param(inferring("BOOL", [1, 28, 28], bool_contents=[True] * 784), 400, "InvalidRequest", id="booleans"),
    pytest.param(MESSAGES["ModelInferRequest"](model_name="digits"), 400, "InvalidRequest", id="no input"),
    pytest.param(inferring("BYTES", [1], request_id="x" * 1001, bytes_contents=[b"a"]), 400, "InvalidRequest", id="long id"),
    pytest.param(inferring("UINT8", [1025, 28, 28], uint_contents=[7] * 1025 * 784), 413, "RequestTooLarge", id="too many"),
]


@pytest.mark.parametrize(("request_message", "code", "kind"), MODEL_INFER_ERRORS)
def test_model_infer_error_is_a_tensor(
    frontend: TorchServe, calls: Calls, samples: list[Sample], request_message: Any, code: int, kind: str
) -> None:
    """The frontend reads nothing but tensors, and can give one request of a batch no status of its own."""
    reply = beside(frontend, samples, partial(calls.infer, request_message, timeout=TIMEOUT_S))
    assert (reply.model_name, reply.model_version) == ("digits", "1.0")
    (output,) = reply.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("error", "BYTES", [1])
    (error,) = map(json.loads, output.contents.bytes_contents)
    details = error["error"] if isinstance(error["error"], dict) else error  # a text on the routes of the protocol
    assert (details["code"], details["type"]) == (code, kind)


def statuses(call: Callable[[], object]) -> list[grpc.StatusCode]:
    """The status of a call that fails; none of one that gives an answer."""
    try:
        call()
    except grpc.RpcError as error:
        return [error.code()]
    return []


MANY_FIELDS = asking({str(number): b"" for number in range(5000)})
ODD_CALLS: list[Any] = [
    pytest.param(raw_request(b"\xff\xfe", b"1"), id="a field's name is not UTF-8"),
    pytest.param(raw_request(b"\xed\xa0\x80", b"1"), id="a field's name is half a character"),
    pytest.param(raw_request(b"", b""), id="a field without name and value"),
    pytest.param(raw_request(b"\x00\r\n", b"1"), id="a field's name has control characters"),
    pytest.param(b"\xff" * 20, id="no message"),
    pytest.param(asking({}), id="nothing"),
    pytest.param(
        asking(dict.fromkeys(("explain", "describe", "content-length", "ts_request_sequence_id", "x-sent-twice"), b"True")),
        id="fields named as headers",
    ),
    pytest.param(asking({"describe": b"True"}), id="a field named describe"),
    pytest.param(MANY_FIELDS, id="5,000 fields"),
    pytest.param(asking({"data": b"1"}, model_name="other"), id="another model"),
    pytest.param(asking({"data": b"1"}, model_version="9"), id="another version"),
    pytest.param(asking({"data": b"1"}, model_name=""), id="no model"),
]


@pytest.mark.parametrize("request_message", ODD_CALLS)
def test_odd_call_costs_its_neighbours_nothing(
    frontend: TorchServe, calls: Calls, samples: list[Sample], request_message: Any
) -> None:
    code = 413 if request_message is MANY_FIELDS else 400
    metadata = [("x-bin", b"\xff\x00"), ("explain", "True"), ("content-length", "3"), ("describe", "True")]

    def call() -> None:
        with contextlib.suppress(grpc.RpcError):
            reply = calls.predictions(request_message, timeout=TIMEOUT_S, metadata=metadata)
            assert json.loads(reply.prediction)["error"]["code"] == code
        with contextlib.suppress(grpc.RpcError):
            (reply,) = calls.stream(request_message, timeout=TIMEOUT_S, metadata=metadata)
            assert json.loads(reply.prediction)["error"]["code"] == code

    beside(frontend, samples, call)


@pytest.mark.parametrize("fields", [{"sequence_id": "a"}, {}], ids=["a sequence", "no sequence"])
@pytest.mark.parametrize("kept_open", [False, True], ids=["ended at once", "kept open"])
def test_stream_of_requests_costs_its_neighbours_nothing(
    frontend: TorchServe, calls: Calls, samples: list[Sample], fields: dict[str, str], kept_open: bool
) -> None:
    """StreamPredictions2 is for models with sequences. The frontend fails on an answer here, and that worker is lost for good."""

    def call() -> list[Any]:
        ended = Event()

        def ask() -> Iterator[Any]:
            for sample in samples[:3]:
                yield asking({"data": sample.png}, **fields)
            if kept_open:
                ended.wait(1)

        try:
            return list(calls.stream2(ask(), timeout=TIMEOUT_S))
        except grpc.RpcError:
            return []
        finally:
            ended.set()

    for _ in range(ROUNDS):
        assert all(not reply.prediction for reply in beside(frontend, samples, call))


def test_description_by_grpc_costs_nobody_anything(frontend: TorchServe, calls: Calls, samples: list[Sample]) -> None:
    """A client that gives up on it would cost the server the worker, for good: there is no answer, and by HTTP there is."""
    request = MESSAGES["DescribeModelRequest"](model_name="digits", customized=True)
    for timeout_s in (0.001, 0.02, 0.06, 1):
        given = beside(frontend, samples, partial(statuses, partial(calls.describe, request, timeout=timeout_s)))
        assert given in ([grpc.StatusCode.DEADLINE_EXCEEDED], [grpc.StatusCode.CANCELLED])  # who is first to say so
    reply = requests.get(f"{frontend.management_address}/models/digits?customized=true", timeout=TIMEOUT_S)
    assert reply.json()[0]["customizedMetadata"]["model"]["name"] == "digits"
    plain = calls.describe(MESSAGES["DescribeModelRequest"](model_name="digits"), timeout=TIMEOUT_S)
    assert json.loads(plain.msg)[0]["modelName"] == "digits"


def test_clients_of_grpc_that_give_up_cost_the_others_nothing(frontend: TorchServe, calls: Calls, samples: list[Sample]) -> None:
    """Each opens a batch and gives up long before its end: in the very moment of an answer the frontend itself fails."""
    every: list[Callable[[float], object]] = [
        lambda timeout: calls.predictions(asking({"data": samples[0].png}), timeout=timeout),
        lambda timeout: list(calls.stream(asking({"data": samples[0].png, "explain": b"true"}), timeout=timeout)),
        lambda timeout: calls.infer(inferring("BYTES", [1], bytes_contents=[samples[0].png]), timeout=timeout),
    ]
    with undisturbed(frontend, samples):
        for timeout_s in (0.001, 0.002, 0.005, 0.01):
            for call in every:
                (status,) = statuses(partial(call, timeout_s))
                assert status in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)  # who is first to say so
                check_prediction(ask(frontend, predict(data=samples[1].png)), samples[1])  # in that batch


# --- HTTP


def http(
    headers: bytes = b"", body: bytes = b"", path: bytes = b"/predictions/digits", method: bytes = b"POST", length: bool = True
) -> bytes:
    """A request, byte for byte."""
    own = b"Content-Length: %d\r\n" % len(body) if length else b""
    return method + b" " + path + b" HTTP/1.1\r\n" + own + headers + b"\r\n" + body


def form(*parts: tuple[bytes, bytes], kind: bytes = b"multipart/form-data; boundary=B") -> bytes:
    """A form: headers and content of each part."""
    body = b"".join(b"--B\r\n" + headers + b"\r\n\r\n" + content + b"\r\n" for headers, content in parts) + b"--B--\r\n"
    return http(b"Content-Type: " + kind + b"\r\n", body)


def field(name: bytes) -> bytes:
    return b'Content-Disposition: form-data; name="' + name + b'"'


FILE = field(b"data") + b'; filename="a.png"'
CHUNKED = b"Transfer-Encoding: chunked\r\n"
ODD_REQUESTS: list[Any] = [  # made of an image; what statuses they may get
    pytest.param(lambda png: http(b"X-Saliency-Target: \xff\xfe\r\n", png), {400}, id="a header's value is not UTF-8"),
    pytest.param(lambda png: http("X-Any: \u20ac\r\n".encode(), png), {200}, id="a header's value outside ASCII"),
    pytest.param(lambda png: http(b"X-Any: a\x00b\r\n", png), {400}, id="a header's value has a zero"),
    pytest.param(lambda png: http(b"X-\xff: 1\r\n", png), {400}, id="a header's name is not UTF-8"),
    pytest.param(lambda png: http(b": 1\r\n", png), {400}, id="a header without a name"),
    pytest.param(lambda png: http(b"X-Any: a\r\n b\r\n", png), {200}, id="a header of two lines"),
    pytest.param(lambda png: http(b"Content-Type: \xff\xe2\r\n", png), {200}, id="a type that is not UTF-8"),
    pytest.param(lambda png: http(b"Content-Type: application/json; charset=\xff\r\n", b'{"a": "\xff"}'), {400}, id="bad JSON"),
    pytest.param(lambda png: http(b"Accept: \xff\r\n", png), {200, 406}, id="an Accept that is not UTF-8"),
    pytest.param(lambda png: http(b"X-Correlation-Id: \xff\r\n", png), {200}, id="an id that is not UTF-8"),
    pytest.param(lambda png: http(b"ts_stream_next: true\r\n", png), {200}, id="the header of a stream's reply"),
    pytest.param(lambda png: http(b"ts_request_sequence_id: a\r\n", png), {200}, id="the header of a sequence"),
    pytest.param(lambda png: http(b"describe: True\r\n", png), {200}, id="the header of a description"),
    pytest.param(lambda png: http(b"X-Any: " + b"a" * 7000 + b"\r\n", png), {200}, id="a large header"),
    pytest.param(lambda png: http(b"X-Any: " + b"a" * 20_000 + b"\r\n", png), {400}, id="too large a header"),
    pytest.param(lambda png: http(b"".join(b"X-%d: \r\n" % number for number in range(600)), png), {200}, id="600 headers"),
    pytest.param(lambda png: http(b"Content-Length: 1\r\n", png), {400}, id="two lengths"),
    pytest.param(lambda png: http(CHUNKED, png), {400}, id="a length and chunks"),
    pytest.param(lambda png: http(CHUNKED, b"%x\r\n%b\r\n0\r\n\r\n" % (len(png), png), length=False), {200}, id="chunks"),
    pytest.param(
        lambda png: http(CHUNKED, b"%x\r\n%b\r\n0\r\nX-Saliency-Target: \xff\r\n\r\n" % (len(png), png), length=False),
        {200},
        id="headers behind the body",
    ),
    pytest.param(lambda png: http(CHUNKED, b"zz\r\n", length=False), {400}, id="a chunk without a size"),
    pytest.param(lambda png: http(b"Expect: 100-continue\r\n", png), {200}, id="Expect"),
    pytest.param(lambda png: http(b"Expect: anything\r\n", png), {417}, id="another Expect"),
    pytest.param(lambda png: http(b"Connection: Upgrade\r\nUpgrade: websocket\r\n", png), {200}, id="Upgrade"),
    pytest.param(lambda png: b"POST /predictions/digits HTTP/1.0\r\n\r\n", {400}, id="HTTP/1.0 without a header"),
    pytest.param(lambda png: b"POST /invocations HTTP/1.1\r\n\r\n", {400}, id="no header on a route that adds none"),
    pytest.param(
        lambda png: http(CHUNKED, b"%x\r\n%b\r\n0\r\n\r\n" % (len(png), png), b"/invocations", length=False),
        {200},
        id="chunks on a route that adds no header",
    ),
    pytest.param(lambda png: http(b"describe: True\r\n", path=b"/invocations"), {400}, id="a description that is none"),
    pytest.param(lambda png: http(path=b"/invocations?%ff=%ff&=1", body=png), {400}, id="a query that is not UTF-8"),
    pytest.param(lambda png: http(path=b"/predictions/digits/1.0/%ff/\xff", body=png), {200}, id="a path that is not UTF-8"),
    pytest.param(lambda png: http(method=b"ANY", body=png), {200}, id="another method"),
    pytest.param(lambda png: http(method=b"HEAD", body=png), {200}, id="HEAD"),
    pytest.param(lambda png: http(method=b"OPTIONS", body=png), {200}, id="OPTIONS"),
    pytest.param(lambda png: form((FILE, png), (field(b"\xff\xfe"), b"1")), {400}, id="a field's name is not UTF-8"),
    pytest.param(lambda png: form((FILE, png), (field(b"\xed\xa0\x80"), b"1")), {400}, id="a field's name is half a character"),
    pytest.param(lambda png: form((FILE, png), (field("\u20ac".encode()), b"1")), {400}, id="a field's name outside ASCII"),
    pytest.param(lambda png: form((FILE, png), (field(b"a\x00"), b"1")), {400}, id="a field's name has a zero"),
    pytest.param(
        lambda png: form((FILE, png), (field(b""), b"1")), {500}, id="a field without a name, which the frontend refuses"
    ),
    pytest.param(lambda png: form((FILE + b"\r\nContent-Type: \xff", png)), {200}, id="a field's type is not UTF-8"),
    pytest.param(lambda png: form((FILE + b"\r\nContent-Type: application/json", b"{")), {400}, id="a field of bad JSON"),
    pytest.param(lambda png: form((FILE, b"")), {400}, id="an empty field"),
    pytest.param(lambda png: form(), {400}, id="a form without a field"),
    pytest.param(
        lambda png: form((FILE, png), *((field(name), b"1") for name in (b"describe", b"content-length", b"x-sent-twice"))),
        {400},
        id="fields named as headers",
    ),
    pytest.param(lambda png: form((FILE, png), kind=b"multipart/form-data"), {400}, id="a form without a boundary"),
    pytest.param(
        lambda png: http(b"Content-Type: application/x-www-form-urlencoded\r\n", b"%ff=%ff&%ed%a0%80=1"), {400}, id="curl -d"
    ),
]


def send(server: TorchServe, content: bytes) -> int:
    """Send bytes. Returns the status of the reply."""
    with socket.create_connection(("127.0.0.1", server.settings.ports.inference), timeout=TIMEOUT_S) as connection:
        connection.sendall(content)
        reply = HTTPResponse(connection)
        reply.begin()
        return reply.status


@pytest.mark.parametrize(("make", "accepted"), ODD_REQUESTS)
def test_odd_request_costs_its_neighbours_nothing(
    frontend: TorchServe, samples: list[Sample], make: Callable[[bytes], bytes], accepted: set[int]
) -> None:
    assert beside(frontend, samples, lambda: send(frontend, make(samples[0].png))) in accepted


def test_clients_that_hang_up_cost_the_others_nothing(frontend: TorchServe, samples: list[Sample]) -> None:
    """Before, while and after their batch is computed."""
    random_s = random.Random(0)

    def hang_up() -> None:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", frontend.settings.ports.inference)) as connection:
                connection.sendall(http(body=samples[0].png, path=b"/explanations/digits"))
                connection.settimeout(random_s.uniform(0.001, 0.1))
                with contextlib.suppress(TimeoutError):
                    connection.recv(1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close it by a reset

    beside(frontend, samples, hang_up)


def test_requests_that_do_not_wait_for_replies_get_theirs(frontend: TorchServe, samples: list[Sample]) -> None:
    """Several at once on one connection, in batches with others."""

    def ask() -> int:
        with socket.create_connection(("127.0.0.1", frontend.settings.ports.inference), timeout=TIMEOUT_S) as connection:
            connection.sendall(http(body=samples[0].png) * 6)
            content = b""
            while content.count(b"HTTP/1.1 200 OK") < 6 or not content.endswith(b"}"):
                content += connection.recv(65_536)
        return content.count(b'"digit":%d' % samples[0].predicted)

    assert beside(frontend, samples, ask) == 6


# --- sent twice


TWICE: list[Any] = [
    pytest.param(lambda png: form((FILE, png), (FILE, png)), "data", id="an image"),
    pytest.param(lambda png: form((field(b"target"), b"3"), (FILE, png), (field(b"target"), b"4")), "target", id="a field"),
    pytest.param(lambda png: form((FILE, png), (field(b"target"), b"3"), (field(b"target"), b"3")), "target", id="alike"),
    pytest.param(lambda png: http(b"X-Saliency-Target: 3\r\nx-saliency-target: 4\r\n", png), "x-saliency-target", id="a header"),
    pytest.param(
        lambda png: http(b"X-Saliency-Target: 3\r\nx-saliency-target: 4\r\n", png + bytes(1_000_000)),
        "x-saliency-target",
        id="a header with a large image",
    ),
    pytest.param(lambda png: form((FILE, png + bytes(1_000_000)), (FILE, png)), "data", id="a large image"),
    pytest.param(lambda png: http(path=b"/invocations?target=3&target=4", body=png), "target", id="a query's parameter"),
]


@pytest.mark.parametrize(("make", "name"), TWICE)
def test_what_is_sent_twice_is_refused(
    frontend: TorchServe, samples: list[Sample], make: Callable[[bytes], bytes], name: str
) -> None:
    """Of two headers that are spelled alike, TorchServe keeps the last before any worker sees them: those cannot be refused."""

    def ask() -> dict[str, Any]:
        with socket.create_connection(("127.0.0.1", frontend.settings.ports.inference), timeout=TIMEOUT_S) as connection:
            connection.sendall(make(samples[0].png))
            reply = HTTPResponse(connection)
            reply.begin()
            error: dict[str, Any] = json.loads(reply.read())["error"]
        return error

    error = beside(frontend, samples, ask)
    assert (error["code"], error["type"]) == (400, "InvalidRequest")
    assert name in error["message"]
    assert "twice" in error["message"]


def test_form_of_each_field_once_is_answered(frontend: TorchServe, samples: list[Sample]) -> None:
    fields = {"target": "3", "encoding": "base64"}
    arguments = explain(files={"data": samples[0].png}, data=fields, headers={"X-Saliency-Method": "gradient"})
    reply = ask(frontend, arguments)
    check_explanation(reply, samples[0], 3)


# --- what the server was started with


def test_envelope_is_passed_through(frontend: TorchServe, samples: list[Sample]) -> None:
    """TorchServe's own envelopes read the first request of a batch alone, and all of it got a 503."""
    log = (frontend.settings.log_dir / "model_log.log").read_text()
    assert log.count("service_envelope: KServeEnvelope passes everything through") == 1
    asked: list[Arguments] = [
        {"route": V1_PREDICT, "json": {"instances": [base64_of(sample)]}} for sample in samples[:BATCH_SIZE]
    ]
    with undisturbed(frontend, samples):
        for reply, sample in zip(ask_at_once(frontend, asked), samples, strict=False):
            check_instances(reply, [sample], explained=False)
