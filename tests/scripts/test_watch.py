"""When a server must be replaced: bounds that are read, and states that last."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.paths import CONFIGURATION, HARDENED_CONFIGURATION
from scripts.serving.configuration import find_property
from scripts.serving.watch import JVM_OTHER_BYTES, Limits, Watch, jvm_bound, resident_bytes


@pytest.mark.parametrize("configuration", [CONFIGURATION, HARDENED_CONFIGURATION], ids=lambda path: path.name)
def test_committed_jvms_are_bounded(configuration: Path) -> None:
    arguments = find_property(configuration.read_text(), "vmargs") or ""
    assert jvm_bound(arguments) == (1 << 30) + (768 << 20) + JVM_OTHER_BYTES
    assert "-Dio.netty.allocator.type=unpooled" in arguments.split()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-Xmx2g -XX:MaxDirectMemorySize=512M", (2 << 30) + (512 << 20) + JVM_OTHER_BYTES),
        ("-XX:MaxDirectMemorySize=1048576 -Xmx1024k", (1 << 20) + (1 << 20) + JVM_OTHER_BYTES),
        ("-Xmx2g", 0),
        ("", 0),
    ],
)
def test_bound_is_the_sum_of_both(arguments: str, expected: int) -> None:
    assert jvm_bound(arguments) == expected


def test_resident_memory_is_the_processs() -> None:
    code = "import sys; held = b'x' * 100_000_000; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 100e6 < resident_bytes(process.pid) < 200e6
        process.communicate()
    assert resident_bytes(process.pid) == 0


def reasons(monkeypatch: pytest.MonkeyPatch, states: list[int | None], limits: Limits) -> list[str]:
    """What a watch says of these states, one second after the other."""
    now = [1000.0]
    monkeypatch.setattr("scripts.serving.watch.time.monotonic", lambda: now[0])
    looks = iter(states)
    watched = Watch(limits, 0, 2, lambda: next(looks))
    said = []
    for _ in states:
        now[0] += 1
        said.append(watched.find_reason(None))
    return said


def test_workers_that_come_back_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(missing_s=3, silent_s=3, poll_s=1)
    assert set(reasons(monkeypatch, [2, 1, 0, 0, 2, None, None, None, 2, 1, 1, 1, 3], limits)) == {""}


def test_workers_that_stay_away_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    said = reasons(monkeypatch, [2, 1, 1, 1, 1], Limits(missing_s=3, silent_s=30, poll_s=1))
    assert said == ["", "", "", "", "only 1 of 2 workers have been ready for 4 s"]


def test_silence_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    said = reasons(monkeypatch, [2, None, None, None, None], Limits(missing_s=30, silent_s=3, poll_s=1))
    assert said == ["", "", "", "", "TorchServe has not answered for 4 s"]


def test_memory_over_the_bound_is_a_reason() -> None:
    watched = Watch(Limits(), 1_000_000, 1, lambda: 1)
    assert watched.find_reason(None) == ""
    reason = watched.find_reason(os.getpid())
    assert reason.startswith("the JVM takes ")
    assert reason.endswith(" MB of memory, more than 1")
