"""The machine and the command, for reports: figures mean nothing without them."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

PACKAGES = ("torch", "torchvision", "torchserve", "numpy", "pillow", "orjson", "scipy")


def describe_machine(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Hardware of this machine, and versions of the packages that are installed."""
    gigabytes = psutil.virtual_memory().total / 2**30
    machine = {
        "CPU": _cpu_model(),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
        if hasattr(os, "sched_getaffinity")
        else f"{os.cpu_count()}",
        "memory": f"{gigabytes:.0f} GiB",
        "system": platform.platform(),
        "Python": platform.python_version(),
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        machine["GPU"] = "; ".join(subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines())
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            machine[package] = importlib.metadata.version(package)
    return machine


def join_facts(facts: Mapping[str, object]) -> str:
    """Write facts, such as those of `describe_machine`, in one line."""
    return "; ".join(f"{name} {value}" for name, value in facts.items())


def command_of(script: str, argv: Sequence[str] | None) -> str:
    """Write the command line that started a script.

    Args:
        script: such as "sweep".
        argv: as its `main` got it; None for this process's own.
    """
    return shlex.join(["python", "-m", f"scripts.bench.{script}", *(sys.argv[1:] if argv is None else argv)])


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
