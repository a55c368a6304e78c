"""A worker's socket -> the fields of requests, received in large pieces.

TorchServe 0.12 calls `recv` for each field of a request, for its length and for its value: some fifty times a request, which
takes longer than all the rest that a worker does to receive one. Knows nothing of TorchServe's messages.
"""

import socket
from collections.abc import Callable

PIECE_BYTES = 262_144  # received at once, at most: a full batch of small pictures with their headers

Receive = Callable[[socket.socket, int], bytearray]  # receives exactly so many bytes, or ends the process


class PieceReceiver:
    """Gives exactly as many bytes as are asked for, and receives all that is there. Of one socket; what is left is kept."""

    def __init__(self, receive: Receive) -> None:
        """Take what TorchServe itself receives with, for large fields and for the end of the connection."""
        self.by_fields = receive
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
