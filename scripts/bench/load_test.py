"""Put a running server under load, keep one sample a request, and report what the server can take.

    python -m scripts.bench.load_test --rates 100,200,400 --mix predict=3,explain=1

The open loop (`--rates`) shows how long answers take at a given rate, the closed loop (`--connections`) how many answers a second
a given number of clients gets. The samples go to OUTPUT.npz first; the text, OUTPUT.json and OUTPUT.html are made of that file
alone, and `--report OUTPUT.npz` makes them again. load_report.py defines the figures.
"""

import argparse
import contextlib
import ssl
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scripts.bench import digit_requests
from scripts.bench.arguments import read_address, read_count, read_counts, read_positive, read_rates, read_seconds
from scripts.bench.digit_requests import KINDS, is_right_form
from scripts.bench.interruption import interruptible
from scripts.bench.load import Call, Load, Tick, run_load
from scripts.bench.load.recording import LoadTestError, Recording, read_recording, write_recording
from scripts.bench.load_report import Report, build_report, format_ms, render_html, render_text
from scripts.bench.machine import describe_machine
from scripts.pages import write_report
from scripts.paths import BUILD, MODEL_NAME, SAMPLE_FILES
from scripts.serving.credentials import CredentialsError, read_token

SEED = 0  # of the order of kinds and images, the same in every run
CONNECTIONS = (1, 4, 16, 64)  # of the closed loop's steps


def build_calls(address: str, model: str, mix: Mapping[str, int], images: Sequence[Path], token: str | None = None) -> list[Call]:
    """Write every kind of request with every image, as often as the mix says, in an order shuffled the same way each time.

    Raises:
        LoadTestError: an image cannot be read, or the token cannot stand in a header.
    """
    calls = []
    for image in images:
        try:
            body = image.read_bytes()
            for name, weight in mix.items():
                calls += digit_requests.build_calls(name, address, [body], model=model, token=token) * weight
        except OSError as error:
            raise LoadTestError(f"{image}: {error.strerror}") from error
        except ValueError as error:
            raise LoadTestError(f"the token or the model's name cannot stand in a request: {error}") from None
    return [calls[index] for index in np.random.default_rng(SEED).permutation(len(calls))]


def build_loads(arguments: argparse.Namespace) -> list[Load]:
    """Turn the command line into one load a step.

    Raises:
        LoadTestError: as `build_calls`.
        CredentialsError: the token cannot be read.
        OSError: the certificates cannot be read.
    """
    token = read_token(arguments.key_file) if arguments.key_file else None
    common: dict[str, Any] = {
        "address": arguments.url,
        "calls": build_calls(arguments.url, arguments.model, arguments.mix, arguments.images or SAMPLE_FILES, token),
        "duration_s": arguments.duration,
        "warm_up_s": arguments.warm_up,
        "timeout_s": arguments.timeout,
        "tls": _tls_of(arguments),
    }
    if arguments.rates:
        return [Load(**common, rate=rate, connections=arguments.max_connections) for rate in arguments.rates]
    return [Load(**common, connections=connections) for connections in arguments.connections or CONNECTIONS]


def describe(arguments: argparse.Namespace, loads: Sequence[Load]) -> dict[str, Any]:
    """Describe the test, for the report."""
    return {
        "url": loads[0].address,
        "model": arguments.model,
        "loop": "open" if arguments.rates else "closed",
        "mix": dict(arguments.mix),
        "images": len(arguments.images or SAMPLE_FILES),
        "duration_s": loads[0].duration_s,
        "warm_up_s": loads[0].warm_up_s,
        "timeout_s": loads[0].timeout_s,
        "max_connections": max(load.connections for load in loads),
    }


def run_steps(loads: Sequence[Load], about: Mapping[str, Any], raw_file: Path, interrupted: threading.Event) -> None:
    """Send all loads, and write the raw file after each.

    Args:
        about: of `describe`.
        interrupted: ends the test, also within a step.
    Raises:
        OSError: the address has no such host, or the file cannot be written.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    recording = Recording({**about, "started": started, "interrupted": False, "machine": describe_machine()}, [])
    for number, load in enumerate(loads, 1):
        step = f"step {number} of {len(loads)}"
        with _progress(f"{load.label}, {number} of {len(loads)}", load, interrupted) as tick:
            samples = run_load(load, tick=tick)
        samples.mark_wrong_forms(is_right_form)
        recording.steps.append(samples)
        recording.about["interrupted"] = interrupted.is_set()
        write_recording(recording, raw_file)
        errors = sum(samples.error_counts.values())
        p99 = format_ms(samples.latency_quantiles_ms([0.99])[0])
        print(f"{step}: {load.label}: served {samples.served_rate:,.1f}/s, p99 {p99} ms, {errors} errors", file=sys.stderr)
        if interrupted.is_set():
            break
        if not samples.good.any():
            print("no good reply at all: the steps that are left are skipped", file=sys.stderr)
            break


@contextlib.contextmanager
def _progress(name: str, load: Load, interrupted: threading.Event) -> Iterator[Tick]:
    """A bar of the step's seconds, with the number of requests so far; the tick says whether to go on."""
    total_s = load.warm_up_s + load.duration_s
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=total_s, desc=name, leave=False, disable=None, bar_format=layout) as bar:

        def tick(now_s: float, request_count: int) -> bool:
            bar.set_postfix_str(f"{request_count:,} requests", refresh=False)
            bar.update(min(now_s + load.warm_up_s, 0.999 * total_s) - bar.n)  # the sum's rounding must not pass the total
            return not interrupted.is_set()

        yield tick


def report_again(raw_file: Path) -> Report:
    """Make text (to stdout), JSON and page of a raw file, beside it.

    Raises:
        LoadTestError: the file is of another kind, or empty.
        OSError: a file cannot be written.
    """
    recording = read_recording(raw_file)
    report = build_report(recording)
    print(render_text(report))
    write_report(raw_file, report, lambda: render_html(report, recording))
    return report


def read_mix(text: str) -> dict[str, int]:
    """Read "predict=3,explain=1"; kinds of weight 0 are left out."""
    mix = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        if name not in KINDS or not weight.isdecimal():
            raise argparse.ArgumentTypeError(f"expected KIND=WHOLE NUMBER, with a kind of {', '.join(KINDS)}, got {part!r}")
        mix[name] = int(weight)
    if not any(mix.values()):
        raise argparse.ArgumentTypeError(f"expected one weight above 0, got {text!r}, which asks for nothing")
    return {name: weight for name, weight in mix.items() if weight}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.load_test",
        description="Put a running server under load and report latencies, rates, errors and the knee.",
        epilog="example: %(prog)s --rates 100,200,400 --mix predict=3,explain=1,explain-npy=1",
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--rates", type=read_rates, metavar="N,N", help="open loop: requests a second, one step each")
    steps.add_argument(
        "--connections", type=read_counts, metavar="N,N", help="closed loop: connections, one step each; default: 1,4,16,64"
    )
    steps.add_argument("--report", type=Path, metavar="FILE.npz", help="send nothing: report again what this file holds")
    kinds = ", ".join(KINDS)
    parser.add_argument(
        "--mix", type=read_mix, default="predict=1,explain=1", metavar="KIND=N,...", help=f"of {kinds}; default: %(default)s"
    )
    parser.add_argument("--images", type=Path, nargs="+", metavar="FILE", help="default: model/samples/*.png")
    parser.add_argument("--duration", type=read_positive, default=10.0, metavar="S", help="of a step; default: 10")
    parser.add_argument("--warm-up", type=read_seconds, default=2.0, metavar="S", help="before each, not counted; default: 2")
    parser.add_argument(
        "--timeout", type=read_positive, default=10.0, metavar="S", help="for a reply, from its schedule; default: 10"
    )
    parser.add_argument("--max-connections", type=read_count, default=256, metavar="N", help="of the open loop; default: 256")
    parser.add_argument("--url", type=read_address, default="http://127.0.0.1:8080", help="default: %(default)s")
    parser.add_argument("--model", default=MODEL_NAME, help="the served model's name; default: %(default)s")
    parser.add_argument(
        "--key-file", type=Path, metavar="FILE", help="the token: TorchServe's key_file.json, or a file that holds it alone"
    )
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="for https: certificates to trust, as PEM")
    parser.add_argument("--insecure", action="store_true", help="for https: check no certificate")
    parser.add_argument(
        "--output",
        type=Path,
        default=BUILD / "load-test",
        metavar="NAME",
        help="of .npz, .json and .html; default: build/load-test",
    )
    return parser


def _tls_of(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    if not arguments.url.startswith("https:"):
        return None
    context = ssl.create_default_context(cafile=arguments.ca_file)
    if arguments.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def main(argv: Sequence[str] | None = None) -> int:
    """Send and report, or report alone. Returns the exit code: 1 where requests failed or the test could not run."""
    arguments = build_parser().parse_args(argv)
    raw_file = arguments.report or Path(f"{arguments.output}.npz")
    try:
        if arguments.report is None:
            loads = build_loads(arguments)
            about = describe(arguments, loads)
            print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
            with interruptible() as interrupted:
                run_steps(loads, about, raw_file, interrupted)
        report = report_again(raw_file)
    except (LoadTestError, CredentialsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {raw_file} and, beside it, the reports made from it", file=sys.stderr)
    return int(report.error_count > 0)


if __name__ == "__main__":
    sys.exit(main())
