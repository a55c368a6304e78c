"""All that is changed in TorchServe's worker, each with its reason.

- Its socket is received in large pieces: TorchServe 0.12 calls `recv` for each field of a request, for its length and for its
  value, some fifty times a request, which takes longer than all the rest that a worker does to receive one.
- Its log leaves out the line for each batch, and its metrics the time of each: the frontend reads and drops both, before any
  request of the batch gets its reply.
- Counts go to the frontend in its own format.
- A worker whose GPU is lost ends, so that another is started.

With `saliency_handler` the only module that imports TorchServe.
"""

import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import torch
from ts.context import Context
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_type_enum import MetricTypes
from ts.protocol import otf_message_handler
from ts.service import PREDICTION_METRIC

from handler.runtime.metrics import COUNTERS, Emit, Series

logger = logging.getLogger(__name__)

PIECE_BYTES = 262_144  # received at once, at most: a full batch of small images with their headers
LENGTH = struct.Struct("!i")
END_OF_LIST = -1  # in the place of a field's length
DECODED_TYPES = (b"application/json", b"text")  # content types, or how they begin, whose values TorchServe decodes

Request = dict[str, Any]
Receive = Callable[[socket.socket, int], bytearray]  # receives exactly so many bytes, or ends the process
ReceiveRequest = Callable[[socket.socket], Request | None]  # None at the end of a batch


def adapt_worker(context: Context, *, log_batches: bool) -> None:
    """Change what TorchServe's worker does between two batches. Safe to call again.

    Args:
        context: of the handler that is initialized.
        log_batches: leave TorchServe's own line for each batch in the log.
    """
    _receive_in_pieces()
    _write_no_prediction_time(context)
    if not log_batches:
        logging.getLogger().addFilter(_is_not_of_a_batch)


def _is_not_of_a_batch(record: logging.LogRecord) -> bool:
    """Whether a record of the root logger is other than the line that TorchServe's worker writes for each batch it gets."""
    return not str(record.msg).startswith("Backend received inference")


def _write_no_prediction_time(context: Context) -> None:
    """Have TorchServe's worker not write its own metric, unless it is declared: the frontend would read and drop it.

    That is a line for each batch, with the ids of all its requests, before any of them gets its reply.
    """
    if context.metrics is not None:
        try:
            context.metrics.get_metric(PREDICTION_METRIC, MetricTypes.GAUGE)
        except MetricsCacheKeyError:
            context.metrics.add_time = lambda *_arguments, **_options: None


def emitter_to_frontend(context: Context) -> Emit | None:
    """Find where counts go, if anywhere: as lines for TorchServe's frontend, in its own format."""
    if context.metrics is None:
        return None
    try:
        counters = {name: context.metrics.get_metric(name, MetricTypes.COUNTER) for name in COUNTERS}
    except MetricsCacheKeyError as error:
        logger.warning("%s: nothing is counted; set metrics_config to a file that declares it", error)
        return None

    def emit(series: Series, value: float) -> None:
        name, labels = series
        counters[name].add_or_update(value, [context.model_name, *labels])

    return emit


def leave_with_a_lost_gpu(device: torch.device) -> None:
    """End this process where its GPU no longer works, so that TorchServe starts another in its place.

    After some CUDA errors (an illegal address, a card that fell off the bus) every later call of the process fails too. Running
    out of memory is none of these.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as error:  # noqa: BLE001  # whatever it is, the GPU did not do the least that it can do
        logger.critical("%s does not work any more (%s): this worker ends", device, type(error).__name__)
        os._exit(1)  # sys.exit would only reach TorchServe's own handlers


def _receive_in_pieces() -> None:
    """Have TorchServe's worker receive all that is there at once, in place of each field of a request by itself.

    All of its protocol reads with `_retrieve_buffer`, and each request with `_retrieve_request`; both are replaced between two
    messages. A TorchServe without them goes on as it does.
    """
    receive = getattr(otf_message_handler, "_retrieve_buffer", None)
    receive_request = getattr(otf_message_handler, "_retrieve_request", None)
    if receive is None or receive_request is None or isinstance(receive, PieceReceiver):
        return
    receiver = PieceReceiver(receive, receive_request)
    otf_message_handler._retrieve_buffer = receiver
    otf_message_handler._retrieve_request = receiver.receive_request


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
        if length - len(piece) > PIECE_BYTES:  # a large image: nothing behind it is received
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
