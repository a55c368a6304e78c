"""What is asked for comes, whole and in order, however it was sent, and requests as TorchServe's own reader gives them."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from ts.protocol import otf_message_handler

from handler.torchserve import PIECE_BYTES, PieceReceiver

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
        for name, content_type, value in parameters:
            message += text(name.encode()) + text(content_type.encode()) + text(value)
        message += END
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
    "a form": [(HEADERS, [("data", "image/png", b"one"), ("target", "", b"3"), ("data", "", b"\xff")])],
    "JSON and text, which are decoded": [
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


@pytest.mark.parametrize("decode", ["true", "false"])
def test_values_are_decoded_as_torchserve_is_told(read: Read, monkeypatch: pytest.MonkeyPatch, decode: str) -> None:
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", decode)
    batch = BATCHES["JSON and text, which are decoded"]
    (command, requests), _ = read(True, batch, 10**9)
    assert (command, requests) == read(False, batch, 10**9)[0]
    value = requests[0]["parameters"][0]["value"]
    assert value == ({"data": [1, 2]} if decode == "true" else b'{"data": [1, 2]}')


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
