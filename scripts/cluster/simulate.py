"""Simulate a day's traffic with a tenfold peak, and the autoscaler of serve_config/cluster.

    python -m scripts.cluster.simulate

Service times are measured on a running server (`--measure`) or read from a file that an earlier run wrote. Results go to stdout
as Markdown, progress to stderr.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import requests
from numpy.typing import NDArray
from PIL import Image

from scripts.cluster.simulation import Cluster, Outcome, simulate, trapezoid
from scripts.command_line import HelpFormatter
from scripts.paths import MODEL_NAME, ROOT, SAMPLE_FILES
from scripts.tables import render_markdown

DAY_S = 24 * 3600
PEAK_START_S = 12 * 3600
SERVICE_TIMES = ROOT / "scripts" / "results" / "service-times-2-shared-cores.json"
WARM_UP_REQUESTS = 20
TIMEOUT_S = 30


def make_photograph(file: Path, side: int) -> bytes:
    """Enlarge a test digit to a JPEG with a side of so many pixels."""
    content = io.BytesIO()
    with Image.open(file) as opened:
        opened.convert("L").resize((side, side), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return content.getvalue()


def measure_service_times(address: str, count: int, side: int) -> NDArray[np.float64]:
    """Ask for one explanation after another; with one client each batch is one image.

    Args:
        address: of the inference API.
        count: requests that are measured.
        side: of the photographs, in pixels.
    Returns:
        (count,), seconds as a client sees them: a worker's own time, and a millisecond or two of HTTP.
    Raises:
        requests.RequestException: the server does not answer, or with an error.
    """
    photographs = [make_photograph(file, side) for file in SAMPLE_FILES]
    times = []
    with requests.Session() as session:
        for index in range(WARM_UP_REQUESTS + count):
            started = time.perf_counter()
            reply = session.post(
                f"{address}/explanations/{MODEL_NAME}",
                photographs[index % len(photographs)],
                headers={"Content-Type": "image/jpeg"},
                timeout=TIMEOUT_S,
            )
            times.append(time.perf_counter() - started)
            reply.raise_for_status()
    return np.array(times[WARM_UP_REQUESTS:])


def describe(name: str, outcome: Outcome, peak: tuple[float, float]) -> list[str]:
    """Write one row of the report.

    Args:
        name: of the configuration.
        outcome: its simulation.
        peak: start and end of the ramp and the plateau, in seconds.
    """
    during = (outcome.arrivals_s >= peak[0]) & (outcome.arrivals_s < peak[1])
    latencies_ms = outcome.latencies_s * 1e3
    counts = [count for _, count in outcome.pods]
    asked = len(outcome.arrivals_s) + len(outcome.refused_s)
    return [
        name,
        f"{min(counts)} - {max(counts)}",
        f"{outcome.pod_seconds / 3600:.0f}",
        f"{np.quantile(latencies_ms[~during], 0.99):.0f}",
        f"{np.quantile(latencies_ms[during], 0.99):.0f}",
        f"{worst_minute_p99_ms(outcome):.0f}",
        f"{len(outcome.refused_s):,} of {asked:,}",
    ]


def worst_minute_p99_ms(outcome: Outcome) -> float:
    """Find the 99th percentile of the latency in the worst minute, in ms."""
    minutes = (outcome.arrivals_s // 60).astype(np.int64)
    order = np.argsort(minutes, kind="stable")
    bounds = np.flatnonzero(np.diff(minutes[order])) + 1
    return max(float(np.quantile(part, 0.99)) for part in np.split(outcome.latencies_s[order], bounds)) * 1e3


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.cluster.simulate",
        description="Simulate a day's traffic with a peak, and the autoscaler that follows it.",
        epilog="examples:\n  %(prog)s\n  %(prog)s --measure http://127.0.0.1:8080\n  %(prog)s --peak 20 --ramp-minutes 1",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--service-times", type=Path, default=SERVICE_TIMES, metavar="FILE", help="JSON, as --measure writes it")
    parser.add_argument("--measure", metavar="URL", help="measure them first on a server without other load, into that file")
    parser.add_argument("--requests", type=int, default=500, metavar="N", help="requests that --measure sends")
    parser.add_argument("--side", type=int, default=256, metavar="PX", help="side of the photographs that --measure sends")
    parser.add_argument("--rate", type=float, default=20, metavar="N", help="requests a second, most of the day")
    parser.add_argument("--peak", type=float, default=10, metavar="N", help="how many times as many at the peak")
    parser.add_argument("--ramp-minutes", type=float, default=10, metavar="M", help="minutes in which the load rises to the peak")
    parser.add_argument("--plateau-minutes", type=float, default=60, metavar="M", help="minutes of the peak")
    parser.add_argument(
        "--in-flight",
        type=int,
        nargs="+",
        default=[2, 4, 8],
        metavar="N",
        help="requests in flight a worker to aim at, each tried",
    )
    parser.add_argument("--start-seconds", type=float, default=30, metavar="S", help="until a new pod gives its first answer")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is left to chance")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate. Returns the exit code: 1 where service times can be neither measured nor read."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.measure:
            print(f"measuring {arguments.requests} requests at {arguments.measure} ...", file=sys.stderr)
            measured = measure_service_times(arguments.measure, arguments.requests, arguments.side)
            written: dict[str, Any] = {
                "what": f"explanations of JPEGs of {arguments.side} x {arguments.side} pixels, one client, seconds",
                "service_s": [round(seconds, 6) for seconds in measured.tolist()],
            }
            arguments.service_times.write_text(f"{json.dumps(written)}\n")
        read = json.loads(arguments.service_times.read_text())
        service_s = np.array(read["service_s"], dtype=np.float64)
    except (requests.RequestException, OSError, ValueError, KeyError) as error:
        print(f"error: no service times: {error}", file=sys.stderr)
        return 1
    ramp_s, plateau_s = arguments.ramp_minutes * 60, arguments.plateau_minutes * 60
    rise = trapezoid(np.arange(DAY_S, dtype=np.float64), PEAK_START_S, ramp_s, plateau_s)
    rates = arguments.rate * (1 + (arguments.peak - 1) * rise)
    scaled = Cluster(start_s=arguments.start_seconds)
    needed = int(np.ceil(arguments.rate * arguments.peak * service_s.mean() / scaled.workers)) + 1
    last = float(arguments.in_flight[-1] * scaled.workers)
    cases = {
        **{f"{count} in flight a worker": replace(scaled, target=float(count * scaled.workers)) for count in arguments.in_flight},
        f"{arguments.in_flight[-1]}, to the less loaded of two pods": replace(scaled, target=last, is_least_loaded=True),
        f"{arguments.in_flight[-1]}, pods start in two minutes": replace(scaled, target=last, start_s=120.0),
        f"fixed, {scaled.least} pods": replace(scaled, target=None),
        f"fixed, {needed} pods": replace(scaled, target=None, least=needed),
    }
    rows = []
    for name, cluster in cases.items():
        print(f"simulating {name} ...", file=sys.stderr)
        outcome = simulate(cluster, service_s, rates, arguments.seed)
        rows.append(describe(name, outcome, (PEAK_START_S, PEAK_START_S + ramp_s + plateau_s)))
    quantiles = np.quantile(service_s, [0.5, 0.99]) * 1e3
    print(
        f"{read['what']}: median {quantiles[0]:.1f} ms, p99 {quantiles[1]:.1f} ms. {arguments.rate:g} requests a second, "
        f"{arguments.rate * arguments.peak:g} for {arguments.plateau_minutes:g} minutes after a ramp of "
        f"{arguments.ramp_minutes:g}; a pod starts in {arguments.start_seconds:g} s.\n"
    )
    header = [
        "pods",
        "number",
        "pod-hours",
        "p99 off peak, ms",
        "p99 at the peak, ms",
        "p99 of the worst minute, ms",
        "lost requests",
    ]
    print(render_markdown(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
