"""What a worker's allocator, glibc's, keeps of what is freed: nearly all while there is work, and next to nothing without.

Knows nothing of what the memory is for. Other C libraries have none of these calls; with them nothing is changed.
"""

import ctypes
import threading
import time
from collections.abc import Callable

KEPT_BYTES = 32 * 1024 * 1024  # the most that glibc takes for M_MMAP_THRESHOLD
IDLE_S = 1.0  # without work, until freed memory is given back
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Have this process keep up to KEPT_BYTES of freed memory, as the next batch needs as much.

    By default glibc gives 128 KB and more back to the system at once, and the next batch has it faulted in again, page by page,
    which takes a fifth of a small batch's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


class IdleTrimmer:
    """Gives freed memory back to the system where there was no work for IDLE_S, by a thread that ends with the process.

    Batches of many sizes leave holes between what stays, some 25 MiB after small images, which no threshold gives back.
    """

    def __init__(self) -> None:
        """Wait for the first work."""
        self._has_worked = threading.Event()
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            threading.Thread(target=self._trim_when_idle, args=(malloc_trim,), name="idle trimmer", daemon=True).start()

    def note_work(self) -> None:
        """Note that there was work."""
        if not self._has_worked.is_set():
            self._has_worked.set()

    def _trim_when_idle(self, malloc_trim: Callable[[int], int]) -> None:
        while self._has_worked.wait():
            self._has_worked.clear()
            time.sleep(IDLE_S)
            if not self._has_worked.is_set():
                malloc_trim(0)
