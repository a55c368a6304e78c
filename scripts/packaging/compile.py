"""Print the source of a network's compiled pass, as the archive carries it.

python -m scripts.packaging.compile > build/compiled_pass.py
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from handler.gradients.compiler import compile_pass
from handler.gradients.explain import freeze
from handler.runtime.archive import ArchiveError, build_network
from scripts.command_line import HelpFormatter
from scripts.packaging.check import require_servable
from scripts.paths import MODEL_FILE


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.packaging.compile",
        description="Print the source of a network's compiled pass, as scripts.packaging puts it into the archive.",
        epilog="example:\n  %(prog)s --model-file model/network.py > build/compiled_pass.py",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--model-file", type=Path, default=MODEL_FILE, metavar="FILE", help="Python file that defines the network"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the source. Returns the exit code: 1 where the network has no compiled pass."""
    arguments = build_parser().parse_args(argv)
    try:
        network = freeze(build_network(arguments.model_file))
        print(compile_pass(network, require_servable(network)), end="")
    except (ArchiveError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
