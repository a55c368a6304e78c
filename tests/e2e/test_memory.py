"""A worker's memory after large requests, in a real TorchServe."""

import io
import sys
import time

import numpy as np
import pytest
import requests

from handler.memory import IDLE_S
from scripts.serve import TorchServe
from tests.e2e.conftest import TIMEOUT_S, workers_of

MIB = 2**20
PICTURES = 1024  # as many as a request may have


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators than glibc's are left alone")
def test_idle_worker_gives_back_what_it_has_freed(server: TorchServe) -> None:
    (worker,) = workers_of(server)
    content = io.BytesIO()
    np.save(content, np.random.default_rng(0).integers(0, 256, (PICTURES, 28, 28), dtype=np.uint8))
    for _ in range(2):
        reply = requests.put(f"{server.address}/explanations/digits", data=content.getvalue(), timeout=TIMEOUT_S)
        assert reply.status_code == 200
        busy = worker.memory_info().rss
    deadline = time.monotonic() + IDLE_S + TIMEOUT_S
    while worker.memory_info().rss > busy - 8 * MIB:
        assert time.monotonic() < deadline, f"of {busy // MIB} MiB {worker.memory_info().rss // MIB} are still resident"
        time.sleep(0.05)
