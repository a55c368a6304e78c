"""What is received comes whole and in order, however it was sent; what is written is what the frontend reads of each call."""

import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from ts import service
from ts.context import Context, RequestProcessor
from ts.model_loader import ModelLoaderFactory
from ts.protocol import otf_message_handler
from ts.protocol.otf_message_handler import create_predict_response

from handler.limits import MAX_BATCH_BODY_BYTES, MAX_FORM_FIELDS
from handler.protocol.request import SENT_TWICE_HEADER, TOO_LARGE_BATCH_HEADER, TOO_MANY_FIELDS_HEADER
from handler.torchserve import PIECE_BYTES, Door, PieceReceiver, adapt_worker, door_of, names_sent_twice, write_replies

receive: Any = otf_message_handler._retrieve_buffer  # TorchServe's own, unless a handler was loaded in this process
receive_request = otf_message_handler._retrieve_request
if isinstance(receive, PieceReceiver):
    receive, receive_request = receive.by_fields, receive.request_by_fields

END = (0xFFFFFFFF).to_bytes(4)
Parameter = tuple[str, str, bytes]  # name, content type, value
Sent = tuple[dict[str, str], Sequence[Parameter]]  # headers, parameters


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        yield ours, theirs


def send_in_background(theirs: socket.socket, content: bytes, piece: int) -> threading.Thread:
    def send() -> None:
        for start in range(0, len(content), piece):
            theirs.sendall(content[start : start + piece])

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("piece", [1, 7, 4096, 10**9], ids=lambda piece: f"sent by {piece}")
def test_fields_come_whole_and_in_order(ends: tuple[socket.socket, socket.socket], piece: int) -> None:
    ours, theirs = ends
    random = np.random.default_rng(piece)
    content = random.bytes(20_000)
    lengths = [int(length) for length in random.integers(0, 300, 130)]
    sender = send_in_background(theirs, content, piece)
    receiver, start = PieceReceiver(receive, receive_request), 0
    for length in lengths:
        if start + length > len(content):
            break
        field = receiver(ours, length)
        assert isinstance(field, bytearray)
        assert field == content[start : start + length]
        start += length
    assert start > 10_000
    sender.join()


@pytest.mark.parametrize("extra", [-1, 0, 1, 3 * PIECE_BYTES], ids=str)
def test_large_field_between_small_ones(ends: tuple[socket.socket, socket.socket], extra: int) -> None:
    ours, theirs = ends
    large = np.random.default_rng(0).bytes(PIECE_BYTES + extra)
    sender = send_in_background(theirs, b"before" + large + b"after", 100_000)
    receiver = PieceReceiver(receive, receive_request)
    assert receiver(ours, 6) == b"before"
    assert receiver(ours, len(large)) == large
    assert receiver(ours, 5) == b"after"
    sender.join()


def test_field_may_be_changed_without_harm_to_the_next(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.sendall(b"oneone" + b"two")
    receiver = PieceReceiver(receive, receive_request)
    first = receiver(ours, 3)
    first[:] = b"xxxxxx"
    assert receiver(ours, 3) == b"one"
    assert receiver(ours, 3) == b"two"


@pytest.mark.parametrize("sent", [b"", b"par"], ids=["between fields", "within a field"])
def test_worker_ends_when_the_frontend_is_gone(ends: tuple[socket.socket, socket.socket], sent: bytes) -> None:
    ours, theirs = ends
    theirs.sendall(sent)
    theirs.close()
    with pytest.raises(SystemExit) as ended:
        PieceReceiver(receive, receive_request)(ours, 4)
    assert ended.value.code == 0


# --- requests


class Counting:
    """A connection that counts how often it is received from."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.calls = connection, 0

    def recv(self, length: int) -> bytes:
        self.calls += 1
        return self.connection.recv(length)


Read = Callable[[bool, Sequence[Sent], int], tuple[Any, int]]


@pytest.fixture
def read(ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> Read:
    """Send a batch in pieces, and have TorchServe read it, with or without ours. Returns its message, and the calls it took."""
    ours, theirs = ends

    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "false")  # as in a worker

    def read_batch(in_pieces: bool, batch: Sequence[Sent], piece: int) -> tuple[Any, int]:
        receiver = PieceReceiver(receive, receive_request)
        monkeypatch.setattr(otf_message_handler, "_retrieve_buffer", receiver if in_pieces else receive)
        monkeypatch.setattr(otf_message_handler, "_retrieve_request", receiver.receive_request if in_pieces else receive_request)
        sender = send_in_background(theirs, write_batch(batch), piece)
        counting = Counting(ours)
        message = otf_message_handler.retrieve_msg(counting)
        sender.join()
        return message, counting.calls

    return read_batch


def write_batch(batch: Sequence[Sent]) -> bytes:
    """Write a batch as TorchServe's frontend does."""

    def text(content: bytes) -> bytes:
        return len(content).to_bytes(4) + content

    message = b"I"
    for index, (headers, parameters) in enumerate(batch):
        message += text(b"id-%d" % index)
        message += b"".join(text(name.encode()) + text(value.encode()) for name, value in headers.items()) + END
        fields = [text(name.encode()) + text(content_type.encode()) + text(value) for name, content_type, value in parameters]
        message += b"".join(fields) + END
    return message + END


def image(size: int) -> Parameter:
    return "body", "image/png", np.random.default_rng(size).bytes(size)


HEADERS = {f"name-{index}": "value" * index for index in range(8)}
BATCHES: dict[str, Sequence[Sent]] = {
    "eight images": [(HEADERS, [image(300 + index)]) for index in range(8)],
    "no request": [],
    "a request without anything": [({}, [])],
    "no header": [({}, [image(10)])],
    "no parameter": [(HEADERS, []), (HEADERS, [image(10)])],
    "empty fields": [({"": ""}, [("", "", b"")])],
    "a form": [(HEADERS, [("data", "image/png", b"one"), ("target", "", b"3"), ("Data", "", b"\xff")])],
    "JSON and text, which are not decoded": [
        (HEADERS, [("body", "application/json", b'{"data": [1, 2]}')]),
        (HEADERS, [("body", "application/json; charset=utf-8", b"{}")]),
        (HEADERS, [("body", "text/plain", "\u00fc".encode())]),
        (HEADERS, [image(20)]),
    ],
    "JSON and text that are none": [(HEADERS, [("a", "application/json", b"{"), ("b", "text/plain", b"\xff")])],
    "names outside ASCII": [({"X-\u00fc": "\u20ac"}, [("\u00fc", "image/\u00fc", b"1")])],
    "bytes that look like an end": [(HEADERS, [("body", "", END * 5), ("more", "", END)])],
    "large images between small ones": [(HEADERS, [image(size)]) for size in (10, PIECE_BYTES - 200, 10, 3 * PIECE_BYTES, 10)],
}


@pytest.mark.parametrize("piece", [1, 7, 1000, 10**9], ids=lambda piece: f"sent by {piece}")
@pytest.mark.parametrize("name", BATCHES)
def test_requests_are_those_of_torchserve(read: Read, name: str, piece: int) -> None:
    batch = BATCHES[name]
    if piece < 1000 and len(write_batch(batch)) > PIECE_BYTES:
        piece = 50_000
    expected, _ = read(False, batch, piece)
    assert len(expected[1]) == len(batch)
    assert read(True, batch, piece)[0] == expected


@pytest.mark.parametrize("piece", [1, 10**9], ids=["by fields", "in pieces"])
def test_values_are_the_bytes_that_were_sent(read: Read, piece: int) -> None:
    """TorchServe would parse JSON without a limit, and keep the last of two keys."""
    batch = BATCHES["JSON and text, which are not decoded"]
    (_, requests), _ = read(True, batch, piece)
    values = [[parameter["value"] for parameter in request["parameters"]] for request in requests]
    assert values == [[value for _, _, value in parameters] for _, parameters in batch]
    assert all(isinstance(value, bytearray) for own in values for value in own)


SENT_TWICE: list[Any] = [  # headers, names of fields, what is named
    pytest.param({}, ["data", "target", "data"], ["data"], id="a field"),
    pytest.param({}, ["target", "data", "data", "target", "target"], ["target", "data"], id="two fields"),
    pytest.param({"X-Saliency-Target": "3", "x-saliency-target": "3"}, ["body"], ["x-saliency-target"], id="a header"),
    pytest.param(
        {"X-SALIENCY-SEED": "3", "X-Saliency-Seed": "4", "Accept": "a"}, ["a", "b", "a"], ["a", "x-saliency-seed"], id="both"
    ),
    pytest.param({"X-Saliency-Target": "3", "X-Saliency-Method": "gradient"}, ["data", "Data", "DATA"], [], id="nothing"),
    pytest.param({"Accept": "a", "accept": "b", "X-Saliency": "1", "x-saliency": "2"}, ["body"], [], id="other headers"),
    pytest.param({"X-Saliency-Target": "3"}, ["x-saliency-target", "data"], [], id="a header and a field"),
    pytest.param({}, ["\u20ac\r\n", "\u20ac\r\n", "a"], ["\u20ac\r\n"], id="a name outside ASCII"),
]


@pytest.mark.parametrize("piece", [1, 10**9], ids=["by fields", "in pieces"])
@pytest.mark.parametrize(("headers", "fields", "expected"), SENT_TWICE)
def test_what_was_sent_twice_is_named_in_a_header(
    read: Read, headers: dict[str, str], fields: list[str], expected: list[str], piece: int
) -> None:
    batch: Sequence[Sent] = [(headers, [(name, "", b"1") for name in fields]), (HEADERS, [image(10)])]
    (command, plain), _ = read(False, batch, piece)
    (_, requests), _ = read(True, batch, piece)
    assert names_sent_twice(requests[0]) == expected
    if expected:
        header = requests[0]["headers"].pop()
        assert header["name"] == SENT_TWICE_HEADER.encode()
        assert header["value"].decode() == ", ".join(expected)
    assert (command, requests) == (b"I", plain)


def test_very_many_fields_twice_are_named_in_a_short_header(read: Read) -> None:
    batch: Sequence[Sent] = [({}, [(str(index % 50), "", b"") for index in range(100)])]
    (_, requests), _ = read(True, batch, 10**9)
    assert requests[0]["headers"] == [{"name": SENT_TWICE_HEADER.encode(), "value": b"0, 1, 2, 3, 4"}]


@pytest.mark.parametrize("piece", [5000, 10**9], ids=lambda piece: f"sent by {piece}")
@pytest.mark.parametrize("count", [MAX_FORM_FIELDS + 2, 100_000], ids=str)
def test_fields_beyond_the_limit_are_dropped_and_what_follows_is_not(read: Read, count: int, piece: int) -> None:
    form: Sent = (HEADERS, [(f"{index}", "", b"1" * (index % 7)) for index in range(count)])
    after: Sent = (HEADERS, [image(300)])
    (_, plain), _ = read(False, [after], piece)
    (_, requests), _ = read(True, [form, after, form, after], piece)
    for refused, kept in ((requests[0], requests[1]), (requests[2], requests[3])):
        assert len(refused["parameters"]) == MAX_FORM_FIELDS + 1
        assert refused["headers"][-1] == {"name": TOO_MANY_FIELDS_HEADER.encode(), "value": b"true"}
        assert kept | {"requestId": b""} == plain[0] | {"requestId": b""}


def test_large_bodies_beyond_what_a_batch_may_hold_are_dropped(read: Read) -> None:
    """The first two fill it. A small one is always taken, and the next batch begins anew."""
    size = MAX_BATCH_BODY_BYTES // 2
    large: Sent = (HEADERS, [("body", "image/png", bytes(size))])
    small: Sent = (HEADERS, [image(PIECE_BYTES)])
    for _ in range(2):
        (_, requests), _ = read(True, [large, large, large, small], 10**9)
        lengths = [len(request["parameters"][0]["value"]) for request in requests]
        assert lengths == [size, size, 0, PIECE_BYTES]
        marked = [TOO_LARGE_BATCH_HEADER.encode() in [header["name"] for header in request["headers"]] for request in requests]
        assert marked == [False, False, True, False]


def test_batches_follow_each_other(ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    """All that one receiver holds at the end of a batch belongs to the next."""
    ours, theirs = ends
    receiver = PieceReceiver(receive, receive_request)
    monkeypatch.setattr(otf_message_handler, "_retrieve_buffer", receiver)
    monkeypatch.setattr(otf_message_handler, "_retrieve_request", receiver.receive_request)
    batches = list(BATCHES.values())
    sender = send_in_background(theirs, b"".join(map(write_batch, batches)), 10**9)
    for batch in batches:
        _, requests = otf_message_handler.retrieve_msg(ours)
        assert [len(request["headers"]) for request in requests] == [len(headers) for headers, _ in batch]
        assert [len(request["parameters"]) for request in requests] == [len(parameters) for _, parameters in batch]
    sender.join()


def test_a_batch_takes_one_call(read: Read) -> None:
    _, plain_calls = read(False, BATCHES["eight images"], 10**9)
    _, piece_calls = read(True, BATCHES["eight images"], 10**9)
    assert plain_calls > 300
    assert piece_calls == 1


# --- replies by gRPC

JSON_BODY = {"body": {"content-type": "application/json"}}  # a body's type stands among the headers
NO_TYPE = {"content-type": ""}
STREAM_HEADERS = {"ts_request_sequence_id": "a", "ts_request_sequence_end": "true", "data": NO_TYPE}
DOORS: list[Any] = [
    pytest.param({"explain": "False", "Content-Length": "3", "body": {"content-type": "image/png"}}, Door.HTTP, id="HTTP"),
    pytest.param({"explain": "True", **JSON_BODY}, Door.HTTP, id="HTTP, JSON"),
    pytest.param({"content-length": "0", "body": NO_TYPE}, Door.HTTP, id="HTTP /invocations"),
    pytest.param({"CONTENT-LENGTH": "3", **STREAM_HEADERS}, Door.HTTP, id="HTTP with the headers of a sequence"),
    pytest.param({"content-length": "0", "Host": "a", "describe": "True"}, Door.HTTP, id="description by HTTP"),
    pytest.param({"data": NO_TYPE}, Door.PREDICTIONS, id="gRPC"),
    pytest.param({}, Door.PREDICTIONS, id="gRPC without an input"),
    pytest.param({"body": NO_TYPE}, Door.PREDICTIONS, id="gRPC with a body"),
    pytest.param(
        dict.fromkeys(("explain", "describe", "content-length", "ts_request_sequence_id"), NO_TYPE),
        Door.PREDICTIONS,
        id="gRPC with inputs named as headers",
    ),
    pytest.param(JSON_BODY, Door.INFER, id="gRPC ModelInfer"),
    pytest.param(STREAM_HEADERS, Door.UNSAFE, id="gRPC StreamPredictions2"),
    pytest.param({"describe": "True"}, Door.UNSAFE, id="description by gRPC"),
]


@pytest.mark.parametrize(("headers", "door"), DOORS)
def test_call_is_told_by_headers(headers: dict[str, object], door: Door) -> None:
    assert door_of(headers) is door


Written = tuple[int, dict[str, str], bytes]  # status, headers, body


def read_replies(message: bytes) -> dict[str, Written]:
    """Read a batch's replies as the frontend does, by their requests' ids, in order."""
    at = 0

    def number() -> int:
        nonlocal at
        at += 4
        return int(struct.unpack_from("!i", message, at - 4)[0])

    def field(length: int) -> bytes:
        nonlocal at
        at += length
        return message[at - length : at]

    def text() -> str:
        return field(number()).decode()

    assert (number(), text()) == (200, "Prediction success")
    found: dict[str, Written] = {}
    while (length := number()) != -1:
        request_id = field(length).decode()
        text()  # the content type, which is among the headers too
        status, _ = number(), text()
        headers = {text(): text() for _ in range(number())}
        found[request_id] = status, headers, field(number())
    assert at == len(message)
    return found


def write(batch: Sequence[tuple[Mapping[str, object], int, bytes]]) -> dict[str, Written]:
    """Write a batch's replies, each by the headers of its request, its status and its body, and read them."""
    context = Context("digits", "", {"model": {"modelVersion": "1.0"}}, 8, None, "0.12.0")
    context.request_processor = [RequestProcessor(dict(headers)) for headers, _, _ in batch]
    for index, (_, status, _) in enumerate(batch):
        context.set_response_status(status, "Some phrase", index)
        context.set_response_content_type(index, "application/json")
    ids = {index: f"id-{index}" for index in range(len(batch))}
    replies = [body for _, _, body in batch]
    message = write_replies(replies, ids, "Prediction success", 200, context=context)
    assert message is not None
    return read_replies(bytes(message))


HTTP = {"explain": "True", "Content-Length": "3"}
TYPE = {"content-type": "application/json"}
ENDS_A_STREAM = TYPE | {"ts_stream_next": "false"}


def test_every_call_gets_the_reply_that_the_frontend_can_read() -> None:
    error = b'{"error": {"code": 413}}'
    written = write(
        [
            ({"data": NO_TYPE}, 200, b"0"),
            (HTTP, 200, b"1"),
            (STREAM_HEADERS, 200, b"2"),
            (JSON_BODY, 200, b"3"),
            (HTTP, 404, b"4"),
            (JSON_BODY, 413, error),
            ({"describe": "True"}, 200, b"6"),
            ({}, 400, b"7"),
        ]
    )
    refused = written["id-5"][2]
    assert written == {
        "id-1": (200, TYPE, b"1"),
        "id-4": (404, TYPE, b"4"),
        "id-0": (200, ENDS_A_STREAM, b"0"),
        "id-3": (200, TYPE, b"3"),
        "id-5": (413, TYPE, refused),
        "id-7": (400, ENDS_A_STREAM, b"7"),
    }
    assert list(written) == ["id-1", "id-4", "id-0", "id-3", "id-5", "id-7"]  # by HTTP first
    assert json.loads(refused) == {
        "id": "",
        "model_name": "digits",
        "model_version": "1.0",
        "outputs": [{"name": "error", "datatype": "BYTES", "shape": [1], "data": [json.loads(error)]}],
    }


def test_batch_by_http_alone_is_written_as_it_is() -> None:
    batch: list[tuple[dict[str, object], int, bytes]] = [({**HTTP}, status, b"%d" % status) for status in (200, 400, 200)]
    assert list(write(batch).values()) == [(status, TYPE, body) for _, status, body in batch]


def test_batch_that_nobody_can_be_answered_in_is_written_empty(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert write([(STREAM_HEADERS, 200, b"1"), (STREAM_HEADERS, 400, b"2")]) == {}
    assert "2 requests get no answer" in caplog.text


def test_failure_of_a_whole_batch_is_torchserves_own() -> None:
    ids = {0: "id-0", 1: "id-1"}
    ours = write_replies(None, ids, "Prediction failed", 503)
    assert ours == create_predict_response(None, ids, "Prediction failed", 503)


# --- the worker


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as a worker with the handler, twice over; all is put back."""
    context = Context("digits", "", {"model": {"modelVersion": "1.0"}}, 8, None, "0.12.0")
    monkeypatch.setattr(otf_message_handler, "_retrieve_buffer", receive)
    monkeypatch.setattr(otf_message_handler, "_retrieve_request", receive_request)
    monkeypatch.setattr(service, "create_predict_response", create_predict_response)
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "true")
    for _ in range(2):
        adapt_worker(context, log_batches=True)


@pytest.mark.usefixtures("adapted")
def test_worker_is_adapted_once() -> None:
    assert os.environ["TS_DECODE_INPUT_REQUEST"] == "false"
    assert otf_message_handler._retrieve_buffer.by_fields is receive
    assert service.create_predict_response is write_replies


ROWS: list[dict[str, object]] = [{"body": bytearray(b'{"instances": [1]}')}, {"data": bytearray(b"2")}, {}]


@pytest.mark.parametrize("name", ["body", "json", "kserve", "kservev2"])
def test_envelope_passes_everything_through(request: pytest.FixtureRequest, name: str) -> None:
    """All that TorchServe has. By themselves they read one row, or fail on these."""
    given = []

    def handle(rows: list[object], _context: object) -> list[bytes]:
        given.append(rows)
        return [b"1", b"2", b"3"]

    envelope = (
        ModelLoaderFactory.get_model_loader()._load_default_envelope(name)(handle).handle
    )  # before initialize, as in a worker
    request.getfixturevalue("adapted")
    assert envelope(ROWS, None) == [b"1", b"2", b"3"]
    assert given == [ROWS]
