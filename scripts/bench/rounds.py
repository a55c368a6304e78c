"""Measuring in rounds: what the benchmark, the sweep of settings and the measurement of scaling have in common.

A slow minute of the machine hits all that is measured in a round; what counts is the median over the rounds.
"""

import argparse
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from scripts.bench.digit_requests import is_right_form
from scripts.bench.load import Call, Figures, Load, run_load
from scripts.bench.machine import command_of, describe_machine
from scripts.paths import SERVE_CONFIG
from scripts.serving.launcher import find_java_home, read_model_config

LONE_CONNECTION = 1
BUSY_CONNECTIONS = (16, 32, 64)
WARM_UP_SHARE = 0.2  # of a measurement's seconds, before it
TIMEOUT_S = 60.0
PACKAGES = ("torch", "torchserve", "numpy", "pillow", "scipy", "orjson")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and largest of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise one number or more."""
        return cls(median(values), min(values), max(values))

    def __format__(self, number_format: str) -> str:
        """Write "median (least - largest)", or the median alone where all numbers are the same."""
        if self.low == self.high:
            return format(self.median, number_format)
        return f"{self.median:{number_format}} ({self.low:{number_format}} - {self.high:{number_format}})"


def closed_load(address: str, calls: Sequence[Call], connections: int, seconds: float) -> Load:
    """Keep connections busy for some seconds, after a short warm-up.

    A lone connection gets no warm-up: its first request counts, even where it takes longer than all the seconds.
    """
    warm_up_s = seconds * WARM_UP_SHARE if connections > LONE_CONNECTION else 0.0
    return Load(address, calls, seconds, connections=connections, warm_up_s=warm_up_s, timeout_s=TIMEOUT_S)


def measure(load: Load, has_right_form: Callable[[str, bytes], bool] = is_right_form) -> Figures:
    """Send a load, and check the form of the first good reply to each call.

    Args:
        has_right_form: whether a call's name and its reply's body fit.
    """
    samples = run_load(load)
    samples.mark_wrong_forms(has_right_form)
    return Figures.of(samples)


def describe_conditions(
    script: str,
    argv: Sequence[str] | None,
    arguments: argparse.Namespace,
    *,
    device: str = "cpu",
    packages: Sequence[str] = PACKAGES,
) -> dict[str, Any]:
    """Describe what a script's figures depend on: command, date, machine, versions and committed settings.

    Args:
        script: such as "sweep".
        argv: its arguments; None for those of this process.
        arguments: the same as values; with `rounds` and `seconds`.
        device: whose settings, as of scripts.serving.launcher.
        packages: whose versions.
    """
    return {
        "command": command_of(script, argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(packages) | {"Java": _java_version()},
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "config_properties": (SERVE_CONFIG / "config.properties").read_text(),
        "model_config": read_model_config(device),
    }


def _java_version() -> str:
    """The version line of the Java that `scripts.serving.launcher` takes."""
    java_home = find_java_home()
    java = "java" if java_home is None else str(java_home / "bin" / "java")
    return subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr.partition("\n")[0]
