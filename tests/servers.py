"""Servers of the end-to-end tests: start one as a person does, wait for it, find its processes."""

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests

from scripts.paths import ROOT
from scripts.serving.launcher import Ports, TorchServe
from tests.client import TIMEOUT_S

START_TIMEOUT_S = 120
RECOVERY_S = 120  # from a fault to right answers, on a busy machine


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = RECOVERY_S) -> None:
    """Wait until a condition holds; fail and name what is missing if it does not hold in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.02)


@contextlib.contextmanager
def serving(
    ports: Ports, log_dir: Path, *more: str, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run `python -m scripts.serving` as a process of its own, and end it if the test did not."""
    options = [f"--{name.replace('_', '-')}-port={getattr(ports, name)}" for name in Ports.__dataclass_fields__]
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.serving", *options, f"--log-dir={log_dir}", "--device=cpu", *more],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
        assert process.stdout is not None
        process.stdout.close()


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Read all that is printed, up to the first line that matches."""
    assert process.stdout is not None
    printed = ""
    deadline = time.monotonic() + START_TIMEOUT_S
    for line in process.stdout:
        printed += line
        if re.search(pattern, line):
            return printed
        assert time.monotonic() < deadline, printed
    pytest.fail(f"the server ended without printing {pattern!r}:\n{printed}")


def processes_with(marker: str) -> list[psutil.Process]:
    """Find the processes whose command line or environment names a temp folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and any(
                marker in text for text in [*process.cmdline(), *process.environ().values()]
            ):
                found.append(process)
    return found


def workers_of(server: TorchServe) -> list[psutil.Process]:
    """Find the worker processes, ready or not."""
    return [process for process in server.processes() if "model_service_worker" in " ".join(process.cmdline())]


def wait_for_workers(server: TorchServe, other_than: set[int]) -> None:
    """Wait until all workers are ready and none of them is one of these."""
    deadline = time.monotonic() + RECOVERY_S
    while True:
        described = requests.get(f"{server.management_address}/models/digits", timeout=TIMEOUT_S).json()[0]["workers"]
        ready = {worker["pid"] for worker in described if worker["status"] == "READY"}
        if len(ready) == server.worker_count and not ready & other_than:
            return
        assert time.monotonic() < deadline, described
        time.sleep(0.2)
