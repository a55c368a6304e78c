"""Time the step that explains a batch, in this process, beside the plain forward and other ways to the same gradients.

    python -m scripts.bench.benchmark_step --seconds 10
    python -m scripts.bench.benchmark_step --instructions --batch-sizes 1 8 64

One thread of the CPU. All ways take turns, call by call, so that a slow moment hits all of them; ratios are taken within a turn,
and their median counts. First each way's maps are checked. Writes benchmark_step.json, and the printed table as
benchmark_step.md.

`--instructions` counts the processor's instructions instead, under valgrind (apt-get install valgrind), each in a process of its
own; it only prints. Times change with the machine's other work and with what its caches hold; these counts hardly do. They say
what the code has to do, and nothing of how long it waits for memory.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from handler.gradients.compiled import COMPILED_PASS_FILE, CompiledPass, import_file
from handler.gradients.compiler import Shape, compile_and_load, compile_pass
from handler.gradients.explain import Explanation, predict_and_explain
from handler.runtime.malloc import keep_freed_memory
from scripts.bench.arguments import read_count, read_positive
from scripts.bench.digits import MAX_MAP_DIFFERENCE, largest_difference, read_levels
from scripts.bench.machine import command_of, describe_machine, join_facts
from scripts.network import load_committed_network
from scripts.paths import BUILD, ROOT
from scripts.tables import render_markdown

BATCH_SIZES = (1, 8, 64, 256)
FORWARD = "forward, inference_mode"
OURS = "predict_and_explain (this service)"
AUTOGRAD = "autograd.grad, parameters frozen"
CAPTUM = "captum Saliency"
LOSS = "CrossEntropyLoss(...).backward()"
WARM_UP_TURNS = 3
MIN_TURNS = 5
QUARTILES = (0.25, 0.5, 0.75)
NOISE = 0.05  # intensity that is added to a digit at most, so that inputs of max pools do not tie
PACKAGES = ("torch", "captum", "numpy")

Way = Callable[[torch.Tensor, torch.Tensor], Any]  # returns a tensor; ours what the handler gets
"""Pixels, float32 (N, 1, 28, 28) in [0, 1], and targets, int64 (N,) -> logits (N, 10) or gradients (N, 1, 28, 28)."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations of one way for one batch.

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


def build_ways() -> dict[str, Way]:
    """Name every way to score or explain a batch, each on a network of its own. captum's only where it is installed.

    All but the loss differentiate the targets' logits. Ours finds the predicted classes itself; the others are given them.
    """
    plain, differentiated, trained = load_committed_network(), load_committed_network(), load_committed_network()
    trained.requires_grad_()
    ours = compile_and_load(load_committed_network())
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
        saliency = Saliency(load_committed_network())
        ways[CAPTUM] = lambda pixels, targets: saliency.attribute(pixels.detach().requires_grad_(), target=targets, abs=False)
    return {**ways, LOSS: differentiate_loss}


def make_batch(batch_size: int) -> torch.Tensor:
    """Repeat the sample digits, with a little noise added.

    Returns:
        float32 (batch_size, 1, 28, 28), in [0, 1].
    """
    levels = read_levels()
    intensities = levels[np.arange(batch_size) % len(levels)] / 255
    noise = np.random.default_rng(0).uniform(0, NOISE, intensities.shape)
    return torch.from_numpy(np.clip(intensities + noise, 0, 1).astype(np.float32))[:, None]


# --- timing


def check_maps(ways: Mapping[str, Way], pixels: torch.Tensor, targets: torch.Tensor) -> float:
    """Compare the ways that differentiate logits with autograd.

    Returns:
        the `largest_difference` of all.
    Raises:
        ValueError: it is larger than MAX_MAP_DIFFERENCE.
    """
    expected = ways[AUTOGRAD](pixels, targets).numpy()
    others = [_stack(ways[name](pixels, targets)) for name in (OURS, CAPTUM) if name in ways]
    difference = float(np.max([largest_difference(other, expected) for other in others]))
    if not difference <= MAX_MAP_DIFFERENCE:  # NaN is not
        raise ValueError(f"the ways differ by {difference:.2g} of a map's largest number at batch size {len(pixels)}")
    return difference


def _stack(maps: torch.Tensor | list[Explanation]) -> NDArray[np.floating]:
    """Make one array (N, C, H, W) of a way's maps."""
    if isinstance(maps, torch.Tensor):
        array: NDArray[np.floating] = maps.numpy()
        return array
    return np.concatenate([explanation.maps for explanation in maps])


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


def render_timings(timings: Sequence[Timing]) -> str:
    """Write microseconds, and in brackets the multiple of the plain forward, as Markdown: a row a way, a column a batch size."""
    sizes = sorted({timing.batch_size for timing in timings})
    rows: dict[str, list[str]] = {}
    for timing in timings:
        cell = f"{quartiles(timing.durations_us)[1]:,.0f} ({quartiles(timing.multiples)[1]:.2f})"
        rows.setdefault(timing.way, [timing.way]).append(cell)
    return render_markdown(["microseconds (multiple of the forward)", *(f"batch {size}" for size in sizes)], rows.values())


# --- counting instructions

SETUP = """
import sys
sys.path.insert(0, {root!r})
from scripts.bench.benchmark_step import prepare_call
call = prepare_call({way!r}, {compiled_pass!r}, {batch_size})
"""


def prepare_call(way: str, compiled_pass: str, batch_size: int) -> Callable[[], object]:
    """Make a call of the plain forward, or of this service's way by a compiled pass, and warm it up.

    Args:
        way: FORWARD or OURS.
        compiled_pass: the file with the source of the pass.
    """
    network = load_committed_network()
    pixels = make_batch(batch_size)
    call: Callable[[], object]
    if way == OURS:
        call = functools.partial(
            predict_and_explain, CompiledPass(import_file(Path(compiled_pass)), network), pixels, [(None,)] * batch_size
        )
    else:
        call = functools.partial(torch.inference_mode()(network), pixels)
    for _ in range(WARM_UP_TURNS):
        call()
    return call


def count_instructions(batch_sizes: Sequence[int]) -> dict[str, dict[int, int]]:
    """Count the instructions of one call, by way and batch size. Each takes some two minutes.

    Raises:
        OSError: valgrind is not installed, or cannot run PyTorch here.
    """
    from torch.utils.benchmark import Timer  # it imports what compiles extensions

    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # PyTorch's counting starts `python`
    counts: dict[str, dict[int, int]] = {FORWARD: {}, OURS: {}}
    with tempfile.TemporaryDirectory(prefix="count-instructions-") as folder:
        compiled_pass = Path(folder) / COMPILED_PASS_FILE
        network = load_committed_network()
        compiled_pass.write_text(compile_pass(network, cast(Shape, network.INPUT_SHAPE)))
        cases = [(batch_size, way) for batch_size in batch_sizes for way in counts]
        for batch_size, way in tqdm(cases, unit="count", disable=None):
            setup = SETUP.format(root=str(ROOT), way=way, compiled_pass=str(compiled_pass), batch_size=batch_size)
            stats = Timer("call()", setup).collect_callgrind(
                number=1, repeats=None, collect_baseline=False, retain_out_file=False
            )
            counts[way][batch_size] = stats.counts()
    return counts


def render_counts(counts: Mapping[str, Mapping[int, int]]) -> str:
    """Write millions of instructions, and in brackets the multiple of the plain forward, as Markdown."""
    sizes = list(counts[FORWARD])
    rows = [
        [way, *(f"{own[size] / 1e6:.2f} ({own[size] / counts[FORWARD][size]:.3f})" for size in sizes)]
        for way, own in counts.items()
    ]
    return render_markdown(["millions of instructions (multiple of the forward)", *(f"batch {size}" for size in sizes)], rows)


# --- the command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.benchmark_step",
        description="Time the step that explains a batch beside the plain forward, on one CPU thread.",
        epilog="example: %(prog)s --seconds 30",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=read_positive, default=10.0, help="for each of the batch sizes")
    parser.add_argument("--batch-sizes", type=read_count, nargs="+", default=BATCH_SIZES, help="images a call")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--alone",
        action="store_true",
        help="only this service's way beside the forward: the processor's caches then hold what they hold in a busy worker",
    )
    what.add_argument(
        "--instructions", action="store_true", help="count instructions of the same two under valgrind, some four minutes a size"
    )
    parser.add_argument("--output", metavar="DIR", type=Path, default=BUILD / "benchmark", help="where the reports go")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, report; or count and print. Returns the exit code: 1 for wrong gradients, or where nothing can be counted."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.instructions:
            print(render_counts(count_instructions(arguments.batch_sizes)))
            return 0
        timings = _check_and_time(arguments.batch_sizes, arguments.seconds, alone=arguments.alone)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = _write_reports(timings, command_of("benchmark_step", argv), arguments.output)
    print(report)
    return 0


def _check_and_time(batch_sizes: Sequence[int], seconds: float, *, alone: bool) -> list[Timing]:
    torch.set_num_threads(1)
    keep_freed_memory()  # as a worker does; it helps all ways alike
    ways = build_ways()
    timings: list[Timing] = []
    for batch_size in tqdm(batch_sizes, unit="batch size", disable=None):
        pixels = make_batch(batch_size)
        targets = ways[FORWARD](pixels, torch.empty(0)).argmax(dim=1).clone()  # no inference tensor, which autograd refuses
        check_maps(ways, pixels, targets)
        timed = {name: ways[name] for name in (FORWARD, OURS)} if alone else ways
        timings += time_ways(timed, pixels, targets, seconds=seconds)
    return timings


def _write_reports(timings: Sequence[Timing], command: str, folder: Path) -> str:
    """Write the timings as JSON and as Markdown. Returns the Markdown."""
    machine = describe_machine(PACKAGES)
    report = (
        f"# Benchmark of the explaining step\n\n`{command}`, {time.strftime('%Y-%m-%d')}, one thread: {join_facts(machine)}. "
        f"Medians; multiples are taken within a turn.\n\n{render_timings(timings)}\n"
    )
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark_step.md").write_text(report)
    (folder / "benchmark_step.json").write_text(json.dumps(content, indent=1) + "\n")
    return report


if __name__ == "__main__":
    sys.exit(main())
