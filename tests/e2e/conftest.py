"""Fixtures of the end-to-end tests: a real TorchServe on ports and in folders of its own, and images with their answers."""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import requests
import torch

from scripts.packaging.package import read_archive
from scripts.paths import SAMPLE_FILES
from scripts.serving.launcher import Ports, Settings, TorchServe
from tests.client import BATCH_SIZE, TIMEOUT_S, Sample
from tests.conftest import label_of
from tests.kinks import dithered_digits
from tests.oracle import Oracle
from tests.servers import wait_for

SERVER = pytest.StashKey[TorchServe]()


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """The device of the server's workers: "cpu" or "gpu"."""
    asked: str = pytestconfig.getoption("device")
    if asked == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return asked


@pytest.fixture(scope="session")
def server(
    archive: Path, device: str, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[TorchServe]:
    """A server with one worker and a long batch delay, so that requests sent at once share a batch."""
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
    """Test digits and the oracle's answers. A little noise breaks ties in the max pools, where the gradient is not unique."""
    oracle = Oracle(read_archive(archive)["weights.safetensors"])
    return [
        Sample(label_of(file), levels, *oracle.explain(levels / 255))
        for file, levels in zip(SAMPLE_FILES[::3], dithered_digits()[::3], strict=True)
    ]


@pytest.fixture
def batch_count(server: TorchServe) -> Callable[[], int]:
    """The number of batches that the workers have got so far: TorchServe's worker logs a line for each.

    The lines pass through a pipe and a log queue: they are all there once a later line is, that of a request without an image.
    """
    log = server.settings.log_dir / "model_log.log"
    numbers = itertools.count(1)

    def count() -> int:
        number = next(numbers)
        mark = f"batch_count_{id(numbers)}_{number}"
        requests.get(f"{server.address}/predictions/digits", headers={"X-Correlation-Id": mark}, timeout=TIMEOUT_S)
        wait_for(lambda: mark in log.read_text(), "line in the log")
        return log.read_text().count("Backend received inference") - number

    return count


@pytest.fixture
def worker_pids(server: TorchServe) -> Callable[[], list[int]]:
    """Process ids of the workers that TorchServe reports as ready."""

    def pids() -> list[int]:
        reply = requests.get(f"{server.management_address}/models/digits", timeout=TIMEOUT_S)
        return [worker["pid"] for worker in reply.json()[0]["workers"] if worker["status"] == "READY"]

    return pids


@pytest.fixture
def temp_dir() -> Iterator[Path]:
    """A folder with a short path: Unix sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the server's log beside a failure."""
    report = yield
    running = item.config.stash.get(SERVER, None)
    if report.failed and running is not None:
        report.sections.append(("server log", running.log_tail()))
    return report
