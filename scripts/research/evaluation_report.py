"""Measured values -> a report: text, JSON, and one HTML page that needs no other file.

Knows nothing of networks or maps. Every number is an estimate: a value with its interval and the number of images behind it.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from scripts.pages import draw_svg, render_page
from scripts.tables import render_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIDENCE = 0.95
RESAMPLES = 2000

Statistic = Literal["mean", "median"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic over images, with its 95 % confidence interval.

    Attributes:
        value: of the images at hand.
        low, high: the interval's ends; both equal the value where all images have the same one.
        count: of images.
        statistic: of the images' values.
    """

    value: float
    low: float
    high: float
    count: int
    statistic: Statistic

    @classmethod
    def of(cls, values: NDArray[np.float64], random: np.random.Generator, *, statistic: Statistic = "mean") -> "Estimate":
        """Take a statistic and its bootstrap interval (percentiles; whole images are drawn, with replacement).

        Args:
            values: (N,), one an image, N >= 2, finite.
            random: draws the resamples.
            statistic: "mean" or "median".
        Source: Efron, "Bootstrap methods: another look at the jackknife" (1979).
        """
        take = np.median if statistic == "median" else np.mean
        interval = bootstrap(
            (values,),
            take,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            batch=200,  # resamples held in memory at once
            vectorized=True,
            rng=random,
        ).confidence_interval
        return cls(float(take(values)), float(interval.low), float(interval.high), len(values), statistic)

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, slots=True)
class Table:
    """Estimates in rows and columns.

    Attributes:
        name: in JSON, and for gates.
        title: in text and on the page.
        note: what was measured, how, and which way is better.
        columns: names of the columns.
        rows: name of a row -> one estimate a column.
    """

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Estimate, ...]]


@dataclass(frozen=True, slots=True)
class Gate:
    """The bounds that one value of one table must keep for the maps to be served."""

    name: str
    table: str
    row: str
    column: str
    lowest: float | None = None  # that passes; None for no bound
    highest: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A gate, the value that it judges, and whether that passes."""

    gate: Gate
    estimate: Estimate
    passed: bool

    def __str__(self) -> str:
        gate = self.gate
        bounds = [f"at least {gate.lowest}"] * (gate.lowest is not None) + [f"at most {gate.highest}"] * (
            gate.highest is not None
        )
        return f"{'pass' if self.passed else 'FAIL'}  {gate.name}: {self.estimate}; accepted: {' and '.join(bounds)}"


def judge(gates: Sequence[Gate], tables: Sequence[Table]) -> tuple[Verdict, ...]:
    """Judge values by gates. The value decides, not its interval."""
    by_name = {table.name: table for table in tables}
    verdicts = []
    for gate in gates:
        table = by_name[gate.table]
        estimate = table.rows[gate.row][table.columns.index(gate.column)]
        above = gate.lowest is None or estimate.value >= gate.lowest
        below = gate.highest is None or estimate.value <= gate.highest
        verdicts.append(Verdict(gate, estimate, above and below))
    return tuple(verdicts)


@dataclass(frozen=True, slots=True)
class Report:
    """All results of one evaluation.

    Attributes:
        settings: what was evaluated, and with what.
        verdicts: of the gates.
        tables: the numbers.
        curves: "deletion" or "insertion" -> order of pixels -> the mean probability at each share of pixels, from 0 to 1.
    """

    settings: Mapping[str, str | int]
    verdicts: tuple[Verdict, ...]
    tables: tuple[Table, ...]
    curves: Mapping[str, Mapping[str, tuple[Estimate, ...]]]

    @property
    def passed(self) -> bool:
        """Whether all gates are passed."""
        return all(verdict.passed for verdict in self.verdicts)


def render_json(report: Report) -> str:
    """Write all numbers as JSON; the same evaluation gives the same text."""
    return json.dumps(asdict(report), indent=1, allow_nan=False) + "\n"


def render_text(report: Report) -> str:
    """Write gates and tables for a terminal and for the README: the tables are Markdown."""
    lines = [_settings_line(report), "", *map(str, report.verdicts)]
    for table in report.tables:
        rows = [[name, *map(str, row)] for name, row in table.rows.items()]
        lines += ["", f"## {table.title}", "", table.note, "", render_markdown(["", *table.columns], rows, padded=True)]
    return "\n".join(lines)


def _settings_line(report: Report) -> str:
    return ", ".join(f"{name} {value}" for name, value in report.settings.items())


# --- the page

ABSOLUTE = ", absolute"  # ends the name of a curve by absolute numbers
CURVES_INCHES = (13, 4)


def render_html(report: Report, examples: bytes) -> str:
    """Write one page with gates, plots, tables and example maps; it loads nothing from elsewhere.

    Args:
        examples: a PNG of images and their maps.
    Raises:
        MatplotlibMissing: matplotlib is not installed.
    """
    return render_page(
        "evaluation.html",
        title="How far to trust a saliency map",
        settings=_settings_line(report),
        verdicts=report.verdicts,
        curves=draw_svg("curves", CURVES_INCHES, lambda figure: _plot_curves(figure, report)),
        tables=report.tables,
        examples=base64.b64encode(examples).decode(),
    )


def _plot_curves(figure: "Figure", report: Report) -> None:
    """Plot the mean probability against the share of pixels, with its interval."""
    panels = figure.subplots(1, len(report.curves), sharey=True)
    for axes, (title, curves) in zip(panels, report.curves.items(), strict=True):
        for name, points in curves.items():
            shares = np.linspace(0, 100, len(points))
            base, absolute, _ = name.partition(ABSOLUTE)  # dashed, in the colour of the signed map
            color = f"C{[*dict.fromkeys(other.partition(ABSOLUTE)[0] for other in curves)].index(base)}"
            values = [point.value for point in points]
            (line,) = axes.plot(shares, values, label=name, color=color, linestyle="--" if absolute else "-")
            bounds = [point.low for point in points], [point.high for point in points]
            axes.fill_between(shares, *bounds, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(title=title, xlabel="pixels, %", ylabel="probability of the predicted class", ylim=(0, 1.02))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
