"""Draw the mean saliency map of each class from the output of `scripts.bulk`: how its files are read, and what for.

python -m scripts.bulk.mean_maps build/explained --output .github/bulk.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset

from handler.render.drawing import Layout, Row, Style, draw
from scripts.command_line import HelpFormatter

COLUMNS = ["class", "label", "saliency"]


def mean_maps(folder: Path) -> dict[int, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Average the maps of all images of each class, one file at a time.

    Args:
        folder: of Parquet files with one map an image, of one shape.
    Returns:
        float32 (H, W) by class.
    """
    sums: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    counts: dict[int, int] = {}
    answered = pa.compute.field("class").is_valid()
    for batch in pa.dataset.dataset(folder, format="parquet").to_batches(columns=COLUMNS, filter=answered):
        maps = batch["saliency"].to_numpy_ndarray()  # (N, H, W)
        classes = batch["class"].to_numpy()
        for one in np.unique(classes).tolist():
            own = maps[classes == one]
            sums[one] = sums.get(one, 0) + own.sum(axis=0)
            counts[one] = counts.get(one, 0) + len(own)
    return {one: sums[one] / np.float32(counts[one]) for one in sorted(sums)}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bulk.mean_maps",
        description="Draw the mean saliency map of the images of each class, from the output of scripts.bulk.",
        epilog="example:\n  %(prog)s build/explained --output build/mean-maps.png",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the --output of scripts.bulk")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="PNG to write")
    parser.add_argument("--size", type=int, default=96, help="longer side of one map, in pixels")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Average and draw. Returns the exit code: 1 where there is nothing to draw."""
    arguments = build_parser().parse_args(argv)
    try:
        means = mean_maps(arguments.folder)
    except (OSError, pa.ArrowException, AttributeError) as error:
        print(f"error: expected the output of scripts.bulk with one map an image: {error}", file=sys.stderr)
        return 1
    if not means:
        print(f"error: {arguments.folder} holds no image that was answered", file=sys.stderr)
        return 1
    maps = np.stack(list(means.values()))
    row = Row(np.zeros(maps.shape[1:], np.float32), maps, tuple(means))
    arguments.output.write_bytes(draw([row], Style(size=arguments.size, layout=Layout.MAP)))
    print(f"wrote {arguments.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
