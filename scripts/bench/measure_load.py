"""A running server and some seconds of requests over some connections -> one row of figures.

What the sweep of settings and the look at scaling have in common. Knows nothing of how the server was started.
"""

import argparse
import math
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.bench.benchmark import HEADERS, LONE_CONNECTION, WARM_UP_SHARE
from scripts.bench.load import Call, Failure, build_call, run_closed
from scripts.bench.load_test import KINDS, describe_machine, is_right_form
from scripts.paths import MODEL_NAME, SAMPLE_FILES, SERVE_CONFIG
from scripts.serving.launcher import find_java_home, read_model_config

TIMEOUT_S = 60.0
PACKAGES = ("torch", "torchserve", "numpy", "pillow", "scipy", "orjson")


@dataclass(frozen=True, slots=True)
class Load:
    """A few seconds of requests, one after another over each connection.

    Attributes:
        connections: that were kept busy.
        requests: how many were sent.
        rate: good replies a second.
        p50_ms, p99_ms: latency; None where no request had a good reply.
        error_counts: requests without a good reply, by kind.
        generator_cpu_share: of one core that the load generator itself took; near 1 it, and not the server, is the limit.
    """

    connections: int
    requests: int
    rate: float
    p50_ms: float | None
    p99_ms: float | None
    error_counts: dict[str, int]
    generator_cpu_share: float

    @property
    def is_good(self) -> bool:
        """Whether there were requests, and all had good replies."""
        return self.requests > 0 and not self.error_counts


def explanation_calls(address: str, images: Sequence[bytes] | None = None) -> list[Call]:
    """Requests for one image's explanation each, as JSON, in the space `canonical`.

    Args:
        images: image files; by default the test digits.
    """
    kind = KINDS["explain"]
    contents = [file.read_bytes() for file in SAMPLE_FILES] if images is None else images
    headers = {**HEADERS, **kind.headers}
    return [build_call("explain", address, f"/{kind.route}/{MODEL_NAME}", content, headers) for content in contents]


def measure_load(
    address: str,
    calls: Sequence[Call],
    *,
    connections: int,
    seconds: float,
    has_right_form: Callable[[str, bytes], bool] = is_right_form,
) -> Load:
    """Keep connections busy for some seconds, after a short warm-up.

    A connection that is alone gets no warm-up: its first request is counted, even where it takes longer than all the seconds.

    Args:
        has_right_form: whether a call's name and its reply's body fit; asked of the first good reply to each call.
    """
    samples = run_closed(
        address,
        calls,
        connections=connections,
        duration_s=seconds,
        warm_up_s=seconds * WARM_UP_SHARE if connections > LONE_CONNECTION else 0.0,
        timeout_s=TIMEOUT_S,
    )
    for call, reply in samples.first_replies.items():
        if not has_right_form(samples.names[call], reply.body):
            samples.failure[reply.row] = Failure.WRONG_FORM
    p50_ms, p99_ms = (None if math.isnan(value) else value for value in samples.latency_quantiles_ms((0.5, 0.99)).tolist())
    return Load(connections, samples.request_count, samples.served_rate, p50_ms, p99_ms, samples.error_counts, samples.cpu_share)


def describe_conditions(script: str, argv: Sequence[str], arguments: argparse.Namespace, device: str = "cpu") -> dict[str, Any]:
    """What has to be known to read a script's figures: command, date, machine, versions, and the committed settings.

    Args:
        script: such as "sweep".
        arguments: have `rounds` and `seconds`.
        device: whose settings, as of scripts.serving.launcher.
    """
    return {
        "command": shlex.join(["python", "-m", f"scripts.{script}", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(PACKAGES) | {"Java": _java_version()},
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "config_properties": (SERVE_CONFIG / "config.properties").read_text(),
        "model_config": read_model_config(device),
    }


def _java_version() -> str:
    """What the Java that `scripts.serving.launcher` takes says of itself."""
    java_home = find_java_home()
    java = "java" if java_home is None else str(java_home / "bin" / "java")
    return subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr.partition("\n")[0]


def read_count(text: str) -> int:
    """Read a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; a whole number from 1 is accepted")
    return int(text)
