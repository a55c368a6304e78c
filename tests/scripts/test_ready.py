"""The readiness probe, against servers that are wrong in one way each. Against a real one: tests/e2e/test_ready.py."""

import contextlib
import copy
import http.server
import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.packaging.package import read_archive, write_archive
from scripts.paths import ROOT
from scripts.serving import ready
from tests.oracle import Oracle
from tests.tolerance import require_close

WRITTEN_SHARE = 6e-7  # of the largest number, which is written with seven digits


@pytest.fixture
def reference(archive: Path) -> ready.ReferenceAnswer:
    expected = ready.read_reference_answer(archive)
    assert expected is not None
    return expected


@pytest.fixture
def right_reply(reference: ready.ReferenceAnswer) -> dict[str, Any]:
    """What a right server answers to both requests, as far as the probe looks."""
    return {
        "digit": reference.digit,
        "logits": reference.logits,
        "explanation": {"target": reference.digit, "saliency": reference.saliency},
        "model": {"weights_sha256": reference.weights_sha256},
    }


@contextlib.contextmanager
def answering(status: int, body: bytes, token: str | None = None) -> Iterator[str]:
    """A server that gives one reply to everything, or, where it wants a token, to those who show it."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the base class's name
            self.rfile.read(int(self.headers["Content-Length"]))
            allowed = token is None or self.headers["Authorization"] == f"Bearer {token}"
            self.send_response(status if allowed else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run_probe(capsys: pytest.CaptureFixture[str], address: str, *options: str) -> tuple[int, str]:
    code = ready.main(["--address", address, *options])
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert printed.count("\n") == 1
    return code, printed


def test_reference_answer_is_what_an_independent_computation_says(archive: Path, reference: ready.ReferenceAnswer) -> None:
    logits, jacobian = Oracle(read_archive(archive)["weights.safetensors"]).explain(np.array(reference.pixels))
    assert reference.digit == logits.argmax()
    assert reference.logits is not None
    assert reference.saliency is not None
    require_close(reference.logits, logits, WRITTEN_SHARE)
    require_close(reference.saliency, jacobian[logits.argmax()], WRITTEN_SHARE, row_axes=2)


def test_right_answers_are_ready(archive: Path, right_reply: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with answering(200, json.dumps(right_reply).encode()) as address:
        code, printed = run_probe(capsys, address, "--archive", str(archive))
    assert (code, printed.startswith(f"ready: {address}")) == (0, True)


def test_token_is_shown_and_never_printed(
    archive: Path, right_reply: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token_file = tmp_path / "token"
    options = ["--archive", str(archive), "--key-file", str(token_file)]
    with answering(200, json.dumps(right_reply).encode(), token="s3cret") as address:
        token_file.write_text("s3cret\n")
        assert run_probe(capsys, address, *options)[0] == 0
        for wrong, message in (
            ("s3cre7", "predictions answers 401"),
            ("s3cre\nt", f"{token_file} holds no token"),
            ("", "no token"),
        ):
            token_file.write_text(wrong)
            code, printed = run_probe(capsys, address, *options)
            assert (code, message in printed, "s3cre" in printed) == (1, True, False)


def change(reply: dict[str, Any], path: str, value: object) -> None:
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for parent in parents:
        reply = reply[parent]  # type: ignore[index]
    reply[last] = value  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.weights_sha256", "0" * 64, f"other weights are served: expected {{weights}}, got {'0' * 64}"),
        ("digit", -1, "a wrong answer: expected digit {digit}, got -1"),
        ("logits.9", 99.0, "a wrong answer: logits differ from what was expected by"),
        ("logits.9", math.nan, "a wrong answer: logits differ"),
        ("explanation.target", -1, "a wrong answer: expected an explanation of class {digit}, got class -1"),
        ("explanation.saliency.27.27", 0.5, "a wrong answer: saliency differ"),
        ("explanation.saliency", [[0.0]], "a wrong answer: expected 784 numbers of saliency, got 1"),
        ("explanation", None, "does not reply as this API does: TypeError"),
    ],
)
def test_each_wrong_answer_is_found(
    archive: Path, right_reply: dict[str, Any], capsys: pytest.CaptureFixture[str], path: str, value: object, message: str
) -> None:
    message = message.format(digit=right_reply["digit"], weights=right_reply["model"]["weights_sha256"])
    wrong = copy.deepcopy(right_reply)
    change(wrong, path, value)
    with answering(200, json.dumps(wrong).encode()) as address:
        code, printed = run_probe(capsys, address, "--archive", str(archive))
    assert (code, message in printed) == (1, True), printed


@pytest.mark.parametrize(("share", "expected_code"), [(2e-6, 0), (1e-4, 1)], ids=["rounding", "more"])
@pytest.mark.parametrize("path", ["logits", "explanation.saliency"])
def test_numbers_may_differ_by_a_share_of_the_largest(
    archive: Path, right_reply: dict[str, Any], capsys: pytest.CaptureFixture[str], path: str, share: float, expected_code: int
) -> None:
    numbers = np.array(right_reply["logits"] if path == "logits" else right_reply["explanation"]["saliency"])
    numbers.flat[np.abs(numbers).argmin()] += share * np.abs(numbers).max()
    wrong = copy.deepcopy(right_reply)
    change(wrong, path, numbers.tolist())
    with answering(200, json.dumps(wrong).encode()) as address:
        code, printed = run_probe(capsys, address, "--archive", str(archive))
    assert (code, "differ from what was expected by" in printed) == (expected_code, expected_code == 1), printed


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (503, b'{\n"code": 503}\n', 'predictions answers 503: { "code": 503} '),
        (200, b"hello", "does not reply as this API does: JSONDecodeError"),
    ],
)
def test_another_reply_is_not_ready(
    archive: Path, capsys: pytest.CaptureFixture[str], status: int, body: bytes, message: str
) -> None:
    with answering(status, body) as address:
        code, printed = run_probe(capsys, address, "--archive", str(archive))
    assert (code, message in printed) == (1, True), printed


@contextlib.contextmanager
def silent_server(send: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that accepts, and then does something else than answer."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            client, _ = listening.accept()
            with client, contextlib.suppress(OSError):  # the probe leaves
                send(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


def wait_for_the_end(client: socket.socket) -> None:
    client.settimeout(60)
    while client.recv(65536):
        pass


def trickle(client: socket.socket) -> None:
    """A byte every tenth of a second: no single wait is long."""
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b" " * 10:
        client.sendall(bytes([byte]))
        time.sleep(0.1)


@pytest.mark.parametrize("send", [wait_for_the_end, trickle])
def test_hanging_server_is_not_ready_within_the_timeout(archive: Path, send: Callable[[socket.socket], None]) -> None:
    """In a process of its own: its end must not wait for the server either."""
    with silent_server(send) as address:
        started = time.monotonic()
        finished = subprocess.run(
            [sys.executable, "-m", "scripts.serving.ready", "--address", address, "--archive", archive, "--timeout", "1"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        elapsed_s = time.monotonic() - started
    assert (finished.returncode, finished.stderr) == (1, f"not ready: no answer from {address} within 1 s\n")
    assert elapsed_s >= 1
    if send is trickle:
        assert elapsed_s < 5.5  # the trickle alone takes longer


def test_absent_server_is_not_ready(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    code, printed = run_probe(capsys, address, "--archive", str(archive))
    assert (code, f"not ready: no server answers at {address}: " in printed) == (1, True), printed


def test_archive_without_a_reference_answer_is_named(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = read_archive(archive)
    write_archive(tmp_path / "old.mar", {name: entries[name] for name in entries.keys() - {"reference.json"}})
    code, printed = run_probe(capsys, "http://127.0.0.1:1", "--archive", str(tmp_path / "old.mar"))
    assert (code, "old.mar holds no reference answer; build it with scripts.packaging, or" in printed) == (1, True)
    (tmp_path / "no.mar").write_text("no archive")
    code, printed = run_probe(capsys, "http://127.0.0.1:1", "--archive", str(tmp_path / "no.mar"))
    assert (code, "no.mar is not a readable archive: File is not a zip file" in printed) == (1, True)


def test_probe_waits_where_it_is_told_to(archive: Path, right_reply: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["--address", f"http://127.0.0.1:{port}", "--archive", str(archive), "--wait"]
    started = time.monotonic()
    assert ready.main([*arguments, "1"]) == 1
    assert time.monotonic() - started >= 1


def test_probe_loads_nothing_slow() -> None:
    """It starts every few seconds in each pod."""
    code = "import sys, scripts.serving.ready; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "requests", "PIL", "handler"} & set(json.loads(loaded.replace("'", '"')))
