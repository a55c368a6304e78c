"""A real TorchServe for the end-to-end tests, on ports, folders and temp files of its own."""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import torch
from numpy.typing import NDArray
from PIL import Image

from scripts.packaging.package import read_archive
from scripts.paths import SAMPLE_FILES
from scripts.serving.launcher import Ports, Settings, TorchServe
from tests.conftest import label_of
from tests.kinks import dithered_digits
from tests.oracle import Oracle

BATCH_SIZE = 8
TIMEOUT_S = 30
SERVER = pytest.StashKey[TorchServe]()


@dataclasses.dataclass(frozen=True)
class Sample:
    """A digit as a client has it, and what an independent computation says of it."""

    digit: int
    levels: NDArray[np.uint8]  # (28, 28)
    logits: NDArray[np.float64]  # (10,)
    jacobian: NDArray[np.float64]  # (10, 28, 28)

    @property
    def png(self) -> bytes:
        content = BytesIO()
        Image.fromarray(self.levels).save(content, format="PNG")
        return content.getvalue()

    @property
    def predicted(self) -> int:
        return int(self.logits.argmax())


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """Where the server's workers run: "cpu" or "gpu"."""
    asked: str = pytestconfig.getoption("device")
    if asked == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return asked


@pytest.fixture(scope="session")
def server(
    archive: Path, device: str, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[TorchServe]:
    """One worker and a long wait for neighbours, so that requests sent at once share a batch."""
    settings = Settings(
        archive=archive,
        ports=Ports.free(),
        device=device,
        log_dir=tmp_path_factory.mktemp("logs"),
        model_config={
            **{"minWorkers": 1, "maxWorkers": 1, "batchSize": BATCH_SIZE, "maxBatchDelay": 60},
            "handler": {"torch_threads": 1, "log_batches": True},
        },
    )
    with TorchServe(settings) as running:
        pytestconfig.stash[SERVER] = running
        yield running


@pytest.fixture(scope="session")
def samples(archive: Path) -> list[Sample]:
    """Test digits with a little noise (without it max pools tie, and ties have no one gradient), and the oracle's answers."""
    oracle = Oracle(read_archive(archive)["weights.safetensors"])
    return [
        Sample(label_of(file), levels, *oracle.explain(levels / 255))
        for file, levels in zip(SAMPLE_FILES[::3], dithered_digits()[::3], strict=True)
    ]


@pytest.fixture
def batch_count(server: TorchServe) -> Callable[[], int]:
    """How many batches the workers have got so far: TorchServe's worker logs a line for each."""

    def count() -> int:
        time.sleep(0.3)  # the line passes through a pipe and a log queue
        return (server.settings.log_dir / "model_log.log").read_text().count("Backend received inference")

    return count


def workers_of(server: TorchServe) -> list[psutil.Process]:
    """The worker processes that run, ready or not."""
    return [process for process in server.processes() if "model_service_worker" in " ".join(process.cmdline())]


@pytest.fixture
def worker_pids(server: TorchServe) -> Callable[[], list[int]]:
    """The workers that TorchServe says are ready."""

    def pids() -> list[int]:
        reply = requests.get(f"{server.management_address}/models/digits", timeout=TIMEOUT_S)
        return [worker["pid"] for worker in reply.json()[0]["workers"] if worker["status"] == "READY"]

    return pids


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the server logged last beside a failure."""
    report = yield
    running = item.config.stash.get(SERVER, None)
    if report.failed and running is not None:
        report.sections.append(("server log", running.log_tail()))
    return report
