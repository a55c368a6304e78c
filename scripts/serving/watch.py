"""Watch a running TorchServe: memory of its JVM, missing workers, silence. Says when it must be replaced, and why.

TorchServe's frontend is of 2020 and has no more fixes. Its direct memory and heap are bounded where the JVM starts
(serve_config/config.properties); this watches what no such bound holds. Knows nothing of how a server is replaced.
"""

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

JVM_OTHER_BYTES = 500_000_000  # classes, compiled code, threads, and what malloc keeps of freed buffers
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
BOUNDS = re.compile(r"-(?:Xmx|XX:MaxDirectMemorySize=)(\d+)([kmg]?)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server may do before it is replaced.

    Attributes:
        jvm_bytes: resident memory of its JVM; None for the sum of the bounds that the JVM is started with.
        missing_s: seconds in which workers are missing: more than one takes to start (startupTimeout in model-config.yaml).
        silent_s: seconds in which the management API does not answer.
        poll_s: seconds between two looks at the workers.
    """

    jvm_bytes: int | None = None
    missing_s: float = 180
    silent_s: float = 60
    poll_s: float = 5


def jvm_bound(arguments: str) -> int:
    """Add up the bounds of heap and direct memory among a JVM's arguments, and what else it takes, in bytes.

    Returns:
        0 where one of the two has no bound.
    """
    found = BOUNDS.findall(arguments)
    return sum(int(number) * UNITS[unit.lower()] for number, unit in found) + JVM_OTHER_BYTES if len(found) == 2 else 0


def resident_bytes(pid: int) -> int:
    """Read the resident memory of a process; 0 where it has ended."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        found = re.search(r"(?m)^VmRSS:\s+(\d+) kB", Path("/proc", str(pid), "status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


class Watch:
    """The state of a server over time.

    Args:
        limits: of this server.
        bound: bytes of resident memory of its JVM; 0 for no bound.
        worker_count: of a whole server.
        count_ready: counts its ready workers; None where it does not answer.
    """

    def __init__(self, limits: Limits, bound: int, worker_count: int, count_ready: Callable[[], int | None]) -> None:
        self._limits, self._bound, self._worker_count, self._count_ready = limits, bound, worker_count, count_ready
        self._whole = self._heard = self._looked = time.monotonic()

    def find_reason(self, jvm: int | None) -> str:
        """Say why the server must be replaced; "" where it need not be.

        Args:
            jvm: its process id.
        """
        resident = 0 if jvm is None else resident_bytes(jvm)
        if self._bound and resident > self._bound:
            return f"the JVM takes {resident / 1e6:.0f} MB of memory, more than {self._bound / 1e6:.0f}"
        now = time.monotonic()
        if now - self._looked < self._limits.poll_s:
            return ""
        ready = self._count_ready()
        self._looked = time.monotonic()  # the look itself may have taken long
        if ready is not None:
            self._heard = self._looked
        if ready is not None and ready >= self._worker_count:
            self._whole = self._looked
        if self._looked - self._heard > self._limits.silent_s:
            return f"TorchServe has not answered for {self._looked - self._heard:.0f} s"
        if self._looked - self._whole > self._limits.missing_s:
            return f"only {ready or 0} of {self._worker_count} workers have been ready for {self._looked - self._whole:.0f} s"
        return ""
