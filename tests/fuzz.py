"""Coverage-guided fuzzing of all code that reads a request before the network runs.

    python -m tests.fuzz --seconds 600

A request is parsed, decoded and prepared as in a worker. It must end in canonical pixels or in a client error within MAX_SECONDS;
anything else is written to build/fuzz/crash-* and ends the run. Needs atheris (`make fuzz` installs it).
"""

import argparse
import collections
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["handler", "PIL", "numpy.lib", "json"]):
    from tests.hostile import SEEDS, outcome_of, row_of

MAX_SECONDS = 1.0  # of processor time for one request
FOLDER = Path("build/fuzz")


class Fuzzer:
    """Run inputs and count their outcomes."""

    def __init__(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.slowest_s = 0.0

    def run(self, content: bytes) -> None:
        """Answer one request. The first byte chooses its form."""
        row, headers = row_of(content)
        started = time.process_time()
        outcome = outcome_of(row, headers)
        elapsed = time.process_time() - started
        self.slowest_s = max(self.slowest_s, elapsed)
        self.outcomes[outcome] += 1
        if elapsed > MAX_SECONDS:
            raise TimeoutError(f"{elapsed:.1f} s for one request that ended in {outcome}")

    def report(self) -> str:
        """Count outcomes, the most frequent first."""
        total = sum(self.outcomes.values())
        counts = ", ".join(f"{name} {count:,}" for name, count in self.outcomes.most_common())
        return f"{total:,} requests, slowest {self.slowest_s:.2f} s: {counts}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Fuzz the path of a request.", epilog="example: %(prog)s --seconds 60"
    )
    parser.add_argument("--seconds", type=int, default=600, help="default: 600")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz for a while. Returns the exit code; a crash ends the process with another."""
    arguments = build_parser().parse_args(argv)
    corpus = FOLDER / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS):
        (corpus / f"seed-{number}").write_bytes(seed)
    fuzzer = Fuzzer()
    deadline = time.monotonic() + arguments.seconds

    def run_until_deadline(content: bytes) -> None:
        if time.monotonic() > deadline:
            print(fuzzer.report(), flush=True)
            os._exit(0)  # libFuzzer takes any other exit for a crash
        fuzzer.run(content)

    options = ["-max_len=65536", f"-artifact_prefix={FOLDER}/", "-print_final_stats=0", "-rss_limit_mb=4096", str(corpus)]
    atheris.Setup([sys.argv[0], *options], run_until_deadline)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
