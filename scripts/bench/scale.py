"""Measure how the cost of explanations grows with workers, size of the images, images a request, and clients.

    python -m scripts.bench.scale --rounds 3 --seconds 2

Starts the service with the committed settings, once for each number of workers; those servers stay up and are measured in turn.
All but the first question are asked of the server with the most workers. Everything is measured in rounds, so that a slow minute
of the machine spreads over all points; a point is the median of its rounds. Writes every number as JSON and draws the medians as
one figure, which `--draw FILE.json` draws again.
"""

import argparse
import base64
import contextlib
import functools
import io
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from model.photograph import ink_of
from scripts.bench.arguments import read_count, read_counts, read_positive
from scripts.bench.digit_requests import BINARY, build_calls, is_right_form
from scripts.bench.digits import read_files, read_levels
from scripts.bench.load import Call, Figures, Load, build_call
from scripts.bench.rounds import BUSY_CONNECTIONS, LONE_CONNECTION, closed_load, describe_conditions, measure
from scripts.paths import ARCHIVE, BUILD, MODEL_NAME, ROOT, SAMPLE_IMAGE
from scripts.serving.launcher import Ports, ServeError, Settings, TorchServe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDES_PX = (28, 64, 256, 1000, 2000, 4000)  # the last is the largest square that the service takes
IMAGE_COUNTS = (1, 4, 16, 64, 256, 1024)  # the last is the most that the service takes
CONNECTIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FIGURE = ROOT / ".github" / "scaling.png"
FORMATS = {"JPEG": "JPEG, colour photograph", "PNG": "PNG, grey scan"}
PROTOCOLS = {"npy": ".npy in, .npy out", "kserve": "KServe v1, JSON in and out"}
OLD_QUESTIONS = {"pictures": "images"}  # as runs of older versions wrote them
DIGIT_SHARE = 0.6  # of a drawn image's side, by its digit
PAPER, INK = 205.0, 45.0  # grey levels
GRAIN = 3.0  # standard deviation, in grey levels: what a camera adds, and what makes files large
COLOUR = (1.0, 0.97, 0.9)  # of the paper under a lamp


class ScaleError(RuntimeError):
    """There is nothing to draw; the message says why, for a person."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement.

    Attributes:
        question: "workers", "sides", "images" or "connections".
        series: what was sent, where there are several kinds: of FORMATS or PROTOCOLS; else empty.
        x: workers, pixels a side, images a request or connections.
        round_index: from 0.
        request_bytes: of the largest of the requests, head and body.
        load: its figures.
    """

    question: str
    series: str
    x: int
    round_index: int
    request_bytes: int
    load: Figures


@dataclass(frozen=True, slots=True)
class Task:
    """The loads that one point needs; where there are several, the best of their figures counts."""

    question: str
    series: str
    x: int
    loads: Sequence[Load]


# --- what is sent


def draw_on_paper(side_px: int, image_format: str) -> bytes:
    """Draw a digit on paper, as a photograph or scan: (side, side) pixels, an image file of a format of FORMATS."""
    with Image.open(SAMPLE_IMAGE) as image:
        ink = ink_of(np.asarray(image.convert("L")))  # (h, w)
    scale = DIGIT_SHARE * side_px / max(ink.shape)
    height, width = (max(1, round(length * scale)) for length in ink.shape)
    digit = Image.fromarray(np.rint(ink * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    cover = Image.new("L", (side_px, side_px))
    cover.paste(digit, ((side_px - width) // 2, (side_px - height) // 2))
    grain = np.random.default_rng(side_px).standard_normal((side_px, side_px), dtype=np.float32) * GRAIN
    grey = PAPER + (INK - PAPER) * (np.asarray(cover, np.float32) / 255) + grain  # (side, side)
    content = io.BytesIO()
    if image_format == "JPEG":
        Image.fromarray(_levels(grey[:, :, None] * np.array(COLOUR, np.float32))).save(content, "JPEG", quality=90)
    else:
        Image.fromarray(_levels(grey)).save(content, image_format)
    return content.getvalue()


def _levels(grey: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def many_images_call(address: str, protocol: str, count: int) -> Call:
    """Write one request for the explanations of many images, all 28x28 digits.

    Args:
        protocol: a key of PROTOCOLS.
    """
    if protocol == "npy":
        levels = read_levels()
        content = io.BytesIO()
        np.save(content, levels[np.arange(count) % len(levels)])  # uint8 (count, 28, 28)
        headers = {**BINARY, "Accept": "application/x-npy"}
        return build_call(protocol, address, f"/explanations/{MODEL_NAME}", content.getvalue(), headers)
    files = read_files()
    instances = [{"data": base64.b64encode(files[index % len(files)]).decode()} for index in range(count)]
    body = orjson.dumps({"instances": instances})
    return build_call(protocol, address, f"/v1/models/{MODEL_NAME}:explain", body, {"Content-Type": "application/json"})


def has_all_maps(count: int, protocol: str, body: bytes) -> bool:
    """Whether a reply holds as many maps of 28x28 finite numbers as images were sent."""
    try:
        if protocol == "npy":
            maps = np.load(io.BytesIO(body), allow_pickle=False)
        else:
            maps = np.array([one["saliency"] for one in orjson.loads(body)["explanations"]], np.float32)
        return maps.shape == (count, 28, 28) and bool(np.isfinite(maps).all())
    except (ValueError, KeyError, TypeError, EOFError):
        return False


# --- measuring


@dataclass(frozen=True, slots=True)
class Extent:
    """The points of each question but the first."""

    sides_px: Sequence[int] = SIDES_PX
    image_counts: Sequence[int] = IMAGE_COUNTS
    connections: Sequence[int] = CONNECTIONS


def list_tasks(addresses: Mapping[int, str], extent: Extent, seconds: float) -> list[Task]:
    """List every point of every question.

    Args:
        addresses: of the servers, by their number of workers.
        seconds: of each load; a request that takes longer is waited for.
    """
    most = addresses[max(addresses)]
    digits = read_files()

    def explaining(address: str, images: Sequence[bytes], *connections: int) -> list[Load]:
        calls = build_calls("explain", address, images)
        return [closed_load(address, calls, count, seconds) for count in connections]

    def alone(call: Call) -> list[Load]:
        return [closed_load(most, [call], LONE_CONNECTION, seconds)]

    return [
        *(Task("workers", "", workers, explaining(address, digits, *BUSY_CONNECTIONS)) for workers, address in addresses.items()),
        *(
            Task("sides", name, side, explaining(most, [draw_on_paper(side, name)], LONE_CONNECTION))
            for name in FORMATS
            for side in extent.sides_px
        ),
        *(
            Task("images", name, count, alone(many_images_call(most, name, count)))
            for name in PROTOCOLS
            for count in extent.image_counts
        ),
        *(Task("connections", "", count, explaining(most, digits, count)) for count in extent.connections),
    ]


def measure_tasks(tasks: Sequence[Task], *, rounds: int) -> list[Point]:
    """Measure all points, round by round, after a first round that is not kept; every other round backwards."""
    points = []
    with tqdm(total=(rounds + 1) * len(tasks), unit="point", disable=None) as progress:
        for round_index in range(-1, rounds):  # -1: the JVM has compiled nothing yet
            for task in tasks if round_index % 2 == 0 else reversed(tasks):
                progress.set_postfix_str(f"{task.question} {task.x} {task.series}".rstrip())
                point = _measure_once(task, round_index)
                progress.update()
                if round_index >= 0:
                    points.append(point)
    return points


def _measure_once(task: Task, round_index: int) -> Point:
    right = functools.partial(has_all_maps, task.x) if task.question == "images" else is_right_form
    figures = [measure(load, right) for load in task.loads]
    failed = [one for one in figures if not one.is_good]
    chosen = failed[0] if failed else max(figures, key=lambda one: one.rate)
    request_bytes = max(len(call.request) for load in task.loads for call in load.calls)
    return Point(task.question, task.series, task.x, round_index, request_bytes, chosen)


def describe_errors(points: Sequence[Point]) -> list[str]:
    """Say what went wrong, a line a point; such points are not drawn."""
    return [
        f"{point.question} {point.x} {point.series}, round {point.round_index}: {point.load.error_counts or 'no reply in time'}"
        for point in points
        if not point.load.is_good
    ]


# --- drawing

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito, which colour-blind readers can tell apart
ABOVE, BELOW = 4, -4  # points, of a number from its marker, where two markers are close


def medians(points: Sequence[Point], question: str, series: str, field: str) -> tuple[list[int], list[float]]:
    """Find what to draw: x, and the median over the rounds of a field of Figures; only where every round was good.

    Raises:
        ScaleError: there is no such x.
    """
    chosen: dict[int, list[Figures]] = {}
    for point in points:
        if (point.question, point.series) == (question, series):
            chosen.setdefault(point.x, []).append(point.load)
    good = {x: figures for x, figures in sorted(chosen.items()) if all(one.is_good for one in figures)}
    if not good:
        raise ScaleError(f"no point of {question} {series} is good")
    return list(good), [median(getattr(one, field) for one in figures) for figures in good.values()]


def draw(points: Sequence[Point], caption: str, file: Path) -> None:
    """Draw the medians: four panels, a PNG.

    Raises:
        ScaleError: matplotlib is not there, or a panel would be empty.
    """
    try:
        import matplotlib as mpl  # slow, large, and needed for this alone
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ScaleError("drawing needs matplotlib: pip install matplotlib") from error

    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 7.6), dpi=110, layout="constrained")
        grid = figure.add_gridspec(2, 2)
        _draw_workers(figure.add_subplot(grid[0, 0]), points)
        _draw_sides(figure.add_subplot(grid[0, 1]), points)
        _draw_images(figure.add_subplot(grid[1, 0]), points)
        halves = grid[1, 1].subgridspec(2, 1, hspace=0.05)
        upper = figure.add_subplot(halves[0])
        _draw_connections(upper, figure.add_subplot(halves[1], sharex=upper), points)
        figure.supxlabel(caption, fontsize=7.5, color="#555555")
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(64).save(file, optimize=True)  # a third of the bytes, with no visible loss


def _draw_workers(axes: "Axes", points: Sequence[Point]) -> None:
    workers, rates = medians(points, "workers", "", "rate")
    places = range(len(workers))
    bars = axes.bar(places, rates, width=0.4, color=BLUE)
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates])
    axes.set_xticks(places, [str(count) for count in workers])
    axes.set(title="Workers", xlabel="worker processes", ylabel="explanations/s", ylim=(0, 1.12 * max(rates)))


def _draw_sides(axes: "Axes", points: Sequence[Point]) -> None:
    for (name, title), colour, marker, shift in zip(FORMATS.items(), (BLUE, ORANGE), "os", (BELOW, ABOVE), strict=True):
        sides, latencies = medians(points, "sides", name, "p50_ms")
        axes.loglog(sides, latencies, marker=marker, color=colour, label=title)
        _write_last(axes, sides, latencies, " ms", colour, shift)
    _ticks(axes, sides)
    axes.set(title="Size of the image, one client", xlabel="pixels a side", ylabel="explanation, p50, ms")
    _finish(axes)


def _draw_images(axes: "Axes", points: Sequence[Point]) -> None:
    for (name, title), colour, marker, shift in zip(PROTOCOLS.items(), (BLUE, ORANGE), "os", (BELOW, ABOVE), strict=True):
        counts, latencies = medians(points, "images", name, "p50_ms")
        each = [latency / count for latency, count in zip(latencies, counts, strict=True)]
        axes.loglog(counts, latencies, marker=marker, color=colour, label=f"{title}: the request")
        axes.loglog(
            counts, each, marker=marker, markerfacecolor="white", linestyle="--", color=colour, label="   each image of it"
        )
        _write_last(axes, counts, latencies, " ms", colour, shift)
        _write_last(axes, counts, each, " ms", colour, shift)
    _ticks(axes, counts)
    axes.set(title="Images a request, one client", xlabel="images a request", ylabel="p50, ms")
    _finish(axes)


def _draw_connections(upper: "Axes", lower: "Axes", points: Sequence[Point]) -> None:
    counts, rates = medians(points, "connections", "", "rate")
    upper.semilogx(counts, rates, marker="o", color=BLUE)
    _write_last(upper, counts, rates, "/s", BLUE)
    upper.set(title="Clients at once", ylabel="explanations/s", ylim=(0, 1.25 * max(rates)))
    upper.tick_params(labelbottom=False)
    for field, colour, marker, shift in (("p99_ms", ORANGE, "s", ABOVE), ("p50_ms", GREEN, "o", BELOW)):
        counts, latencies = medians(points, "connections", "", field)
        lower.loglog(counts, latencies, marker=marker, color=colour, label=field.removesuffix("_ms"))
        _write_last(lower, counts, latencies, " ms", colour, shift)
    lower.set(xlabel="connections, each with one request at a time", ylabel="ms")
    _ticks(lower, counts)
    upper.grid(alpha=0.3)
    _finish(lower)


def _write_last(axes: "Axes", xs: Sequence[int], ys: Sequence[float], unit: str, colour: str, shift: int = 0) -> None:
    """Write the number to the right of the last marker."""
    text = f"{ys[-1]:,.0f}{unit}" if ys[-1] >= 10 else f"{ys[-1]:.2g}{unit}"
    axes.annotate(text, (xs[-1], ys[-1]), xytext=(6, shift), textcoords="offset points", va="center", color=colour, fontsize=8)


def _ticks(axes: "Axes", xs: Sequence[int]) -> None:
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.minorticks_off()


def _finish(axes: "Axes") -> None:
    """Scale an axis of latencies logarithmically, with plain numbers as ticks."""
    axes.set_yscale("log", subs=[])
    low, high = axes.get_ylim()
    step = (1, 2, 5) if high / low < 300 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [first * 10.0**decade for decade in decades for first in step if low <= first * 10.0**decade <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


# --- the command


@contextlib.contextmanager
def start_servers(worker_counts: Sequence[int], archive: Path) -> Iterator[dict[int, str]]:
    """Start one server for each number of workers; gives their addresses."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder, contextlib.ExitStack() as stack:
        addresses = {}
        for count in sorted(set(worker_counts)):
            print(f"starting with {count} workers ...", file=sys.stderr)
            settings = Settings(
                archive=archive,
                ports=Ports.free(),
                device="cpu",
                log_dir=Path(folder, str(count)),
                model_config={"minWorkers": count, "maxWorkers": count},
            )
            addresses[count] = stack.enter_context(TorchServe(settings)).address
        yield addresses


def read_points(file: Path) -> tuple[dict[str, Any], list[Point]]:
    """Read what `main` wrote: what was measured on, and all points.

    Raises:
        ScaleError: the file holds something else.
    """
    try:
        conditions = json.loads(file.read_text())
        return conditions, [_read_point(point) for point in conditions.pop("points")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScaleError(f"{file} holds no points: {error}") from error


def _read_point(written: dict[str, Any]) -> Point:
    question = OLD_QUESTIONS.get(written["question"], written["question"])
    return Point(**written | {"question": question, "load": Figures(**written["load"])})


def write_caption(conditions: Mapping[str, Any]) -> str:
    """Write the caption of the figure: measured on what, when, by which command."""
    machine, rounds = conditions["machine"], conditions["rounds"]
    return (
        f"{machine['CPU']}, {machine['cores']} cores, shared with the load generator; no GPU. Median of {rounds} round"
        f"{'s' if rounds > 1 else ''}.\n{conditions['date']}, {conditions['command']}"
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.scale",
        description="Measure how the cost of explanations grows with workers, image size, images a request and clients.",
        epilog="example: %(prog)s --rounds 3 --seconds 2 --workers 1,2,4",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=read_count, default=3, help="how often everything is measured")
    parser.add_argument("--seconds", type=read_positive, default=2.0, help="of each load")
    parser.add_argument("--workers", type=read_counts, default="1,2", help="worker processes of each server")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="what is served")
    parser.add_argument("--output", metavar="FILE", type=Path, default=BUILD / "scale.json", help="all single numbers")
    parser.add_argument("--image", metavar="FILE", type=Path, default=FIGURE, help="the figure drawn of them")
    parser.add_argument("--draw", metavar="FILE", type=Path, help="measure nothing: draw again what this file holds")
    return parser


def main(argv: Sequence[str] | None = None, extent: Extent = Extent()) -> int:
    """Measure and draw, or draw alone. Returns the exit code: 1 where a request failed or nothing could be drawn."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.draw is None:
            conditions, points = _measure_all(arguments, extent, argv)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            content = {**conditions, "points": [asdict(point) for point in points]}
            arguments.output.write_text(json.dumps(content, indent=1) + "\n")
        else:
            conditions, points = read_points(arguments.draw)
        errors = describe_errors(points)
        print(*errors, sep="\n", end="\n" if errors else "", file=sys.stderr)
        draw(points, write_caption(conditions), arguments.image)
    except (ServeError, ScaleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"drew {arguments.image}")
    return int(bool(errors))


def _measure_all(arguments: argparse.Namespace, extent: Extent, argv: Sequence[str] | None) -> tuple[dict[str, Any], list[Point]]:
    conditions = describe_conditions("scale", argv, arguments)
    with start_servers(arguments.workers, arguments.archive) as addresses:
        return conditions, measure_tasks(list_tasks(addresses, extent, arguments.seconds), rounds=arguments.rounds)


if __name__ == "__main__":
    sys.exit(main())
