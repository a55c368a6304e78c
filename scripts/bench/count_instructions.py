"""Count the processor's instructions of the step that explains a batch, beside the plain forward.

    apt-get install valgrind
    python -m scripts.bench.count_instructions

Times change with a machine's other work and with what its caches hold; these counts hardly do. They say what the code has to do,
and nothing of how long it waits for memory. Each is taken in a process of its own, under valgrind, on one thread.
"""

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

from handler.gradients.compiled import COMPILED_PASS_FILE, CompiledPass, import_file
from handler.gradients.compiler import Shape, compile_pass
from handler.gradients.explain import freeze, predict_and_explain
from scripts.bench.benchmark_step import FORWARD, OURS, WARM_UP_TURNS, load_committed, make_batch
from scripts.bench.measure_load import read_count
from scripts.paths import ROOT

SETUP = """
import sys
sys.path.insert(0, {root!r})
from scripts.bench.count_instructions import prepare_call
call = prepare_call({way!r}, {compiled_pass!r}, {batch_size})
"""


def prepare_call(way: str, compiled_pass: str, batch_size: int) -> Callable[[], object]:
    """Make a call of the plain forward, or of this service's way by a derived pass, that is ready to be counted.

    Args:
        way: FORWARD or OURS.
        compiled_pass: the file with the source of the pass.
    """
    network = freeze(load_committed())
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


def count(batch_sizes: Sequence[int]) -> dict[str, dict[int, int]]:
    """Count instructions of one call, by way and batch size.

    Raises:
        OSError: valgrind is not installed, or cannot run PyTorch here.
    """
    from torch.utils.benchmark import Timer  # it imports what compiles extensions

    counts: dict[str, dict[int, int]] = {FORWARD: {}, OURS: {}}
    with tempfile.TemporaryDirectory(prefix="count-instructions-") as folder:
        compiled_pass = Path(folder) / COMPILED_PASS_FILE
        network = load_committed()
        compiled_pass.write_text(compile_pass(network, cast(Shape, network.INPUT_SHAPE)))
        cases = [(batch_size, way) for batch_size in batch_sizes for way in counts]
        for batch_size, way in tqdm(cases, unit="count", disable=None):
            setup = SETUP.format(root=str(ROOT), way=way, compiled_pass=str(compiled_pass), batch_size=batch_size)
            stats = Timer("call()", setup).collect_callgrind(
                number=1, repeats=None, collect_baseline=False, retain_out_file=False
            )
            counts[way][batch_size] = stats.counts()
    return counts


def render_table(counts: Mapping[str, Mapping[int, int]]) -> str:
    """Write millions of instructions, and in brackets the multiple of the plain forward, as Markdown."""
    sizes = list(counts[FORWARD])
    rows = [
        f"| {way} | " + " | ".join(f"{own[size] / 1e6:.2f} ({own[size] / counts[FORWARD][size]:.3f})" for size in sizes) + " |"
        for way, own in counts.items()
    ]
    head = "| millions of instructions (multiple of the forward) | " + " | ".join(f"batch {size}" for size in sizes) + " |"
    return "\n".join([head, "| --- | " + " | ".join("---" for _ in sizes) + " |", *rows])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.count_instructions",
        description="Count the instructions of the step that explains a batch beside the plain forward, under valgrind.",
        epilog="example: %(prog)s --batch-sizes 1 8",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--batch-sizes", type=read_count, nargs="+", default=[1, 8, 64], help="each takes some two minutes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print. Returns the exit code: 1 where it cannot be counted here."""
    arguments = build_parser().parse_args(argv)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # PyTorch's counting starts `python`
    try:
        print(render_table(count(arguments.batch_sizes)))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
