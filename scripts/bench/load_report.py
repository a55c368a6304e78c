"""The samples of a load test -> figures, text and a page.

Knows nothing of how the samples were taken. Figures:

- Latency: from the instant a request was scheduled to its last byte; of good replies, and of timeouts with the time waited.
- Served: good replies (2xx) a second that arrived within a step's window, which starts after the warm-up.
- Knee: the highest rate such that it and every lower one served at least 98 % of what was offered, with a p99 of at most five
  times that of the lowest rate.
- Lag: how late the generator itself sent, when a request was scheduled and a connection free. CPU: its processor time over wall
  time. Where either is high the figures say as much of the generator as of the server, and the report warns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scripts.bench.digit_requests import KINDS
from scripts.bench.load import QUANTILES, Samples
from scripts.bench.load.generator import label_load
from scripts.bench.load.recording import LoadTestError, Recording
from scripts.pages import draw_svg, render_page
from scripts.tables import render_aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KNEE_SERVED_SHARE = 0.98  # of what was offered
KNEE_P99_GROWTH = 5.0  # against the lowest rate
HIGH_LAG_SHARE = 0.1  # of the p99 of the latencies, by the p99 of the generator's lag
HIGH_CPU_SHARE = 0.8  # of one core; the generator has one thread
QUANTILE_NAMES = ("p50", "p90", "p99", "p99.9", "max")  # of QUANTILES
TIMELINE_BINS = 200  # of a step's window, in the plot
PLOTS_INCHES = (11, 8.5)  # of the page's four plots together


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
        """Its rate or its connections."""
        return label_load(self.offered_rate, self.connections)


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of a test. The knee is None where even the lowest rate was too much, and in a closed loop."""

    about: dict[str, Any]
    steps: list[StepSummary]
    knee_rate: float | None
    peak_rate: float
    warnings: list[str]

    @property
    def error_count(self) -> int:
        """Requests without a good reply, in all steps."""
        return sum(sum(step.errors.values()) for step in self.steps)


def build_report(recording: Recording) -> Report:
    """Summarise all steps in which requests were counted.

    Raises:
        LoadTestError: there is none.
    """
    steps = [summarise(samples) for samples in recording.steps if samples.request_count]
    if not steps:
        raise LoadTestError("no request was counted: the test ended in its first warm-up")
    return Report(
        about=recording.about,
        steps=steps,
        knee_rate=find_knee(steps),
        peak_rate=max(step.served_rate for step in steps),
        warnings=[warning for step in steps for warning in find_warnings(step)],
    )


def summarise(samples: Samples) -> StepSummary:
    """Reduce the samples of one step to its figures."""
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
    """Find the highest rate such that it and every lower one was served, without a p99 far above that of the lowest."""
    knee = None
    by_rate = sorted((step.offered_rate, step) for step in steps if step.offered_rate is not None)
    for rate, step in by_rate:
        p99_limit_ms = KNEE_P99_GROWTH * by_rate[0][1].latency_ms["p99"]
        if step.served_rate < KNEE_SERVED_SHARE * rate or not step.latency_ms["p99"] <= p99_limit_ms:
            break
        knee = rate
    return knee


def find_warnings(step: StepSummary) -> list[str]:
    """Warn where a step's figures say more of the generator than of the server."""
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
    """Write the report for a terminal."""
    lines = [*_describe_run(report), "", render_aligned([STEP_COLUMNS, *_rows(report)]), "", *_conclude(report)]
    lines += [f"{name}: {value}" for name, value in report.about["machine"].items()]
    return "\n".join(lines)


def render_html(report: Report, recording: Recording) -> str:
    """Write the report as a page.

    Args:
        recording: what the report was built from, for the plots.
    Raises:
        MatplotlibMissing: matplotlib is not installed.
    """
    return render_page(
        "load.html",
        title="Load test",
        described=_describe_run(report),
        tables=[(STEP_COLUMNS, _rows(report))],
        concluded=_conclude(report),
        plots=draw_svg("load test", PLOTS_INCHES, lambda figure: _plot_all(figure, report, recording)),
        machine=report.about["machine"],
    )


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


def _rows(report: Report) -> list[tuple[str, ...]]:
    return [row for step in report.steps for row in (_step_row(step), *_kind_rows(step))]


def _step_row(step: StepSummary) -> tuple[str, ...]:
    return (
        step.label,
        f"{step.requests:,}",
        f"{step.served_rate:,.1f}",
        *map(format_ms, step.latency_ms.values()),
        str(sum(step.errors.values())),
        str(step.connections),
        format_ms(step.lag_ms["p99"]),
        f"{step.cpu_share:.0%}",
    )


def _kind_rows(step: StepSummary) -> list[tuple[str, ...]]:
    if len(step.kinds) == 1:
        return []
    return [
        (f"  {name}", f"{kind.requests:,}", "", *map(format_ms, kind.latency_ms.values()), "", "", "", "")
        for name, kind in step.kinds.items()
    ]


def format_ms(milliseconds: float) -> str:
    """Write a latency: "-" for NaN, with as many digits as matter."""
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
    """Conclude from the figures, one sentence a line."""
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


def _plot_all(figure: "Figure", report: Report, recording: Recording) -> None:
    rates, quantiles, distribution, timeline = figure.subplots(2, 2).flat
    _plot_rates(rates, report)
    _plot_quantiles(quantiles, report)
    for samples, step in zip((samples for samples in recording.steps if samples.request_count), report.steps, strict=True):
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


def _positions(report: Report) -> tuple[list[float], str]:
    """Place the steps on an axis, and name it."""
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
    """Draw the worst latency of each of some equal parts of the window."""
    chosen = samples.timed
    moments_s = samples.scheduled_s[chosen]
    bins = np.minimum((moments_s / samples.duration_s * TIMELINE_BINS).astype(int), TIMELINE_BINS - 1)
    worst_ms = np.full(TIMELINE_BINS, -np.inf)
    np.maximum.at(worst_ms, bins, samples.latencies_ms())
    used = np.flatnonzero(np.isfinite(worst_ms))
    axes.plot((used + 0.5) * samples.duration_s / TIMELINE_BINS, worst_ms[used], linewidth=1, label=label)
