"""Explain images in a process of its own, with the handler of an unpacked archive, as a TorchServe worker would.

    python -P explainer_process.py UNPACKED FD HEADERS [GPU]        (with PYTHONPATH=UNPACKED, as TorchServe sets it)

A decoder that crashes, hangs or takes all memory ends this process alone; `explainer.py` starts it, talks to it through the
socket FD, and starts it anew. Sees nothing of the repo: handler, weights and settings are the archive's.

Messages out: first JSON, what the archive and the options give (`explainer.Description`) or `{"error": ...}`; then, for each
batch, its answers as an Arrow IPC message of one record batch. Messages in: batches of image files, see `split_batch`.
"""

import base64
import contextlib
import ctypes
import json
import os
import queue
import signal
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

COUNTS = struct.Struct("<II")  # of a message's files, and of those that are answered at once
LENGTH = struct.Struct("<Q")
AHEAD = 2  # batches that wait here while one is answered
LABELS_FILE = "index_to_name.json"  # TorchServe's name for the names of classes
PR_SET_PDEATHSIG = 1  # linux/prctl.h
KILL_THIS_FIRST = "1000"  # says Linux's out-of-memory killer

ERROR_TYPE = pa.struct([("code", pa.int32()), ("type", pa.string()), ("message", pa.string())])
WARNINGS_TYPE = pa.list_(pa.struct([("type", pa.string()), ("message", pa.string())]))


def main() -> None:
    """Answer batches until the other end closes the socket."""
    model_dir, channel = Path(sys.argv[1]).resolve(), socket.socket(fileno=int(sys.argv[2]))
    headers: dict[str, str] = json.loads(sys.argv[3])
    gpu = int(sys.argv[4]) if len(sys.argv) > 4 else None
    _end_with_parent()
    handler, settings = load_handler(model_dir, gpu)
    try:
        columns = Columns(handler, headers, model_dir)
    except Refused as error:
        send_message(channel, json.dumps({"error": str(error)}).encode())
        return
    schema = columns.record_batch([]).schema
    description = {
        "schema": base64.b64encode(schema.serialize()).decode(),
        "model": handler.model_description,
        "batch_size": settings.get("batchSize", 1),
        "timeout_s": settings.get("responseTimeout", 120),  # TorchServe's own default
    }
    send_message(channel, json.dumps(description).encode())

    batches: queue.Queue[pa.Buffer] = queue.Queue(AHEAD)
    threading.Thread(target=_receive, args=(channel, batches), daemon=True).start()
    while True:
        contents, batch_size = split_batch(batches.get())
        rows = [{"data": content} for content in contents]
        answers = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            answers += handler.results_of(batch, [headers] * len(batch))
        for index, answer in enumerate(answers):
            if not isinstance(answer, list) and answer.status >= 500:  # perhaps only too much beside the others
                (answers[index],) = handler.results_of([rows[index]], [headers])
        send_message(channel, columns.record_batch(answers).serialize())


def load_handler(model_dir: Path, gpu: int | None) -> tuple[Any, dict[str, Any]]:
    """Load an unpacked archive as a TorchServe worker does.

    Returns:
        its handler; and its model-config.yaml.
    """
    from ts.model_loader import ModelLoaderFactory  # here: `explainer.py` imports this module, and not TorchServe and torch

    manifest = json.loads((model_dir / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    loader = ModelLoaderFactory.get_model_loader()
    service = loader.load(manifest["modelName"], str(model_dir), manifest["handler"], gpu_id=gpu, batch_size=1)
    handler = service._entry_point.__self__  # the BaseHandler: TorchServe keeps only its bound method
    return handler, service.context.model_yaml_config or {}


def _end_with_parent() -> None:
    """End this process with its parent, and let it be the one to go where memory runs out."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(KILL_THIS_FIRST)


def _receive(channel: socket.socket, batches: "queue.Queue[pa.Buffer]") -> None:
    """Take batches off the socket while others are answered."""
    while True:
        try:
            batches.put(receive_message(channel))
        except (EOFError, OSError):
            os._exit(0)  # whoever asked is gone, and so is all reason to finish


def send_message(channel: socket.socket, message: bytes | pa.Buffer) -> None:
    """Send a message behind its length. Raises OSError."""
    channel.sendall(LENGTH.pack(len(message)))
    channel.sendall(message)


def receive_message(channel: socket.socket) -> pa.Buffer:
    """Wait for a message, into memory that Arrow keeps for the next one: the system would give so much anew page by page.

    Raises:
        EOFError: the other end has closed.
        OSError: it is gone.
    """
    (length,) = LENGTH.unpack(_receive_exactly(channel, LENGTH.size))
    return _receive_exactly(channel, length)


def _receive_exactly(channel: socket.socket, size: int) -> pa.Buffer:
    buffer = pa.allocate_buffer(size)
    left = memoryview(buffer)
    while left:
        count = channel.recv_into(left, 0, socket.MSG_WAITALL)
        if not count:
            raise EOFError
        left = left[count:]
    return buffer


def join_batch(contents: Sequence[bytes], batch_size: int) -> bytes:
    """Make a message of image files: how many, how many to answer at once, the length of each, then all of them."""
    lengths = struct.pack(f"<{len(contents)}Q", *map(len, contents))
    return b"".join([COUNTS.pack(len(contents), batch_size), lengths, *contents])


def split_batch(message: pa.Buffer) -> tuple[list[bytes], int]:
    """Undo `join_batch`."""
    count, batch_size = COUNTS.unpack_from(message)
    lengths = struct.unpack_from(f"<{count}Q", message, COUNTS.size)
    ends = list(accumulate(lengths, initial=len(message) - sum(lengths)))
    view = memoryview(message)
    return [bytes(view[start:end]) for start, end in pairwise(ends)], batch_size


class Refused(ValueError):
    """The archive cannot be used, or does not take these options."""


class Columns:
    """Answers of the handler -> columns of the output.

    Attributes:
        saliency_shape: of each image's maps: (H, W), or (T, H, W) where a list of targets is asked for; () where there are none,
            None where they have the shape of their image.
    """

    def __init__(self, handler: Any, headers: dict[str, str], model_dir: Path) -> None:  # noqa: ANN401  # the archive's own
        """Ask about the archive's reference image, whose answer shows what these options give.

        Raises:
            Refused: the handler has no `results_of`, or does not take the options.
        """
        if not hasattr(handler, "results_of"):
            raise Refused("its handler is older than scripts.bulk: build the archive anew with python -m scripts.packaging")
        pixels = json.loads((model_dir / "reference.json").read_text())["pixels"]
        for more in ({}, {"x-saliency-prepare": "none"}):  # the first checks the options as they are; the image may be refused
            (answer,) = handler.results_of([{"data": pixels}], [{**headers, **more}])
            if isinstance(answer, list):
                break
            if type(answer).__name__ in ("InvalidOption", "UnknownOption", "RequestTooLarge", "InternalError"):
                raise Refused(answer.message)
        else:
            raise Refused(answer.message)
        (result,) = answer
        self.class_count = len(result.logits)
        self.labels = _read_labels(model_dir, self.class_count)
        self.explains = result.explanation is not None
        self.in_image_space = result.image.sent is not None
        self.has_delta = self.explains and result.options.method.has_convergence_delta
        shape = result.saliency.shape if self.explains else ()
        self.saliency_shape = None if self.in_image_space else shape

    def record_batch(self, answers: Sequence[Any]) -> pa.RecordBatch:
        """Make one row of each answer, which is a list of one Result or an error."""
        errors = [_describe_error(answer) for answer in answers]
        results = [answer[0] if error is None else None for answer, error in zip(answers, errors, strict=True)]
        missing = np.array([result is None for result in results], dtype=bool)
        good = [result for result in results if result is not None]
        classes = np.zeros(len(missing), np.int32)
        if good:
            classes[~missing] = np.argmax([result.logits for result in good], axis=1)
        columns = {
            "class": pa.array(classes, mask=missing),
            "label": self.labels.take(pa.array(classes, mask=missing)),
            "probabilities": _stack([one.probabilities for one in good], missing, np.float64, self.class_count),
            "logits": _stack([one.logits for one in good], missing, np.float32, self.class_count),
        }
        if self.explains:
            targets = [None if result is None else result.explanation.classes for result in results]
            columns["target"] = pa.array(targets, pa.list_(pa.int32()))
            columns |= self._encode_maps(good, missing)
        if self.has_delta:
            deltas = [None if result is None else result.explanation.convergence_deltas.tolist() for result in results]
            columns["completeness_gap"] = pa.array(deltas, pa.list_(pa.float64()))
        preparations = [None if result is None else result.image.describe() for result in results]
        warnings = [
            None if result is None else [{"type": one.type, "message": one.message} for one in result.warnings]
            for result in results
        ]
        columns["preparation"] = pa.array(_write_json(preparations), pa.string())
        columns["warnings"] = pa.array(warnings, WARNINGS_TYPE)
        columns["error"] = pa.array(errors, ERROR_TYPE)
        return pa.RecordBatch.from_pydict(columns)

    def _encode_maps(self, good: Sequence[Any], missing: NDArray[np.bool_]) -> dict[str, pa.Array]:
        maps = [result.saliency for result in good]
        if self.saliency_shape is not None:
            storage = _stack([one.ravel() for one in maps], missing, np.float32, int(np.prod(self.saliency_shape)))
            tensor = pa.fixed_shape_tensor(pa.float32(), list(self.saliency_shape))
            return {"saliency": pa.ExtensionArray.from_storage(tensor, storage)}
        places = iter(maps)
        own = [None if is_missing else next(places) for is_missing in missing]
        return {
            "saliency": pa.array([None if one is None else one.ravel() for one in own], pa.list_(pa.float32())),
            "saliency_shape": pa.array([None if one is None else one.shape for one in own], pa.list_(pa.int32())),
        }


def _describe_error(answer: Any) -> dict[str, Any] | None:  # noqa: ANN401
    """Say what is wrong with an image, as the service's own reply does; None where nothing is."""
    if not isinstance(answer, list):
        return {"code": answer.status, "type": type(answer).__name__, "message": answer.message}
    if len(answer) != 1:
        return {"code": 400, "type": "WrongShape", "message": f"expected one image in a file, got an array of {len(answer)}"}
    return None


def _write_json(values: Sequence[dict[str, Any] | None]) -> list[str | None]:
    """Write each value as JSON, those that are like the one before at no cost: most images of a set are prepared alike."""
    texts: list[str | None] = []
    for value, same in groupby(values):
        text = None if value is None else json.dumps(value)
        texts += [text for _ in same]
    return texts


def _stack(rows: Sequence[NDArray[Any]], missing: NDArray[np.bool_], dtype: type[np.generic], size: int) -> pa.Array:
    """Put rows of one size into a column, with nulls where one is missing."""
    values, mask = np.zeros((len(missing), size), dtype), None
    if len(rows) < len(missing):
        values[~missing] = np.reshape(rows, (len(rows), size))
        mask = pa.array(missing)
    elif rows:
        np.stack(rows, out=values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), size, mask=mask)


def _read_labels(model_dir: Path, class_count: int) -> pa.StringArray:
    """Read the names of the classes; where the archive has none, they are the indices."""
    file = model_dir / LABELS_FILE
    names = json.loads(file.read_text()) if file.is_file() else {}
    own = [names.get(str(index), str(index)) for index in range(class_count)]
    return pa.array([str(name[-1]) if isinstance(name, list) else str(name) for name in own], pa.string())


if __name__ == "__main__":
    main()
