"""Time the steps of a request inside a worker, in this process.

    python -m scripts.bench.profile_request --archive build/digits.mar
    python -m scripts.bench.profile_request --start

Loads the archive as a TorchServe worker does, and has TorchServe's own code receive, answer and pack batches of raw PNGs. A
stopwatch around the functions of STEPS, where they are looked up, measures each step's own time: the steps add up to the whole.
Turns with and without the stopwatch alternate, so that a slow moment hits both. Microseconds a request, medians.

`--start` shows instead what a worker's start and memory are made of: it imports what a worker imports, one module after another,
loads the archive and answers batches, and after each step reads the time and the resident memory. So this module itself imports
little, and that late.
"""

import argparse
import contextlib
import functools
import importlib
import json
import logging
import socket
import statistics
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from scripts.bench.arguments import read_count, read_positive, read_seconds
from scripts.paths import ARCHIVE, SAMPLE_FILES, SERVE_CONFIG
from scripts.tables import render_markdown

ENTRY = "all else in the handler (saliency_handler.py)"
# A step -> its functions, as MODULE:NAME or MODULE:CLASS.NAME, of the archive or of TorchServe.
STEPS: Mapping[str, Sequence[str]] = {
    "receive the batch (torchserve.py)": ["ts.protocol.otf_message_handler:retrieve_msg"],
    "TorchServe's own work around the handler": ["ts.service:Service.predict"],
    "read the request (protocol/request.py)": ["handler.protocol.request:parse_request"],
    "decode the PNG (images/decode.py)": ["handler.images.decode:decode_image"],
    "preprocess it (images/digits.py)": ["handler.images.digits:prepare_digit"],
    "score and differentiate (gradients)": ["handler.gradients.explain:predict_and_explain"],
    "write the JSON (protocol/reply.py)": ["handler.protocol.reply:render_results"],
    "count (runtime/metrics.py)": [
        "handler.runtime.metrics:answer_of",
        *(f"handler.runtime.metrics:Meter.{method}" for method in ("start", "lap", "see", "finish")),
    ],
    ENTRY: [],  # TorchServe holds the handler's bound method; `find_places` names that place
    "pack the replies (TorchServe)": ["ts.protocol.otf_message_handler:create_predict_response"],
}
WHOLE = "all of it, without the stopwatch"
RECEIVED_BY_FIELDS = "receive the batch as TorchServe does by itself"

HEADERS = {  # as a client sends them and the frontend adds to them
    "Host": "127.0.0.1:8080",
    "User-Agent": "curl/8",
    "Accept": "*/*",
    "Content-Type": "image/png",
    "explain": "True",
}
SEND_TIMEOUT_S = 10.0  # a batch that does not fit into the socket's buffer is never sent
WARM_UP_BATCHES = 3

IMPORTS = {  # in a worker's order: a module that several need counts for the first
    "torch": "torch, which runs the network",
    "ts.model_service_worker": "TorchServe's worker",
    "ts.torch_handler.base_handler": "TorchServe's BaseHandler",
    "handler.images.decode": "Pillow and images/decode.py: image files",
    "handler.images.digits": "scipy.ndimage and images/digits.py: the ink in a photograph",
    "saliency_handler": "the rest of the handler",
}
START_BATCH_SIZES = (1, 8, 32)
REPEATED = 20  # batches of each size
MIB = 2**20

Place = tuple[Any, str, object]  # a module, class or object; a name in it; what is to stand there


class ProfileError(RuntimeError):
    """Nothing can be measured; the message says why, for a person."""


# --- a worker


class Worker:
    """A worker's end of a connection to TorchServe's frontend, with the service that an archive makes, in this process."""

    def __init__(self, folder: Path, device: str) -> None:
        """Load an unpacked archive as a worker does.

        Args:
            device: "cpu", or "gpu" for the first one.
        """
        import torch
        from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
        from ts.model_loader import TsModelLoader
        from ts.protocol import otf_message_handler

        torch.set_num_threads(1)
        self.protocol: Any = otf_message_handler
        before = dict(vars(otf_message_handler))
        metrics = MetricsCacheYamlImpl(config_file_path=str(SERVE_CONFIG / "metrics.yaml"))
        metrics.initialize_cache()
        manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())["model"]
        self.service = TsModelLoader().load(
            manifest["modelName"],
            str(folder),
            manifest["handler"],
            gpu_id=0 if device == "gpu" else None,
            batch_size=1,
            metrics_cache=metrics,
        )
        # TorchServe's protocol as it was before the handler changed it.
        self.untouched: list[Place] = [
            (otf_message_handler, name, value) for name, value in before.items() if vars(otf_message_handler)[name] is not value
        ]
        self.frontend, self.connection = socket.socketpair()
        self.frontend.settimeout(SEND_TIMEOUT_S)
        self.service.set_cl_socket(self.connection)

    def close(self) -> None:
        """End the connection."""
        self.frontend.close()
        self.connection.close()

    def receive(self, message: bytes) -> tuple[Any, float]:
        """Send a batch to the worker, and receive it there.

        Returns:
            the batch as the service takes it, and the seconds that receiving took.
        """
        self.frontend.sendall(message)
        started = time.perf_counter()
        _, batch = self.protocol.retrieve_msg(self.connection)
        return batch, time.perf_counter() - started

    def answer(self, message: bytes) -> float:
        """Receive and answer a batch, as a worker does but for sending the replies. Returns the seconds that it took."""
        batch, received_s = self.receive(message)
        started = time.perf_counter()
        self.service.predict(batch)
        return received_s + time.perf_counter() - started

    def require_good_replies(self, message: bytes, batch_size: int) -> None:
        """Answer a batch, and check the replies' statuses.

        Raises:
            ProfileError: one is not 200.
        """
        self.answer(message)
        statuses = {self.service.context.get_response_status(index)[0] for index in range(batch_size)}
        if statuses != {200}:
            raise ProfileError(f"expected replies with the status 200, got {sorted(statuses, key=str)}")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive, and let Python import from it first."""
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    sys.path.insert(0, str(folder))


def write_message(batch_size: int) -> bytes:
    """Write a batch of requests as TorchServe's frontend sends it to a worker: sample digits as raw bodies, with HEADERS."""
    end = (0xFFFFFFFF).to_bytes(4)

    def text(content: bytes) -> bytes:
        return len(content).to_bytes(4) + content

    contents = [SAMPLE_FILES[index % len(SAMPLE_FILES)].read_bytes() for index in range(batch_size)]
    headers = b"".join(text(name.encode()) + text(value.encode()) for name, value in HEADERS.items()) + end
    bodies = [text(b"body") + text(HEADERS["Content-Type"].encode()) + text(content) + end for content in contents]
    return b"I" + b"".join(text(f"{index:036}".encode()) + headers + body for index, body in enumerate(bodies)) + end


# --- the steps of a request


class Stopwatch:
    """The own time of steps: what their functions take, less what functions of other steps take inside them.

    Attributes:
        own_s: seconds of each step so far.
    """

    def __init__(self) -> None:
        self.own_s: dict[str, float] = defaultdict(float)
        self._inner_s = [0.0]  # of each call that runs now: the time of the timed calls inside it

    def wrap(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function that does the same and counts its time for a step."""

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401  # as the function has it
            self._inner_s.append(0.0)
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                taken_s = time.perf_counter() - started
                self.own_s[step] += taken_s - self._inner_s.pop()
                self._inner_s[-1] += taken_s

        return timed

    def read(self) -> dict[str, float]:
        """Give the times so far, and start again."""
        own_s, self.own_s = dict(self.own_s), defaultdict(float)
        return own_s


@contextlib.contextmanager
def replaced(places: Sequence[Place]) -> Iterator[None]:
    """Put other functions in their places, for a while."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, other in places:
        setattr(owner, name, other)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def find_places(worker: Worker, stopwatch: Stopwatch, steps: Mapping[str, Sequence[str]]) -> list[Place]:
    """Find every place where a function of the steps is looked up, in its class or in modules, and what times it there.

    Raises:
        ProfileError: there is no function of that name.
    """
    places: list[Place] = [(worker.service, "_entry_point", stopwatch.wrap(ENTRY, worker.service._entry_point))]
    modules = [module for module in sys.modules.values() if isinstance(module, ModuleType)]
    for step, functions in steps.items():
        for function in functions:
            module_name, _, path = function.partition(":")
            class_name, _, name = path.rpartition(".")
            try:
                owner: Any = importlib.import_module(module_name)
                owner = getattr(owner, class_name) if class_name else owner
                original = getattr(owner, name)
            except (ImportError, AttributeError) as error:
                raise ProfileError(f"expected STEPS to name a function, got {function}: {error}") from error
            timed = stopwatch.wrap(step, original)
            if class_name:
                places.append((owner, name, timed))
            else:
                places += [(user, alias, timed) for user in modules for alias, value in vars(user).items() if value is original]
    return places


def time_steps(worker: Worker, batch_size: int, seconds: float, pause_s: float = 0.0) -> dict[str, float]:
    """Measure the median time of each step of a batch, in microseconds.

    Args:
        seconds: for all of it.
        pause_s: before each batch this process sleeps so long, as the worker of a lone client does.
    Raises:
        ProfileError: a reply is not good, or STEPS names what is not there.
    """
    from tqdm import tqdm

    message = write_message(batch_size)
    for _ in range(WARM_UP_BATCHES):
        worker.require_good_replies(message, batch_size)
    stopwatch = Stopwatch()
    timed = find_places(worker, stopwatch, STEPS)
    taken_s: dict[str, list[float]] = {name: [] for name in (*STEPS, WHOLE, RECEIVED_BY_FIELDS)}
    deadline = time.perf_counter() + seconds
    with tqdm(desc=f"batches of {batch_size}", unit="turn", disable=None) as progress:
        while time.perf_counter() < deadline:
            time.sleep(pause_s)
            taken_s[WHOLE].append(worker.answer(message))
            time.sleep(pause_s)
            with replaced(timed):
                worker.answer(message)
            for step, own_s in stopwatch.read().items():
                taken_s[step].append(own_s)
            time.sleep(pause_s)
            with replaced(worker.untouched):
                taken_s[RECEIVED_BY_FIELDS].append(worker.receive(message)[1])
            progress.update()
    unused = [step for step in STEPS if not taken_s[step]]
    if unused:
        raise ProfileError(f"expected a request to take every step of STEPS, got none that took: {', '.join(unused)}")
    return {name: statistics.median(times) * 1e6 for name, times in taken_s.items()}


def render_steps(medians_us: Mapping[int, Mapping[str, float]]) -> str:
    """Write microseconds a request, one column a batch size, as Markdown.

    Args:
        medians_us: by batch size, of each step, for the whole batch.
    """
    sizes = list(medians_us)
    rows = [[name, *(f"{medians_us[size][name] / size:.0f}" for size in sizes)] for name in medians_us[sizes[0]]]
    return render_markdown(["microseconds a request", *(f"batch {size}" for size in sizes)], rows)


# --- a worker's start


@dataclass(frozen=True, slots=True)
class StartStep:
    """One step of a worker's start: the seconds that it took, and the MiB that were resident after it."""

    title: str
    seconds: float
    resident_mib: float


def start_worker(archive: Path, folder: Path, device: str) -> Iterator[StartStep]:
    """Start a worker step by step, and measure each.

    Args:
        archive: whose handler is loaded.
        folder: an empty one, for its files.
    """
    yield _measure_step("Python itself", lambda: None)
    unpack(archive, folder)
    for name, title in IMPORTS.items():
        yield _measure_step(title, functools.partial(importlib.import_module, name))
    workers: list[Worker] = []
    yield _measure_step("the archive: network, compiled pass and its check", lambda: workers.append(Worker(folder, device)))
    for size in START_BATCH_SIZES:
        message = write_message(size)
        yield _measure_step(f"{REPEATED} batches of {size}", functools.partial(_answer_again, workers[0], message))
    workers[0].close()


def _answer_again(worker: Worker, message: bytes) -> None:
    for _ in range(REPEATED):
        worker.answer(message)


def _measure_step(title: str, step: Callable[[], object]) -> StartStep:
    started = time.perf_counter()
    step()
    return StartStep(title, time.perf_counter() - started, psutil.Process().memory_info().rss / MIB)


def render_start(steps: Sequence[StartStep]) -> str:
    """Write the steps as Markdown."""
    rows = [(step.title, f"{step.seconds:.2f}", f"{step.resident_mib:.0f}") for step in steps]
    return render_markdown(("a worker's step", "seconds", "MiB resident after it"), rows)


# --- the command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.profile_request",
        description="Time the steps of a request inside a worker, or of the worker's start.",
        epilog="example: %(prog)s --batch-sizes 1 8 32",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="whose code is timed")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where the network runs")
    parser.add_argument("--start", action="store_true", help="time a worker's start, and show its memory, instead")
    parser.add_argument("--batch-sizes", type=read_count, nargs="+", default=[1, 8], help="requests a batch")
    parser.add_argument("--seconds", type=read_positive, default=5.0, help="for each batch size")
    parser.add_argument(
        "--pause", type=read_seconds, default=0.0, help="seconds of sleep before each batch, as between a lone client's requests"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code: 1 where nothing can be measured."""
    arguments = build_parser().parse_args(argv)
    printing = logging.StreamHandler()
    printing.setLevel(logging.ERROR)
    logging.basicConfig(level=logging.INFO, handlers=[printing], force=True)  # as a worker logs, and only errors are shown
    try:
        with tempfile.TemporaryDirectory(prefix="profile-") as name:
            folder = Path(name)
            if arguments.start:
                print(render_start(list(start_worker(arguments.archive, folder, arguments.device))))
                return 0
            unpack(arguments.archive, folder)
            worker = Worker(folder, arguments.device)
            sizes = arguments.batch_sizes
            print(render_steps({size: time_steps(worker, size, arguments.seconds, arguments.pause) for size in sizes}))
            worker.close()
    except (ProfileError, OSError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
