"""Time the step that explains a batch, in this process, beside the plain forward and other ways to the same gradients.

    python -m scripts.bench.benchmark_step --seconds 10

One thread of the CPU. All ways take turns, call by call, so that a slow moment hits all of them; ratios are taken within a turn,
and their median is what counts. First each way is checked. Writes benchmark_step.json, and the printed table as
benchmark_step.md.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from tqdm import tqdm

from handler.gradients.compiler import compile_and_load
from handler.gradients.explain import Explanation, freeze, predict_and_explain
from handler.runtime.archive import load_network
from handler.runtime.malloc import keep_freed_memory
from scripts.bench.load_test import describe_machine
from scripts.paths import MODEL_FILE, SAMPLE_FILES, WEIGHTS_FILE

BATCH_SIZES = (1, 8, 64, 256)
FORWARD = "forward, inference_mode"
OURS = "predict_and_explain (this service)"
AUTOGRAD = "autograd.grad, parameters frozen"
CAPTUM = "captum Saliency"
LOSS = "CrossEntropyLoss(...).backward()"
WARM_UP_TURNS = 3
MIN_TURNS = 5
QUARTILES = (0.25, 0.5, 0.75)
MAX_MAP_DIFFERENCE = 2e-5  # of a map's largest number
SAME_MAPS_SHARE = 0.9  # of the images; where two inputs of a max pool are equal but for rounding, either gradient is right
PACKAGES = ("torch", "captum", "numpy")

Way = Callable[[torch.Tensor, torch.Tensor], Any]  # gives a tensor; ours gives what the handler gets
"""Pixels, float32 (N, 1, 28, 28) in [0, 1], and targets, int64 (N,) -> logits (N, 10) or gradients (N, 1, 28, 28)."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one way takes for one batch.

    Attributes:
        way: its name.
        batch_size: images.
        durations_us: of each turn.
        multiples: of the plain forward's duration in the same turn.
    """

    way: str
    batch_size: int
    durations_us: tuple[float, ...]
    multiples: tuple[float, ...]


def load_committed() -> nn.Module:
    """The committed network with its weights, in eval mode."""
    return load_network(MODEL_FILE, WEIGHTS_FILE).eval()


def build_ways() -> dict[str, Way]:
    """Every way to score or explain a batch, by its name, each on a network of its own. captum's only where it is installed.

    All but the loss differentiate the targets' logits. Ours finds the predicted classes itself; the others get them for nothing.
    """
    plain, differentiated, trained = freeze(load_committed()), freeze(load_committed()), load_committed()
    ours = compile_and_load(freeze(load_committed()))
    cross_entropy = nn.CrossEntropyLoss()

    def forward(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = plain(pixels)
            return logits

    def explain(pixels: torch.Tensor, _: torch.Tensor) -> list[Explanation | None]:
        return predict_and_explain(ours, pixels, [(None,)] * len(pixels))[1]

    def differentiate(pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        inputs = pixels.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(differentiated(inputs).gather(1, targets[:, None]).sum(), inputs)
        return gradient

    def differentiate_loss(pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        inputs = pixels.detach().requires_grad_()
        cross_entropy(trained(inputs), targets).backward()
        assert inputs.grad is not None
        return inputs.grad

    ways: dict[str, Way] = {FORWARD: forward, OURS: explain, AUTOGRAD: differentiate}
    try:
        from captum.attr import Saliency  # a peer, which need not be installed
    except ModuleNotFoundError:
        print(f"{CAPTUM}: not installed", file=sys.stderr)
    else:
        saliency = Saliency(freeze(load_committed()))
        ways[CAPTUM] = lambda pixels, targets: saliency.attribute(pixels.detach().requires_grad_(), target=targets, abs=False)
    return {**ways, LOSS: differentiate_loss}


def make_batch(batch_size: int) -> torch.Tensor:
    """The test digits, over and over, with a little noise: without it max pools tie, and have no one gradient to compare.

    Returns:
        float32 (batch_size, 1, 28, 28), in [0, 1].
    """
    digits = np.stack([np.asarray(Image.open(file)) for file in SAMPLE_FILES])  # (50, 28, 28)
    levels = digits[np.arange(batch_size) % len(digits)] / 255
    noise = np.random.default_rng(0).uniform(0, 0.05, levels.shape)
    return torch.from_numpy(np.clip(levels + noise, 0, 1).astype(np.float32))[:, None]


def check_maps(ways: Mapping[str, Way], pixels: torch.Tensor, targets: torch.Tensor) -> float:
    """Compare the ways that differentiate logits with autograd.

    Returns:
        the largest difference in the SAME_MAPS_SHARE of the maps that agree best, as a share of the map's largest number.
    Raises:
        ValueError: it is larger than MAX_MAP_DIFFERENCE.
    """
    expected = ways[AUTOGRAD](pixels, targets)
    others = [_stack(ways[name](pixels, targets)) for name in (OURS, CAPTUM) if name in ways]
    largest = expected.abs().flatten(1).amax(dim=1)
    by_map = [(other - expected).abs().flatten(1).amax(dim=1) / largest for other in others]  # (N,) each
    difference = max(float(values.quantile(SAME_MAPS_SHARE, interpolation="higher")) for values in by_map)
    if not difference <= MAX_MAP_DIFFERENCE:  # NaN is not
        raise ValueError(f"the ways differ by {difference:.2g} of a map's largest number at batch size {len(pixels)}")
    return difference


def _stack(maps: torch.Tensor | list[Explanation]) -> torch.Tensor:
    """Make one tensor (N, C, H, W) of what a way gave."""
    if isinstance(maps, torch.Tensor):
        return maps
    return torch.from_numpy(np.concatenate([explanation.maps for explanation in maps]))


def time_ways(ways: Mapping[str, Way], pixels: torch.Tensor, targets: torch.Tensor, *, seconds: float) -> list[Timing]:
    """Let all ways take turns until the time is over, in an order that shifts from turn to turn.

    Args:
        seconds: for all together; there are at least MIN_TURNS turns.
    """
    for _ in range(WARM_UP_TURNS):
        for way in ways.values():
            way(pixels, targets)
    names = list(ways)
    turns: list[dict[str, float]] = []
    deadline = time.perf_counter() + seconds
    while len(turns) < MIN_TURNS or time.perf_counter() < deadline:
        first = len(turns) % len(names)
        turn = {}
        for name in names[first:] + names[:first]:
            started_ns = time.perf_counter_ns()
            ways[name](pixels, targets)
            turn[name] = (time.perf_counter_ns() - started_ns) / 1e3
        turns.append(turn)
    return [
        Timing(
            name,
            len(pixels),
            tuple(turn[name] for turn in turns),
            tuple(turn[name] / turn[FORWARD] for turn in turns),
        )
        for name in names
    ]


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile."""
    found: NDArray[np.float64] = np.quantile(values, QUARTILES)
    return [float(value) for value in found]


def render_table(timings: Sequence[Timing]) -> str:
    """Write microseconds, and in brackets the multiple of the plain forward, as Markdown: a row a way, a column a batch size."""
    sizes = sorted({timing.batch_size for timing in timings})
    rows: dict[str, list[str]] = {}
    for timing in timings:
        cell = f"{quartiles(timing.durations_us)[1]:,.0f} ({quartiles(timing.multiples)[1]:.2f})"
        rows.setdefault(timing.way, []).append(cell)
    return "\n".join(
        [
            "| microseconds (multiple of the forward) | " + " | ".join(f"batch {size}" for size in sizes) + " |",
            "| --- | " + " | ".join("---" for _ in sizes) + " |",
            *(f"| {way} | {' | '.join(cells)} |" for way, cells in rows.items()),
        ]
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.benchmark_step",
        description="Time the step that explains a batch beside the plain forward, on one CPU thread.",
        epilog="example: %(prog)s --seconds 30",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="for each of the batch sizes")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="only this service's way beside the forward: the processor's caches then hold what they hold in a busy worker",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("build/benchmark"), help="where the reports go")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, report. Returns the exit code: 1 where a way gives wrong gradients."""
    arguments = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()  # as a worker does; it serves all ways alike
    timings: list[Timing] = []
    try:
        ways = build_ways()
        for batch_size in tqdm(BATCH_SIZES, unit="batch size", disable=None):
            pixels = make_batch(batch_size)
            targets = ways[FORWARD](pixels, torch.empty(0)).argmax(dim=1).clone()  # no inference tensor, which autograd refuses
            check_maps(ways, pixels, targets)
            timed = {name: ways[name] for name in (FORWARD, OURS)} if arguments.alone else ways
            timings += time_ways(timed, pixels, targets, seconds=arguments.seconds)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    command = shlex.join(["python", "-m", "scripts.bench.benchmark_step", *(sys.argv[1:] if argv is None else argv)])
    machine = describe_machine(PACKAGES)
    report = "\n".join(
        [
            "# Benchmark of the explaining step",
            "",
            f"`{command}`, {time.strftime('%Y-%m-%d')}, one thread: "
            + "; ".join(f"{name} {value}" for name, value in machine.items())
            + ". Medians; multiples are taken within a turn.",
            "",
            render_table(timings),
            "",
        ]
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "benchmark_step.md").write_text(report)
    content = {
        "command": command,
        "machine": machine,
        "timings": [
            {
                "way": timing.way,
                "batch_size": timing.batch_size,
                "turns": len(timing.durations_us),
                "duration_us_quartiles": quartiles(timing.durations_us),
                "multiple_quartiles": quartiles(timing.multiples),
            }
            for timing in timings
        ],
    }
    (arguments.output / "benchmark_step.json").write_text(json.dumps(content, indent=1) + "\n")
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
