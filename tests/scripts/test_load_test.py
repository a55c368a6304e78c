"""The load generator against small real servers that stall, fail, cut replies short and speak no HTTP."""

import contextlib
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from scripts.bench import load_test
from scripts.bench.digit_requests import KINDS, is_right_form
from scripts.bench.load import RECORD, Call, Failure, GarbageReply, Load, ReplyReader, Samples, build_call, run_load
from scripts.bench.load_report import StepSummary, find_knee, find_warnings, summarise
from scripts.bench.load_test import read_mix
from scripts.paths import MODEL_NAME, ROOT, SAMPLE_FILES
from tests.tls import make_certificate

STALL_S = 1.0
TOKEN = "kept-to-itself-4711"


def reply_with(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A reply of known length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


DIGIT = reply_with(b'{"digit": 7}')
MAP = reply_with(b'{"digit": 7, "explanation": {"shape": [1, 2], "saliency": [[0.5, -0.5]]}}')


@dataclass(frozen=True)
class Got:
    """A request as the server got it; `number` counts from 0."""

    number: int
    head: str
    body: bytes


class Connection(socketserver.StreamRequestHandler):
    """Answers the requests of a connection, until it is told to close it."""

    server: "Server"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while head := b"".join(iter(self._line, b"")):
                length = re.search(rb"(?i)content-length: (\d+)", head)
                body = self.rfile.read(int(length[1]) if length else 0)
                self.server.answer(self, Got(next(self.server.numbers), head.decode(), body))
                if self.wfile.closed:
                    return

    def _line(self) -> bytes:
        line = self.rfile.readline()
        return b"" if line == b"\r\n" else line

    def send(self, content: bytes, *, then_close: bool = False) -> None:
        self.wfile.write(content)
        if then_close:
            self.wfile.close()

    def reset(self) -> None:
        """Close such that the client gets a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.wfile.close()
        self.rfile.close()
        self.connection.close()


Answer = Callable[[Connection, Got], None]


class Server(socketserver.ThreadingTCPServer):
    """A server on a free port of the loopback address, with a thread for each connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, answer: Answer, tls: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.answer = answer
        self.numbers = itertools.count()
        self.tls = tls

    def get_request(self) -> tuple[socket.socket, object]:
        opened, peer = super().get_request()
        if self.tls:  # the handshake is made by the connection's own thread, with its first read
            opened = self.tls.wrap_socket(opened, server_side=True, do_handshake_on_connect=False)
        return opened, peer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gives up is no news."""


@contextlib.contextmanager
def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server that answers as the function does; its address."""
    with Server(answer, tls) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def answer_well(connection: Connection, got: Got) -> None:
    connection.send(MAP if "/explanations/" in got.head else DIGIT)


def call_to(address: str, body: bytes = b"image") -> list[Call]:
    return [build_call("predict", address, "/predictions/digits", body, {})]


def one_at_a_time(answer: Answer) -> Answer:
    lock = threading.Lock()

    def answer_locked(connection: Connection, got: Got) -> None:
        with lock:
            answer(connection, got)

    return answer_locked


def stall_once(number: int) -> Answer:
    """A server of one lane that needs a second for one request, and no time for the others."""

    def answer(connection: Connection, got: Got) -> None:
        if got.number == number:
            time.sleep(STALL_S)
        connection.send(DIGIT)

    return one_at_a_time(answer)


@pytest.mark.parametrize("max_connections", [1, 256], ids=["waiting for the one connection", "waiting in the server"])
def test_open_loop_shows_a_stall_in_every_request_that_it_held_up(max_connections: int) -> None:
    with serving(stall_once(20)) as address:
        samples = run_load(Load(address, call_to(address), rate=100, duration_s=1.8, connections=max_connections))
    assert samples.request_count == 180
    assert samples.error_counts == {}
    latencies_ms = samples.latencies_ms()
    assert samples.latency_quantiles_ms([0.99, 1.0]).min() >= 900 * STALL_S
    assert (latencies_ms >= 500 * STALL_S).sum() >= 45  # those due in its first half
    assert samples.connections <= max_connections


def test_closed_loop_shows_a_stall_in_one_request_a_connection() -> None:
    with serving(stall_once(20)) as address:
        samples = run_load(Load(address, call_to(address), connections=2, duration_s=1.8))
    latencies_ms = samples.latencies_ms()
    assert 1 <= (latencies_ms >= 900 * STALL_S).sum() <= 2
    assert samples.connections == 2
    assert len(latencies_ms) > 20


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_every_reply_is_inspected_and_a_refused_one_is_a_failure(loop: str) -> None:
    seen: list[tuple[int, int, bytes]] = []

    def inspect(call: int, status: int, body: bytes) -> bool:
        seen.append((call, status, body))
        return len(seen) != 3

    with serving(answer_well) as address:
        if loop == "open":
            samples = run_load(Load(address, call_to(address), rate=100, duration_s=0.1), inspect=inspect)
        else:
            samples = run_load(Load(address, call_to(address), connections=1, duration_s=0.5), inspect=inspect)
    assert set(seen) == {(0, 200, b'{"digit": 7}')}
    assert len(seen) == len(samples.records) > 3
    assert np.flatnonzero(samples.failure == Failure.WRONG_FORM).tolist() == [2]


def test_more_is_offered_than_a_slow_server_serves() -> None:
    def answer(connection: Connection, got: Got) -> None:
        time.sleep(0.005)
        connection.send(DIGIT)

    with serving(one_at_a_time(answer)) as address:
        samples = run_load(Load(address, call_to(address), rate=500, duration_s=0.6, connections=8))
    assert samples.offered_rate == 500
    assert samples.request_count == 300
    assert 0 < samples.served_rate <= 205  # a reply takes 5 ms or more
    assert samples.error_counts == {}  # all are answered in the end,
    assert samples.latency_quantiles_ms([1.0])[0] >= 800  # the last one after 300 * 5 ms - 600 ms
    assert samples.connections == 8
    assert find_knee([summarise(samples)]) is None


def test_warm_up_is_sent_and_not_counted() -> None:
    def answer(connection: Connection, got: Got) -> None:
        connection.send(DIGIT if got.number >= 20 else reply_with(b"", "503 Service Unavailable"))

    with serving(answer) as address:
        # One connection, so that requests arrive and are answered in the order of sending.
        samples = run_load(Load(address, call_to(address), rate=100, warm_up_s=0.2, duration_s=0.3, connections=1))
    assert samples.scheduled_s == pytest.approx(np.arange(-20, 30) / 100)
    assert samples.request_count == 30
    assert (samples.status == 503).sum() == 20
    assert samples.error_counts == {}


FAILURES: dict[str, tuple[Answer, str]] = {
    "503": (lambda connection, got: connection.send(reply_with(b"{}", "503 Service Unavailable")), "HTTP 503"),
    "cut": (lambda connection, got: connection.send(DIGIT[:-3], then_close=True), "closed"),
    "nothing": (lambda connection, got: connection.send(b"", then_close=True), "closed"),
    "reset": (lambda connection, got: connection.reset(), "reset"),
    "no HTTP": (lambda connection, got: connection.send(b"SSH-2.0-OpenSSH_9.6\r\n"), "garbage"),
    "no status": (lambda connection, got: connection.send(b"HTTP/1.1 good\r\n\r\n"), "garbage"),
    "too long": (lambda connection, got: connection.send(DIGIT + b"more"), "garbage"),
    "silence": (lambda connection, got: time.sleep(0.5), "timeout"),
}


@pytest.mark.parametrize(("answer", "kind"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("loop", ["open", "closed"])
def test_failures_are_counted_by_kind(loop: str, answer: Answer, kind: str) -> None:
    with serving(answer) as address:
        if loop == "open":
            samples = run_load(Load(address, call_to(address), rate=40, duration_s=0.1, timeout_s=0.2))
        else:
            samples = run_load(Load(address, call_to(address), connections=2, duration_s=0.05, timeout_s=0.2))
    assert samples.request_count >= 2
    assert samples.error_counts == {kind: samples.request_count}
    assert samples.served_rate == 0
    assert len(samples.latencies_ms()) == (samples.request_count if kind == "timeout" else 0)


@pytest.fixture
def refusing_address() -> Iterator[str]:
    """A port that is taken, so that nobody else gets it, and does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_closed_port_refuses_without_being_hammered(refusing_address: str) -> None:
    samples = run_load(Load(refusing_address, call_to(refusing_address), connections=3, duration_s=0.35))
    assert samples.error_counts.keys() == {"refused"}
    assert 3 <= samples.request_count <= 12
    samples = run_load(Load(refusing_address, call_to(refusing_address), rate=100, duration_s=0.1))
    assert samples.error_counts == {"refused": 10}


def test_a_request_that_never_got_a_connection_times_out_too() -> None:
    with serving(lambda connection, got: time.sleep(0.6)) as address:
        samples = run_load(Load(address, call_to(address), rate=50, duration_s=0.2, connections=1, timeout_s=0.3))
    assert samples.error_counts == {"timeout": 10}
    assert np.isnan(samples.sent_s).any()
    assert samples.latencies_ms().min() >= 300


def test_a_server_that_closes_after_each_reply_costs_no_errors() -> None:
    with serving(lambda connection, got: connection.send(DIGIT_AND_CLOSE, then_close=True)) as address:
        samples = run_load(Load(address, call_to(address), connections=2, duration_s=0.5))
    assert samples.error_counts == {}
    assert samples.request_count > 4


def test_a_connection_that_the_server_closed_in_the_meantime_is_replaced() -> None:
    with serving(lambda connection, got: connection.send(DIGIT, then_close=True)) as address:
        samples = run_load(Load(address, call_to(address), rate=4, duration_s=0.75))
    assert samples.error_counts == {}
    assert samples.request_count == 3


DIGIT_AND_CLOSE = reply_with(b'{"digit": 7}', "200 OK", "Connection: close")


def test_a_large_image_is_sent_whole() -> None:
    image = np.random.default_rng(0).bytes(8_000_000)  # more than a socket takes at once

    def answer(connection: Connection, got: Got) -> None:
        connection.send(reply_with(hashlib.sha256(got.body).hexdigest().encode()))

    with serving(answer) as address:
        samples = run_load(Load(address, call_to(address, image), connections=2, duration_s=0.2))
    assert samples.error_counts == {}
    assert samples.first_replies[0].body.decode() == hashlib.sha256(image).hexdigest()


def test_calls_are_taken_in_turn() -> None:
    bodies: list[bytes] = []

    def answer(connection: Connection, got: Got) -> None:
        bodies.append(got.body)
        connection.send(DIGIT)

    with serving(answer) as address:
        calls = [build_call("predict", address, "/", body, {"X-Own": "1"}) for body in (b"a", b"b", b"c")]
        samples = run_load(Load(address, calls, connections=1, duration_s=0.1))
    count = len(bodies)
    assert bodies == [b"a", b"b", b"c"] * (count // 3) + [b"a", b"b"][: count % 3]
    assert samples.call.tolist() == [number % 3 for number in range(count)]


def test_a_header_cannot_smuggle_in_another() -> None:
    with pytest.raises(ValueError, match="a character that HTTP does not allow") as raised:
        build_call("predict", "http://localhost", "/", b"", {"Authorization": f"Bearer {TOKEN}\r\nX-More: 1"})
    assert TOKEN not in str(raised.value)


REPLIES = {
    "length": DIGIT,
    "empty": reply_with(b"", "503 Service Unavailable"),
    "letter case": b"HTTP/1.1 200 OK\r\ncontent-LENGTH:2\r\n\r\nok",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1a;x=y\r\n"
    + b"0\r\n\r\nzyxwvutsrqponmlkjihgf\r\n0\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\n" + DIGIT,
    "until closed": b"HTTP/1.0 200 OK\r\n\r\nall there is",
}


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("content", REPLIES.values(), ids=REPLIES)
def test_a_reply_is_read_as_the_standard_library_reads_it(content: bytes, size: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(content)
        theirs.close()
        expected = http.client.HTTPResponse(ours)
        expected.begin()
        expected_body = expected.read()
        expected.close()
    reader = ReplyReader()
    for _ in range(2):  # the second reply over the same connection
        parts = [content[start : start + size] for start in range(0, len(content), size)]
        complete = [reader.feed(part) for part in parts]
        assert not any(complete[:-1])
        assert complete[-1] or reader.is_complete_at_end()
        assert (reader.status, reader.body) == (expected.status, expected_body)
        assert reader.keeps_alive == (content != REPLIES["until closed"])
        reader.start()


@pytest.mark.parametrize(
    "content",
    [
        b"HTTP/2 200\r\n\r\n",
        b"GET / HTTP/1.1\r\n",
        b"HTTP/1.1 999 Odd\r\n\r\n",
        b"HTTP/1.1 " + b"x" * 70_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc",
        DIGIT + DIGIT,
    ],
    ids=["version", "request", "status", "endless head", "chunk size", "two at once"],
)
def test_garbage_is_refused(content: bytes) -> None:
    with pytest.raises(GarbageReply):
        ReplyReader().feed(content)


def samples_of(latencies_s: Sequence[float], *, lag_s: float = 0.0, cpu_share: float = 0.1) -> Samples:
    """A good reply a latency, evenly over ten seconds."""
    records = np.zeros(len(latencies_s), RECORD)
    records["scheduled_s"] = np.arange(len(latencies_s)) * 10 / len(latencies_s)
    records["due_s"] = records["scheduled_s"]
    records["sent_s"] = records["due_s"] + lag_s
    records["done_s"] = records["scheduled_s"] + latencies_s
    records["status"] = 200
    return Samples(("predict",), records, 10.0, len(latencies_s) / 10, 1, cpu_share, {})


def test_quantiles_are_those_of_the_counted_good_replies_and_timeouts() -> None:
    latencies_s = np.random.default_rng(0).permutation(np.arange(1, 1002)) / 1000
    samples = samples_of(latencies_s.tolist())
    assert samples.latency_quantiles_ms() == pytest.approx([501, 901, 991, 1000, 1001])  # of 1, 2, ..., 1001 ms

    samples.records["scheduled_s"][0] = -0.001  # of the warm-up
    samples.records["status"][1] = 503
    samples.records["status"][2], samples.records["failure"][2] = 0, Failure.TIMEOUT
    latencies_s[2] = 30
    samples.records["done_s"][2] = samples.records["scheduled_s"][2] + 30
    samples.records["status"][3], samples.records["failure"][3] = 0, Failure.RESET
    kept_ms = np.delete(latencies_s, [0, 1, 3]) * 1000
    expected = np.quantile(kept_ms, [0.5, 0.9, 0.99, 0.999, 1])
    assert samples.latency_quantiles_ms() == pytest.approx(expected)
    assert samples.error_counts == {"HTTP 503": 1, "reset": 1, "timeout": 1}
    assert np.isnan(samples.latency_quantiles_ms(name="explain")).all()
    summary = summarise(samples)
    assert list(summary.latency_ms.values()) == pytest.approx(expected)
    assert (summary.requests, summary.kinds["predict"].requests) == (1000, 1000)


def test_a_generator_that_is_late_or_busy_is_named() -> None:
    latencies_s = [0.02] * 1000
    assert find_warnings(summarise(samples_of(latencies_s))) == []
    assert find_warnings(summarise(samples_of(latencies_s, lag_s=0.001))) == []
    [late] = find_warnings(summarise(samples_of(latencies_s, lag_s=0.005)))
    assert "the generator itself sent late (lag p99 5.00 ms, latency p99 20.00 ms)" in late
    [busy] = find_warnings(summarise(samples_of(latencies_s, cpu_share=0.93)))
    assert "the generator was busy 93% of the time" in busy


def test_a_generator_that_is_held_up_counts_it_as_its_own_lag() -> None:
    def hold_up(now_s: float, request_count: int) -> bool:
        time.sleep(0.05)
        return True

    with serving(answer_well) as address:
        samples = run_load(Load(address, call_to(address), rate=100, duration_s=0.5), tick=hold_up)
    assert samples.lag_quantiles_ms([1.0])[0] >= 30
    assert (samples.latencies_ms() >= 1e3 * (samples.sent_s - samples.scheduled_s)).all()  # latency has it in it
    assert any("sent late" in warning for warning in find_warnings(summarise(samples)))


def test_waiting_for_a_connection_is_no_lag() -> None:
    with serving(stall_once(1)) as address:
        samples = run_load(Load(address, call_to(address), rate=20, duration_s=0.3, connections=1))
    assert (samples.sent_s - samples.scheduled_s).max() >= 0.8 * STALL_S
    assert samples.lag_quantiles_ms([1.0])[0] < 500 * STALL_S


def step_of(rate: float, served: float, p99_ms: float) -> StepSummary:
    summary = summarise(samples_of([p99_ms / 1000] * 10))
    return replace(summary, offered_rate=rate, served_rate=served)


@pytest.mark.parametrize(
    ("steps", "knee"),
    [
        ([(100, 100, 5), (200, 199, 8), (400, 300, 9)], 200),
        ([(100, 100, 5), (200, 200, 26), (400, 400, 9)], 100),
        ([(400, 300, 9), (100, 98, 5), (200, 200, 25)], 200),
        ([(100, 97, 5), (200, 200, 5)], None),
        ([(100, 0, math.nan)], None),
        ([], None),
    ],
    ids=["not served", "p99 blown up", "any order, on the limits", "none", "no reply", "no steps"],
)
def test_knee_is_the_last_rate_before_the_first_that_is_too_much(steps: list[tuple[float, ...]], knee: float | None) -> None:
    assert find_knee([step_of(*step) for step in steps]) == knee


@dataclass(frozen=True)
class Finished:
    """A load test from the command line."""

    code: int
    stdout: str
    stderr: str
    files: dict[str, bytes]
    heads: list[str]  # of the requests as the server got them


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An open-loop test of two kinds and two rates, with a token, as its own process."""
    folder = tmp_path_factory.mktemp("load")
    (folder / "token").write_text(f"{TOKEN}\n")
    heads: list[str] = []

    def answer(connection: Connection, got: Got) -> None:
        heads.append(got.head)
        answer_well(connection, got)

    with serving(answer) as address:
        command = [sys.executable, "-m", "scripts.bench.load_test", "--url", address, "--rates", "50,100", "--duration", "0.5"]
        command += ["--warm-up", "0.1", "--mix", "predict=3,explain=1,explain-png=0", "--key-file", str(folder / "token")]
        command += ["--output", str(folder / "out" / "test.1")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    files = {file.name: file.read_bytes() for file in (folder / "out").iterdir()}
    return Finished(done.returncode, done.stdout, done.stderr, files, heads)


def test_a_test_writes_samples_then_text_json_and_page(finished: Finished) -> None:
    assert finished.code == 0, finished.stderr
    assert finished.files.keys() == {"test.1.npz", "test.1.json", "test.1.html"}
    assert "step 2 of 2: 100/s" in finished.stderr
    assert "knee" not in finished.stderr
    with np.load(io.BytesIO(finished.files["test.1.npz"])) as raw:
        steps = [raw["step_0"], raw["step_1"]]
        about = json.loads(str(raw["about"]))
    assert [len(step) for step in steps] == [30, 60]
    assert all((step["done_s"] > step["sent_s"]).all() and (step["sent_s"] >= step["scheduled_s"]).all() for step in steps)
    assert about["mix"] == {"predict": 3, "explain": 1}
    report = json.loads(finished.files["test.1.json"])
    assert [step["requests"] for step in report["steps"]] == [25, 50]
    for step, records in zip(report["steps"], steps, strict=True):
        latencies_ms = 1e3 * (records["done_s"] - records["scheduled_s"])[records["scheduled_s"] >= 0]
        assert step["latency_ms"]["p90"] == pytest.approx(np.quantile(latencies_ms, 0.9))
        assert sum(kind["requests"] for kind in step["kinds"].values()) == step["requests"]
        assert f"{step['offered_rate']:g}/s" in finished.stdout
    assert report["about"]["machine"]["torch"] in finished.stdout
    assert "CPU" in report["about"]["machine"]


def test_the_mix_is_what_was_asked_for(finished: Finished) -> None:
    explained = sum("/explanations/digits" in head for head in finished.heads)
    assert len(finished.heads) == 90
    assert 10 <= explained <= 36  # a quarter of 90 is 22


def test_the_token_is_sent_and_kept_to_itself(finished: Finished) -> None:
    assert all(f"Authorization: Bearer {TOKEN}\r\n" in head for head in finished.heads)
    for content in (finished.stdout.encode(), finished.stderr.encode(), *finished.files.values()):
        assert TOKEN.encode() not in content


def test_the_raw_file_alone_gives_the_same_report(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw_file = tmp_path / "again.npz"
    raw_file.write_bytes(finished.files["test.1.npz"])
    assert load_test.main(["--report", str(raw_file)]) == 0
    assert capsys.readouterr().out == finished.stdout
    for ending in ("json", "html"):
        assert (tmp_path / f"again.{ending}").read_bytes() == finished.files[f"test.1.{ending}"]


def test_the_page_has_its_plots_and_needs_no_other_file(finished: Finished) -> None:
    page = finished.files["test.1.html"].decode()
    assert not re.search(r"<(script|link|img|iframe)|url\((?!#)|@import", page)
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    texts = {"".join(element.itertext()).strip() for element in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Served", "Latencies", "Distribution of the latencies", "Latencies in time (worst of each moment)"} <= texts
    assert {"served", "offered", "p99.9", "generator's lag, p99", "50/s", "100/s"} <= texts
    long_lines = [path for path in svg.iter("{http://www.w3.org/2000/svg}path") if path.get("d", "").count("L") > 20]
    assert len(long_lines) >= 4  # distribution and course of both steps


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed; it is also what takes longest here."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("no_matplotlib")
def test_no_page_without_matplotlib_and_a_word_about_it(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.npz").write_bytes(finished.files["test.1.npz"])
    assert load_test.main(["--report", str(tmp_path / "a.npz")]) == 0
    assert "need matplotlib" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.npz"]


def test_failures_are_reported_and_end_with_1(refusing_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--url", refusing_address, "--connections", "1,2", "--duration", "0.1", "--warm-up", "0"]
    assert load_test.main([*arguments, "--output", str(tmp_path / "a")]) == 1
    captured = capsys.readouterr()
    assert re.search(r"errors at 1 connection: \d+ refused", captured.out)
    assert "the steps that are left are skipped" in captured.err
    assert "refused" in (tmp_path / "a.html").read_text()
    assert json.loads((tmp_path / "a.json").read_text())["steps"][0]["latency_ms"]["p99"] is None


@pytest.mark.usefixtures("no_matplotlib")
def test_a_reply_of_the_wrong_form_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda connection, got: connection.send(DIGIT)) as address:
        arguments = ["--url", address, "--rates", "100", "--duration", "0.2", "--warm-up", "0.2", "--mix", "explain=1"]
        arguments += ["--images", str(SAMPLE_FILES[0]), str(SAMPLE_FILES[1]), "--output", str(tmp_path / "a")]
        assert load_test.main(arguments) == 1
    assert "errors at 100/s: 2 wrong form" in capsys.readouterr().out  # the first reply for each image is looked at


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"digit": "7"}', b'{"digit": 7, "explanation": {}}', b"\x93NUMPY\x01\x00", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_reply_of_the_kind_has_the_wrong_form(name: str, body: bytes) -> None:
    assert is_right_form(name, body) == (name == "predict" and body.startswith(b'{"digit": 7,'))


@pytest.mark.usefixtures("no_matplotlib")
def test_ctrl_c_ends_the_test_with_a_report_of_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(connection: Connection, got: Got) -> None:
        if got.number == 50:
            os.kill(os.getpid(), signal.SIGINT)
        answer_well(connection, got)

    before = signal.getsignal(signal.SIGINT)
    with serving(answer) as address:
        arguments = ["--url", address, "--rates", "200,400", "--duration", "600", "--warm-up", "0"]
        arguments += ["--max-connections", "1"]  # so that all before number 50 have their replies when it arrives
        assert load_test.main([*arguments, "--output", str(tmp_path / "a")]) == 0
    assert "interrupted" in capsys.readouterr().out
    [step] = json.loads((tmp_path / "a.json").read_text())["steps"]
    assert 50 <= step["requests"] < 5000
    assert step["served_rate"] > 0
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("no_matplotlib")
def test_a_test_that_ended_in_its_warm_up_has_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda connection, got: os.kill(os.getpid(), signal.SIGTERM)) as address:
        arguments = ["--url", address, "--rates", "20", "--warm-up", "600"]
        assert load_test.main([*arguments, "--output", str(tmp_path / "a")]) == 1
    assert "no request was counted" in capsys.readouterr().err


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"), "IP:127.0.0.1")


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize(
    ("options", "error_kinds"),
    [(["--ca-file", "CERTIFICATE"], []), (["--insecure"], []), ([], ["tls"])],
    ids=["trusted", "unchecked", "unknown"],
)
def test_https(certificate: tuple[Path, Path], options: list[str], error_kinds: list[str], tmp_path: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    with serving(answer_well, tls) as address:
        arguments = ["--url", address, "--connections", "2", "--duration", "0.3", "--warm-up", "0"]
        arguments += [str(certificate[0]) if option == "CERTIFICATE" else option for option in options]
        assert load_test.main([*arguments, "--output", str(tmp_path / "a")]) == len(error_kinds)
    [step] = json.loads((tmp_path / "a.json").read_text())["steps"]
    assert list(step["errors"]) == error_kinds
    assert step["requests"] >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "100,-1"], "expected a number above 0"),
        (["--rates", "nan"], "expected a number above 0"),
        (["--connections", "1,x"], "expected a whole number from 1"),
        (["--connections", "0"], "expected a whole number from 1"),
        (["--rates", "1", "--connections", "1"], "not allowed with argument"),
        (["--mix", "predikt=1"], "expected KIND=WHOLE NUMBER, with a kind of predict, explain"),
        (["--mix", "predict=-1"], "expected KIND=WHOLE NUMBER"),
        (["--mix", "predict=0"], "asks for nothing"),
        (["--url", "127.0.0.1:8080"], "expected http://HOST:PORT"),
        (["--url", "http://me:secret@localhost"], "without a path or a user"),
        (["--duration", "0"], "expected a number above 0"),
        (["--max-connections", "0"], "expected a whole number from 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_ends_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        load_test.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "missing.png"], "missing.png: No such file"),
        (["--key-file", "missing"], "No such file"),
        (["--report", "missing.npz"], "holds no samples of a load test"),
        (["--report", str(SAMPLE_FILES[0])], "holds no samples of a load test"),
        (["--url", "http://no-such-host.invalid"], "error: "),
    ],
    ids=["image", "token", "no file", "other file", "host"],
)
def test_what_cannot_be_done_is_said_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_test.main([*arguments, "--output", str(tmp_path / "a")]) == 1
    assert message in capsys.readouterr().err


def test_the_generator_knows_the_served_model_without_importing_torch() -> None:
    assert load_test.build_parser().get_default("model") == MODEL_NAME
    check = "import sys, scripts.bench.load_test; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


def test_a_mix_is_read() -> None:
    assert read_mix("predict=3, explain-npy=1,explain=0") == {"predict": 3, "explain-npy": 1}
