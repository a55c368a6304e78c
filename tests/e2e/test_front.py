"""The known attacks on TorchServe's frontend, through the port that others reach: nothing hidden is answered, nobody waits."""

import base64
import contextlib
import hashlib
import itertools
import json
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import requests

from scripts.paths import HARDENED_CONFIGURATION, SAMPLE_FILES
from scripts.serving.credentials import authorization, read_token
from scripts.serving.hardened import Hardening
from scripts.serving.launcher import Ports, Settings, TorchServe
from tests.client import TIMEOUT_S, Sample
from tests.grpc_messages import INFERENCE, MANAGEMENT, MESSAGES, OPEN_INFERENCE, asking, inferring
from tests.tls import make_certificate
from tests.tolerance import require_close

PNG = SAMPLE_FILES[0].read_bytes()
PREDICT = "/predictions/digits"
LATE_S = 10  # of another client's answer, beside an attack, on a busy machine


@dataclass(frozen=True)
class Reached:
    """A hardened server, with its token."""

    server: TorchServe
    certificate: Path
    token: str

    @property
    def port(self) -> int:
        return self.server.settings.ports.inference

    def send(self, content: bytes, wait_s: float = 2) -> bytes:
        """Send bytes as they are, and read until the connection ends or nothing has come for a while."""
        context = ssl.create_default_context(cafile=self.certificate)
        reply = b""
        with (
            socket.create_connection(("127.0.0.1", self.port), TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
            contextlib.suppress(OSError),
        ):
            connection.sendall(content)
            connection.settimeout(wait_s)
            while chunk := connection.recv(65536):
                reply += chunk
        return reply

    def ask(self, data: bytes = PNG, method: str = "POST", **headers: str) -> requests.Response:
        url = f"https://localhost:{self.port}{PREDICT}"
        sent = authorization(self.token) | {name.replace("_", "-"): value for name, value in headers.items()}
        return requests.request(method, url, data=data, headers=sent, verify=str(self.certificate), timeout=TIMEOUT_S)

    def jvm(self) -> psutil.Process:
        return next(process for process in self.server.processes() if "org.pytorch.serve.ModelServer" in process.cmdline())


@pytest.fixture(scope="module")
def reached(archive: Path) -> Iterator[Reached]:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        certificate, private_key = make_certificate(folder, "DNS:localhost", "rsa")
        hardening = Hardening(certificate, private_key, key_dir=folder / "keys", allow_privileged_user=True)
        settings = Settings(
            archive=archive,
            ports=Ports.free(),
            device="cpu",
            log_dir=folder / "logs",
            model_config={"minWorkers": 1, "maxWorkers": 1},
            configuration=HARDENED_CONFIGURATION,
            archive_sha256=checksum_of(archive),
            hardening=hardening,
            requests_per_second=0,  # all clients here have one address; tests/scripts/test_proxy.py has several
        )
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TS_OPEN_INFERENCE_PROTOCOL", "oip")  # without it there is no ModelInfer
            with TorchServe(settings) as server:
                yield Reached(server, certificate, read_token(hardening.key_file))


def checksum_of(archive: Path) -> str:
    return hashlib.sha256(archive.read_bytes()).hexdigest()


@contextlib.contextmanager
def good_clients(reached: Reached, samples: list[Sample]) -> Iterator[list[float]]:
    """Ask for known images all the while, each answer of which must be right. Gives the seconds that the answers took."""
    ended, took, wrong = threading.Event(), [], []

    def ask() -> None:
        for sample in itertools.cycle(samples):
            if ended.is_set():
                return
            started = time.monotonic()
            reply = reached.ask(sample.png)
            took.append(time.monotonic() - started)
            if reply.status_code != 200 or reply.json()["digit"] != sample.predicted:
                wrong.append(reply.text)

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        yield took
    finally:
        ended.set()
        for client in clients:
            client.join()
    assert wrong == []
    assert took
    assert max(took) < LATE_S


def head(token: str, more: bytes) -> bytes:
    return f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n".encode() + more


@pytest.mark.parametrize(
    ("headers", "statuses"),
    [
        pytest.param(b"Expect: anything\r\nContent-Length: %d\r\n\r\n", [417], id="Expect"),
        pytest.param(b"Expect: 100-continue\r\nContent-Length: 1000000000\r\n\r\n", [100, 413], id="large Expect"),
        pytest.param(b"Content-Length: 1000000000\r\n\r\n", [413], id="large"),
        pytest.param(b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400], id="two lengths"),
        pytest.param(b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n", [501], id="two codings"),
    ],
)
def test_no_hidden_request_is_answered(reached: Reached, samples: list[Sample], headers: bytes, statuses: list[int]) -> None:
    hidden = f"GET /ping HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {reached.token}\r\n\r\n".encode()
    attack = head(reached.token, headers.replace(b"%d", b"%d" % len(hidden))) + hidden
    with good_clients(reached, samples):
        for _ in range(5):
            reply = reached.send(attack, wait_s=0.5)
            assert [int(part[:3]) for part in reply.split(b"HTTP/1.1 ")[1:]] == statuses
            assert b"Healthy" not in reply


def test_pipelined_requests_are_answered_in_order(reached: Reached, samples: list[Sample]) -> None:
    chosen = samples[:6]
    bodies = [b"Content-Length: %d\r\n\r\n" % len(sample.png) + sample.png for sample in chosen]
    replies = reached.send(b"".join(head(reached.token, body) for body in bodies)).split(b"HTTP/1.1 ")[1:]
    digits = [json.loads(reply.partition(b"\r\n\r\n")[2])["digit"] for reply in replies]
    assert digits == [sample.predicted for sample in chosen]


def test_nothing_is_told_without_the_token(reached: Reached) -> None:
    for method, path in (("OPTIONS", "/"), ("OPTIONS", PREDICT), ("GET", "/api-description"), ("GET", "/ping")):
        reply = requests.request(method, f"https://localhost:{reached.port}{path}", verify=str(reached.certificate), timeout=9)
        assert reply.status_code in (400, 404, 405)
        assert "digits" not in reply.text
        assert "TorchServe" not in reply.text + str(reply.headers)


def test_an_image_with_a_forms_content_type_is_read(reached: Reached, samples: list[Sample]) -> None:
    reply = reached.ask(samples[3].png, Content_Type="application/x-www-form-urlencoded")
    assert (reply.status_code, reply.json()["digit"]) == (200, samples[3].predicted)
    form = b"target=3&image=" + base64.b64encode(samples[3].png).replace(b"+", b"%2B")
    assert reached.ask(form, Content_Type="application/x-www-form-urlencoded").status_code == 400  # a form holds bytes, no base64


# --- gRPC


@dataclass(frozen=True)
class Call:
    """A gRPC call through the front, and how its reply is read."""

    path: str
    request: Any
    read: Callable[[bytes], Any] = bytes

    def ask(self, reached: Reached, token: str | None) -> Any:
        metadata = [] if token is None else [("authorization", f"Bearer {token}")]
        credentials = grpc.ssl_channel_credentials(reached.certificate.read_bytes())
        with grpc.secure_channel(f"localhost:{reached.port}", credentials) as channel:
            # Of a stream with one reply, too: on the wire they are alike.
            call = channel.unary_unary(self.path, lambda message: message.SerializeToString(), self.read)
            return call(self.request, metadata=metadata, timeout=TIMEOUT_S)


def predicting(method: str, png: bytes, **options: bytes) -> Call:
    request = asking({"data": png, **options})
    return Call(f"{INFERENCE}/{method}", request, lambda reply: MESSAGES["PredictionResponse"].FromString(reply))


def inferring_by(png: bytes) -> Call:
    request = inferring("BYTES", [1], bytes_contents=[png])
    return Call(f"{OPEN_INFERENCE}/ModelInfer", request, lambda reply: MESSAGES["ModelInferResponse"].FromString(reply))


@pytest.mark.parametrize("method", ["Predictions", "StreamPredictions"])
def test_grpc_predicts_and_explains_through_the_front(reached: Reached, samples: list[Sample], method: str) -> None:
    for sample in samples[:2]:
        reply = json.loads(predicting(method, sample.png, explain=b"true").ask(reached, reached.token).prediction)
        assert (reply["digit"], reply["explanation"]["target"]) == (sample.predicted, sample.predicted)
        require_close(np.array(reply["explanation"]["saliency"]), sample.jacobian[sample.predicted], row_axes=2)
    error = json.loads(predicting(method, b"no image").ask(reached, reached.token).prediction)["error"]
    assert (error["code"], error["type"]) == (400, "UnreadableImage")


def test_grpc_infers_through_the_front(reached: Reached, samples: list[Sample]) -> None:
    reply = inferring_by(samples[1].png).ask(reached, reached.token)
    (digit,) = (output for output in reply.outputs if output.name == "digit")
    assert list(digit.contents.int64_contents) == [samples[1].predicted]


@pytest.mark.parametrize("token", [None, "AAAAAAAA", "management"])
def test_grpc_without_the_token_is_refused(reached: Reached, token: str | None) -> None:
    if token == "management":
        hardening = reached.server.settings.hardening
        assert hardening is not None
        token = json.loads(hardening.key_file.read_text())["management"]["key"]
    for call in (predicting("Predictions", PNG), predicting("StreamPredictions", PNG), inferring_by(PNG)):
        with pytest.raises(grpc.RpcError) as raised:
            call.ask(reached, token)
        assert raised.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert "digits" not in raised.value.details()


@pytest.mark.parametrize(
    "path",
    [
        f"{MANAGEMENT}/DescribeModel",
        f"{MANAGEMENT}/ListModels",
        f"{MANAGEMENT}/RegisterModel",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.health.v1.Health/Check",
        f"{INFERENCE}2/Predictions",
        f"{INFERENCE}/../{MANAGEMENT}/DescribeModel",
    ],
)
@pytest.mark.parametrize("kind", ["inference", "management"])
def test_no_other_grpc_service_is_reached(reached: Reached, path: str, kind: str) -> None:
    hardening = reached.server.settings.hardening
    assert hardening is not None
    token = json.loads(hardening.key_file.read_text())[kind]["key"]
    call = Call(path, MESSAGES["DescribeModelRequest"](model_name="digits"))
    with pytest.raises(grpc.RpcError) as raised:
        call.ask(reached, token)
    code, message = {
        "inference": (grpc.StatusCode.UNIMPLEMENTED, "expected one of the API's routes"),  # the front's own words
        "management": (grpc.StatusCode.PERMISSION_DENIED, "Token Authorization failed"),
    }[kind]
    assert raised.value.code() == code
    assert message in raised.value.details()


PADDING = b"a" * 100_000  # what TorchServe would not free
BAD_FORMS = [
    b"--B\r\nContent-Disposition: form-data\r\n\r\n" + PADDING + b"\r\n--B--\r\n",
    b"--B\r\nContent-Disposition: form-data; name\r\n\r\n" + PADDING + b"\r\n--B--\r\n",
    b"--B\r\nContent-Disposition: form-data; name=x; filename=x\r\nContent-Type: text/plain; charset=none\r\n\r\n" + PADDING
    + b"\r\n--B--\r\n",
    b"--B\r\nContent-Disposition: form-data; name=x; filename=x\r\nContent-Transfer-Encoding: none\r\n\r\n" + PADDING
    + b"\r\n--B--\r\n",
    b"--B\r\nContent-Disposition: form-data; name=x\r\n\r\n" + PADDING,
]  # fmt: skip


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_malformed_forms_cost_the_server_nothing(reached: Reached, samples: list[Sample], count: int) -> None:
    session = requests.Session()
    url = f"https://localhost:{reached.port}{PREDICT}"
    headers = authorization(reached.token) | {"Content-Type": "multipart/form-data; boundary=B"}
    with good_clients(reached, samples) as took:
        while len(took) < 50:
            time.sleep(0.05)
        jvm, before = reached.jvm(), reached.jvm().memory_info().rss
        for number in range(count):
            body = BAD_FORMS[number % len(BAD_FORMS)]
            reply = session.post(url, data=body, headers=headers, verify=str(reached.certificate), timeout=TIMEOUT_S)
            assert reply.status_code == 400
    grown_mb = (jvm.memory_info().rss - before) / 1e6
    print(f"{count} malformed forms of {len(PADDING)} bytes: the JVM grew by {grown_mb:.1f} MB")
    assert grown_mb < 15 + count * len(PADDING) / 1e6 * 0.02  # of the 20 MB and 1 GB that were sent
