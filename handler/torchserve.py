"""All that is changed in TorchServe's worker, each with its reason.

- Its socket is received in large pieces: TorchServe 0.12 calls `recv` for each field of a request, for its length and for its
  value, some fifty times a request, which takes longer than all the rest that a worker does to receive one.
- Values are received as bytes: TorchServe would parse JSON by itself, without a limit, keep the last of two keys, and log what it
  cannot parse.
- What a client sent twice is noted, where TorchServe would keep the last.
- A batch takes no more memory than its bounds say, however many fields a form has and however large its bodies are together.
- Replies by gRPC are written as the frontend needs them. It trusts its workers: what it cannot read is an exception in the thread
  that keeps the worker, which costs the batch its answers and the worker its life.
- An envelope that is configured passes everything through: TorchServe's own read the first request of a batch alone.
- Its log leaves out the line for each batch, and its metrics the time of each: the frontend reads and drops both, before any
  request of the batch gets its reply.
- Counts go to the frontend in its own format.
- A worker whose GPU is lost ends, so that another is started.

With `saliency_handler` the only module that imports TorchServe.
"""

import enum
import json
import logging
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import torch
from ts import service
from ts.context import Context
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_type_enum import MetricTypes
from ts.protocol import otf_message_handler
from ts.service import PREDICTION_METRIC
from ts.torch_handler.request_envelope.base import BaseEnvelope

from handler.errors import SHOWN_ERRORS
from handler.limits import MAX_BATCH_BODY_BYTES, MAX_FORM_FIELDS
from handler.protocol.options import HEADER_PREFIX
from handler.protocol.request import ROUTE_HEADER, SENT_TWICE_HEADER, TOO_LARGE_BATCH_HEADER, TOO_MANY_FIELDS_HEADER
from handler.runtime.metrics import COUNTERS, Emit, Series

logger = logging.getLogger(__name__)

PIECE_BYTES = 262_144  # received at once, at most: a full batch of small images with their headers
LENGTH = struct.Struct("!i")
END_OF_LIST = -1  # in the place of a field's length
OPTION_PREFIX = HEADER_PREFIX.encode()
LAST_OF_STREAM = ("ts_stream_next", "false")  # a reply's header, by which the frontend ends a StreamPredictions call

Request = dict[str, Any]
Receive = Callable[[socket.socket, int], bytearray]  # receives exactly so many bytes, or ends the process
ReceiveRequest = Callable[[socket.socket], Request | None]  # None at the end of a batch


def adapt_worker(context: Context, *, log_batches: bool) -> None:
    """Change what TorchServe's worker does between two batches. Safe to call again.

    Args:
        context: of the handler that is initialized.
        log_batches: leave TorchServe's own line for each batch in the log.
    """
    os.environ["TS_DECODE_INPUT_REQUEST"] = "false"  # which TorchServe's reader looks up for each value
    _receive_in_pieces()
    service.create_predict_response = write_replies
    _pass_through_envelopes()
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
        """Take TorchServe's own: `receive` for large fields and for the end of the connection. What its `receive_request` does is
        done here, within bounds; it is kept for whoever wants to undo that.
        """
        self.by_fields = receive
        self.request_by_fields = receive_request
        self._piece = bytearray()
        self._start = 0  # of what has not been asked for yet
        self._batch_bytes = 0  # of the large fields of this batch so far

    def __call__(self, connection: socket.socket, length: int) -> bytearray:
        """Receive exactly `length` bytes."""
        end = self._start + length
        if end > len(self._piece):
            return self._receive_more(connection, length)
        field = self._piece[self._start : end]
        self._start = end
        return field

    def receive_request(self, connection: socket.socket) -> Request | None:
        """Receive a request, or the end of the batch, in the form that TorchServe's `_retrieve_request` gives it.

        Of what was sent twice, the names stand in a header of ours, SENT_TWICE_HEADER. Fields beyond MAX_FORM_FIELDS, and large
        ones beyond MAX_BATCH_BODY_BYTES of the batch, are dropped as they come, so that no memory is taken for them; a header of
        ours says so, too.
        """
        request = self._receive_request(connection)
        if request is not None:
            names = names_sent_twice(request)
            if names:
                value = ", ".join(names[:SHOWN_ERRORS])
                request["headers"].append({"name": SENT_TWICE_HEADER.encode(), "value": value.encode()})
        return request

    def _receive_request(self, connection: socket.socket) -> Request | None:
        try:
            fields, ends, end = take_fields(self._piece, self._start)
        except struct.error:  # its rest is still to be received
            return self._receive_by_fields(connection)
        if not fields:
            self._start = end
            self._batch_bytes = 0
            return None
        if end > len(self._piece) or ends[1] - ends[0] > 3 * MAX_FORM_FIELDS:
            return self._receive_by_fields(connection)
        self._start = end
        return {
            "requestId": fields[0],
            "headers": [{"name": fields[at], "value": fields[at + 1]} for at in range(1, ends[0], 2)],
            "parameters": [
                {"name": fields[at].decode(), "contentType": fields[at + 1].decode(), "value": fields[at + 2]}
                for at in range(ends[0], ends[1], 3)
            ],
        }

    def _receive_by_fields(self, connection: socket.socket) -> Request | None:
        length = self._receive_length(connection)
        if length == END_OF_LIST:
            self._batch_bytes = 0
            return None
        request: Request = {"requestId": self(connection, length), "headers": [], "parameters": []}
        while (length := self._receive_length(connection)) != END_OF_LIST:
            name = self(connection, length)
            request["headers"].append({"name": name, "value": self(connection, self._receive_length(connection))})
        refused = set()
        while (length := self._receive_length(connection)) != END_OF_LIST:
            if len(request["parameters"]) > MAX_FORM_FIELDS:
                self._skip_list(connection, length)
                refused.add(TOO_MANY_FIELDS_HEADER)
                break
            name = self(connection, length)
            content_type = self(connection, self._receive_length(connection))
            length = self._receive_length(connection)
            is_dropped = length > PIECE_BYTES and self._batch_bytes + length > MAX_BATCH_BODY_BYTES
            if is_dropped:
                self._skip(connection, length)
                refused.add(TOO_LARGE_BATCH_HEADER)
            elif length > PIECE_BYTES:
                self._batch_bytes += length
            value = bytearray() if is_dropped else self(connection, length)
            request["parameters"].append({"name": name.decode(), "contentType": content_type.decode(), "value": value})
        request["headers"] += [{"name": header.encode(), "value": b"true"} for header in sorted(refused)]
        return request

    def _receive_length(self, connection: socket.socket) -> int:
        (length,) = LENGTH.unpack(self(connection, LENGTH.size))
        return int(length)

    def _skip_list(self, connection: socket.socket, length: int) -> None:
        """Receive what is left of a list of fields, the first of this length, and keep none of it."""
        while length != END_OF_LIST:
            end = self._start + length
            if end + LENGTH.size <= len(self._piece):  # nearly always: hundreds of thousands fit into a large body
                (length,) = LENGTH.unpack_from(self._piece, end)
                self._start = end + LENGTH.size
            else:
                self._skip(connection, length)
                length = self._receive_length(connection)

    def _skip(self, connection: socket.socket, length: int) -> None:
        """Receive so many bytes, some at a time, and keep none of them."""
        while length > 0:
            part = min(length, PIECE_BYTES)
            self(connection, part)
            length -= part

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


def names_sent_twice(request: Request) -> list[str]:
    """Find the form fields, and the headers of options in any letter case, that a request holds more than once.

    Of headers that are spelled alike too, the frontend has kept the last: no worker can see that there were two.
    """
    least = len(OPTION_PREFIX)  # looking at lengths first costs a third
    headers = [
        name.lower()
        for header in request["headers"]
        if len(name := header["name"]) > least and name[:least].lower() == OPTION_PREFIX
    ]
    if len(headers) < 2 and len(request["parameters"]) < 2:  # as nearly all requests
        return []
    fields = [parameter["name"] for parameter in request["parameters"]]
    return [
        name for names in (fields, [name.decode() for name in headers]) for name, count in Counter(names).items() if count > 1
    ]


# --- replies by gRPC


class Door(enum.Enum):
    """The call by which a request came. Each makes the frontend do other things with its reply."""

    HTTP = enum.auto()
    PREDICTIONS = enum.auto()  # gRPC Predictions or StreamPredictions
    INFER = enum.auto()  # gRPC ModelInfer, which there is where TS_OPEN_INFERENCE_PROTOCOL=oip
    UNSAFE = enum.auto()  # gRPC StreamPredictions2, or DescribeModel of the management API


def door_of(headers: Mapping[str, object]) -> Door:
    """Tell by which call a request came, from its headers and the types of its fields, which stand among them as objects.

    The frontend gives every HTTP request a length, and those of the usual routes ROUTE_HEADER. A gRPC request has no header at
    all, or those of a sequence, or that of a description.
    """
    if isinstance(headers.get(ROUTE_HEADER), str):
        return Door.HTTP
    names = {name.lower() for name, value in headers.items() if isinstance(value, str)}
    if not names:
        return Door.INFER if headers == {"body": {"content-type": "application/json"}} else Door.PREDICTIONS
    return Door.HTTP if "content-length" in names else Door.UNSAFE


def write_replies(
    replies: Sequence[bytes] | None,
    request_ids: dict[int, str],
    message: str,
    code: int,
    context: Context | None = None,
    *more: object,
) -> bytearray | None:
    """Write a batch's replies for the frontend, each in the form of the call by which its request came.

    In the place of TorchServe's `create_predict_response`, with whose arguments it is called.

    - Predictions and StreamPredictions: LAST_OF_STREAM, without which the frontend fails on the latter. The former drops all
      headers, and the two cannot be told apart. By HTTP it would make an answer without a head.
    - ModelInfer: the frontend needs tensors of the Open Inference Protocol, also of an error.
    - StreamPredictions2, and DescribeModel with `customized` of the management API: nothing. Where the client has ended its
      side of the stream, or has given up, the frontend fails on any answer, and then again while it tells of the failure. That
      worker is never started again, yet counts as ready, and requests that are given to it hang. Nobody loses an answer to
      StreamPredictions2, which the frontend itself ends with an error, as this model has no sequences; descriptions there are
      by HTTP.

    Those by HTTP go first: where a client of gRPC gives up in the very moment of its reply, the frontend fails there, and only
    those behind it lose their answers.
    """
    if replies is not None and context is not None:  # else the whole batch failed
        doors = {index: door_of(context.get_all_request_header(index)) for index in request_ids}
        if any(door is not Door.HTTP for door in doors.values()):
            replies, request_ids = _fit_to_doors(list(replies), request_ids, context, doors)
    written: bytearray | None = otf_message_handler.create_predict_response(replies, request_ids, message, code, context, *more)
    return written


def _fit_to_doors(
    replies: list[bytes], request_ids: dict[int, str], context: Context, doors: Mapping[int, Door]
) -> tuple[list[bytes], dict[int, str]]:
    """Bring a batch's replies into the forms of their calls. Returns them, and the ids of those to write, in that order."""
    answered = sorted(
        (index for index in request_ids if doors[index] is not Door.UNSAFE), key=lambda i: doors[i] is not Door.HTTP
    )
    for index in answered:
        if doors[index] is Door.PREDICTIONS:
            context.set_response_header(index, *LAST_OF_STREAM)
        elif doors[index] is Door.INFER and context.get_response_status(index)[0] != HTTPStatus.OK:
            replies[index] = write_infer_error(replies[index], context)
    if len(answered) < len(request_ids):
        count = len(request_ids) - len(answered)
        logger.warning("%d requests get no answer, as they came by gRPC StreamPredictions2 or DescribeModel", count)
    return replies, {index: request_ids[index] for index in answered}


def write_infer_error(error: bytes, context: Context) -> bytes:
    """Write an error, which is JSON, as the one tensor `error` of a ModelInfer reply: its element is the JSON.

    A status there is none: the frontend cannot give one request of a batch its own.
    """
    tensor = {"name": "error", "datatype": "BYTES", "shape": [1], "data": [json.loads(error)]}
    model = {"model_name": context.model_name, "model_version": context.manifest["model"]["modelVersion"]}
    return json.dumps({"id": "", **model, "outputs": [tensor]}).encode()


# --- envelopes


def _pass_through_envelopes() -> None:
    """Have the envelope that is configured, if one is, hand over rows and replies as they are.

    The handler reads the bodies of all protocols itself, for each request of a batch.
    """
    for envelope in BaseEnvelope.__subclasses__():  # TorchServe imports the one that `service_envelope` names
        envelope.parse_input = envelope.format_output = _unchanged
        logger.info("service_envelope: %s passes everything through, as the handler reads all protocols", envelope.__name__)


def _unchanged(_envelope: BaseEnvelope, rows_or_replies: list[Any]) -> list[Any]:
    return rows_or_replies
