"""The page's own server and its command line, without a browser: whom it answers, and what it lets through."""

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from scripts.demo import page
from scripts.demo.command import build_parser, main, read_served_model
from scripts.demo.page import STATIC, PageError, ServedModel, serving_page
from tests.upstream import ANSWER, DESCRIPTION, Asked, Upstream, free_port

TIMEOUT_S = 20
TOKEN = "AbCd1234"


@pytest.fixture(scope="module")
def model_server() -> Iterator[Upstream]:
    with Upstream().running() as running:
        yield running


@pytest.fixture
def upstream(model_server: Upstream) -> Upstream:
    model_server.forget()
    return model_server


@pytest.fixture(scope="module")
def address(model_server: Upstream) -> Iterator[str]:
    with serving_page(ServedModel(model_server.address, "digits", model_server.address), free_port()) as served:
        yield served.rstrip("/")


def ask(address: str, method: str = "POST", path: str = "/explanation", **more: Any) -> requests.Response:
    """Ask as the page's own script does, but for what is given."""
    headers = {"Origin": address, "Content-Type": "application/json", "Sec-Fetch-Site": "same-origin"} | more.pop("headers", {})
    kept = {name: value for name, value in headers.items() if value is not None}
    return requests.request(method, address + path, headers=kept, timeout=TIMEOUT_S, **({"data": b"{}"} | more))


def error_of(reply: requests.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["type"]


# --- what is forwarded


def test_page_s_own_script_gets_the_model_s_answer_and_nothing_else_of_it(address: str, upstream: Upstream) -> None:
    reply = ask(address, data=b'{"data": 1}', headers={"Cookie": "a=b", "X-Anything": "c"})
    assert (reply.status_code, reply.json()) == (200, ANSWER)
    assert "set-cookie" not in reply.headers
    (asked,) = upstream.asked
    assert (asked.method, asked.path, asked.body) == ("POST", "/explanations/digits", b'{"data": 1}')
    assert not asked.headers.keys() & {"cookie", "x-anything", "origin", "authorization"}


def test_description_comes_from_the_management_api(address: str, upstream: Upstream) -> None:
    assert ask(address, "GET", "/description", data=None).json() == {"class_count": 10}
    assert (upstream.asked[0].method, upstream.asked[0].path) == ("GET", "/models/digits?customized=true")


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/predictions/digits",
            "/explanations/digits",
            "/models",
            "/models/digits",
            "/ping",
            "/metrics",
            "/token?type=inference",
        ),
        *("/explanation/../models", "/explanation/digits", "/%2e%2e/page.py", "/..%2fpage.py", "//etc/passwd", "/static/main.js"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "CONNECT"])
def test_nothing_else_is_forwarded(address: str, upstream: Upstream, method: str, path: str) -> None:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    with contextlib.closing(connection):
        connection.request(method, path, headers={"Origin": address})
        assert connection.getresponse().status in (404, 405)
    assert upstream.asked == []


@pytest.mark.parametrize(("method", "path"), [("GET", "/explanation"), ("PUT", "/explanation"), ("POST", "/description")])
def test_routes_take_their_own_method_alone(address: str, upstream: Upstream, method: str, path: str) -> None:
    assert ask(address, method, path).status_code in (404, 405)
    assert upstream.asked == []


# --- who is answered


FOREIGN = [
    pytest.param({"Origin": "http://evil.example"}, id="another site"),
    pytest.param({"Origin": "null"}, id="a sandboxed frame"),
    pytest.param({"Origin": "http://127.0.0.1:1"}, id="another port"),
    pytest.param({"Origin": "http://localhost:{port}"}, id="another name of this machine"),
    pytest.param({"Origin": "https://127.0.0.1:{port}"}, id="another scheme"),
    pytest.param({"Origin": None}, id="no origin"),
    pytest.param({"Sec-Fetch-Site": "cross-site"}, id="cross-site by fetch metadata"),
    pytest.param({"Sec-Fetch-Site": "same-site"}, id="same site, another port"),
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_other_pages_reach_no_model(address: str, upstream: Upstream, headers: dict[str, str | None]) -> None:
    port = str(urlsplit(address).port)
    filled = {name: value and value.replace("{port}", port) for name, value in headers.items()}
    reply = ask(address, headers=filled)
    assert error_of(reply) == (403, "OtherOrigin")
    assert not any(name.lower().startswith("access-control-") for name in reply.headers)
    if filled.get("Origin", "") is not None:
        assert error_of(ask(address, "GET", "/description", data=None, headers=filled)) == (403, "OtherOrigin")
    assert upstream.asked == []


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{port}", "[::1]:{port}", ""],
)
@pytest.mark.parametrize("path", ["/", "/main.js", "/settings.json", "/description"])
def test_page_answers_under_its_own_name_alone(address: str, upstream: Upstream, host: str, path: str) -> None:
    """A name that another site makes to point at this machine (DNS rebinding) shows in Host."""
    named = host.replace("{port}", str(urlsplit(address).port))
    reply = ask(address, "GET", path, data=None, headers={"Host": named, "Origin": None, "Sec-Fetch-Site": None})
    assert error_of(reply) == (421, "WrongHost")
    assert upstream.asked == []


def test_page_answers_as_localhost_too(address: str) -> None:
    host = f"localhost:{urlsplit(address).port}"
    reply = ask(address, headers={"Host": host, "Origin": f"http://{host}"})
    assert reply.json() == ANSWER


def test_form_of_another_page_is_no_question(address: str, upstream: Upstream) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", None):
        assert error_of(ask(address, headers={"Content-Type": kind})) == (415, "WrongContentType")
    assert upstream.asked == []


def test_every_reply_forbids_what_the_page_does_not_need(address: str) -> None:
    for path in ("/", "/main.js", "/settings.json", "/nothing"):
        headers = ask(address, "GET", path, data=None).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"https?:|\*|data:|blob:", policy)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["referrer-policy"] == "no-referrer"


def test_page_names_no_other_server() -> None:
    for file in STATIC.iterdir():
        addresses = set(re.findall(r"https?://[\w.]+", file.read_text())) - {"http://www.w3.org"}  # the namespace of SVG
        assert not addresses, file


# --- limits


def test_body_that_is_too_large_is_refused_before_it_is_read(
    address: str, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MAX_BODY_BYTES", 1000)
    assert ask(address, data=b"a" * 1000).status_code == 200
    assert error_of(ask(address, data=b"a" * 1001)) == (413, "RequestTooLarge")
    assert error_of(ask(address, data=iter([b"a" * 600, b"a" * 600]))) == (413, "RequestTooLarge")
    assert len(upstream.asked) == 1


def test_reply_that_is_too_large_is_no_answer(address: str, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_REPLY_BYTES", 100)
    upstream.answer = lambda _: (200, {"a": "a" * 200})
    assert error_of(ask(address)) == (502, "NotThisService")


def test_slow_model_and_slow_page_are_waited_for_so_long(
    address: str, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "REPLY_TIMEOUT_S", 0.3)
    monkeypatch.setattr(page, "BODY_TIMEOUT_S", 0.3)
    upstream.delay_s = 5
    assert error_of(ask(address)) == (504, "NoAnswer")
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S) as connection:
        head = f"POST /explanation HTTP/1.1\r\nHost: {parts.netloc}\r\nOrigin: {address}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 10\r\n\r\n{{".encode())
        assert b"408" in connection.recv(1000).partition(b"\r\n")[0]


def test_question_that_the_page_takes_back_is_taken_back_from_the_model(address: str, upstream: Upstream) -> None:
    upstream.delay_s = 10
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    connection.request("POST", "/explanation", b"{}", {"Origin": address, "Content-Type": "application/json"})
    while not upstream.asked:
        time.sleep(0.01)
    connection.close()
    deadline = time.monotonic() + 8
    while not upstream.ended:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- states of the model's server


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((200, b"<html>"), (502, "NotThisService")),
        ((401, {"error": "no"}), (401, "TokenRefused")),
        ((403, b"denied"), (401, "TokenRefused")),
        ((429, b"slow down"), (429, "HTTPError")),
        ((503, b"no healthy upstream"), (503, "HTTPError")),
        ((400, {"code": 400, "type": "InvalidKeyException", "message": "no"}), (401, "TokenRefused")),
    ],
    ids=[
        "another service",
        "a proxy's 401",
        "a proxy's 403",
        "a proxy's limit",
        "a proxy without servers",
        "TorchServe's own refusal",
    ],
)
def test_reply_that_is_no_answer_says_what_it_is(
    address: str, upstream: Upstream, answer: tuple[int, object], expected: tuple[int, str]
) -> None:
    upstream.answer = lambda _: answer
    assert error_of(ask(address)) == expected


def test_error_of_the_model_goes_through_as_it_is(address: str, upstream: Upstream) -> None:
    error = {"error": {"code": 422, "type": "BlankImage", "message": "expected a digit"}}
    upstream.answer = lambda _: (422, error)
    reply = ask(address)
    assert (reply.status_code, reply.json()) == (422, error)


def test_server_that_is_not_there_is_named(upstream: Upstream) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    with serving_page(ServedModel(gone, "digits"), free_port()) as address:
        reply = ask(address.rstrip("/"))
        assert error_of(reply) == (502, "Unreachable")
        assert gone in reply.json()["error"]["message"]
        assert error_of(ask(address.rstrip("/"), "GET", "/description", data=None)) == (404, "NoDescription")


def test_server_that_starts_is_left_alone(upstream: Upstream) -> None:
    starting = threading.Event()
    starting.set()
    served = ServedModel(upstream.address, "digits", upstream.address, is_starting=starting.is_set)
    with serving_page(served, free_port()) as address:
        assert error_of(ask(address.rstrip("/"))) == (503, "Starting")
        assert upstream.asked == []
        starting.clear()
        assert ask(address.rstrip("/")).json() == ANSWER


# --- the token


def test_token_stays_here_and_is_read_again_when_it_is_refused(upstream: Upstream, tmp_path: Path) -> None:
    key_file = tmp_path / "key_file.json"
    keys = {"inference": {"key": "old1"}, "management": {"key": TOKEN + "m"}}
    key_file.write_text(json.dumps(keys))

    def answer(asked: Asked) -> tuple[int, object]:
        role = "m" if asked.path.startswith("/models/") else ""
        if asked.headers.get("authorization") != f"Bearer {TOKEN}{role}":
            keys["inference"]["key"] = TOKEN  # renewed while the old one is on its way
            key_file.write_text(json.dumps(keys))
            return 400, {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed"}
        return 200, DESCRIPTION if role else ANSWER

    upstream.answer = answer
    with serving_page(ServedModel(upstream.address, "digits", upstream.address, key_file), free_port()) as address:
        origin = address.rstrip("/")
        replies = [
            ask(origin),
            ask(origin),
            *(ask(origin, "GET", path, data=None) for path in ("/description", "/settings.json", "/")),
        ]
        assert [reply.status_code for reply in replies] == [200] * 5
        key_file.unlink()
        replies.append(ask(origin))
        assert error_of(replies[-1]) == (401, "NoToken")
        for reply in replies:
            assert TOKEN not in reply.text + str(reply.headers)
    assert [asked.headers["authorization"] for asked in upstream.asked][:2] == ["Bearer old1", f"Bearer {TOKEN}"]


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "cats"], "--model needs --url"),
        (["--key-file", "a"], "--key-file needs --url"),
        (["--url", "127.0.0.1:8080"], "expected an address such as"),
        (["--url", "ftp://a"], "expected an address such as"),
        (["--url", "http://user:pass@a"], "expected an address such as"),
        (["--url", "http://a", "--management-url", "b"], "as --management-url"),
        (["--url", "http://a.example", "--key-file", "key"], "expected https as --url with --key-file"),
        (["--url", "https://a.example", "--ca-file", "/nothing"], "there is no file /nothing"),
        (["--archive", "/nothing.mar"], "there is no archive /nothing.mar"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_on_the_command_line_are_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--no-browser", "--port", str(free_port())]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_taken_port_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["--url", "http://127.0.0.1:1", "--no-browser", "--port", str(port)]) == 1
    assert f"port {port} is taken" in capsys.readouterr().err
    with pytest.raises(PageError, match="choose another"), serving_page(ServedModel("http://127.0.0.1:1", "digits"), -1):
        pass


@pytest.mark.parametrize(
    ("arguments", "management"),
    [
        (["--url", "http://localhost:9080/"], "http://127.0.0.1:8081"),
        (["--url", "https://a.example"], None),
        (["--url", "https://a.example", "--management-url", "https://b.example/m/"], "https://b.example/m"),
    ],
    ids=["on this machine", "elsewhere", "named"],
)
def test_management_api_is_looked_for_on_this_machine_alone(arguments: list[str], management: str | None) -> None:
    served = read_served_model(build_parser().parse_args(arguments))
    assert served.management_url == management
    assert not served.url.endswith("/")
