"""Measured values -> a report: text, JSON, and one HTML page that needs no other file.

Knows nothing of networks or maps. Every number is an estimate: a value with its interval and with what it was taken from.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

CONFIDENCE = 0.95
RESAMPLES = 2000

Statistic = Literal["mean", "median"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic over images, and the interval that it lies in with a confidence of 95 %.

    Attributes:
        value: of the images at hand.
        low, high: the interval's ends; both the value where all images have the same one.
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
        title: for people.
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
    """What one value of one table must be for the maps to be fit to be served."""

    name: str
    table: str
    row: str
    column: str
    lowest: float | None = None  # accepted; None for no bound
    highest: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A gate and the value that it was held against."""

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
    """Hold values against gates. The value decides, not its interval."""
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
    """All that one evaluation says.

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
    """All numbers, for programs; the same evaluation gives the same text."""
    return json.dumps(asdict(report), indent=1, allow_nan=False) + "\n"


def render_text(report: Report) -> str:
    """Gates and tables, for a terminal and for the README: the tables are Markdown."""
    lines = [", ".join(f"{name} {value}" for name, value in report.settings.items()), ""]
    lines += [str(verdict) for verdict in report.verdicts]
    for table in report.tables:
        cells = [["", *table.columns], *([name, *map(str, row)] for name, row in table.rows.items())]
        widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
        cells.insert(1, ["-" * width for width in widths])
        lines += ["", f"## {table.title}", "", table.note, ""]
        lines += ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join(lines)


# --- the page

ABSOLUTE = ", absolute"  # ends the name of a curve by absolute numbers

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left }
td small { color: #666 } svg, img { max-width: 100%; height: auto }
.pass { color: #1a6b1a } .FAIL { color: #b00020; font-weight: bold }
"""


def render_html(report: Report, examples: bytes) -> str:
    """One page with gates, plots, tables and example maps; nothing in it is loaded from elsewhere.

    Args:
        examples: a PNG of images and their maps.
    Raises:
        ImportError: there is no matplotlib.
    """
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items())
    verdicts = "".join(
        f'<li class="{"pass" if verdict.passed else "FAIL"}">{html.escape(str(verdict))}</li>' for verdict in report.verdicts
    )
    tables = "".join(
        f"<h2>{html.escape(table.title)}</h2><p>{html.escape(table.note)}</p><table><tr><th></th>"
        + "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
        + "</tr>"
        + "".join(f"<tr><th>{html.escape(name)}</th>{''.join(map(_cell, row))}</tr>" for name, row in table.rows.items())
        + "</table>"
        for table in report.tables
    )
    image = base64.b64encode(examples).decode()
    return (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>How far to trust a map</title><style>{STYLE}</style>'
        f"<h1>How far to trust a map</h1><p>{html.escape(settings)}</p><h2>Gates</h2><ul>{verdicts}</ul>"
        f"<h2>Curves</h2>{_plot_curves(report)}{tables}<h2>Examples</h2>"
        "<p>Beside each image the map of its predicted class, and of the runner-up.</p>"
        f'<img alt="Digits beside their maps" src="data:image/png;base64,{image}"></html>\n'
    )


def _cell(estimate: Estimate) -> str:
    return f"<td>{estimate.value:.3g} <small>[{estimate.low:.3g}, {estimate.high:.3g}] n={estimate.count}</small></td>"


def _plot_curves(report: Report) -> str:
    """Draw the mean probability against the share of pixels, with its interval, as SVG."""
    import matplotlib as mpl  # only the page needs it
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves"}):  # text as text; the same page every time
        figure = Figure(figsize=(13, 4), layout="constrained")
        for axes, (title, curves) in zip(figure.subplots(1, len(report.curves), sharey=True), report.curves.items(), strict=True):
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
        drawing = StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    return drawing.getvalue().partition("<svg")[1] + drawing.getvalue().partition("<svg")[2]
