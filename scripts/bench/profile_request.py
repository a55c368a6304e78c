"""Time the steps of a request inside a worker, in this process.

    python -m scripts.bench.profile_request --archive build/digits.mar

Loads the archive as a TorchServe worker does, and has it answer batches of raw PNGs. Each step is timed by itself on what the
step before it gave; all steps take turns, so that a slow moment hits all of them. Microseconds a request, medians.
"""

import argparse
import json
import logging
import socket
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from ts.context import Context, RequestProcessor
from ts.model_loader import ModelLoaderFactory
from ts.protocol import otf_message_handler
from ts.protocol.otf_message_handler import create_predict_response

from handler.gradients.explain import Explanation, predict_and_explain
from handler.gradients.methods import softmax
from handler.images.decode import decode_image
from handler.images.digits import prepare_digit
from handler.preprocess import Prepared, preprocess
from handler.protocol.reply import Maps, Reply, Result, render_results
from handler.protocol.request import parse_request, read_correlation_id
from handler.runtime.metrics import Meter, answer_of
from handler.runtime.metrics import Step as MeteredStep
from scripts.paths import ARCHIVE, SAMPLE_FILES

HEADERS = {  # as a client sends them and the frontend adds to them
    "Host": "127.0.0.1:8080",
    "User-Agent": "curl/8",
    "Accept": "*/*",
    "Content-Type": "image/png",
    "explain": "True",
}
WHOLE = "all of it, as TorchServe calls it"

NOTED = (MeteredStep.DECODE, *[MeteredStep.ENCODE, MeteredStep.MAP, MeteredStep.FORWARD, MeteredStep.BACKWARD] * 2)

Step = Callable[[], object]


def load_handler(archive: Path, folder: Path, device: str = "cpu") -> tuple[Any, Context]:
    """Unpack an archive and load its handler as a worker does.

    Args:
        device: "cpu", or "gpu" for the first one.
    Returns:
        the handler, and the context that it is called with.
    """
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    sys.path.insert(0, str(folder))  # for its entry module; the package `handler` is the repo's, which it was built from
    loader = ModelLoaderFactory.get_model_loader()
    gpu_id = 0 if device == "gpu" else None
    service = loader.load(manifest["modelName"], str(folder), manifest["handler"], batch_size=1, gpu_id=gpu_id)
    return service._entry_point.__self__, service.context


def build_steps(handler: Any, context: Context, batch_size: int) -> dict[str, Step]:  # noqa: ANN401  # of the archive
    """What a worker does with a batch, step by step, each ready to be called again and again."""
    contents = [SAMPLE_FILES[index % len(SAMPLE_FILES)].read_bytes() for index in range(batch_size)]
    rows = [{"body": bytearray(content)} for content in contents]
    _, height, width = handler.input_shape
    requests = [parse_request(row, HEADERS, handler.class_count) for row in rows]
    images = [decode_image(content).grey for content in contents]
    prepared = [preprocess(request, height, width) for request in requests]
    pixels = torch.from_numpy(np.stack([one.questions[0].pixels for one in prepared])[:, None])

    def explain() -> tuple[NDArray[np.floating], list[Explanation | None]]:
        return predict_and_explain(handler.differentiable, pixels.to(handler.device), [(None,)] * batch_size)

    logits, explanations = explain()
    probabilities = softmax(logits)

    def result(index: int, one: Prepared) -> Result:
        explanation, question = explanations[index], one.questions[0]
        assert explanation is not None
        maps = Maps(explanation.classes, explanation.maps.squeeze(1))
        return Result(
            question.options, logits[index], probabilities[index], maps, question.describe_preparation(), question.pixels
        )

    results = [result(index, one) for index, one in enumerate(prepared)]

    meter, reply = Meter(handler.class_count, None), Reply(200, "", b"")

    def note() -> None:
        meter.start()
        for step in NOTED:
            meter.lap(step)
        meter.see(logits)
        meter.finish([answer_of(one, reply, explain_route=True) for one in prepared])
        for _ in rows:
            read_correlation_id(HEADERS)

    def handle() -> list[bytes]:
        context.request_processor = [RequestProcessor(dict(HEADERS)) for _ in rows]
        replies: list[bytes] = handler.handle(rows, context)
        return replies

    replies = handle()
    message = write_message(contents)
    frontend, worker = socket.socketpair()
    receiver = otf_message_handler._retrieve_buffer  # by now the handler's

    def receive() -> None:
        frontend.sendall(message)
        otf_message_handler.retrieve_msg(worker)

    def receive_by_fields() -> None:
        otf_message_handler._retrieve_buffer = receiver.by_fields
        otf_message_handler._retrieve_request = receiver.request_by_fields
        receive()
        otf_message_handler._retrieve_buffer = receiver
        otf_message_handler._retrieve_request = receiver.receive_request

    ids = {index: f"{index:036}" for index in range(batch_size)}
    return {
        "receive it, in pieces (worker_socket.py)": receive,
        "the same by fields, as TorchServe by itself does": receive_by_fields,
        "read the request (request.py)": lambda: [parse_request(row, HEADERS, handler.class_count) for row in rows],
        "decode the PNG (decode.py)": lambda: [decode_image(content) for content in contents],
        "see that it is canonical (canonical.py)": lambda: [prepare_digit(grey, height, width) for grey in images],
        "score and differentiate (saliency.py)": explain,
        "write the JSON (reply.py)": lambda: [
            render_results([one], request.reply_format, handler.model_description, listed=False, infer=None)
            for one, request in zip(results, requests, strict=True)
        ],
        "note what was done (metrics.py)": note,
        WHOLE: handle,
        "TorchServe's own packing of the replies": lambda: create_predict_response(replies, ids, "", 200, context),
    }


def write_message(contents: Sequence[bytes]) -> bytes:
    """Write a batch of requests as TorchServe's frontend sends it to a worker: each a raw body with HEADERS."""
    end = (0xFFFFFFFF).to_bytes(4)

    def text(content: bytes) -> bytes:
        return len(content).to_bytes(4) + content

    headers = b"".join(text(name.encode()) + text(value.encode()) for name, value in HEADERS.items()) + end
    bodies = [text(b"body") + text(HEADERS["Content-Type"].encode()) + text(content) + end for content in contents]
    return b"I" + b"".join(text(f"{index:036}".encode()) + headers + body for index, body in enumerate(bodies)) + end


def time_steps(steps: dict[str, Step], seconds: float, pause: float = 0.0) -> dict[str, float]:
    """Median time of one call of each step, in microseconds; all take turns.

    Args:
        seconds: for all of them.
        pause: seconds before each call in which this process does nothing, as a worker of a lone client.
    """
    durations_us: dict[str, list[float]] = {name: [] for name in steps}
    deadline = time.perf_counter() + seconds
    with tqdm(desc="turns", unit="turn", disable=None) as progress:
        while time.perf_counter() < deadline:
            for name, step in steps.items():
                if pause:
                    time.sleep(pause)
                started = time.perf_counter()
                step()
                durations_us[name].append((time.perf_counter() - started) * 1e6)
            progress.update()
    return {name: float(np.median(times)) for name, times in durations_us.items()}


def render_table(medians_us: dict[int, dict[str, float]]) -> str:
    """Write microseconds a request, one column a batch size, as Markdown.

    Args:
        medians_us: by batch size, of each step, for the whole batch.
    """
    sizes = list(medians_us)
    lines = [
        "| microseconds a request | " + " | ".join(f"batch {size}" for size in sizes) + " |",
        "| --- |" + " --- |" * len(sizes),
    ]
    names = list(medians_us[sizes[0]])
    lines += [f"| {name} | " + " | ".join(f"{medians_us[size][name] / size:.0f}" for size in sizes) + " |" for name in names]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.profile_request",
        description="Time the steps of a request inside a worker.",
        epilog="example: %(prog)s --batch-sizes 1 8 32",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each batch size")
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds of sleep before each step, as between a lone client's requests"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Time and print. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        handler, context = load_handler(arguments.archive, Path(folder), arguments.device)
        logging.disable(logging.INFO)
        medians_us = {
            size: time_steps(build_steps(handler, context, size), arguments.seconds, arguments.pause)
            for size in arguments.batch_sizes
        }
    print(render_table(medians_us))
    return 0


if __name__ == "__main__":
    sys.exit(main())
