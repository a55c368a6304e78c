"""The proxy's configuration and its two scripts, in a real Envoy in front of a server that records the bytes it gets."""

import contextlib
import json
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from threading import Event
from typing import Any

import grpc
import numpy as np
import pytest
import requests
import yaml

from handler.limits import MAX_BODY_BYTES
from scripts.paths import SAMPLE_FILES, SERVE_CONFIG
from scripts.serving.launcher import ServeError, build_parser, read_settings
from scripts.serving.proxy import configuration, process
from scripts.serving.proxy.__main__ import main
from scripts.serving.proxy.configuration import MAX_FORM_FIELDS, REQUESTS_PER_SECOND, Address, Front, write_configuration
from scripts.serving.proxy.front import make_front
from scripts.serving.proxy.process import Envoy, ProxyError, command
from scripts.serving.ready import ReferenceAnswer
from tests.servers import wait_for
from tests.tls import make_certificate

TIMEOUT_S = 20
TOKEN = "AAAAbbbb"
PERMITTED = {"Authorization": f"Bearer {TOKEN}"}
PREDICT = "/predictions/digits"
PNG = SAMPLE_FILES[0].read_bytes()
REFERENCE = ReferenceAnswer("ab" * 32, digit=3)
WORKER_DIED = b'{\n  "code": 500,\n  "type": "InternalServerException",\n  "message": "Worker died."\n}\n'


@dataclass
class Recorder:
    """A server that keeps every request as it came, one for each connection, and answers what it is told.

    Attributes:
        received: head and body of each request, in order.
        replies: what is answered first: status line and body; after these `usual`.
        rest: what came behind a request on its connection.
        usual: status line and body.
        withheld: bytes at the end of each reply that are never sent: the connection ends before them.
        may_answer: no request is answered before.
    """

    path: Path
    received: list[tuple[bytes, bytes]] = field(default_factory=list)
    replies: list[tuple[str, bytes]] = field(default_factory=list)
    rest: list[bytes] = field(default_factory=list)
    usual: tuple[str, bytes] = ("200 OK", b'{"digit":0}')
    withheld: int = 0
    may_answer: Event | None = None

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(self.path))
            listening.listen(1000)
            threading.Thread(target=self.serve, args=(listening,), daemon=True).start()
            yield

    def serve(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(TIMEOUT_S)
            content = b""
            while b"\r\n\r\n" not in content:
                chunk = connection.recv(65536)
                if not chunk:
                    return
                content += chunk
            head, _, body = content.partition(b"\r\n\r\n")
            lengths = [line.partition(b":")[2] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
            while lengths and len(body) < int(lengths[0]):
                body += connection.recv(65536)
            self.received.append((head, body))
            if self.may_answer is not None:
                self.may_answer.wait(TIMEOUT_S)
            status, reply = self.replies.pop(0) if self.replies else self.usual
            head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(reply)}\r\n\r\n".encode()
            connection.sendall((head + reply)[: max(0, len(head + reply) - self.withheld)])
            if self.withheld:
                return
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                self.rest.append(connection.recv(65536))


@dataclass(frozen=True)
class Fronted:
    """An Envoy in front of a recorder."""

    address: tuple[str, int]
    upstream: Recorder
    certificate: Path
    envoy: Envoy

    @property
    def url(self) -> str:
        return f"https://localhost:{self.address[1]}"

    def ask(self, path: str = PREDICT, method: str = "POST", **options: object) -> requests.Response:
        options = {"headers": PERMITTED, "verify": str(self.certificate), "timeout": TIMEOUT_S} | options
        return requests.request(method, self.url + path, **options)  # type: ignore[arg-type]

    def send(self, content: bytes, wait_s: float = 3) -> bytes:
        """Send bytes as they are, and read until the connection ends or nothing has come for a while."""
        context = ssl.create_default_context(cafile=self.certificate)
        context.set_alpn_protocols(["http/1.1"])
        reply = b""
        with (
            socket.create_connection(self.address, TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
            contextlib.suppress(OSError),
        ):
            connection.sendall(content)
            connection.settimeout(wait_s)
            while chunk := connection.recv(65536):
                reply += chunk
        return reply


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronted]:
    folder = tmp_path_factory.mktemp("f")
    certificate, private_key = make_certificate(folder, "DNS:localhost,IP:127.0.0.1", "ec")
    key_file = folder / 'key "file" \u20ac.json'
    key_file.write_text(json.dumps({"management": {"key": "MMMMmmmm"}, "inference": {"key": TOKEN}, "API": {"key": "API"}}))
    recorder = Recorder(folder / "upstream.sock")
    address = ("127.0.0.1", free_port())
    front = Front(
        listen=Address(*address),
        model_name="digits",
        upstreams=[Address(str(recorder.path))],
        certificate=certificate,
        private_key=private_key,
        key_file=key_file,
        access_log=folder / "access.log",
        admin_socket=folder / "admin.sock",
    )
    envoy = Envoy(front, folder, folder / "envoy.log", concurrency=1)
    with recorder.listen():
        envoy.start()
        try:
            yield Fronted(address, recorder, certificate, envoy)
        finally:
            envoy.stop()
        assert "[error]" not in envoy.log_tail()


@pytest.fixture
def fronted(running: Fronted) -> Fronted:
    running.upstream.received.clear()
    running.upstream.replies.clear()
    running.upstream.rest.clear()
    return running


# --- HTTP/1.1, taken apart and written anew

HEAD = b"POST /predictions/digits HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer AAAAbbbb\r\n"
HIDDEN = b"GET /ping HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer AAAAbbbb\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LENGTH = b"Content-Length: 3\r\n"
END = LENGTH + b"\r\nabc"


def statuses_of(reply: bytes) -> list[int]:
    """The statuses of all replies in what a connection gave."""
    return [int(part[:3]) for part in reply.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize(
    ("content", "statuses"),
    [
        # The attacks.
        pytest.param(HEAD + b"Expect: anything\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN, [417], id="Expect"),
        pytest.param(HEAD + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n" + HIDDEN, [100, 413], id="large Expect"),
        # Their relatives: another Expect, and a length that is only found out.
        pytest.param(HEAD + b"Expect: 200-ok, 100-continue\r\n" + END + HIDDEN, [417, 200], id="Expect in a list"),
        pytest.param(HEAD + b"Expect: \r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN, [417], id="empty Expect"),
        pytest.param(HEAD + b"Content-Length: 67108865\r\n\r\n" + HIDDEN, [413], id="too large"),
        # Two lengths.
        pytest.param(HEAD + b"Content-Length: 6\r\n" + CHUNKED + b"\r\n0\r\n\r\nG", [400], id="CL.TE"),
        pytest.param(HEAD + CHUNKED + b"Content-Length: 4\r\n\r\n5c\r\n" + HIDDEN + b"0\r\n\r\n", [400], id="TE.CL"),
        pytest.param(HEAD + LENGTH + b"Content-Length: 5\r\n\r\nabcde", [400], id="two lengths"),
        pytest.param(HEAD + LENGTH + LENGTH + b"\r\nabc", [400], id="the same length twice"),
        pytest.param(HEAD + b"Content-Length: 3, 3\r\n\r\nabc", [400], id="list of lengths"),
        pytest.param(HEAD + b"Content-Length: +3\r\n\r\nabc", [400], id="signed length"),
        pytest.param(HEAD + b"Content-Length: 0x3\r\n\r\nabc", [400], id="hexadecimal length"),
        pytest.param(HEAD + b"Content-Length: 18446744073709551619\r\n\r\nabc", [400], id="length beyond 64 bits"),
        # Odd codings.
        pytest.param(HEAD + b"Transfer-Encoding: xchunked\r\n" + END, [400], id="another coding"),
        pytest.param(HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", [400], id="space before the colon"),
        pytest.param(HEAD + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n", [501], id="two codings"),
        pytest.param(HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", [501], id="list of codings"),
        pytest.param(HEAD + CHUNKED + b"\r\n3;\nxx\r\nabc\r\n0\r\n\r\n", [400], id="line feed in a chunk's extension"),
        pytest.param(HEAD + CHUNKED + b"\r\n3\nabc\n0\n\n", [400], id="chunks with line feeds"),
        pytest.param(HEAD + CHUNKED + b"\r\nFFFFFFFFFFFFFFFF3\r\nabc\r\n0\r\n\r\n", [400], id="chunk beyond 64 bits"),
        # Odd headers.
        pytest.param(HEAD + b"X\xe4: 1\r\n" + END, [400], id="header name beyond ASCII"),
        pytest.param(HEAD + b"X_A: 1\r\n" + END, [400], id="underscore"),
        pytest.param(HEAD + b"X(A): 1\r\n" + END, [400], id="parentheses"),
        pytest.param(HEAD + b": 1\r\n" + END, [400], id="no name"),
        pytest.param(HEAD + b"nothing\r\n" + END, [400], id="no colon"),
        pytest.param(HEAD + b"X: a\0b\r\n" + END, [400], id="NUL"),
        pytest.param(HEAD + b"Host: other\r\n" + END, [400], id="two hosts"),
        pytest.param(HEAD.replace(b"Host: localhost\r\n", b"") + END, [400], id="no host"),
        pytest.param(HEAD + b"Authorization: Bearer AAAAbbbb\r\n" + END, [400], id="two tokens"),
        pytest.param(HEAD + b"".join(b"X-%d: 1\r\n" % number for number in range(70)) + END, [431], id="many headers"),
        pytest.param(HEAD + b"X: " + b"a" * 17_000 + b"\r\n" + END, [431], id="large header"),
        # Odd requests.
        pytest.param(b"GET /ping\r\n", [426], id="HTTP/0.9"),
        pytest.param(HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + END, [426], id="HTTP/1.0"),
        pytest.param(HEAD.replace(b" /", b" http://localhost/") + END, [404], id="absolute form"),
        pytest.param(HEAD.replace(b"POST /predictions/digits", b"CONNECT localhost:1") + END, [400], id="CONNECT"),
        pytest.param(HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + END, [403], id="upgrade"),
        pytest.param(HEAD.replace(b"/predictions/", b"/predictions%2f") + END, [400], id="escaped slash"),
        pytest.param(HEAD.replace(b"digits", b"digits#x") + END, [400], id="fragment"),
    ],
)  # fmt: skip
def test_nothing_of_an_odd_request_reaches_the_server(fronted: Fronted, content: bytes, statuses: list[int]) -> None:
    reply = fronted.send(content, wait_s=0.5)
    assert statuses_of(reply) == statuses
    passed = [head.split(b"\r\n")[0] for head, _ in fronted.upstream.received]
    assert passed == ([b"GET /ping HTTP/1.1"] if statuses[-1:] == [200] else [])  # one that stands behind, whole and permitted
    if statuses and statuses[-1] != 200:
        error = json.loads(reply.rpartition(b"\r\n\r\n")[2])
        assert error.get("error", error)["code"] == statuses[-1]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(HEAD + b"Expect: 100-continue\r\n" + END, id="Expect: 100-continue"),
        pytest.param(HEAD + b"Expect: 100-Continue\r\n" + END, id="Expect in capitals"),
        pytest.param(HEAD + b"X-A: a\r\n Content-Length: 30\r\n" + END, id="folded header"),
        pytest.param((HEAD + END).replace(b"\r\n", b"\n"), id="line feeds"),
        pytest.param(HEAD + b"X-A: a\rContent-Length: 30\r\n" + END, id="carriage return in a header"),
        pytest.param(HEAD + CHUNKED + b"\r\n3;a=b\r\nabc\r\n0\r\n\r\n", id="chunk's extension"),
        pytest.param(HEAD + CHUNKED + b"\r\n1\r\na\r\n2\r\nbc\r\n0\r\nContent-Length: 50\r\n\r\n", id="trailers"),
        pytest.param(HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n" + END, id="h2c"),
        pytest.param(HEAD + b"TE: trailers\r\nKeep-Alive: 3\r\nProxy-Connection: x\r\n" + END, id="hop by hop"),
        pytest.param(HEAD + b"x-envoy-max-retries: 9\r\nx-envoy-answered: 1\r\nX-Forwarded-For: a\r\n" + END, id="proxy's own"),
        pytest.param(HEAD.replace(b"POST /", b"POST  /x/..//") + END, id="path with dots"),
        pytest.param(HEAD.replace(b"digits", b"digits?a=%zz&b") + END, id="query"),
    ],
)  # fmt: skip
def test_what_can_be_read_is_written_anew(fronted: Fronted, content: bytes) -> None:
    assert statuses_of(fronted.send(content, wait_s=0.5))[-1] == 200
    ((head, body),) = fronted.upstream.received
    assert body == b"abc"
    assert not any(fronted.upstream.rest)
    first, *headers = head.split(b"\r\n")
    assert first == b"POST /predictions/digits HTTP/1.1"
    assert sorted(header for header in headers if not header.startswith(b"x-a:")) == [
        b"authorization: Bearer AAAAbbbb",
        b"content-length: 3",
        b"host: localhost",
    ]


def test_pipelined_requests_are_asked_and_answered_in_order_and_apart(fronted: Fronted) -> None:
    fronted.upstream.replies = [("200 OK", b"[%d]" % number) for number in range(3)]
    reply = fronted.send(b"".join(HEAD + b"Content-Length: 1\r\n\r\n%d" % number for number in range(3)), wait_s=1)
    assert [part.rpartition(b"\r\n\r\n")[2] for part in reply.split(b"HTTP/1.1 ")[1:]] == [b"[0]", b"[1]", b"[2]"]
    assert [body for _, body in fronted.upstream.received] == [b"0", b"1", b"2"]
    assert not any(fronted.upstream.rest)  # a connection each


# --- who is let through


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer AAAAAAAA"}, {"Authorization": "Bearer MMMMmmmm"}, {"Authorization": TOKEN}], ids=str
)
def test_without_the_token_no_body_is_read(fronted: Fronted, headers: dict[str, str]) -> None:
    reply = fronted.ask(headers=headers, data=b"abc")
    assert (reply.status_code, reply.json()["type"]) == (400, "InvalidKeyException")
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
    unsent = b"POST /predictions/digits HTTP/1.1\r\nHost: localhost\r\n" + head + b"Content-Length: 3000000\r\n\r\n"
    assert statuses_of(fronted.send(unsent)) == [400]  # before a byte of it has come
    assert fronted.upstream.received == []


def test_a_renewed_token_counts_at_once(fronted: Fronted) -> None:
    key_file = fronted.envoy.front.key_file
    assert key_file is not None
    before = key_file.read_text()
    try:
        key_file.write_text(before.replace(TOKEN, "NNNNnnnn"))
        assert fronted.ask().status_code == 400
        assert fronted.ask(headers={"Authorization": "Bearer NNNNnnnn"}).status_code == 200
        key_file.write_text("")  # as it is while TorchServe writes it
        assert fronted.ask(headers={"Authorization": "Bearer NNNNnnnn"}).status_code == 200
        key_file.write_text("a-token-alone\n")
        assert fronted.ask(headers={"Authorization": "Bearer a-token-alone"}).status_code == 200
    finally:
        key_file.write_text(before)
    assert fronted.ask().status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/predictions/digits", 200),
        ("PUT", "/predictions/digits/1.0", 200),
        ("PUT", "/explanations/digits", 200),
        ("POST", "/v1/models/digits:predict", 200),
        ("POST", "/v1/models/digits:explain", 200),
        ("POST", "/v2/models/digits/infer", 200),
        ("POST", "/v2/models/digits/explain", 200),
        ("GET", "/ping", 200),
        ("OPTIONS", "/predictions/digits", 405),
        ("OPTIONS", "/", 404),
        ("GET", "/predictions/digits", 405),
        ("DELETE", "/v2/models/digits/infer", 405),
        ("POST", "/ping", 405),
        ("GET", "/api-description", 404),
        ("GET", "/models", 404),
        ("POST", "/models/digits/invoke", 404),
        ("POST", "/invocations", 404),
        ("POST", "/digits/predict", 404),
        ("POST", "/wfpredict/digits", 404),
        ("POST", "/predictions/digits/1.0/more", 404),
        ("POST", "/predictions/digitsX", 404),
        ("POST", "/predictions/other", 404),
        ("GET", "/metrics", 404),
        ("GET", "/token?type=inference", 404),
    ],
)
def test_only_the_apis_routes_pass(fronted: Fronted, method: str, path: str, status: int) -> None:
    reply = fronted.ask(path, method)
    assert reply.status_code == status
    assert len(fronted.upstream.received) == (status == 200)
    if status != 200:
        error = reply.json()
        assert (error if "/v2/" in path else error["error"])["code"] == status
        assert reply.headers["content-type"] == "application/json"
    assert reply.headers["server"] == "front"


def test_errors_on_the_routes_of_v2_have_its_form(fronted: Fronted) -> None:
    path = "/v2/models/digits/infer"
    for reply in (
        fronted.ask(path, headers=PERMITTED | {"Expect": "x"}),
        fronted.ask(path, headers=PERMITTED | {"Content-Type": "multipart/form-data; boundary=B"}, data=b"x"),
    ):
        content = reply.json()
        assert content["code"] == reply.status_code
        assert isinstance(content["error"], str)
        assert content["type"] in ("ExpectationFailed", "InvalidRequest")


# --- forms


def part(headers: str, content: bytes = b"abc") -> bytes:
    return f"--B\r\n{headers}\r\n\r\n".encode() + content + b"\r\n"


GOOD_PART = part('Content-Disposition: form-data; name="data"; filename="a.png"')
DISPOSITION = "Content-Disposition: form-data; name=data"
OPEN_END = b"--B--\r\n"


@pytest.mark.parametrize(
    ("form", "written"),
    [
        pytest.param(GOOD_PART + OPEN_END, part('Content-Disposition: form-data; name="data"; filename="file"'), id="file"),
        pytest.param(part(DISPOSITION) + OPEN_END, part('Content-Disposition: form-data; name="data"'), id="field"),
        pytest.param(
            part(DISPOSITION, b"") + OPEN_END, part('Content-Disposition: form-data; name="data"', b""), id="empty field"
        ),
        pytest.param(
            b"\r\n" + part("content-disposition: FORM-DATA;NAME=\"data\";filename*=utf-8''%e4")[:-2] + b"\r\n--B-- \r\nepilogue",
            part('Content-Disposition: form-data; name="data"; filename="file"'),
            id="letter case, extended file name, epilogue",
        ),
        pytest.param(
            part(f"{DISPOSITION}\r\nContent-Type: Text/Plain; Charset=UTF-8\r\nContent-Length: 7\r\nX-Any: 1") + OPEN_END,
            part('Content-Disposition: form-data; name="data"\r\nContent-Type: text/plain'),
            id="headers of a part",
        ),
        pytest.param(
            part(DISPOSITION, b"-B\r\n\r\n--C\r\n-\r\n--A") + OPEN_END,
            part('Content-Disposition: form-data; name="data"', b"-B\r\n\r\n--C\r\n-\r\n--A"),
            id="what is like a boundary",
        ),
        pytest.param(
            part(DISPOSITION + "\r\nContent-Transfer-Encoding: binary", bytes(range(256))) + OPEN_END,
            part('Content-Disposition: form-data; name="data"', bytes(range(256))),
            id="all bytes",
        ),
    ],
)
@pytest.mark.parametrize("boundary", ["B", '"B"', 'B; charset="unknown"'], ids=["plain", "quoted", "unknown charset"])
def test_a_multipart_form_is_written_anew(fronted: Fronted, form: bytes, written: bytes, boundary: str) -> None:
    headers = PERMITTED | {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    assert fronted.ask(data=form, headers=headers).status_code == 200
    ((head, body),) = fronted.upstream.received
    assert b'content-type: multipart/form-data; boundary="B"' in head.split(b"\r\n")
    assert body == written + OPEN_END


@pytest.mark.parametrize(
    ("form", "message"),
    [
        # Those that TorchServe never frees, and two relatives of each.
        pytest.param(part("Content-Disposition: form-data") + OPEN_END, "name=", id="no name"),
        pytest.param(
            part('Content-Disposition: form-data; filename="x"') + OPEN_END, "expected a name", id="file without a name"
        ),
        pytest.param(part('Content-Disposition: form-data; name=""') + OPEN_END, "expected a name", id="empty name"),
        pytest.param(part("Content-Disposition: form-data; name") + OPEN_END, "expected a name", id="name without a value"),
        pytest.param(part("X: 1") + OPEN_END, "Content-Disposition", id="no disposition"),
        pytest.param(part("Content-Disposition: attachment; name=data") + OPEN_END, "form-data", id="another disposition"),
        pytest.param(part(f"{DISPOSITION}\r\nContent-Type: text/plain; charset=none") + OPEN_END, "Content-Type", id="charset"),
        pytest.param(part(f"{DISPOSITION}\r\nContent-Type: nothing") + OPEN_END, "Content-Type", id="no media type"),
        pytest.param(part(f"{DISPOSITION}\r\nContent-Type: multipart/mixed; boundary=C") + OPEN_END, "Content-Type", id="nested"),
        pytest.param(part(f"{DISPOSITION}\r\nContent-Transfer-Encoding: base64") + OPEN_END, "plain bytes", id="encoded"),
        # Those that end early.
        pytest.param(GOOD_PART, "ends early", id="no end"),
        pytest.param(GOOD_PART[:-2], "ends early", id="no boundary after a part"),
        pytest.param(GOOD_PART + b"--B", "ends early", id="half an end"),
        pytest.param(b"--B\r\n" + DISPOSITION.encode(), "ends early", id="only headers"),
        pytest.param(b"--B\r\n" + DISPOSITION.encode() + b"\r\n--B--\r\n", "empty line", id="no empty line"),
        pytest.param(b"--B\r\n\r\nabc\r\n--B--\r\n", "", id="no headers"),
        pytest.param(b"", "begins with the boundary", id="nothing"),
        pytest.param(OPEN_END, "at least one field", id="no fields"),
        pytest.param(b"preamble\r\n" + GOOD_PART + OPEN_END, "begins with the boundary", id="preamble"),
        pytest.param((GOOD_PART + OPEN_END).replace(b"\r\n", b"\n"), "line break", id="line feeds"),
        pytest.param(GOOD_PART.replace(b"--B", b"--BX") + OPEN_END, "line break", id="longer boundary"),
        # Odd headers.
        pytest.param(part(DISPOSITION + "\r\n folded") + OPEN_END, "'name: value'", id="folded"),
        pytest.param(part(DISPOSITION + "\r\n" + DISPOSITION) + OPEN_END, "once", id="disposition twice"),
        pytest.param(part(DISPOSITION + "\r\nContent-Type: a/b\r\nContent-Type: a/b") + OPEN_END, "once", id="type twice"),
        pytest.param(part('Content-Disposition: form-data; name="da\\"ta"') + OPEN_END, "expected a name", id="quotes in a name"),
        pytest.param(part("Content-Disposition: form-data; name=d\xe4ta") + OPEN_END, "expected a name", id="letters in a name"),
        pytest.param(part(DISPOSITION + "\r\nX: a\rb") + OPEN_END, "'name: value'", id="carriage return"),
        pytest.param(part(DISPOSITION + "\r\nX: " + "a" * 5000) + OPEN_END, "empty line", id="large header"),
        pytest.param(GOOD_PART * (MAX_FORM_FIELDS + 1) + OPEN_END, "at most", id="many fields"),
    ],
)
def test_a_malformed_multipart_form_never_reaches_the_server(fronted: Fronted, form: bytes, message: str) -> None:
    reply = fronted.ask(data=form, headers=PERMITTED | {"Content-Type": "multipart/form-data; boundary=B"})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "InvalidRequest"
    assert message in reply.json()["error"]["message"]
    assert fronted.upstream.received == []


def test_as_many_fields_as_are_allowed_pass(fronted: Fronted) -> None:
    headers = PERMITTED | {"Content-Type": "multipart/form-data; boundary=B"}
    assert fronted.ask(data=GOOD_PART * MAX_FORM_FIELDS + OPEN_END, headers=headers).status_code == 200
    form = "&".join(f"a{number}=1" for number in range(MAX_FORM_FIELDS))
    headers = PERMITTED | {"Content-Type": "application/x-www-form-urlencoded"}
    assert fronted.ask(data=form, headers=headers).status_code == 200
    assert fronted.ask(data=f"{form}&b=1", headers=headers).status_code == 400
    assert len(fronted.upstream.received) == 2


FORM = b"application/x-www-form-urlencoded"
RAW = b"application/octet-stream"


@pytest.mark.parametrize(
    ("content_type", "body", "passed"),
    [
        (FORM, PNG, RAW),
        (FORM, b'{"data": 3}', RAW),
        (FORM, b"", RAW),
        (FORM, b"iVBORw0KGgoAAAAN", RAW),
        (FORM, b"P5 2 2 255 data=", RAW),
        (FORM, b"data=abc", FORM),
        (FORM + b"; charset=none", b"data=a%2Bb&target=3", FORM),
        (FORM.upper(), b"data=a+b", FORM),
        (b"x/application/x-www-form-urlencoded", b"a=%zz", RAW),
        (b"multipart/form-data", b"--B", RAW),
        (b"multipart/form-data; boundary=", b"--B", RAW),
        (b"multipart/form-dataX; boundary=B", b"--B", RAW),
        (b"multipart/mixed; boundary=B", b"--B", RAW),
        (b"application/json", b'{"data": 3}', b"application/json"),
        (b"image/png", PNG, b"image/png"),
    ],
)
def test_content_type_of_a_raw_body_is_mended(fronted: Fronted, content_type: bytes, body: bytes, passed: bytes) -> None:
    assert fronted.ask(data=body, headers=PERMITTED | {"Content-Type": content_type.decode("latin-1")}).status_code == 200
    ((head, received),) = fronted.upstream.received
    assert received == body
    assert b"content-type: " + passed in head.split(b"\r\n")


def test_a_forms_last_line_break_is_left_out(fronted: Fronted) -> None:
    assert fronted.ask(data=b"data=abc\r\n", headers=PERMITTED | {"Content-Type": FORM.decode()}).status_code == 200
    assert fronted.upstream.received[0][1] == b"data=abc"


@pytest.mark.parametrize("body", [b"a=%zz", b"a=%4", b"a=%", b"%g0=1", b"a=1&b=%%41"])
def test_a_form_with_bad_escapes_never_reaches_the_server(fronted: Fronted, body: bytes) -> None:
    reply = fronted.ask(data=body, headers=PERMITTED | {"Content-Type": FORM.decode()})
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "InvalidRequest")
    assert fronted.upstream.received == []


@pytest.mark.parametrize("content_type", [RAW.decode(), "multipart/form-data; boundary=B", FORM.decode()])
def test_the_largest_body_passes_and_a_larger_one_does_not(fronted: Fronted, content_type: str) -> None:
    is_multipart, is_form = "multipart" in content_type, content_type == FORM.decode()
    head = part(DISPOSITION, b"")[:-2] if is_multipart else b"data=" if is_form else b""
    tail = b"\r\n--B--\r\n" if is_multipart else b""
    grown = 2 if is_multipart else 0  # bytes by which a form is longer once it is written anew: quotes
    headers = PERMITTED | {"Content-Type": content_type}

    def in_chunks(length: int) -> Iterator[bytes]:
        body = head + b"a" * (length - len(head) - len(tail)) + tail
        yield from (body[at : at + 2**20] for at in range(0, length, 2**20))

    largest = MAX_BODY_BYTES - grown
    assert fronted.ask(data=in_chunks(largest), headers=headers).status_code == 200
    assert fronted.ask(data=b"".join(in_chunks(largest)), headers=headers).status_code == 200
    assert [len(body) for _, body in fronted.upstream.received] == [MAX_BODY_BYTES] * 2
    assert fronted.ask(data=in_chunks(largest + 1), headers=headers).status_code == 413
    assert fronted.ask(data=b"".join(in_chunks(largest + 1)), headers=headers).status_code == 413
    assert len(fronted.upstream.received) == 2


# --- retries


def test_worker_died_is_asked_again(fronted: Fronted) -> None:
    fronted.upstream.replies = [("500 Internal Server Error", WORKER_DIED), ("507 Insufficient Storage", WORKER_DIED)]
    reply = fronted.ask(data=PNG)
    assert (reply.status_code, reply.json()) == (200, {"digit": 0})
    assert [body for _, body in fronted.upstream.received] == [PNG] * 3
    assert "x-worker-died" not in reply.headers


def test_worker_died_is_the_answer_where_it_stays_so(fronted: Fronted) -> None:
    fronted.upstream.replies = [("500 Internal Server Error", WORKER_DIED)] * 3
    reply = fronted.ask(data=PNG)
    assert (reply.status_code, reply.content) == (500, WORKER_DIED)
    assert "x-worker-died" not in reply.headers


@pytest.mark.parametrize(
    ("status", "body"),
    [
        ("500 Internal Server Error", b'{"error": {"code": 500, "type": "InternalError", "message": "a defect"}}'),
        ("500 Internal Server Error", b'{"message": "Worker died. Not in TorchServe\'s words"}'),
        ("500 Internal Server Error", WORKER_DIED + b" " * 1000),
        ("503 Service Unavailable", WORKER_DIED),
        ("400 Bad Request", WORKER_DIED),
    ],
)
def test_no_other_error_is_asked_again(fronted: Fronted, status: str, body: bytes) -> None:
    fronted.upstream.replies = [(status, body)]
    reply = fronted.ask()
    assert (reply.status_code, reply.content) == (int(status[:3]), body)
    assert len(fronted.upstream.received) == 1


@pytest.mark.parametrize(("headers", "seconds"), [("", 1), ("\r\nRetry-After: 7", 7)], ids=["TorchServe's own", "the handler's"])
def test_a_server_that_is_full_says_when_to_ask_again(fronted: Fronted, headers: str, seconds: int) -> None:
    fronted.upstream.replies = [(f"503 Service Unavailable{headers}", b'{"code": 503}')]
    reply = fronted.ask()
    assert (reply.status_code, reply.content, int(reply.headers["retry-after"])) == (503, b'{"code": 503}', seconds)
    assert "retry-after" not in fronted.ask().headers


# --- several servers


PLAIN: dict[str, Any] = {"certificate": None, "private_key": None, "key_file": None, "requests_per_second": 0}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Recorder, Recorder]]:
    one, two = Recorder(tmp_path / "1.sock"), Recorder(tmp_path / "2.sock")
    with one.listen(), two.listen():
        yield one, two


def addresses(pair: tuple[Recorder, Recorder]) -> list[Address]:
    return [Address(str(recorder.path)) for recorder in pair]


FULL = ("503 Service Unavailable", b'{"code": 503}')


@pytest.mark.parametrize(
    ("usual", "withheld"),
    [
        pytest.param(FULL, 0, id="full, or without its TorchServe"),
        pytest.param(("200 OK", b"a" * 100_000), 100_000_000, id="ends before its reply"),
        pytest.param(("200 OK", b"a" * 1_000_000), 500_000, id="ends in its reply"),
    ],
)
def test_another_server_is_asked_for_what_one_does_not_answer(
    fronted: Fronted, folder: Path, pair: tuple[Recorder, Recorder], usual: tuple[str, bytes], withheld: int
) -> None:
    one, two = pair
    one.usual, one.withheld, count = usual, withheld, 1000
    with another(fronted, folder, upstreams=addresses(pair), **PLAIN) as checked:
        statuses = Counter(ask_plainly(checked)[0] for _ in range(count))
    assert statuses == {200: count}
    assert one.received
    assert len(two.received) == count


def test_what_all_servers_refuse_is_asked_a_few_times(fronted: Fronted, folder: Path, pair: tuple[Recorder, Recorder]) -> None:
    for recorder in pair:
        recorder.usual = FULL
    with another(fronted, folder, upstreams=addresses(pair)) as checked:
        reply = checked.ask()
    assert (reply.status_code, reply.content, reply.headers["retry-after"]) == (*(503, FULL[1]), "1")
    assert sum(len(recorder.received) for recorder in pair) == 4


def ask_plainly(fronted: Fronted) -> tuple[int, bytes]:
    with contextlib.closing(HTTPConnection(*fronted.address, timeout=TIMEOUT_S)) as connection:
        connection.request("POST", PREDICT, PNG)
        reply = connection.getresponse()
        return reply.status, reply.read()


def test_all_that_a_killed_server_had_in_flight_is_asked_again(
    fronted: Fronted, folder: Path, pair: tuple[Recorder, Recorder]
) -> None:
    one, two = pair
    one.may_answer, two.may_answer, one.withheld, count = Event(), Event(), 1_000_000, 600
    with (
        another(fronted, folder, upstreams=addresses(pair), **PLAIN) as checked,
        ThreadPoolExecutor(count) as pool,
    ):
        replies = [pool.submit(ask_plainly, checked) for _ in range(count)]
        wait_for(lambda: len(one.received) + len(two.received) == count, "requests in flight")
        one.may_answer.set()
        wait_for(lambda: sum(reply.done() for reply in replies) + len(two.received) == count, "second tries")
        two.may_answer.set()
        assert Counter(reply.result()[0] for reply in replies) == {200: count}


# --- gRPC


def test_grpc_calls_have_the_health_and_the_retries_of_inference() -> None:
    """Each gRPC server gets calls while its inference address gives right answers."""
    servers, callers = [Address("127.0.0.1", 2), Address("127.0.0.1", 3)], [Address("127.0.0.1", 2), Address("127.0.0.1", 4)]
    written = yaml.safe_load(write_configuration(Front(Address("a", 1), "digits", servers, callers, reference=REFERENCE)))
    inference, calls = written["static_resources"]["clusters"]
    for part in ("health_checks", "common_lb_config", "outlier_detection", "circuit_breakers"):
        assert calls[part] == inference[part]
    one, two = (endpoint["endpoint"] for endpoint in calls["load_assignment"]["endpoints"][0]["lb_endpoints"])
    assert "health_check_config" not in one
    assert two["health_check_config"]["address"]["socket_address"]["port_value"] == 3
    (manager,) = written["static_resources"]["listeners"][0]["filter_chains"][0]["filters"]
    routes = manager["typed_config"]["route_config"]["virtual_hosts"][0]["routes"]
    policies = {route["name"]: route["route"] for route in routes if "route" in route}
    assert policies["grpc"] == policies["predictions"] | {"cluster": "grpc"}
    policy = policies["grpc"]["retry_policy"]
    assert "unavailable" in policy["retry_on"]
    assert {"name": "grpc-message", "string_match": {"prefix": "Worker died."}} in policy["retriable_headers"]


# --- limits, TLS, logs


@contextlib.contextmanager
def another(fronted: Fronted, folder: Path, concurrency: int = 1, **changed: object) -> Iterator[Fronted]:
    """An Envoy of other settings in front of the same recorder."""
    address = ("127.0.0.1", free_port())
    own = {"listen": Address(*address), "admin_socket": folder / "admin.sock", "access_log": folder / "access.log"}
    front = replace(fronted.envoy.front, **own | changed)  # type: ignore[arg-type]
    envoy = Envoy(front, folder, folder / "envoy.log", concurrency=concurrency)
    envoy.start()
    try:
        yield Fronted(address, fronted.upstream, fronted.certificate, envoy)
    finally:
        envoy.stop()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a short name: Unix sockets lie in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def ask_from(source: str, address: tuple[str, int], path: str = PREDICT, **headers: str) -> HTTPResponse:
    """Ask over plain HTTP from one of this machine's addresses, on a connection of its own. The reply is read to its end."""
    connection = HTTPConnection(*address, TIMEOUT_S, source_address=(source, 0))
    with contextlib.closing(connection):
        connection.request("POST", path, b"abc", PERMITTED | {name.replace("_", "-"): text for name, text in headers.items()})
        reply = connection.getresponse()
        reply.read()
        return reply


IN_PLAIN: dict[str, Any] = {"certificate": None, "private_key": None}
MANY = 40  # requests at once, far more than the share in these tests


def statuses_from(source: str, address: tuple[str, int], forwarded: str = "198.51.100.1") -> Counter[int]:
    """Ask many times, with an X-Forwarded-For that may have another {number} each time."""
    return Counter(ask_from(source, address, X_Forwarded_For=forwarded.format(number=number)).status for number in range(MANY))


def test_an_address_that_floods_costs_no_other_one_its_answers(fronted: Fronted, folder: Path) -> None:
    """Envoy has two threads here: the share of an address is one for both."""
    ended, flood, share = Event(), Counter[int](), 5
    with another(fronted, folder, concurrency=2, requests_per_second=share, **IN_PLAIN) as shared:

        def ask_on() -> None:
            while not ended.is_set():
                flood[ask_from("127.0.0.2", shared.address).status] += 1

        started = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            floods = [pool.submit(ask_on) for _ in range(4)]
            try:
                others = []
                for _ in range(2 * share):
                    before = flood[429]
                    wait_for(lambda before=before: flood[429] > before + MANY, "refused requests")  # type: ignore[misc]
                    others.append(ask_from("127.0.0.3", shared.address).status)
            finally:
                ended.set()
            for each in floods:
                each.result()
        took_s = time.monotonic() - started
    assert others == [200] * (2 * share)
    assert flood.keys() == {200, 429}
    assert flood[200] <= 2 * share + share * (took_s + 1)


@pytest.mark.parametrize("path", [PREDICT, "/v2/models/digits/infer", "/other"])
def test_too_many_requests_from_an_address_are_told_when_to_come_again(fronted: Fronted, folder: Path, path: str) -> None:
    with another(fronted, folder, requests_per_second=2) as slow:
        replies = [slow.ask(path, headers={}) for _ in range(MANY)]  # without a token: tokens cannot be guessed any faster
        refused = [reply for reply in replies if reply.status_code == 429]
        assert {reply.status_code for reply in replies} == {400, 429}
        assert refused
        for reply in refused:
            error = reply.json() if "/v2/" in path else reply.json()["error"]
            assert (error["code"], error["type"]) == (429, "TooManyRequests")
            assert int(reply.headers["retry-after"]) == 1


def test_a_client_of_grpc_with_too_many_calls_is_told_so(fronted: Fronted, folder: Path) -> None:
    credentials = grpc.ssl_channel_credentials(fronted.certificate.read_bytes())
    with (
        another(fronted, folder, requests_per_second=2) as slow,
        grpc.secure_channel(f"localhost:{slow.address[1]}", credentials) as channel,
    ):
        call = channel.unary_unary("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Ping")
        codes = {call.future(b"", timeout=TIMEOUT_S).code() for _ in range(MANY)}  # without a token
    assert codes == {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_no_client_has_another_share_by_what_it_says_of_its_address(fronted: Fronted, folder: Path) -> None:
    with another(fronted, folder, requests_per_second=2, **IN_PLAIN) as shared:
        assert statuses_from("127.0.0.2", shared.address, "10.0.0.{number}").keys() == {200, 429}
        assert ask_from("127.0.0.3", shared.address, X_Forwarded_For="10.0.0.1").status == 200


@pytest.mark.parametrize(
    ("source", "one_client", "another_client"),
    [
        ("127.0.0.2", "198.51.100.1", "198.51.100.2"),
        pytest.param("127.0.0.2", "10.0.0.{number}, 198.51.100.1", "198.51.100.1, 198.51.100.2", id="its own word before it"),
        pytest.param("127.0.0.2", "10.0.0.{number}, 198.51.100.1, 192.0.2.{number}", "198.51.100.2, 192.0.2.1", id="two proxies"),
        pytest.param("127.0.0.2", "2001:db8::{number}", "2001:db8:0:1::1", id="network of IPv6"),
        pytest.param("127.0.0.2", "unknown{number}", "198.51.100.1", id="unreadable"),
        pytest.param("127.0.0.3", "198.51.100.{number}", None, id="not trusted"),
        pytest.param("127.0.0.3", "192.0.2.{number}", None, id="not trusted, in a trusted one's name"),
    ],
)
def test_behind_a_trusted_proxy_each_client_has_its_share(
    fronted: Fronted, folder: Path, source: str, one_client: str, another_client: str | None
) -> None:
    trusted = ["127.0.0.2/32", "192.0.2.0/24"]
    with another(fronted, folder, requests_per_second=2, trusted_proxies=trusted, **IN_PLAIN) as shared:
        assert statuses_from(source, shared.address, one_client).keys() == {200, 429}
        if another_client is not None:
            assert ask_from(source, shared.address, X_Forwarded_For=another_client).status == 200
        assert ask_from("127.0.0.4", shared.address).status == 200
    passed = {line.partition(b":")[0] for head, _ in fronted.upstream.received for line in head.split(b"\r\n")[1:]}
    assert passed == {b"host", b"accept-encoding", b"authorization", b"content-length"}


def test_slow_clients_are_refused_in_time(fronted: Fronted, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "HEADER_TIMEOUT_S", 1)
    monkeypatch.setattr(configuration, "REQUEST_TIMEOUT_S", 2)
    monkeypatch.setattr(configuration, "IDLE_TIMEOUT_S", 2)
    with another(fronted, folder) as impatient:
        for content in (b"", HEAD[:20], HEAD, HEAD + b"Content-Length: 9\r\n\r\nabc", HEAD + CHUNKED + b"\r\n3\r\nabc\r\n"):
            reply = impatient.send(content, wait_s=TIMEOUT_S)  # until the proxy ends the connection
            assert statuses_of(reply) == ([408] if content else [])
        with socket.create_connection(impatient.address, TIMEOUT_S) as silent:  # not even a handshake
            assert silent.recv(1) == b""
    assert fronted.upstream.received == []


def test_connections_are_limited(fronted: Fronted, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "MAX_CONNECTIONS", 5)
    context = ssl.create_default_context(cafile=fronted.certificate)
    with another(fronted, folder) as small:
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                plain = stack.enter_context(socket.create_connection(small.address, TIMEOUT_S))
                stack.enter_context(context.wrap_socket(plain, server_hostname="localhost"))
            with pytest.raises(requests.ConnectionError):
                small.ask()

        def is_answered() -> bool:
            with contextlib.suppress(requests.ConnectionError):
                return small.ask().status_code == 200
            return False

        wait_for(is_answered, "free place")


def test_idle_connections_end_soon_where_few_places_are_left(
    fronted: Fronted, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So an address that holds nearly all places, and asks nothing, loses them."""
    monkeypatch.setattr(configuration, "MAX_CONNECTIONS", 10)
    monkeypatch.setattr(configuration, "IDLE_TIMEOUT_S", 10 * TIMEOUT_S)
    with another(fronted, folder, **IN_PLAIN) as small, contextlib.ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(small.address, TIMEOUT_S, source_address=("127.0.0.2", 0)))
            for _ in range(9)
        ]
        for connection in idle:
            connection.sendall(HEAD + END)
            assert statuses_of(connection.recv(65536)) == [200]
        assert [connection.recv(1) for connection in idle] == [b""] * len(idle)  # each is ended, within the socket's timeout
        assert ask_from("127.0.0.3", small.address).status == 200


@pytest.mark.parametrize("cipher", ["ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES128-SHA256", "ECDHE-ECDSA-AES256-SHA384"])
def test_no_cipher_with_cbc_is_offered(fronted: Fronted, cipher: str) -> None:
    with pytest.raises(ssl.SSLError):
        handshake(fronted, ssl.TLSVersion.TLSv1_2, cipher)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_is_of_version_1_2_or_1_3(fronted: Fronted, version: ssl.TLSVersion) -> None:
    spoken, cipher, protocol = handshake(fronted, version)
    assert spoken == version.name.replace("_", ".")
    assert "GCM" in cipher or "CHACHA20" in cipher
    assert protocol == "h2"


def test_older_tls_is_not_spoken(fronted: Fronted) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)), pytest.warns(DeprecationWarning, match="TLSv1_1"):
        handshake(fronted, ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0")


def handshake(fronted: Fronted, version: ssl.TLSVersion, ciphers: str | None = None) -> tuple[str, str, str | None]:
    context = ssl.create_default_context(cafile=fronted.certificate)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    if ciphers is not None:
        context.set_ciphers(ciphers)
    with (
        socket.create_connection(fronted.address, TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        return secured.version() or "", (secured.cipher() or ("",))[0], secured.selected_alpn_protocol()


def test_plain_http_on_the_port_of_tls_is_told_so(fronted: Fronted) -> None:
    reply = requests.get(f"http://localhost:{fronted.address[1]}/ping", headers=PERMITTED, timeout=TIMEOUT_S)
    assert reply.status_code == 403
    assert "only accepts HTTPS" in reply.json()["error"]["message"]
    assert fronted.upstream.received == []


def test_log_says_who_was_refused_and_nothing_that_was_sent(fronted: Fronted) -> None:
    mark = "SECRETMARK"
    headers = PERMITTED | {"X-Private": mark, "Expect": mark, "Content-Type": f"multipart/form-data; boundary={mark}"}
    assert fronted.ask(f"{PREDICT}?{mark}", mark, headers=headers, data=mark).status_code in (400, 417)
    assert fronted.ask(f"/{mark}", headers=headers | {"Expect": ""}, data=mark).status_code in (400, 404, 417)
    assert fronted.ask(headers={"Authorization": f"Bearer {mark}"}).status_code == 400
    access_log = fronted.envoy.front.access_log
    assert access_log is not None
    wait_for(lambda: access_log.is_file() and "predictions 400" in access_log.read_text(), "line in the log")
    assert " 127.0.0.1:" in access_log.read_text()
    shown = fronted.envoy._ask("/config_dump").decode() + fronted.envoy._ask("/stats").decode()
    for text in (access_log.read_text(), fronted.envoy.log_tail(), shown):
        assert mark not in text
        assert TOKEN not in text


def test_a_large_access_log_begins_anew(fronted: Fronted, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_LOG_BYTES", 1)
    with another(fronted, folder) as logging:
        log, old = folder / "access.log", folder / "access.1.log"
        logging.ask("/other")
        wait_for(lambda: log.is_file() and log.read_text(), "line in the log")
        logging.envoy.rotate_log()
        assert " refused 404 " in old.read_text()
        wait_for(log.is_file, "new log")
        logging.ask("/another")
        wait_for(lambda: log.read_text().count("404") == 1, "line in the new log")


# --- configuration


def test_envoy_says_why_it_does_not_start(fronted: Fronted, folder: Path) -> None:
    broken = replace(fronted.envoy.front, certificate=Path("/no-such-file"), admin_socket=folder / "admin.sock")
    with pytest.raises(ProxyError, match=r"(?s)Envoy did not start:.*no-such-file"):
        Envoy(broken, folder, folder / "log").start()


@pytest.mark.parametrize(
    "front",
    [
        Front(Address("127.0.0.1", 1), "digits", [Address("127.0.0.1", 2)]),
        Front(Address("127.0.0.1", 1), "digits", [Address("a.example", 2), Address("127.0.0.1", 3)], reference=REFERENCE),
        Front(Address("0.0.0.0", 1), "a b+c.d", [Address("127.0.0.1", 2)], [Address("b", 3)], requests_per_second=0),
        Front(Address("0.0.0.0", 1), "digits", [Address("127.0.0.1", 2)], trusted_proxies=["10.0.0.0/8", "2001:db8::/32"]),
    ],
    ids=["one server", "several servers", "odd name", "trusted proxies"],
)
def test_envoy_accepts_the_configuration(front: Front, tmp_path: Path) -> None:
    file = tmp_path / "envoy.yaml"
    file.write_text(write_configuration(front))
    finished = subprocess.run(
        [*command(file, concurrency=1), "--mode", "validate"], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert finished.returncode == 0, finished.stderr
    assert "[warning]" not in finished.stderr


def test_health_is_asked_by_the_reference_image() -> None:
    written = yaml.safe_load(write_configuration(Front(Address("a", 1), "digits", [Address("b", 2)], reference=REFERENCE)))
    (check,) = written["static_resources"]["clusters"][0]["health_checks"]
    sent = json.loads(bytes.fromhex(check["http_health_check"]["send"]["text"]))
    assert np.allclose(sent["data"], REFERENCE.pixels)
    received = [bytes.fromhex(payload["text"]).decode() for payload in check["http_health_check"]["receive"]]
    assert received == ['"digit":3,', f'"weights_sha256":"{"ab" * 32}"']


def is_ok(fronted: Fronted) -> bool:
    return fronted.ask().status_code == 200


def test_only_a_server_with_the_right_digit_and_weights_is_asked(fronted: Fronted, folder: Path) -> None:
    right = b'{"digit":3,"model":{"weights_sha256":"' + b"ab" * 32 + b'"}}'
    for answer, status in ((right, 200), (right.replace(b":3", b":4"), 503), (right.replace(b"ab", b"cd"), 503)):
        fronted.upstream.replies = [("200 OK", answer)] * 2
        with another(fronted, folder, reference=REFERENCE) as checked:
            if status == 200:
                wait_for(partial(is_ok, checked), "answer")
            else:
                wait_for(lambda: len(fronted.upstream.replies) < 2, "health check")
                reply = checked.ask()
                assert (reply.status_code, reply.json()["error"]["type"]) == (503, "Overloaded")
                assert reply.headers["retry-after"] == "1"


@pytest.mark.parametrize("text", ["", "a", "a:", ":1", "a:0", "a:65536", "a:b", "::1:80", "http://a:1", "unix:relative"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected HOST:PORT or unix:PATH"):
        Address.parse(text)


def test_addresses_are_read() -> None:
    assert Address.parse("10.0.0.1:8080") == Address("10.0.0.1", 8080)
    assert Address.parse("unix:/run/a.sock") == Address("/run/a.sock")


# --- the command


def test_committed_example_is_what_the_generator_writes(archive: Path) -> None:
    """`serve_config/README.md` has the command."""
    example = SERVE_CONFIG / "proxy" / "envoy.yaml"
    options = ["--upstream=10.0.0.1:8080", "--upstream=10.0.0.2:8080", "--listen=0.0.0.0:8443", f"--archive={archive}"]
    options += [f"--{name}=/etc/saliency-serve/{name}.pem" for name in ("certificate", "private-key")]
    assert main([*options, "--key-file=/etc/saliency-serve/token", f"--check={example}"]) == 0


def test_an_example_of_other_settings_is_not_current(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--upstream=a:1", f"--archive={archive}"]
    assert main([*options, f"--output={tmp_path / 'envoy.yaml'}"]) == 0
    assert main([*options, f"--check={tmp_path / 'envoy.yaml'}"]) == 0
    assert main([*options, "--upstream=b:2", f"--check={tmp_path / 'envoy.yaml'}"]) == 1
    assert "is not what these settings give" in capsys.readouterr().err
    assert main(options) == 0
    assert capsys.readouterr().out == (tmp_path / "envoy.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--upstream=b:1", "--grpc-upstream=a:1"],
            "expected a --grpc-upstream for each --upstream, got 1 for 2",
        ),
        (["--certificate=a"], "--certificate and --private-key need each other"),
        (["--listen=localhost:1"], "expected an IPv4 address as --listen"),
        (["--archive=/missing.mar"], "/missing.mar is not a readable archive"),
    ],
)
def test_half_a_command_is_refused(archive: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--upstream=a:1", f"--archive={archive}", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trusted-proxy=10.0.0.1/8", "expected a network, such as 10.0.0.0/8, or an address, got '10.0.0.1/8'"),
        ("--trusted-proxy=balancer", "expected a network, such as 10.0.0.0/8, or an address, got 'balancer'"),
        ("--requests-per-second=-1", "expected an integer from 0 to 1000000000, got '-1'"),
        ("--requests-per-second=3000000000", "expected an integer from 0 to 1000000000, got '3000000000'"),
    ],
)
def test_what_is_no_share_is_refused(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--upstream=a:1", option])
    assert message in capsys.readouterr().err


HARDENED = ["--hardened", "--certificate=c.pem", "--private-key=k.pem"]


@pytest.mark.parametrize(
    ("options", "requests_per_second"),
    [
        (HARDENED, REQUESTS_PER_SECOND),
        ([*HARDENED, "--requests-per-second=7"], 7),
        ([*HARDENED, "--requests-per-second=0"], 0),
        (["--cluster"], 0),
        (["--cluster", *HARDENED], 0),
        (["--cluster", "--requests-per-second=7"], 7),
        (["--cluster", "--trusted-proxy=10.0.0.0/8"], REQUESTS_PER_SECOND),
        (["--cluster", "--trusted-proxy=10.0.0.0/8", "--requests-per-second=0"], 0),
    ],
)
def test_a_server_in_a_cluster_limits_no_address_until_it_knows_its_load_balancer(
    options: list[str], requests_per_second: int, tmp_path: Path
) -> None:
    front = make_front(read_settings(build_parser().parse_args(options)), tmp_path).front
    assert front.requests_per_second == requests_per_second
    assert front.trusted_proxies == (["10.0.0.0/8"] if "--trusted-proxy=10.0.0.0/8" in options else [])


@pytest.mark.parametrize("option", ["--requests-per-second=7", "--requests-per-second=0", "--trusted-proxy=10.0.0.0/8"])
def test_without_a_front_there_are_no_shares(option: str) -> None:
    with pytest.raises(ServeError, match=rf"^{option.partition('=')[0]} needs --hardened or --cluster$"):
        read_settings(build_parser().parse_args([option]))


def test_shares_stand_in_the_configuration(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--requests-per-second=7", "--trusted-proxy=10.0.0.0/8", "--trusted-proxy=2001:db8::1"]
    assert main(["--upstream=a:1", f"--archive={archive}", *options]) == 0
    (chain,) = yaml.safe_load(capsys.readouterr().out)["static_resources"]["listeners"][0]["filter_chains"]
    manager = chain["filters"][0]["typed_config"]
    (share,) = manager["http_filters"][0]["typed_config"]["descriptors"]
    assert share["token_bucket"]["tokens_per_fill"] == 7
    (detection,) = manager["original_ip_detection_extensions"]
    assert detection["typed_config"]["xff_trusted_cidrs"]["cidrs"] == [
        {"address_prefix": "10.0.0.0", "prefix_len": 8},
        {"address_prefix": "2001:db8::1", "prefix_len": 128},
    ]
