"""The services that the benchmark compares: what each needs, how it is started, what it answers.

All run on the same device, on the loopback address, with the same number of workers and, but for TorchServe's example as
published, one thread of torch a worker. Those on TorchServe are started by `scripts.serving`, with this service's configuration.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import requests
import safetensors.torch
import torch

from scripts.packaging.package import MODEL_VERSION, build_archive, write_archive
from scripts.paths import MODEL_CONFIG, MODEL_FILE, MODEL_NAME, ROOT, SAMPLE_IMAGE, WEIGHTS_FILE
from scripts.serving.launcher import Ports, ServeError, Settings, TorchServe

PEERS = Path(__file__).parent
START_TIMEOUT_S = 120
START_POLL_S = 0.1
STOP_TIMEOUT_S = 15


class Explains(Enum):
    """The kind of a system's explanations, which decides how they are checked."""

    PREDICTED = "gradient of the predicted class"
    CLASS_0 = "gradient of class 0"
    OTHER = "integrated gradients of class 0"
    NOTHING = "a constant"


@dataclass(frozen=True, slots=True)
class Workplace:
    """The surroundings in which a system is started.

    Attributes:
        folder: for archives and logs.
        workers: worker processes of each system.
        device: "cpu" or "gpu", of all workers.
        explanation, prediction: this service's replies to one image, which the no-op repeats.
    """

    folder: Path
    workers: int
    device: str = "cpu"
    explanation: bytes = b""
    prediction: bytes = b""


@dataclass(frozen=True, slots=True)
class Running:
    """A started system.

    Attributes:
        address: such as http://127.0.0.1:8080.
        explain_path, predict_path: where a PNG is posted.
        processes: lists those of it that run now.
        ready_s: seconds from its start until all its workers could answer.
    """

    address: str
    explain_path: str
    predict_path: str
    processes: Callable[[], list[psutil.Process]]
    ready_s: float

    def path(self, route: str) -> str:
        """Give the path that "explain" or "predict" is posted to."""
        return {"explain": self.explain_path, "predict": self.predict_path}[route]

    def cpu_seconds(self) -> tuple[float, float]:
        """Sum up the processor time of its processes so far: of all but a JVM, and of a JVM."""
        seconds = {False: 0.0, True: 0.0}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                used = process.cpu_times()
                seconds[process.name() == "java"] += used.user + used.system
        return seconds[False], seconds[True]


@dataclass(frozen=True, slots=True)
class System:
    """One service that can be measured.

    Attributes:
        title: in tables.
        explains: what its explanations are.
        needs: packages that it imports, beside those of this project.
        start: makes a context manager in which it runs.
    """

    title: str
    explains: Explains
    needs: tuple[str, ...]
    start: Callable[[Workplace], AbstractContextManager[Running]]

    def missing(self) -> list[str]:
        """List the packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


@contextlib.contextmanager
def _start_torchserve(
    archive: Path, workplace: Workplace, model_config: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[Running]:
    started = time.perf_counter()
    settings = Settings(
        archive=archive,
        ports=Ports.free(),
        device=workplace.device,
        log_dir=workplace.folder / f"logs-{archive.stem}",
        model_config={"minWorkers": workplace.workers, "maxWorkers": workplace.workers, **model_config},
    )
    with TorchServe(settings) as server:
        ready_s = time.perf_counter() - started
        name = server.model_name
        yield Running(server.address, f"/explanations/{name}", f"/predictions/{name}", server.processes, ready_s)


def _start_ours(workplace: Workplace) -> AbstractContextManager[Running]:
    archive = workplace.folder / f"{MODEL_NAME}.mar"
    build_archive(archive, model_file=MODEL_FILE, weights_file=WEIGHTS_FILE, model_config=MODEL_CONFIG)
    return _start_torchserve(archive, workplace)


def _start_stock(
    workplace: Workplace, handler: str, name: str, model_config: Mapping[str, Any] = MappingProxyType({})
) -> AbstractContextManager[Running]:
    """Start a handler of the stock kind; `model_config` replaces keys of model-config.yaml."""
    weights = io.BytesIO()
    torch.save(safetensors.torch.load_file(WEIGHTS_FILE), weights)
    files = {"network.py": MODEL_FILE.read_bytes(), "weights.pt": weights.getvalue()}
    manifest = {"modelFile": "network.py", "serializedFile": "weights.pt"}
    archive = _build_peer_archive(workplace.folder / f"{name}.mar", handler, files, manifest)
    return _start_torchserve(archive, workplace, model_config)


def _start_noop(workplace: Workplace) -> AbstractContextManager[Running]:
    files = {"explanation.json": workplace.explanation, "prediction.json": workplace.prediction}
    archive = _build_peer_archive(workplace.folder / "noop.mar", "noop_handler.py", files, {})
    return _start_torchserve(archive, workplace)


def _build_peer_archive(output: Path, handler: str, files: Mapping[str, bytes], manifest: Mapping[str, str]) -> Path:
    """Pack a peer's handler alone, with this service's own model-config.yaml."""
    model = {
        "modelName": output.stem,
        "modelVersion": MODEL_VERSION,
        "handler": handler,
        "configFile": "model-config.yaml",
        **manifest,
    }
    entries = {
        "MAR-INF/MANIFEST.json": json.dumps({"runtime": "python", "model": model}).encode(),
        "model-config.yaml": MODEL_CONFIG.read_bytes(),
        handler: (PEERS / handler).read_bytes(),
        **files,
    }
    write_archive(output, entries)
    return output


@contextlib.contextmanager
def _start_program(workplace: Workplace, *, name: str, command: tuple[str, ...]) -> Iterator[Running]:
    """Start `python -m COMMAND --port ... --workers ...`."""
    port = Ports.free().inference
    log_file = workplace.folder / f"{name}.log"
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""} if workplace.device == "cpu" else {}
    started = time.perf_counter()
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(port), "--workers", str(workplace.workers)],
            cwd=ROOT,
            env={**os.environ, **no_gpu, "TMPDIR": str(workplace.folder)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running = psutil.Process(process.pid)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_it_answers(process, f"{address}/explain", log_file)
        ready_s = time.perf_counter() - started
        yield Running(address, "/explain", "/predict", lambda: [running, *running.children(recursive=True)], ready_s)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_it_answers(process: subprocess.Popen[bytes], route: str, log_file: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    image = SAMPLE_IMAGE.read_bytes()
    while True:
        with contextlib.suppress(requests.RequestException):
            if requests.post(route, data=image, timeout=5).ok:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServeError(f"{route} did not answer:\n{log_file.read_text(errors='replace')[-4000:]}")
        time.sleep(START_POLL_S)


SYSTEMS: dict[str, System] = {
    "ours": System("this service", Explains.PREDICTED, (), _start_ours),
    "stock-1": System(
        "TorchServe's MNIST example as published (captum IntegratedGradients, 15 steps; a thread a core), batches of 1",
        Explains.OTHER,
        ("captum",),
        partial(_start_stock, handler="stock_handler.py", name="stock1", model_config={"batchSize": 1, "handler": {}}),
    ),
    "stock-8": System(
        "the same, batches of 8",
        Explains.OTHER,
        ("captum",),
        partial(_start_stock, handler="stock_handler.py", name="stock8", model_config={"batchSize": 8, "handler": {}}),
    ),
    "stock-tuned": System(
        "the same, batches of 1, one thread a worker",
        Explains.OTHER,
        ("captum",),
        partial(_start_stock, handler="stock_handler.py", name="stocktuned", model_config={"batchSize": 1}),
    ),
    "saliency": System(
        "the same with captum Saliency, batches of 8, one thread a worker",
        Explains.CLASS_0,
        ("captum",),
        partial(_start_stock, handler="saliency_handler.py", name="saliency"),
    ),
    "fastapi": System(
        "FastAPI + captum Saliency",
        Explains.PREDICTED,
        ("fastapi", "uvicorn", "captum"),
        partial(_start_program, name="fastapi", command=("uvicorn", "scripts.bench.peers.fastapi_app:app", "--no-access-log")),
    ),
    "mosec": System(
        "mosec + captum Saliency, batches of 16",
        Explains.PREDICTED,
        ("mosec", "captum"),
        partial(_start_program, name="mosec", command=("scripts.bench.peers.mosec_app", "--address", "127.0.0.1")),
    ),
    "mosec-1": System(
        "the same without batches, mosec's default",
        Explains.PREDICTED,
        ("mosec", "captum"),
        partial(
            _start_program,
            name="mosec1",
            command=("scripts.bench.peers.mosec_app", "--address", "127.0.0.1", "--max-batch-size", "1"),
        ),
    ),
    "noop": System("TorchServe with a handler that does nothing", Explains.NOTHING, (), _start_noop),
}


def worker_memory_mib(running: Running) -> tuple[float, float, float]:
    """Read the memory of one worker: of the system's largest process but a JVM.

    Returns:
        MiB that are resident, with the pages of libraries that workers share; MiB that are unshared; the most MiB that were
        resident at any time, as Linux counts them.
    """
    workers = []
    for process in running.processes():
        with contextlib.suppress(psutil.Error):
            if process.name() != "java":
                workers.append((process.memory_full_info(), process.pid))
    largest, pid = max(workers, key=lambda worker: worker[0].rss)
    (peak_kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return largest.rss / 2**20, largest.uss / 2**20, int(peak_kib) / 2**10


def read_digit(reply: object) -> int:
    """Find the digit in a reply to a prediction: an object's field, or TorchServe's bare number."""
    digit = reply["digit"] if isinstance(reply, dict) else reply
    assert isinstance(digit, int)
    return digit


def read_map(reply: object) -> list[Any]:
    """Find the map in a reply to an explanation, nested: this service's, a program's, or TorchServe's bare one."""
    found = reply["explanation"] if isinstance(reply, dict) else reply
    if isinstance(found, dict):
        found = found["saliency"]
    assert isinstance(found, list)
    return found
