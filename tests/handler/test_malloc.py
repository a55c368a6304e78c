"""What is freed is kept while there is work, and given back without."""

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import psutil
import pytest

from handler.runtime.malloc import IDLE_S, IdleTrimmer, keep_freed_memory

MIB = 2**20
FREED_MIB = 24  # less than KEPT_BYTES
TIMEOUT_S = 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other allocators than glibc's are left alone")


def resident_mib() -> float:
    return float(psutil.Process().memory_info().rss) / MIB


def test_freed_memory_is_kept_while_there_is_work_and_given_back_without() -> None:
    """In a fresh process: here the trimmers of other tests' handlers may be at work."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        before, worked, idle = pool.submit(watch_freed_memory).result()
    assert worked > before + 0.8 * FREED_MIB
    assert idle <= before + 0.2 * FREED_MIB, "nothing was given back"


def watch_freed_memory() -> tuple[float, float, float]:
    """Resident MiB before memory is used and freed, after some seconds of work, and without work."""
    keep_freed_memory()
    trimmer = IdleTrimmer()
    before = resident_mib()
    blocks = [np.ones(MIB, np.uint8) for _ in range(FREED_MIB)]
    del blocks
    busy_until = time.monotonic() + 3 * IDLE_S
    while time.monotonic() < busy_until:
        trimmer.note_work()
        time.sleep(0.05)
    worked = resident_mib()
    deadline = time.monotonic() + TIMEOUT_S
    while (idle := resident_mib()) > before + 0.2 * FREED_MIB and time.monotonic() < deadline:
        time.sleep(0.05)
    return before, worked, idle
