"""The samples of a soak -> figures, gates, text and a page.

Knows nothing of how the samples were taken. Figures:

- Slope: of a process's resident memory, by least squares through the means of ten equal parts of the window, with a 95 %
  confidence interval. Samples a few seconds apart are nearly equal, and taken as independent they would give an interval that is
  too narrow; the means of parts that are minutes long are independent enough.
- p99: of the right answers, refusals of bad requests included, that had no attack in flight beside them; of the first and of the
  last sixth of the window, which are five minutes of half an hour. What attacks cost their neighbours is too rare and too large
  for a steady p99; the next figure bounds it.
- Late: an answer that took longer than an attack may take (attacks.py), whether it is an attack's or a neighbour's.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from scripts.bench.attacks import MAX_ACCEPTED_SECONDS, MAX_REFUSED_SECONDS, max_seconds
from scripts.bench.load import Failure, Samples
from scripts.bench.load.recording import LoadTestError
from scripts.bench.load.samples import quantiles_of
from scripts.pages import draw_svg, render_page
from scripts.tables import render_aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
BLOCKS = 10  # of the window, whose means the slope goes through
CONFIDENCE = 0.95
# MiB/h: the upper end of a slope's interval must be below it, so that larger growth is ruled out. In half an hour that is 32 MiB,
# which the allocator may keep of freed memory (KEPT_BYTES in runtime/malloc.py), in steps at any time. A leak of 200 bytes a
# request is 69 MiB/h at 100 requests a second.
MAX_SLOPE_MIB_PER_HOUR = 64.0
MAX_P99_GROWTH = 1.10
JUDGED_FROM_S = 600.0  # in a shorter window slopes and latencies mean nothing
SIXTHS = 6
NAMED_LATE = 10  # kinds whose answers came late: those with the most of them
PLOTTED_PARTS = 60  # of the window, in the plots of answers
PLOTS_INCHES = (11, 8.5)  # of the page's four plots together


@dataclass(frozen=True, slots=True)
class Slope:
    """A slope with its confidence interval, in units of the values an hour."""

    per_hour: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.per_hour:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def estimate_slope(times_s: NDArray[np.float64], values: NDArray[np.float64], block_count: int = BLOCKS) -> Slope | None:
    """Fit a line through the means of equal parts of the time.

    Args:
        times_s: (N,), ascending.
        values: (N,).
    Returns:
        the slope; None where fewer than three parts have samples.
    """
    if len(times_s) < block_count:
        return None
    blocks = np.minimum((times_s - times_s[0]) / np.ptp(times_s) * block_count, block_count - 1).astype(int)
    used = np.unique(blocks)
    if len(used) < 3:
        return None
    hours = np.array([times_s[blocks == block].mean() for block in used]) / 3600
    means = np.array([values[blocks == block].mean() for block in used])
    centred = hours - hours.mean()
    slope = float(centred @ means / (centred @ centred))
    residuals = means - means.mean() - slope * centred
    freedom = len(used) - 2
    error = math.sqrt(float(residuals @ residuals) / freedom / float(centred @ centred))
    half_width = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    return Slope(slope, slope - half_width, slope + half_width)


@dataclass(frozen=True, slots=True)
class ProcessSummary:
    """Memory, descriptors and threads of a process; the latter two of before and after the window, when it is idle."""

    name: str
    rss_mib: float
    slope: Slope | None
    descriptors: tuple[int, int | None]
    threads: tuple[int, int | None]

    @property
    def has_ended(self) -> bool:
        """Whether it was gone at the end."""
        return self.descriptors[1] is None


@dataclass(frozen=True, slots=True)
class KindSummary:
    """One kind of request. Latencies in ms, of the right answers; NaN where there is none."""

    name: str
    requests: int
    right: int
    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class Gate:
    """A demand, what was found, and whether that meets it; None where it could not be judged."""

    demand: str
    found: str
    passed: bool | None

    def __str__(self) -> str:
        verdict = {True: "passed", False: "FAILED", None: "not judged"}[self.passed]
        return f"{verdict}: {self.demand}: {self.found}"


@dataclass(frozen=True, slots=True)
class Report:
    """All figures and gates of a soak."""

    about: dict[str, Any]
    requests: int
    rate: float
    p99_ms: tuple[float, float]
    kinds: list[KindSummary]
    attacks: list[KindSummary]
    processes: list[ProcessSummary]
    gates: list[Gate]

    @property
    def passed(self) -> bool:
        """Whether no gate failed."""
        return all(gate.passed is not False for gate in self.gates)


def build_report(about: dict[str, Any], samples: Samples) -> Report:
    """Summarise a soak.

    Args:
        about: with the keys that `scripts.bench.soak` writes: `resources` in time, `before` and `after`.
        samples: a wrong answer is a failure in them, whatever its status.
    Raises:
        LoadTestError: no request was counted.
    """
    if not samples.request_count:
        raise LoadTestError("no request was counted: the soak ended in its warm-up")
    right = samples.counted & (samples.failure == Failure.NONE)
    attacks = [_summarise_kind(name, samples, right) for name in about["attacks"]]
    processes = [_summarise_process(about, name) for name in about["before"]["processes"]]
    p99_ms = _edge_quantiles_ms(samples, right & ~_beside_attacks(about, samples))
    gates = [
        *_gates_of_answers(about, samples),
        _gate_of_refusals(attacks, int((right & (samples.status >= 500)).sum())),
        *_gates_of_processes(about, processes, samples.duration_s),
        _gate_of_latency(p99_ms, samples.duration_s),
        _gate_of_late_answers(samples),
    ]
    return Report(
        about={key: value for key, value in about.items() if key != "resources"},
        requests=samples.request_count,
        rate=float(right.sum() / samples.duration_s),
        p99_ms=p99_ms,
        kinds=[_summarise_kind(name, samples, right) for name in about["kinds"]],
        attacks=attacks,
        processes=processes,
        gates=gates,
    )


def _latencies_ms(samples: Samples, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.asarray((samples.done_s - samples.scheduled_s)[chosen] * 1e3)


def _quantile_ms(latencies_ms: NDArray[np.float64], quantile: float) -> float:
    return float(quantiles_of(latencies_ms, [quantile])[0])


def _is_of(names: Sequence[str], samples: Samples) -> NDArray[np.bool_]:
    """Which requests are of these kinds: (N,)."""
    return np.array([own in names for own in samples.names])[samples.call]


def _beside_attacks(about: Mapping[str, Any], samples: Samples) -> NDArray[np.bool_]:
    """Which requests were on their way while an attack was, attacks among them: (N,)."""
    attacks = _is_of(about["attacks"], samples)
    begun = np.searchsorted(np.sort(samples.scheduled_s[attacks]), samples.done_s, side="right")
    ended = np.searchsorted(np.sort(samples.done_s[attacks]), samples.scheduled_s)
    return np.asarray(begun > ended)


def _edge_quantiles_ms(samples: Samples, chosen: NDArray[np.bool_]) -> tuple[float, float]:
    part_s = samples.duration_s / SIXTHS
    first = chosen & (samples.scheduled_s < part_s)
    last = chosen & (samples.scheduled_s >= samples.duration_s - part_s)
    return _quantile_ms(_latencies_ms(samples, first), 0.99), _quantile_ms(_latencies_ms(samples, last), 0.99)


def _summarise_kind(name: str, samples: Samples, right: NDArray[np.bool_]) -> KindSummary:
    of_kind = _is_of([name], samples)
    latencies_ms = _latencies_ms(samples, right & of_kind)
    return KindSummary(
        name,
        requests=int((samples.counted & of_kind).sum()),
        right=int((right & of_kind).sum()),
        p50_ms=_quantile_ms(latencies_ms, 0.5),
        p99_ms=_quantile_ms(latencies_ms, 0.99),
        max_ms=_quantile_ms(latencies_ms, 1.0),
    )


def _summarise_process(about: Mapping[str, Any], name: str) -> ProcessSummary:
    before, after = about["before"]["processes"][name], about["after"]["processes"].get(name, {})
    times_s, rss_mib = _memory_of(about, name)
    return ProcessSummary(
        name,
        rss_mib=float(rss_mib[-1]) if len(rss_mib) else before["rss"] / MIB,
        slope=estimate_slope(times_s, rss_mib),
        descriptors=(before["descriptors"], after.get("descriptors")),
        threads=(before["threads"], after.get("threads")),
    )


def _memory_of(about: Mapping[str, Any], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times in the window, in seconds, and resident memory then, in MiB."""
    rows = [(row["s"], row["processes"][name]["rss"] / MIB) for row in about["resources"] if name in row["processes"]]
    times_s, rss_mib = np.array(rows, dtype=float).reshape(-1, 2).T
    return times_s, rss_mib


def _gates_of_answers(about: Mapping[str, Any], samples: Samples) -> list[Gate]:
    wrong = int((samples.failure == Failure.WRONG_FORM).sum()) + about["wrong_before"]
    failed = int(((samples.status >= 500) & (samples.failure != Failure.NONE)).sum())  # an attack may be told to come again
    unanswered = int((samples.status == 0).sum())
    example = f"; the first: {about['first_wrong']}" if about["first_wrong"] else ""
    total = f"of {len(samples.records):,}"
    return [
        Gate("no wrong answer", f"{wrong:,} {total}{example}", wrong == 0),
        Gate("no 5xx", f"{failed:,} {total}", failed == 0),
        Gate("no request without an answer", f"{unanswered:,} {total}", unanswered == 0),
    ]


def _gate_of_refusals(attacks: Sequence[KindSummary], told_to_come_again: int) -> Gate:
    wrong = [f"{attack.name} ({attack.requests - attack.right:,})" for attack in attacks if attack.right < attack.requests]
    unsent = [attack.name for attack in attacks if not attack.requests]
    found = f"{sum(attack.right for attack in attacks):,} of {sum(attack.requests for attack in attacks):,}"
    found += f", {told_to_come_again:,} of them with 503 beside costly neighbours" if told_to_come_again else ""
    found += f"; not: {'; '.join(wrong)}" if wrong else ""
    found += f"; not sent in this time: {'; '.join(unsent)}" if unsent else ""
    return Gate(f"each of {len(attacks)} attacks ends as it has to", found, False if wrong else None if unsent else True)


def _gate_of_late_answers(samples: Samples) -> Gate:
    """Judge each answer of the window: what an attack may take bounds what it may cost its neighbours too."""
    answered = samples.counted & (samples.failure == Failure.NONE)
    latencies_s = samples.done_s - samples.scheduled_s
    bounds_s = np.where(samples.status == 200, max_seconds(200), max_seconds(400))
    late = answered & (latencies_s > bounds_s)
    counts = Counter(samples.names[call] for call in samples.call[late].tolist())
    slowest_s = float(latencies_s[answered].max(initial=0))
    most = counts.most_common(NAMED_LATE)
    named = f"; late: {'; '.join(f'{name} ({count:,})' for name, count in most)}" if most else ""
    named += f" and {len(counts) - len(most)} other kinds" if len(counts) > len(most) else ""
    return Gate(
        f"no refusal after {MAX_REFUSED_SECONDS:g} s, no answer after {MAX_ACCEPTED_SECONDS:g} s",
        f"{int(late.sum()):,} of {int(answered.sum()):,}, the slowest took {slowest_s:.2f} s{named}",
        not late.any() if samples.duration_s >= JUDGED_FROM_S else None,
    )


def _gates_of_processes(about: Mapping[str, Any], processes: Sequence[ProcessSummary], duration_s: float) -> list[Gate]:
    if not processes:
        return [Gate("processes leave nothing", "unknown: on another machine, or not named by --management-url", None)]
    ended = [process.name for process in processes if process.has_ended]
    more = [
        f"{process.name} {process.descriptors[0]} -> {process.descriptors[1]}"
        for process in processes
        if process.descriptors[1] is not None and process.descriptors[1] > process.descriptors[0]
    ]
    temp_files = about["after"]["temp_files"]
    left = None if temp_files is None else sorted(set(temp_files) - set(about["before"]["temp_files"]))
    return [
        Gate("the same processes at the end", f"ended: {', '.join(ended) or 'none'}", not ended),
        Gate("no descriptor left open", ", ".join(more) or "none", not more),
        Gate(
            "no temp file left over",
            "unknown: their folder is not known" if left is None else ", ".join(left) or "none",
            None if left is None else not left,
        ),
        *(_gate_of_memory(process, duration_s) for process in processes),
    ]


def _gate_of_memory(process: ProcessSummary, duration_s: float) -> Gate:
    demand = f"{process.name} grows by less than {MAX_SLOPE_MIB_PER_HOUR:g} MiB/h"
    if process.slope is None:
        return Gate(demand, "too few samples", None)
    passed = process.slope.high < MAX_SLOPE_MIB_PER_HOUR if duration_s >= JUDGED_FROM_S else None
    return Gate(demand, f"{process.slope} MiB/h", passed)


def _gate_of_latency(p99_ms: tuple[float, float], duration_s: float) -> Gate:
    first_ms, last_ms = p99_ms
    part = f"{duration_s / SIXTHS / 60:.3g} minutes"
    is_judged = duration_s >= JUDGED_FROM_S and not math.isnan(first_ms + last_ms)
    passed = last_ms <= MAX_P99_GROWTH * first_ms if is_judged else None
    return Gate(
        f"p99 beside no attack of the last {part} at most {MAX_P99_GROWTH - 1:.0%} above that of the first",
        f"{first_ms:.1f} -> {last_ms:.1f} ms ({last_ms / first_ms - 1:+.0%})",
        passed,
    )


KIND_COLUMNS = ("kind", "requests", "right", "p50 ms", "p99 ms", "max ms")
ATTACK_COLUMNS = ("attack", *KIND_COLUMNS[1:])
PROCESS_COLUMNS = ("process", "resident MiB", "slope MiB/h (95 % confidence)", "descriptors", "threads")


def _kind_rows(kinds: Sequence[KindSummary]) -> list[tuple[str, ...]]:
    return [
        (
            kind.name,
            f"{kind.requests:,}",
            f"{kind.right:,}",
            f"{kind.p50_ms:.1f}",
            f"{kind.p99_ms:.1f}",
            f"{kind.max_ms:.1f}",
        )
        for kind in kinds
    ]


def _process_rows(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            process.name,
            f"{process.rss_mib:.0f}",
            "-" if process.slope is None else str(process.slope),
            "{} -> {}".format(*process.descriptors),
            "{} -> {}".format(*process.threads),
        )
        for process in report.processes
    ]


def _describe(report: Report) -> list[str]:
    about = report.about
    lines = [
        f"{about['duration_s'] / 60:g} minutes at {about['rate']:.1f} requests/s against {about['url']}, {about['started']}; "
        f"{report.requests:,} requests, {report.rate:.1f} right answers/s",
        f"rate: {about['rate_source']}; memory and latencies after {about['warm_up_s']:g} s of warm-up",
    ]
    return [*lines, "interrupted: shorter than planned"] if about["interrupted"] else lines


def _conclude(report: Report) -> list[str]:
    lines = [str(gate) for gate in report.gates]
    if any(gate.passed is None for gate in report.gates):
        lines.append(f"slopes and latencies are judged in soaks of {JUDGED_FROM_S / 60:g} minutes or more")
    return lines


def _tables(report: Report) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    kinds, attacks = (KIND_COLUMNS, _kind_rows(report.kinds)), (ATTACK_COLUMNS, _kind_rows(report.attacks))
    processes = (PROCESS_COLUMNS, _process_rows(report))
    return [kinds, attacks, processes] if report.processes else [kinds, attacks]


def render_text(report: Report) -> str:
    """Write the report for a terminal."""
    lines = [*_describe(report), ""]
    for columns, rows in _tables(report):
        lines += [render_aligned([columns, *rows]), ""]
    lines += _conclude(report)
    lines += [f"{name}: {value}" for name, value in report.about["machine"].items()]
    return "\n".join(lines)


def render_html(report: Report, about: Mapping[str, Any], samples: Samples) -> str:
    """Write the report as a page, with plots of memory, descriptors, latencies and right answers in time.

    Args:
        about, samples: what the report was built from.
    Raises:
        MatplotlibMissing: matplotlib is not installed.
    """
    return render_page(
        "load.html",
        title="Soak",
        described=_describe(report),
        tables=_tables(report),
        concluded=_conclude(report),
        plots=draw_svg("soak", PLOTS_INCHES, lambda figure: _plot_all(figure, about, samples)),
        machine=report.about["machine"],
    )


def _plot_all(figure: "Figure", about: Mapping[str, Any], samples: Samples) -> None:
    memory, descriptors, latencies, answers = figure.subplots(2, 2).flat
    for name in about["before"]["processes"]:
        _plot_process(memory, descriptors, about, name)
    _plot_answers(latencies, answers, samples)
    memory.set(title="Resident memory", ylabel="MiB")
    descriptors.set(title="Descriptors", ylabel="open")
    latencies.set(title="Latencies of right answers", ylabel="ms")
    answers.set(title="Right answers", ylabel="a second", ylim=(0, None))
    for axes in (memory, descriptors, latencies, answers):
        axes.set(xlabel="minutes since the warm-up")
        axes.grid(visible=True, alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)


def _plot_process(memory: "Axes", descriptors: "Axes", about: Mapping[str, Any], name: str) -> None:
    times_s, rss_mib = _memory_of(about, name)
    memory.plot(times_s / 60, rss_mib, linewidth=1, label=name)
    slope = estimate_slope(times_s, rss_mib)
    if slope is not None:
        line = rss_mib.mean() + slope.per_hour / 3600 * (times_s - times_s.mean())
        memory.plot(times_s / 60, line, "--", color="grey", linewidth=1)
    open_counts = [row["processes"][name]["descriptors"] for row in about["resources"] if name in row["processes"]]
    descriptors.plot(times_s / 60, open_counts, linewidth=1, label=name)


def _plot_answers(latencies: "Axes", answers: "Axes", samples: Samples) -> None:
    right = samples.counted & (samples.failure == Failure.NONE)
    parts = (samples.scheduled_s[right] / samples.duration_s * PLOTTED_PARTS).astype(int)
    taken_ms = _latencies_ms(samples, right)
    minutes = (np.arange(PLOTTED_PARTS) + 0.5) * samples.duration_s / PLOTTED_PARTS / 60
    for quantile in (0.5, 0.99):
        latencies.plot(
            minutes,
            [_quantile_ms(taken_ms[parts == part], quantile) for part in range(PLOTTED_PARTS)],
            label=f"p{quantile * 100:g}",
        )
    latencies.set_yscale("log")
    answers.plot(minutes, np.bincount(parts, minlength=PLOTTED_PARTS) * PLOTTED_PARTS / samples.duration_s)
