"""A worker's socket -> TorchServe's requests, received in large pieces and taken apart whole.

TorchServe 0.12 calls `recv` for each field of a request, for its length and for its value: some fifty times a request, which
takes longer than all the rest that a worker does to receive one.
"""

import os
import socket
import struct
from collections.abc import Callable
from typing import Any

PIECE_BYTES = 262_144  # received at once, at most: a full batch of small pictures with their headers
LENGTH = struct.Struct("!i")
END_OF_LIST = -1  # in the place of a field's length
DECODED_TYPES = (b"application/json", b"text")  # content types, or how they begin, whose values TorchServe decodes

Request = dict[str, Any]
Receive = Callable[[socket.socket, int], bytearray]  # receives exactly so many bytes, or ends the process
ReceiveRequest = Callable[[socket.socket], Request | None]  # None at the end of a batch


class PieceReceiver:
    """Receives all that is there, and gives of it what is asked for. Of one socket; what is left is kept."""

    def __init__(self, receive: Receive, receive_request: ReceiveRequest) -> None:
        """Take TorchServe's own: `receive` for large fields and for the end of the connection, `receive_request` for all requests
        that are not here as a whole. It has to receive by `self`.
        """
        self.by_fields = receive
        self.request_by_fields = receive_request
        self.decodes_values = os.environ.get("TS_DECODE_INPUT_REQUEST", "true") == "true"
        self._piece = bytearray()
        self._start = 0  # of what has not been asked for yet

    def __call__(self, connection: socket.socket, length: int) -> bytearray:
        """Receive exactly `length` bytes."""
        end = self._start + length
        if end > len(self._piece):
            return self._receive_more(connection, length)
        field = self._piece[self._start : end]
        self._start = end
        return field

    def receive_request(self, connection: socket.socket) -> Request | None:
        """Receive a request, or the end of the batch, in the form that TorchServe's `_retrieve_request` gives it."""
        try:
            fields, ends, end = take_fields(self._piece, self._start)
        except struct.error:  # its rest is still to be received
            return self.request_by_fields(connection)
        if not fields:
            self._start = end
            return None
        is_decoded = self.decodes_values and any(kind.startswith(DECODED_TYPES) for kind in fields[ends[0] + 1 : ends[1] : 3])
        if end > len(self._piece) or is_decoded:
            return self.request_by_fields(connection)
        self._start = end
        return {
            "requestId": fields[0],
            "headers": [{"name": fields[at], "value": fields[at + 1]} for at in range(1, ends[0], 2)],
            "parameters": [
                {"name": fields[at].decode(), "contentType": fields[at + 1].decode(), "value": fields[at + 2]}
                for at in range(ends[0], ends[1], 3)
            ],
        }

    def _receive_more(self, connection: socket.socket, length: int) -> bytearray:
        piece, self._piece, self._start = self._piece[self._start :], bytearray(), 0
        if length - len(piece) > PIECE_BYTES:  # a large picture: nothing behind it is received
            return piece + self.by_fields(connection, length - len(piece))
        while len(piece) < length:
            received = connection.recv(PIECE_BYTES)
            if not received:
                return piece + self.by_fields(connection, length - len(piece))  # which finds the same
            piece += received
        self._piece, self._start = piece, length
        return piece[:length]


def take_fields(piece: bytearray, start: int) -> tuple[list[bytearray], list[int], int]:
    """Take a request apart: its id, then names and values of headers, then names, content types and values of parameters.

    Each field has its length before it, and each of the two lists an end after it. A batch's end is an end without a field.

    Returns:
        the fields; how many there are up to each list's end; where in the piece the request ends, which may be beyond its end.
    Raises:
        struct.error: the piece does not even hold all lengths.
    """
    fields: list[bytearray] = []
    ends: list[int] = []
    at = start
    while len(ends) < 2:
        (length,) = LENGTH.unpack_from(piece, at)
        at += LENGTH.size
        if length == END_OF_LIST:
            if not fields:
                break
            ends.append(len(fields))
        else:
            fields.append(piece[at : at + length])
            at += length
    return fields, ends, at
