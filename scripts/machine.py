"""On what a measurement was made: hardware and versions, for reports that outlive it."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import psutil
import torch

CPU_INFO = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linuxes
NOT_INSTALLED = "not installed"


def describe_machine() -> dict[str, str | int | float]:
    """The hardware: processor, cores that this process may use, memory, GPUs, kernel."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": ", ".join(gpus) or "none",
        "system": f"{platform.system()} {platform.release()}",
    }


def describe_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of packages, by their names on PyPI."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = NOT_INSTALLED
    return versions
