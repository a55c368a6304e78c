"""Print the source of a network's compiled pass, as the archive carries it.

python -m scripts.packaging.compile > build/compiled_pass.py
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from handler.gradients.compiler import Shape, compile_pass
from handler.runtime.archive import build_network
from scripts.paths import MODEL_FILE


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.packaging.compile",
        description="Print the source of a network's compiled pass, as scripts.packaging puts it into the archive.",
        epilog="example: %(prog)s --model-file model/network.py > build/compiled_pass.py",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model-file", type=Path, default=MODEL_FILE, help="defines the network")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the source. Returns the exit code."""
    network = build_network(build_parser().parse_args(argv).model_file)
    print(compile_pass(network, cast(Shape, network.INPUT_SHAPE)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
