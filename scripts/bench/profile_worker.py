"""Show what a worker's start and memory are made of, in this process.

    python -m scripts.bench.profile_worker --archive build/digits.mar

Imports what a worker imports, one after another, loads the archive as a worker does, and has it answer batches. After each step
it looks at the seconds that this took and at the memory that the process has resident then. This module itself imports little,
so that nothing is there before its turn.
"""

import argparse
import functools
import importlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from scripts.paths import ARCHIVE

IMPORTS = {  # in a worker's order: a module that more than one needs counts for the first
    "torch": "torch, which runs the network",
    "ts.model_service_worker": "TorchServe's worker",
    "ts.torch_handler.base_handler": "TorchServe's BaseHandler",
    "handler.images.decode": "Pillow and decode.py: image files",
    "handler.images.digits": "scipy.ndimage and canonical.py: the ink in a photograph",
    "handler.saliency_handler": "the rest of handler/",
}
BATCH_SIZES = (1, 8, 32)
REPEATED = 20  # batches of each size
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """One step: the seconds that it took, and the MiB that were resident after it."""

    title: str
    seconds: float
    resident_mib: float


def look(archive: Path, folder: Path) -> Iterator[Row]:
    """Take a worker's steps, and look at each.

    Args:
        archive: whose handler is loaded.
        folder: an empty one, for what it holds.
    """
    yield _take("Python itself", lambda: None)
    for name, title in IMPORTS.items():
        yield _take(title, functools.partial(importlib.import_module, name))
    from scripts.bench.profile_request import WHOLE, build_steps, load_handler

    importlib.import_module("torch").set_num_threads(1)
    loaded: list[tuple[Any, Any]] = []
    yield _take("the archive: network, compiled pass and its check", lambda: loaded.append(load_handler(archive, folder)))
    ((handler, context),) = loaded
    for size in BATCH_SIZES:
        handle = build_steps(handler, context, size)[WHOLE]
        yield _take(f"{REPEATED} batches of {size}", functools.partial(_repeat, handle))


def _repeat(step: Callable[[], object]) -> None:
    for _ in range(REPEATED):
        step()


def _take(title: str, step: Callable[[], object]) -> Row:
    started = time.perf_counter()
    step()
    return Row(title, time.perf_counter() - started, psutil.Process().memory_info().rss / MIB)


def render_table(rows: Sequence[Row]) -> str:
    """Write the steps as Markdown."""
    lines = ["| a worker's step | seconds | MiB resident after it |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {row.title} | {row.seconds:.2f} | {row.resident_mib:.0f} |" for row in rows)])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.profile_worker",
        description="Show what a worker's start and memory are made of.",
        epilog="example: %(prog)s --archive build/digits.mar",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Look and print. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        print(render_table(list(look(arguments.archive, Path(folder)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
