"""What is asked for comes, whole and in order, however it was sent."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ts.protocol import otf_message_handler

from handler.worker_socket import PIECE_BYTES, PieceReceiver

receive = otf_message_handler._retrieve_buffer  # TorchServe's own, unless a handler was loaded in this process
if isinstance(receive, PieceReceiver):
    receive = receive.by_fields


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
    receiver, start = PieceReceiver(receive), 0
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
    receiver = PieceReceiver(receive)
    assert receiver(ours, 6) == b"before"
    assert receiver(ours, len(large)) == large
    assert receiver(ours, 5) == b"after"
    sender.join()


def test_field_may_be_changed_without_harm_to_the_next(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.sendall(b"oneone" + b"two")
    receiver = PieceReceiver(receive)
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
        PieceReceiver(receive)(ours, 4)
    assert ended.value.code == 0


def test_torchserve_receives_a_batch_with_fewer_calls(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is as TorchServe's frontend writes it; TorchServe's own reader takes it apart, with and without."""

    def text(content: bytes) -> bytes:
        return len(content).to_bytes(4) + content

    end = (0xFFFFFFFF).to_bytes(4)
    headers = b"".join(text(b"name-%d" % index) + text(b"value") for index in range(8))
    request = text(b"id") + headers + end + text(b"body") + text(b"image/png") + text(bytes(300)) + end
    message = b"I" + request * 8 + end

    class Counting:
        def __init__(self, connection: socket.socket) -> None:
            self.connection, self.calls = connection, 0

        def recv(self, length: int) -> bytes:
            self.calls += 1
            return self.connection.recv(length)

    ours, theirs = ends
    taken: list[Any] = []
    for reader in (receive, PieceReceiver(receive)):
        monkeypatch.setattr(otf_message_handler, "_retrieve_buffer", reader)
        theirs.sendall(message)
        counting = Counting(ours)
        taken.append((otf_message_handler.retrieve_msg(counting), counting.calls))
    (plain, plain_calls), (pieces, piece_calls) = taken
    assert pieces == plain
    assert len(pieces[1]) == 8
    assert plain_calls > 300
    assert piece_calls == 1
