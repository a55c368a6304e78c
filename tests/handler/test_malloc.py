"""What is freed is kept while there is work, and given back without."""

import ctypes
import sys
import time

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
    keep_freed_memory()
    trimmer = IdleTrimmer()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed
    before = resident_mib()
    blocks = [np.ones(MIB, np.uint8) for _ in range(FREED_MIB)]
    del blocks
    busy_until = time.monotonic() + 3 * IDLE_S
    while time.monotonic() < busy_until:
        trimmer.note_work()
        time.sleep(0.05)
    assert resident_mib() > before + 0.8 * FREED_MIB
    deadline = time.monotonic() + TIMEOUT_S
    while resident_mib() > before + 0.2 * FREED_MIB:
        assert time.monotonic() < deadline, "nothing was given back"
        time.sleep(0.05)
