"""Measure this service and its peers side by side: the same weights, images, machine, load and minutes.

    python -m scripts.bench.benchmark --rounds 5 --seconds 2

All systems are started and stay up. First the answers of each are checked: none may win by being wrong. Then they are measured in
turn, in rounds, so that a slow minute of the machine hits all of them; ratios are taken within a round, and their median counts.
Writes every number as benchmark.json, and the tables, which are also printed, as benchmark.md.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import requests
from numpy.typing import NDArray
from tqdm import tqdm

from scripts.bench.arguments import names_reader, read_count, read_positive
from scripts.bench.digit_requests import BINARY
from scripts.bench.digits import MAX_MAP_DIFFERENCE, dither, largest_difference, read_files
from scripts.bench.load import Figures, Load, build_call, run_load
from scripts.bench.machine import join_facts
from scripts.bench.peers.systems import SYSTEMS, Explains, Running, Workplace, read_digit, read_map, worker_memory_mib
from scripts.bench.rounds import BUSY_CONNECTIONS, LONE_CONNECTION, WARM_UP_SHARE, Spread, describe_conditions
from scripts.paths import BUILD, SAMPLE_IMAGE
from scripts.serving.launcher import ServeError, read_model_config
from scripts.tables import render_markdown

OURS = "ours"
ROUTES = ("explain", "predict")
CHECKING_CONNECTIONS = 16
TIMEOUT_S = 30.0
IDLE_S = 3.0  # between the last load and reading the workers' memory
PACKAGES = ("torch", "torchserve", "captum", "fastapi", "uvicorn", "mosec", "numpy", "orjson")


class BenchmarkError(RuntimeError):
    """The systems cannot be compared: one of them gives other answers than the rest, or none."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A few seconds of one system under one load.

    Attributes:
        round_index: from 0.
        system: a key of SYSTEMS.
        route: "explain" or "predict".
        connections: that were kept busy.
        rate: good replies a second.
        p50_ms, p99_ms: latency.
        error_counts: requests without a good reply, by kind.
        generator_cpu_share: of one core that the load generator itself took; near 1 it, and not the system, is the limit.
        worker_cpu_us: processor time a request, of all processes but a JVM.
        frontend_cpu_us: the same of the JVM, which is TorchServe's frontend; 0 where there is none.
    """

    round_index: int
    system: str
    route: str
    connections: int
    rate: float
    p50_ms: float
    p99_ms: float
    error_counts: dict[str, int]
    generator_cpu_share: float
    worker_cpu_us: float
    frontend_cpu_us: float

    @property
    def generator_cpu_us(self) -> float:
        """Processor time that the load generator takes for a good reply."""
        return self.generator_cpu_share / self.rate * 1e6


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one worker after all load, in MiB: resident, unshared, and the most that was resident until then."""

    rss_mib: float
    uss_mib: float
    peak_mib: float


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio of this service to another system, and what it should be.

    Attributes:
        title: in tables.
        quantity: a key of `Results.by_round`.
        other: a system.
        bound: the least ratio for a rate, and the largest for milliseconds or MiB; None for a ratio without a goal.
    """

    title: str
    quantity: str
    other: str
    bound: float | None

    @property
    def more_is_better(self) -> bool:
        """Whether the quantity is a rate."""
        return self.quantity.endswith("_rate")

    def is_reached(self, ratio: float) -> bool | None:
        """Whether a ratio meets the bound; None without a bound."""
        if self.bound is None:
            return None
        return ratio >= self.bound if self.more_is_better else ratio <= self.bound


GOALS = (
    Goal("explanations/s, against TorchServe's MNIST example as published", "explain_rate", "stock-1", 40),
    Goal("explanations/s, against the same with batches of 8", "explain_rate", "stock-8", None),
    Goal("explanations/s, against the same with one thread a worker", "explain_rate", "stock-tuned", None),
    Goal("explanations/s, against mosec + captum, batches of 16", "explain_rate", "mosec", 4),
    Goal("explanations/s, against mosec + captum without batches", "explain_rate", "mosec-1", None),
    Goal("explanations/s, against a handler that does nothing", "explain_rate", "noop", 0.4),
    Goal("p50 of a lone client's explanation, against a handler that does nothing", "explain_p50_ms", "noop", 1.6),
    Goal("predictions/s, against a handler that does nothing", "predict_rate", "noop", 0.7),
    Goal("a worker's resident memory, against a handler that does nothing", "rss_mib", "noop", 1.15),
    Goal("the same at its peak", "peak_mib", "noop", None),
)


@dataclass(frozen=True, slots=True)
class Results:
    """All that was measured.

    Attributes:
        measurements: in the order in which they were taken.
        memory: by system.
        ready_s: seconds from a system's start until all its workers could answer, by system.
    """

    measurements: tuple[Measurement, ...]
    memory: Mapping[str, Memory]
    ready_s: Mapping[str, float]

    def by_round(self, system: str, quantity: str) -> list[float]:
        """Give one number a round; of the memory, which is read once, a single number.

        Args:
            quantity: "explain_rate" or "predict_rate": replies a second at the best number of connections;
                "explain_p50_ms" or "predict_p50_ms": of a lone client; "rss_mib", "uss_mib" or "peak_mib".
        """
        if quantity.endswith("_mib"):
            return [float(getattr(self.memory[system], quantity))]
        route, _, what = quantity.partition("_")
        own = [one for one in self.measurements if (one.system, one.route) == (system, route)]
        rounds = range(1 + max(one.round_index for one in own))
        lone = [one for one in own if one.connections == LONE_CONNECTION]
        if what == "rate":
            return [max(one.rate for one in own if one.round_index == index and one not in lone) for index in rounds]
        return [next(one.p50_ms for one in lone if one.round_index == index) for index in rounds]

    def ratios(self, goal: Goal) -> list[float]:
        """Divide this service's number by the other's: one ratio a round; no ratio where the other was not measured.

        Raises:
            BenchmarkError: there was a round in which the other gave no reply in time.
        """
        if goal.other not in self.ready_s:
            return []
        others = self.by_round(goal.other, goal.quantity)
        if 0 in others:
            raise BenchmarkError(f"expected replies from {goal.other} in every round; give it more --seconds")
        return [own / other for own, other in zip(self.by_round(OURS, goal.quantity), others, strict=True)]

    def error_count(self, system: str) -> int:
        """Count requests to a system without a good reply."""
        return sum(sum(one.error_counts.values()) for one in self.measurements if one.system == system)


# --- measuring


def measure(
    running: Mapping[str, Running], images: Sequence[bytes], *, rounds: int, warm_up_rounds: int, seconds: float
) -> tuple[Measurement, ...]:
    """Measure all systems in turn, round by round, after rounds that are not kept.

    A JVM compiles what it runs often: for some fifteen seconds of load a request costs up to five times as much. Within a round
    the systems follow each other under one load, in an order that shifts from load to load.

    Args:
        images: PNG files, sent in turn.
        seconds: of each measurement.
    """
    loads = [(route, connections) for connections in (LONE_CONNECTION, *BUSY_CONNECTIONS) for route in ROUTES]
    names = list(running)
    kept = []
    with tqdm(total=(rounds + warm_up_rounds) * len(loads) * len(names), unit="measurement", disable=None) as progress:
        for round_index in range(-warm_up_rounds, rounds):
            for shift, (route, connections) in enumerate(loads):
                first = (round_index + shift) % len(names)
                for name in names[first:] + names[:first]:
                    measurement = _measure_once(name, running[name], images, route, connections, round_index, seconds)
                    progress.update()
                    if round_index >= 0:
                        kept.append(measurement)
    return tuple(kept)


def _measure_once(
    name: str, running: Running, images: Sequence[bytes], route: str, connections: int, round_index: int, seconds: float
) -> Measurement:
    path = running.path(route)
    calls = [build_call(route, running.address, path, image, BINARY) for image in images]
    load = Load(
        running.address,
        calls,
        duration_s=seconds,
        connections=connections,
        warm_up_s=seconds * WARM_UP_SHARE,
        timeout_s=TIMEOUT_S,
    )
    before = running.cpu_seconds()
    samples = run_load(load)
    worker_us, frontend_us = (
        1e6 * (end - start) / len(samples.records) for start, end in zip(before, running.cpu_seconds(), strict=True)
    )
    figures = Figures.of(samples)
    if figures.p50_ms is None or figures.p99_ms is None:
        problem = figures.error_counts or "give it more --seconds"
        raise BenchmarkError(f"{name} gave no good reply to {route} over {connections} connections: {problem}")
    return Measurement(
        *(round_index, name, route, connections, figures.rate, figures.p50_ms, figures.p99_ms),
        *(figures.error_counts, figures.generator_cpu_share, worker_us, frontend_us),
    )


# --- checking


def check_answers(running: Mapping[str, Running], images: Sequence[bytes]) -> dict[str, float]:
    """Ask every system for the same images, many at once, and compare with this service's answers.

    Maps by integrated gradients, another method, are not compared; of the handler that does nothing only the replies' form is.

    Args:
        images: PNG files without flat areas.
    Returns:
        the result of `require_same_maps`, by the systems that have comparable maps.
    Raises:
        BenchmarkError: a digit differs, or the maps do, or the no-op's replies have another form.
    """
    ours = running[OURS]
    digits = _ask_for_digits(ours, images)
    expected = {
        Explains.PREDICTED: _ask_for_maps(ours, images),
        Explains.CLASS_0: _ask_for_maps(ours, images, {"X-Saliency-Target": "0"}),
    }
    differences: dict[str, float] = {}
    for name, other in running.items():
        explains = SYSTEMS[name].explains
        if explains is Explains.NOTHING:
            _require_same_form(name, other, ours)
        elif name != OURS:
            require_same_digits(name, _ask_for_digits(other, images), digits)
            if explains in expected:
                differences[name] = require_same_maps(name, _ask_for_maps(other, images), expected[explains])
    return differences


def require_same_digits(name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Raise a BenchmarkError where a system reads other digits than this service."""
    wrong = [f"a {digit} as {other}" for digit, other in zip(expected, found, strict=True) if digit != other]
    if wrong:
        raise BenchmarkError(f"{name} reads other digits than {OURS}: {', '.join(wrong)}")


def require_same_maps(name: str, found: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Compare a system's maps (N, 28, 28) with this service's.

    Returns:
        the `largest_difference`.
    Raises:
        BenchmarkError: it is larger than MAX_MAP_DIFFERENCE.
    """
    difference = largest_difference(found, expected)
    if not difference <= MAX_MAP_DIFFERENCE:  # NaN is not
        raise BenchmarkError(f"{name} has maps that differ from those of {OURS} by {difference:.2g} of their largest number")
    return difference


def _ask_for_digits(running: Running, images: Sequence[bytes]) -> list[int]:
    with ThreadPoolExecutor(CHECKING_CONNECTIONS) as pool:
        return [read_digit(reply.json()) for reply in pool.map(partial(_ask, running, "predict"), images)]


def _ask_for_maps(running: Running, images: Sequence[bytes], headers: Mapping[str, str] | None = None) -> NDArray[np.float64]:
    """Get the maps of all images: (N, 28, 28)."""
    with ThreadPoolExecutor(CHECKING_CONNECTIONS) as pool:
        replies = pool.map(partial(_ask, running, "explain", headers=headers), images)
        return np.array([np.reshape(read_map(reply.json()), (28, 28)) for reply in replies])


def _require_same_form(name: str, constant: Running, real: Running) -> None:
    """Compare the size and type of the no-op's replies with those of the service that it stands for."""
    for route in ROUTES:
        replies = [_ask(running, route, SAMPLE_IMAGE.read_bytes()) for running in (constant, real)]
        forms = [(len(reply.content), reply.headers["Content-Type"]) for reply in replies]
        if forms[0] != forms[1]:
            raise BenchmarkError(f"{name} replies to {route} with {forms[0]}, {OURS} with {forms[1]}")


def _ask(running: Running, route: str, image: bytes, headers: Mapping[str, str] | None = None) -> requests.Response:
    reply = requests.post(
        running.address + running.path(route), data=image, headers={**BINARY, **(headers or {})}, timeout=TIMEOUT_S
    )
    reply.raise_for_status()
    return reply


# --- reporting

VERDICTS = {True: "reached", False: "**not reached**", None: ""}
COLUMNS = (
    "system",
    "explanations/s",
    "explanation, a lone client's p50, ms",
    "predictions/s",
    "prediction, a lone client's p50, ms",
    "worker, MiB resident (own; at its peak)",
    "ready after, s",
    "errors",
)


GOAL_COLUMNS = ("this service, as a multiple", "median (least - largest)", "goal", "")


def render_table(results: Results) -> str:
    """Write all systems, with those that are not installed, and the goals, as Markdown."""
    rows = []
    for name, system in SYSTEMS.items():
        if name in results.ready_s:
            memory = results.memory[name]
            cells = [
                format(_spread(results, name, "explain_rate"), ",.0f"),
                format(_spread(results, name, "explain_p50_ms"), ".2f"),
                format(_spread(results, name, "predict_rate"), ",.0f"),
                format(_spread(results, name, "predict_p50_ms"), ".2f"),
                f"{memory.rss_mib:.0f} ({memory.uss_mib:.0f}; {memory.peak_mib:.0f})",
                f"{results.ready_s[name]:.1f}",
                str(results.error_count(name)),
            ]
        else:
            missing = system.missing()
            cells = [f"not installed ({', '.join(missing)})" if missing else "not asked for", *[""] * (len(COLUMNS) - 2)]
        rows.append([system.title, *cells])
    return f"{render_markdown(COLUMNS, rows)}\n\n{render_markdown(GOAL_COLUMNS, _goal_rows(results))}"


def _goal_rows(results: Results) -> Iterator[list[str]]:
    for goal in GOALS:
        ratios = results.ratios(goal)
        bound = "" if goal.bound is None else f"{'at least' if goal.more_is_better else 'at most'} {goal.bound:g}"
        if ratios:
            spread = Spread.of(ratios)
            yield [goal.title, format(spread, ".2f"), bound, VERDICTS[goal.is_reached(spread.median)]]
        else:
            yield [goal.title, "not measured", bound, ""]


def render_costs(results: Results) -> str:
    """Write the processor time of a request by process, at the most connections, as Markdown: medians over the rounds."""
    parts = {"workers": "worker_cpu_us", "JVM": "frontend_cpu_us", "load generator": "generator_cpu_us"}
    rows = []
    for name in results.ready_s:
        cells = [SYSTEMS[name].title]
        for route in ROUTES:
            own = [one for one in results.measurements if (one.system, one.route) == (name, route)]
            busiest = [one for one in own if one.connections == max(one.connections for one in own)]
            cells += [f"{median(getattr(one, part) for one in busiest):.0f}" for part in parts.values()]
        rows.append(cells)
    return render_markdown(["system", *(f"{route}: {part}" for route in ROUTES for part in parts)], rows)


def _spread(results: Results, system: str, quantity: str) -> Spread:
    return Spread.of(results.by_round(system, quantity))


def render_report(results: Results, conditions: Mapping[str, Any]) -> str:
    """Write the tables and the conditions that they hold under, as Markdown."""
    busiest = max(results.measurements, key=lambda one: one.generator_cpu_share)
    return "\n".join(
        [
            "# Benchmark",
            "",
            f"`{conditions['command']}`, {conditions['date']}, load generator and servers on one machine: "
            f"{join_facts(conditions['machine'])}.",
            "",
            f"Rounds: {conditions['rounds']}; in each, every system for {conditions['seconds']:g} s under each load, in turn. "
            f"Replies/s are those of the best of {', '.join(map(str, BUSY_CONNECTIONS))} connections. "
            "Median (least - largest) over the rounds; ratios are taken within a round. "
            f"Workers a system: {conditions['workers']} on the {conditions['device']}, with one thread of torch each where "
            "nothing else is said. "
            f"Raw 28x28 PNG in, JSON out. A worker's memory is read {IDLE_S:g} s after all load. "
            f"The load generator took at most {busiest.generator_cpu_share:.0%} of a core (on {busiest.system}).",
            "",
            render_table(results),
            "",
            f"Processor time a request over {BUSY_CONNECTIONS[-1]} connections, microseconds (medians):",
            "",
            render_costs(results),
            "",
        ]
    )


def summarize(results: Results) -> dict[str, Any]:
    """Give the tables as data, for JSON."""
    quantities = ("explain_rate", "explain_p50_ms", "predict_rate", "predict_p50_ms", "rss_mib", "uss_mib", "peak_mib")
    return {
        "systems": {
            name: {quantity: asdict(Spread.of(results.by_round(name, quantity))) for quantity in quantities}
            | {"ready_s": results.ready_s[name], "errors": results.error_count(name)}
            for name in results.ready_s
        },
        "goals": [
            {
                **asdict(goal),
                "ratios": ratios,
                "median": median(ratios) if ratios else None,
                "reached": goal.is_reached(median(ratios)) if ratios else None,
            }
            for goal in GOALS
            for ratios in [results.ratios(goal)]
        ],
    }


# --- the command


@contextlib.contextmanager
def start_systems(names: Sequence[str], workplace: Workplace) -> Iterator[dict[str, Running]]:
    """Start this service and then others, one after another; they run until the end."""
    with contextlib.ExitStack() as stack:
        running: dict[str, Running] = {}
        for name in [OURS, *names]:
            print(f"starting {name} ...", file=sys.stderr)
            running[name] = stack.enter_context(SYSTEMS[name].start(workplace))
            if name == OURS:
                sample = SAMPLE_IMAGE.read_bytes()
                explanation, prediction = (_ask(running[OURS], route, sample).content for route in ROUTES)
                workplace = replace(workplace, explanation=explanation, prediction=prediction)
        yield running


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.benchmark",
        description="Measure this service and its peers side by side. Peers that are not installed are named and left out.",
        epilog="example: %(prog)s --rounds 3 --seconds 2 --systems noop,mosec",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    others = [name for name in SYSTEMS if name != OURS]
    parser.add_argument("--rounds", type=read_count, default=5, help="how often everything is measured")
    parser.add_argument("--warm-up-rounds", type=read_count, default=2, help="rounds before these, which are not kept")
    parser.add_argument("--seconds", type=read_positive, default=2.0, help="of each of a system's eight measurements in a round")
    parser.add_argument("--systems", type=_read_systems, default=",".join(others), help="what this service is compared with")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where all workers run")
    parser.add_argument("--workers", type=read_count, help="worker processes of each system; default: as served on the device")
    parser.add_argument("--output", metavar="DIR", type=Path, default=BUILD / "benchmark", help="where the reports go")
    return parser


def _read_systems(text: str) -> list[str]:
    """Read "noop,mosec"; this service is measured anyway."""
    return [name for name in names_reader(SYSTEMS)(text) if name != OURS]


def main(argv: Sequence[str] | None = None) -> int:
    """Start, check, measure, report. Returns the exit code: 1 where a system did not start, was wrong, or failed requests."""
    arguments = build_parser().parse_args(argv)
    workers = arguments.workers or int(read_model_config(arguments.device)["minWorkers"])
    installed = [name for name in arguments.systems if not SYSTEMS[name].missing()]
    not_installed = {name: SYSTEMS[name].missing() for name in arguments.systems if name not in installed}
    for name, packages in not_installed.items():
        print(f"{name}: not installed ({', '.join(packages)})", file=sys.stderr)
    conditions = describe_conditions("benchmark", argv, arguments, device=arguments.device, packages=PACKAGES) | {
        "warm_up_rounds": arguments.warm_up_rounds,
        "device": arguments.device,
        "workers": workers,
        "not_installed": not_installed,
    }
    images = read_files()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
            start_systems(installed, Workplace(Path(folder), workers, arguments.device)) as running,
        ):
            differences = check_answers(running, [dither(image, seed) for seed, image in enumerate(images)])
            print(f"same digits; differences between maps: {differences}", file=sys.stderr)
            measurements = measure(
                running, images, rounds=arguments.rounds, warm_up_rounds=arguments.warm_up_rounds, seconds=arguments.seconds
            )
            time.sleep(IDLE_S)
            memory = {name: Memory(*worker_memory_mib(one)) for name, one in running.items()}
        results = Results(measurements, memory, {name: one.ready_s for name, one in running.items()})
        report, summary = render_report(results, conditions), summarize(results)
    except (ServeError, BenchmarkError, requests.RequestException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "benchmark.md").write_text(report)
    content = {**conditions, "map_differences": differences, "summary": summary, **asdict(results)}
    (arguments.output / "benchmark.json").write_text(json.dumps(content, indent=1) + "\n")
    print(report)
    return int(any(results.error_count(name) for name in results.ready_s))


if __name__ == "__main__":
    sys.exit(main())
