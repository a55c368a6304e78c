"""Put a running server under load, keep one sample a request, and report what it can take.

    python -m scripts.bench.load_test --rates 100,200,400 --mix predict=3,explain=1

Open loop (`--rates`) asks how long answers take at a given rate, closed loop (`--connections`) how many answers a second a given
number of clients gets. The samples go to OUTPUT.npz first; the text, OUTPUT.json and OUTPUT.html are made of that file alone, and
`--report OUTPUT.npz` makes them again. Figures:

- Latency: from the instant a request was scheduled to its last byte; of good replies, and of timeouts with the time waited.
- Served: good replies (2xx) a second that came within a step's window, which starts after the warm-up.
- Knee: the highest rate such that it and every lower one served at least 98 % of what was offered, with a p99 of at most five
  times that of the lowest rate.
- Lag: how late the generator itself sent, when the schedule had come and a connection was free. CPU: its processor time over
  wall time. Where either is high the figures say as much of the generator as of the server, and the report warns.
"""

import argparse
import base64
import contextlib
import dataclasses
import html
import importlib.metadata
import io
import math
import os
import platform
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import orjson
import psutil
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from scripts.bench.load import QUANTILES, Call, Failure, Samples, Tick, build_call, run_closed, run_open
from scripts.paths import BUILD, MODEL_NAME, SAMPLE_FILES
from scripts.serving.credentials import CredentialsError, authorization, read_token

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KNEE_SERVED_SHARE = 0.98  # of what was offered
KNEE_P99_GROWTH = 5.0  # against the lowest rate
HIGH_LAG_SHARE = 0.1  # of the p99 of the latencies, by the p99 of the generator's lag
HIGH_CPU_SHARE = 0.8  # of one core; the generator has one thread
SEED = 0  # of the order of kinds and images, the same in every run
QUANTILE_NAMES = ("p50", "p90", "p99", "p99.9", "max")  # of QUANTILES
PACKAGES = ("torch", "torchvision", "torchserve", "numpy", "pillow", "orjson", "scipy")
TIMELINE_BINS = 200  # of a step's window, in the plot


class LoadTestError(RuntimeError):
    """The test cannot be made; the message says why, for a person."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What one request asks for: a route, such as "predictions", and headers."""

    route: str
    headers: Mapping[str, str]


KINDS = {
    "predict": Kind("predictions", {}),
    "explain": Kind("explanations", {}),
    "explain-base64": Kind("explanations", {"X-Saliency-Encoding": "base64"}),
    "explain-npy": Kind("explanations", {"Accept": "application/x-npy"}),
    "explain-png": Kind("explanations", {"Accept": "image/png"}),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What to send, where and how fast. Rates or connections, one step each; the other is empty."""

    url: str
    model: str
    rates: Sequence[float]
    connections: Sequence[int]
    mix: Mapping[str, int]
    images: Sequence[Path]
    duration_s: float
    warm_up_s: float
    timeout_s: float
    max_connections: int

    def describe(self) -> dict[str, Any]:
        """What the report says of it."""
        return {
            "url": self.url,
            "model": self.model,
            "loop": "open" if self.rates else "closed",
            "mix": dict(self.mix),
            "images": len(self.images),
            "duration_s": self.duration_s,
            "warm_up_s": self.warm_up_s,
            "timeout_s": self.timeout_s,
            "max_connections": self.max_connections if self.rates else max(self.connections),
        }


@dataclass(frozen=True, slots=True)
class Run:
    """All steps of a test, as its raw file holds them. `about` says what was tested, when and on what."""

    about: dict[str, Any]
    steps: list[Samples]


def build_calls(settings: Settings, token: str | None) -> list[Call]:
    """Every kind with every image, as often as the mix says, in an order that is shuffled the same way each time.

    Raises:
        LoadTestError: an image cannot be read, or the token is none.
    """
    calls = []
    for image in settings.images:
        try:
            body = image.read_bytes()
        except OSError as error:
            raise LoadTestError(f"{image}: {error.strerror}") from error
        for name, weight in settings.mix.items():
            headers = {"Content-Type": "application/octet-stream", **KINDS[name].headers, **authorization(token)}
            path = f"/{KINDS[name].route}/{settings.model}"
            try:
                calls += [build_call(name, settings.url, path, body, headers)] * weight
            except ValueError as error:
                raise LoadTestError(f"the token or the model's name cannot stand in a request: {error}") from None
    return [calls[index] for index in np.random.default_rng(SEED).permutation(len(calls))]


def is_right_form(name: str, body: bytes) -> bool:
    """Whether a reply's body is what this kind of call asks for: JSON with a digit, a map where one was asked for."""
    try:
        if name == "explain-npy":
            return bool(np.isfinite(np.load(io.BytesIO(body), allow_pickle=False)).all())
        if name == "explain-png":
            with Image.open(io.BytesIO(body), formats=["PNG"]) as image:
                image.load()
            return True
        content = orjson.loads(body)
        if name == "predict":
            return isinstance(content["digit"], int)
        saliency = content["explanation"]["saliency"]
        if name == "explain-base64":
            saliency = np.frombuffer(base64.b64decode(saliency, validate=True), "<f4")
        return isinstance(content["digit"], int) and np.asarray(saliency, np.float32).size == math.prod(
            content["explanation"]["shape"]
        )
    except (ValueError, KeyError, TypeError, EOFError, OSError, SyntaxError):  # numpy: EOFError; Pillow: the last two
        return False


def mark_wrong_forms(samples: Samples) -> None:
    """Look into the first good reply to each call; where its form is wrong its record becomes a failure."""
    for call, reply in samples.first_replies.items():
        if not is_right_form(samples.names[call], reply.body):
            samples.failure[reply.row] = Failure.WRONG_FORM


def run_steps(
    settings: Settings, calls: Sequence[Call], raw_file: Path, *, tls: ssl.SSLContext | None, interrupted: threading.Event
) -> None:
    """Make all steps, and write the raw file after each.

    Raises:
        OSError: the address has no such host, or the file cannot be written.
    """
    about = settings.describe() | {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "interrupted": False,
        "machine": describe_machine(),
    }
    run = Run(about, [])
    count = len(settings.rates or settings.connections)
    for number in range(count):
        asked = _label_of(settings.rates[number], 0) if settings.rates else _label_of(None, settings.connections[number])
        with _progress(f"{asked}, {number + 1} of {count}", settings, interrupted) as tick:
            samples = _run_step(settings, calls, number, tls, tick)
        mark_wrong_forms(samples)
        run.steps.append(samples)
        about["interrupted"] = interrupted.is_set()
        write_raw(run, raw_file)
        errors = sum(samples.error_counts.values())
        p99_ms = _shown(samples.latency_quantiles_ms([0.99])[0])
        print(
            f"step {number + 1} of {count}: {asked}: served {samples.served_rate:,.1f}/s, p99 {p99_ms} ms, {errors} errors",
            file=sys.stderr,
        )
        if interrupted.is_set():
            break
        if not samples.good.any():
            print("no good reply at all: the steps that are left are not made", file=sys.stderr)
            break


def _run_step(settings: Settings, calls: Sequence[Call], number: int, tls: ssl.SSLContext | None, tick: Tick) -> Samples:
    duration_s, warm_up_s, timeout_s = settings.duration_s, settings.warm_up_s, settings.timeout_s
    if settings.rates:
        return run_open(
            settings.url,
            calls,
            rate=settings.rates[number],
            max_connections=settings.max_connections,
            duration_s=duration_s,
            warm_up_s=warm_up_s,
            timeout_s=timeout_s,
            tls=tls,
            tick=tick,
        )
    return run_closed(
        settings.url,
        calls,
        connections=settings.connections[number],
        duration_s=duration_s,
        warm_up_s=warm_up_s,
        timeout_s=timeout_s,
        tls=tls,
        tick=tick,
    )


@contextlib.contextmanager
def _progress(name: str, settings: Settings, interrupted: threading.Event) -> Iterator[Tick]:
    """A bar of the step's seconds, with the number of requests so far; the tick says whether to go on."""
    total_s = settings.warm_up_s + settings.duration_s
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=total_s, desc=name, leave=False, disable=None, bar_format=layout) as bar:

        def tick(now_s: float, request_count: int) -> bool:
            bar.set_postfix_str(f"{request_count:,} requests", refresh=False)
            bar.update(min(now_s + settings.warm_up_s, 0.999 * total_s) - bar.n)  # the sum's rounding must not pass the total
            return not interrupted.is_set()

        yield tick


def describe_machine(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Hardware of the machine that sends, and versions of packages, as far as they can be found out."""
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


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


STEP_FACTS = ("names", "duration_s", "offered_rate", "connections", "cpu_share")  # of Samples, beside the records


def write_raw(run: Run, file: Path) -> None:
    """Write an .npz: `about`, a JSON text, and for each step `step_0`, ...: one record a request, of `load.RECORD`."""
    steps = [{name: getattr(samples, name) for name in STEP_FACTS} for samples in run.steps]
    about = orjson.dumps(run.about | {"steps": steps}).decode()
    file.parent.mkdir(parents=True, exist_ok=True)
    records = {f"step_{number}": samples.records for number, samples in enumerate(run.steps)}
    np.savez(file, allow_pickle=False, about=np.array(about), **records)


def read_raw(file: Path) -> Run:
    """Read what `write_raw` wrote, without the replies.

    Raises:
        LoadTestError: there is no such file, or it is another kind of file.
    """
    try:
        with np.load(file, allow_pickle=False) as opened:
            about: dict[str, Any] = orjson.loads(str(opened["about"]))
            steps = [
                Samples(
                    records=opened[f"step_{number}"],
                    first_replies={},
                    **{name: facts[name] for name in STEP_FACTS if name != "names"},
                    names=tuple(facts["names"]),
                )
                for number, facts in enumerate(about.pop("steps"))
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadTestError(f"{file} holds no samples of a load test: {error}") from error
    return Run(about, steps)


@dataclass(frozen=True, slots=True)
class KindSummary:
    """One kind of call in a step. Latencies in ms, by the names of QUANTILE_NAMES; NaN where there is none."""

    requests: int
    latency_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class StepSummary:
    """One step. Rates are per second; `offered_rate` is None in a closed loop."""

    offered_rate: float | None
    served_rate: float
    connections: int
    requests: int
    errors: dict[str, int]
    latency_ms: dict[str, float]
    lag_ms: dict[str, float]
    cpu_share: float
    kinds: dict[str, KindSummary]

    @property
    def label(self) -> str:
        """What was asked of the step."""
        return _label_of(self.offered_rate, self.connections)


def _label_of(rate: float | None, connections: int) -> str:
    return f"{rate:g}/s" if rate is not None else f"{connections} connection{'s' if connections > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Report:
    """What a run says. The knee is None where even the lowest rate was too much, and in a closed loop."""

    about: dict[str, Any]
    steps: list[StepSummary]
    knee_rate: float | None
    peak_rate: float
    warnings: list[str]

    @property
    def error_count(self) -> int:
        """Of all steps."""
        return sum(sum(step.errors.values()) for step in self.steps)


def build_report(run: Run) -> Report:
    """Summarise all steps in which requests were counted.

    Raises:
        LoadTestError: there is none.
    """
    steps = [summarise(samples) for samples in run.steps if samples.request_count]
    if not steps:
        raise LoadTestError("no request was counted: the test ended in its first warm-up")
    return Report(
        about=run.about,
        steps=steps,
        knee_rate=find_knee(steps),
        peak_rate=max(step.served_rate for step in steps),
        warnings=[warning for step in steps for warning in find_warnings(step)],
    )


def summarise(samples: Samples) -> StepSummary:
    """The figures of one step."""
    requests = dict.fromkeys(samples.names, 0)
    for call, count in zip(*np.unique(samples.call[samples.counted], return_counts=True), strict=True):
        requests[samples.names[call]] += int(count)
    return StepSummary(
        offered_rate=samples.offered_rate,
        served_rate=samples.served_rate,
        connections=samples.connections,
        requests=samples.request_count,
        errors=samples.error_counts,
        latency_ms=_by_name(samples.latency_quantiles_ms()),
        lag_ms=_by_name(samples.lag_quantiles_ms()),
        cpu_share=samples.cpu_share,
        kinds={
            name: KindSummary(requests[name], _by_name(samples.latency_quantiles_ms(QUANTILES, name)))
            for name in KINDS
            if name in requests
        },
    )


def _by_name(values: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(QUANTILE_NAMES, values.tolist(), strict=True))


def find_knee(steps: Sequence[StepSummary]) -> float | None:
    """The highest rate such that it and every lower one was served, without a p99 far above that of the lowest."""
    knee = None
    by_rate = sorted((step.offered_rate, step) for step in steps if step.offered_rate is not None)
    for rate, step in by_rate:
        p99_limit_ms = KNEE_P99_GROWTH * by_rate[0][1].latency_ms["p99"]
        if step.served_rate < KNEE_SERVED_SHARE * rate or not step.latency_ms["p99"] <= p99_limit_ms:
            break
        knee = rate
    return knee


def find_warnings(step: StepSummary) -> list[str]:
    """Where a step's figures say more of the generator than of the server."""
    warnings = []
    lag_ms, latency_ms = step.lag_ms["p99"], step.latency_ms["p99"]
    if lag_ms > HIGH_LAG_SHARE * latency_ms:
        warnings.append(
            f"{step.label}: the generator itself sent late (lag p99 {lag_ms:.2f} ms, latency p99 {latency_ms:.2f} ms): "
            "the latencies are partly its own"
        )
    if step.cpu_share > HIGH_CPU_SHARE:
        warnings.append(
            f"{step.label}: the generator was busy {step.cpu_share:.0%} of the time: it may be what limits the served rate"
        )
    return warnings


def render_text(report: Report) -> str:
    """The report for a terminal."""
    lines = [*_describe_run(report), ""]
    table = [STEP_COLUMNS, *(row for step in report.steps for row in (_step_row(step), *_kind_rows(step)))]
    widths = [max(len(row[column]) for row in table) for column in range(len(STEP_COLUMNS))]
    for row in table:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *others]).rstrip())
    lines += ["", *_conclude(report)]
    lines += [f"{name}: {value}" for name, value in report.about["machine"].items()]
    return "\n".join(lines)


STEP_COLUMNS = (
    "step",
    "requests",
    "served/s",
    *(f"{name} ms" for name in QUANTILE_NAMES),
    "errors",
    "conns",
    "lag p99 ms",
    "CPU",
)


def _step_row(step: StepSummary) -> tuple[str, ...]:
    return (
        step.label,
        f"{step.requests:,}",
        f"{step.served_rate:,.1f}",
        *map(_shown, step.latency_ms.values()),
        str(sum(step.errors.values())),
        str(step.connections),
        _shown(step.lag_ms["p99"]),
        f"{step.cpu_share:.0%}",
    )


def _kind_rows(step: StepSummary) -> list[tuple[str, ...]]:
    if len(step.kinds) == 1:
        return []
    return [
        (f"  {name}", f"{kind.requests:,}", "", *map(_shown, kind.latency_ms.values()), "", "", "", "")
        for name, kind in step.kinds.items()
    ]


def _shown(milliseconds: float) -> str:
    return "-" if math.isnan(milliseconds) else f"{milliseconds:,.2f}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def _describe_run(report: Report) -> list[str]:
    about = report.about
    mix = ", ".join(f"{name} {weight}" for name, weight in about["mix"].items())
    lines = [
        f"{about['loop']} loop against {about['url']}, model {about['model']}, {about['started']}",
        f"mix {mix}; {about['images']} images; {about['duration_s']:g} s a step after {about['warm_up_s']:g} s of warm-up; "
        f"timeout {about['timeout_s']:g} s; up to {about['max_connections']} connections",
    ]
    return [*lines, "interrupted: the last step is shorter, steps may be missing"] if about["interrupted"] else lines


def _conclude(report: Report) -> list[str]:
    """What the figures come to, one sentence a line."""
    lines = []
    for step in report.steps:
        if step.errors:
            lines.append(f"errors at {step.label}: " + ", ".join(f"{count} {kind}" for kind, count in step.errors.items()))
    if report.about["loop"] == "open":
        share, growth = f"{KNEE_SERVED_SHARE:.0%}", f"{KNEE_P99_GROWTH:g}"
        definition = (
            f"it and every lower rate served {share} of what was offered, with a p99 of at most {growth} times the lowest's"
        )
        knee = "none of these rates" if report.knee_rate is None else f"{report.knee_rate:g}/s"
        lines.append(f"knee: {knee} ({definition})")
    lines.append(f"most served: {report.peak_rate:,.1f}/s")
    return lines + [f"warning: {warning}" for warning in report.warnings]


def render_page(report: Report, plots: str) -> str:
    """The report as one HTML page that needs no other file.

    Args:
        plots: of `draw_plots`.
    """
    rows = "".join(
        f"<tr{' class=kind' if row[0].startswith(' ') else ''}>" + "".join(f"<td>{html.escape(cell)}" for cell in row)
        for step in report.steps
        for row in (_step_row(step), *_kind_rows(step))
    )
    heads = "".join(f"<th>{html.escape(name)}" for name in STEP_COLUMNS)
    machine = "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(value)}" for name, value in report.about["machine"].items())
    described = "".join(f"<p>{html.escape(line)}" for line in _describe_run(report))
    concluded = "".join(
        f"<p{' class=warning' if line.startswith('warning') else ''}>{html.escape(line)}" for line in _conclude(report)
    )
    return PAGE.format(
        title="Load test", described=described, concluded=concluded, plots=plots, heads=heads, rows=rows, machine=machine
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }}
p {{ margin: .3rem 0 }}
.warning {{ color: #a30 }}
.wide {{ overflow-x: auto; margin: 1.5rem 0 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}
td:first-child, th:first-child {{ text-align: left }}
.kind td {{ color: #666 }}
.kind td:first-child {{ padding-left: 1.6rem }}
.machine td {{ text-align: left }}
svg {{ max-width: 100%; height: auto }}
</style>
<h1>{title}</h1>
{described}
<div class="wide"><table><tr>{heads}{rows}</table></div>
{concluded}
<figure style="margin: 1.5rem 0">{plots}</figure>
<h2>The machine that sent</h2>
<table class="machine">{machine}</table>
</html>
"""


def draw_plots(run: Run, report: Report) -> str:
    """Draw rates, latencies, their distribution and their course in time, as an SVG element.

    Raises:
        LoadTestError: matplotlib is not there.
    """
    return draw_svg("load test", lambda figure: _plot_all(figure, run, report))


def _plot_all(figure: "Figure", run: Run, report: Report) -> None:
    rates, quantiles, distribution, timeline = figure.subplots(2, 2).flat
    _plot_rates(rates, report)
    _plot_quantiles(quantiles, report)
    for samples, step in zip((samples for samples in run.steps if samples.request_count), report.steps, strict=True):
        _plot_distribution(distribution, samples, step.label)
        _plot_timeline(timeline, samples, step.label)
    distribution.set(title="Distribution of the latencies", xlabel="quantile", ylabel="ms")
    distribution.set(xscale="log")
    distribution.minorticks_off()
    distribution.set_xticks([0.5, 0.1, 0.01, 0.001], QUANTILE_NAMES[:-1])
    distribution.invert_xaxis()
    timeline.set(title="Latencies in time (worst of each moment)", xlabel="s since the warm-up", ylabel="ms")
    for axes in (quantiles, distribution):
        axes.legend(fontsize=8)
    for axes in (quantiles, distribution, timeline):
        if np.isfinite(axes.dataLim.intervaly).all():  # without any reply there is nothing to scale
            axes.set_yscale("log")
    for axes in (rates, quantiles, distribution, timeline):
        axes.grid(visible=True, which="major", alpha=0.3)


def draw_svg(salt: str, plot: Callable[["Figure"], None]) -> str:
    """Draw a figure as an SVG element, to stand in a page.

    Args:
        salt: of the ids in it: the same figure is the same text every time.
        plot: draws into the empty figure.
    Raises:
        LoadTestError: matplotlib is not there.
    """
    try:
        import matplotlib as mpl  # slow, large, and needed for this alone
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LoadTestError("the page's plots need matplotlib: pip install matplotlib") from error

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}):
        figure = Figure(figsize=(11, 8.5), layout="constrained")
        plot(figure)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]


def _positions(report: Report) -> tuple[list[float], str]:
    """Where the steps stand on an axis, and its name."""
    if report.about["loop"] == "open":
        return [step.offered_rate or 0.0 for step in report.steps], "offered requests/s"
    return [float(step.connections) for step in report.steps], "connections"


def _plot_rates(axes: "Axes", report: Report) -> None:
    positions, name = _positions(report)
    axes.plot(positions, [step.served_rate for step in report.steps], "o-", label="served")
    if report.about["loop"] == "open":
        axes.plot(positions, positions, "--", color="grey", label="offered")
    if report.knee_rate is not None:
        axes.axvline(report.knee_rate, color="tab:red", linestyle=":", label="knee")
    axes.set(title="Served", xlabel=name, ylabel="replies/s", ylim=(0, None))
    axes.legend(fontsize=8)


def _plot_quantiles(axes: "Axes", report: Report) -> None:
    positions, name = _positions(report)
    for quantile in QUANTILE_NAMES:
        axes.plot(positions, [step.latency_ms[quantile] for step in report.steps], "o-", label=quantile)
    axes.plot(positions, [step.lag_ms["p99"] for step in report.steps], "--", color="grey", label="generator's lag, p99")
    axes.set(title="Latencies", xlabel=name, ylabel="ms")


def _plot_distribution(axes: "Axes", samples: Samples, label: str) -> None:
    latencies_ms = samples.latencies_ms()
    longer = np.geomspace(1, 1 / max(len(latencies_ms), 1), 200)  # share of requests
    axes.plot(longer, np.quantile(latencies_ms, 1 - longer) if len(latencies_ms) else np.full(200, np.nan), label=label)


def _plot_timeline(axes: "Axes", samples: Samples, label: str) -> None:
    """The worst latency of each of some equal parts of the window, where there is one."""
    chosen = samples.timed
    moments_s = samples.scheduled_s[chosen]
    bins = np.minimum((moments_s / samples.duration_s * TIMELINE_BINS).astype(int), TIMELINE_BINS - 1)
    worst_ms = np.full(TIMELINE_BINS, -np.inf)
    np.maximum.at(worst_ms, bins, samples.latencies_ms())
    used = np.flatnonzero(np.isfinite(worst_ms))
    axes.plot((used + 0.5) * samples.duration_s / TIMELINE_BINS, worst_ms[used], linewidth=1, label=label)


def write_report(raw_file: Path) -> Report:
    """Make text (to stdout), JSON and page of a raw file, beside it.

    Raises:
        LoadTestError: it is no such file, or there is nothing in it.
        OSError: a file cannot be written.
    """
    run = read_raw(raw_file)
    report = build_report(run)
    print(render_text(report))
    raw_file.with_suffix(".json").write_bytes(orjson.dumps(dataclasses.asdict(report), option=orjson.OPT_INDENT_2))
    try:
        raw_file.with_suffix(".html").write_text(render_page(report, draw_plots(run, report)))
    except LoadTestError as error:
        print(f"no {raw_file.with_suffix('.html')}: {error}", file=sys.stderr)
    return report


def read_mix(text: str) -> dict[str, int]:
    """Read "predict=3,explain=1"; kinds of weight 0 are left out."""
    mix = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        if name not in KINDS or not weight.isdecimal():
            raise argparse.ArgumentTypeError(f"got {part!r}; KIND=WHOLE NUMBER is accepted, with a kind of {', '.join(KINDS)}")
        mix[name] = int(weight)
    if not any(mix.values()):
        raise argparse.ArgumentTypeError(f"got {text!r}, which asks for nothing")
    return {name: weight for name, weight in mix.items() if weight}


def read_rates(text: str) -> list[float]:
    """Read "100,200.5"."""
    return [read_positive(part) for part in text.split(",")]


def read_connections(text: str) -> list[int]:
    """Read "1,16"."""
    counts = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(counts) != len(text.split(",")) or not all(counts):
        raise argparse.ArgumentTypeError(f"got {text!r}; whole numbers from 1, with commas, are accepted")
    return counts


def read_positive(text: str) -> float:
    """Read a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; a number above 0 is accepted")
    return number


def read_seconds(text: str) -> float:
    """Read a finite number from 0."""
    return 0.0 if text.strip() == "0" else read_positive(text)


def read_url(text: str) -> str:
    """Read the address of a server."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or parts.path.strip("/"):
        raise argparse.ArgumentTypeError("http://HOST:PORT or https://HOST:PORT is accepted, without a path or a user")
    return text.rstrip("/")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.load_test",
        description="Put a running server under load and report latencies, rates, errors and the knee.",
        epilog="example: %(prog)s --rates 100,200,400 --mix predict=3,explain=1,explain-npy=1",
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--rates", type=read_rates, metavar="N,N", help="open loop: requests a second, one step each")
    steps.add_argument(
        "--connections", type=read_connections, metavar="N,N", help="closed loop: connections, one step each; default: 1,4,16,64"
    )
    steps.add_argument("--report", type=Path, metavar="FILE.npz", help="send nothing: report again what this file holds")
    kinds = ", ".join(KINDS)
    parser.add_argument(
        "--mix", type=read_mix, default="predict=1,explain=1", metavar="KIND=N,...", help=f"of {kinds}; default: %(default)s"
    )
    parser.add_argument("--images", type=Path, nargs="+", metavar="FILE", help="default: model/samples/*.png")
    parser.add_argument("--duration", type=read_positive, default=10.0, metavar="S", help="of a step; default: 10")
    parser.add_argument("--warm-up", type=read_seconds, default=2.0, metavar="S", help="before each, not counted; default: 2")
    parser.add_argument(
        "--timeout", type=read_positive, default=10.0, metavar="S", help="for a reply, from its schedule; default: 10"
    )
    parser.add_argument("--max-connections", type=int, default=256, metavar="N", help="of the open loop; default: 256")
    parser.add_argument("--url", type=read_url, default="http://127.0.0.1:8080", help="default: %(default)s")
    parser.add_argument("--model", default=MODEL_NAME, help="the served model's name; default: %(default)s")
    parser.add_argument(
        "--key-file", type=Path, metavar="FILE", help="the token: TorchServe's key_file.json, or a file that holds it alone"
    )
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="for https: certificates to trust, as PEM")
    parser.add_argument("--insecure", action="store_true", help="for https: check no certificate")
    parser.add_argument(
        "--output",
        type=Path,
        default=BUILD / "load-test",
        metavar="NAME",
        help="of .npz, .json and .html; default: build/load-test",
    )
    return parser


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Turn the command line into settings."""
    return Settings(
        url=arguments.url,
        model=arguments.model,
        rates=arguments.rates or [],
        connections=[] if arguments.rates else arguments.connections or [1, 4, 16, 64],
        mix=arguments.mix,
        images=arguments.images or SAMPLE_FILES,
        duration_s=arguments.duration,
        warm_up_s=arguments.warm_up,
        timeout_s=arguments.timeout,
        max_connections=arguments.max_connections,
    )


def _tls_of(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    if not arguments.url.startswith("https:"):
        return None
    context = ssl.create_default_context(cafile=arguments.ca_file)
    if arguments.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Let the first Ctrl-C (or SIGTERM) set the event; the next one ends the program as ever."""
    interrupted = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def interrupt(number: int, frame: object) -> None:
        interrupted.set()
        restore()

    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield interrupted
    finally:
        restore()


def main(argv: Sequence[str] | None = None) -> int:
    """Send and report, or report alone. Returns the exit code: 1 where requests failed or the test could not be made."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.max_connections < 1:
        parser.error("--max-connections is at least 1")
    raw_file = arguments.report or Path(f"{arguments.output}.npz")
    try:
        if arguments.report is None:
            settings = read_settings(arguments)
            token = read_token(arguments.key_file) if arguments.key_file else None
            calls = build_calls(settings, token)
            print(", ".join(f"{name} {value}" for name, value in settings.describe().items()), file=sys.stderr)
            with interruptible() as interrupted:
                run_steps(settings, calls, raw_file, tls=_tls_of(arguments), interrupted=interrupted)
        report = write_report(raw_file)
    except (LoadTestError, CredentialsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {raw_file} and what was made of it, beside it", file=sys.stderr)
    return int(report.error_count > 0)


if __name__ == "__main__":
    sys.exit(main())
