"""Keep a server under mixed traffic with bad requests in it for half an hour, and see whether it stays as it was.

    python -m scripts.bench.soak --minutes 30

Starts a server of its own (or takes one: --url), learns the right answers from requests that are alone (soak_traffic.py),
warms up with as many requests as the server takes, then sends them by the clock, by default at 60 % of what it took. Every answer
is compared. Resident memory, descriptors and threads of the workers and the JVM are sampled meanwhile; descriptors and temp files
are counted before and after, with nothing to do. All samples go to OUTPUT.npz first; the text, OUTPUT.json and OUTPUT.html are
made of that file alone (soak_report.py says how), and `--report OUTPUT.npz` makes them again. Exits with 1 where a gate
fails.
"""

import argparse
import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import psutil
import requests

from scripts.bench.load import Failure, Samples, Tick, run_closed, run_open
from scripts.bench.load_test import (
    LoadTestError,
    Run,
    describe_machine,
    interruptible,
    read_positive,
    read_raw,
    read_url,
    write_raw,
)
from scripts.bench.soak_report import MIB, Report, build_report, draw_plots, render_page, render_text
from scripts.bench.soak_traffic import KINDS, Answers, Traffic, build_traffic, read_samples
from scripts.paths import MODEL_NAME, ROOT, SAMPLE_FILES
from scripts.serving import launcher

IMAGES = [file for file in SAMPLE_FILES if file.stem.endswith("-1")]  # one of each class
RATE_SHARE = 0.6  # of what the closed loop gives: near the knee, with room for what the machine does beside
WARM_UP_CONNECTIONS = 32
TIMEOUT_S = 60.0
LEARNING_TIMEOUT_S = 300.0
SAMPLE_S = 5.0  # between looks at the processes; shorter where the soak is
MIN_SAMPLES = 40
PROGRESS_S = 30.0
SETTLING_S = 2.0  # without a change, until descriptors are counted
SETTLING_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What to soak and how.

    Attributes:
        url, management_url: of a running server. The processes of one without a management_url are not looked at.
        model: the served model's name.
        rate: requests a second; None for RATE_SHARE of what the warm-up gives.
        duration_s: of the window.
        warm_up_s: of the closed loop, and again of the open one before the window.
    """

    url: str
    management_url: str | None
    model: str
    rate: float | None
    duration_s: float
    warm_up_s: float


class Processes:
    """The workers and the JVM of a server on this machine, and the folders of their temp files."""

    def __init__(self, management_url: str | None, model: str) -> None:
        self._processes: dict[str, psutil.Process] = {}
        self._temp_dirs: set[Path] = set()
        if management_url is None:
            return
        try:
            reply = requests.get(f"{management_url}/models/{model}", timeout=TIMEOUT_S)
            reply.raise_for_status()
            workers = [psutil.Process(worker["pid"]) for worker in reply.json()[0]["workers"]]
            jvm = workers[0].parent()
            if jvm is None:
                raise LoadTestError("a worker has no parent process")
            environment = jvm.environ()
        except (requests.RequestException, psutil.Error, ValueError, LookupError) as error:
            raise LoadTestError(f"the server's processes cannot be found by {management_url}: {error}") from error
        self._processes = {f"worker {number}": worker for number, worker in enumerate(workers, 1)} | {"JVM": jvm}
        self._temp_dirs = {Path(environment[name]) for name in ("TMPDIR", "TEMP") if environment.get(name)}

    def look(self) -> dict[str, dict[str, int]]:
        """Resident bytes, descriptors and threads of each process that still runs, by its name."""
        found = {}
        for name, process in self._processes.items():
            with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():
                if process.is_running():
                    found[name] = {
                        "rss": process.memory_info().rss,
                        "descriptors": process.num_fds(),
                        "threads": process.num_threads(),
                    }
        return found

    def look_at_rest(self, before: dict[str, Any] | None = None) -> dict[str, Any]:
        """Look when nothing is to do: once descriptors no longer change and, where there is a look before, are down to its count.

        Returns:
            "processes" as of `look`, and "temp_files": their paths; None where it is not known where they are.
        """
        deadline = time.monotonic() + SETTLING_TIMEOUT_S
        found, unchanged_since = self.look(), time.monotonic()
        while self._processes and time.monotonic() < deadline:
            time.sleep(SETTLING_S / 10)
            latest = self.look()
            if _descriptors(latest) != _descriptors(found):
                unchanged_since = time.monotonic()
            found = latest
            is_down = before is None or all(
                row["descriptors"] <= before["processes"][name]["descriptors"] for name, row in found.items()
            )
            if is_down and time.monotonic() - unchanged_since >= SETTLING_S:
                break
        temp_files = sorted(str(path) for folder in self._temp_dirs for path in folder.rglob("*"))
        return {"processes": found, "temp_files": temp_files if self._temp_dirs else None}


def _descriptors(found: dict[str, dict[str, int]]) -> dict[str, int]:
    return {name: row["descriptors"] for name, row in found.items()}


def soak(settings: Settings, interrupted: threading.Event) -> Run:
    """Learn the answers, warm up, and send for as long as is asked.

    Returns:
        one step, and in `about` all that `soak_report.build_report` reads.
    Raises:
        LoadTestError: the server does not answer, or not as it ought to when a request is alone.
        OSError: the address has no such host.
    """
    traffic = build_traffic(settings.url, settings.model, read_samples(IMAGES))
    answers = Answers(traffic)
    processes = Processes(settings.management_url, settings.model)
    about: dict[str, Any] = {
        "url": settings.url,
        "model": settings.model,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "warm_up_s": settings.warm_up_s,
        "kinds": [kind.name for kind in KINDS],
        "machine": describe_machine(),
        "resources": [],
    }
    _learn(settings.url, traffic, answers)
    rate = _warm_up(settings, traffic, answers, interrupted)
    source = f"{RATE_SHARE:.0%} of what {WARM_UP_CONNECTIONS} connections got" if settings.rate is None else "as asked for"
    about |= {"rate": settings.rate or rate, "rate_source": source, "wrong_before": answers.wrong_count}
    about["before"] = processes.look_at_rest()
    samples = run_open(
        settings.url,
        traffic.calls,
        rate=about["rate"],
        duration_s=settings.duration_s,
        warm_up_s=settings.warm_up_s,
        timeout_s=TIMEOUT_S,
        tick=_watching(settings, processes, answers, about["resources"], interrupted),
        inspect=answers.check,
    )
    about["after"] = processes.look_at_rest(about["before"])
    about |= {"duration_s": samples.duration_s, "first_wrong": answers.first_wrong, "interrupted": interrupted.is_set()}
    return Run(about, [samples])


def _learn(url: str, traffic: Traffic, answers: Answers) -> None:
    """Send every distinct call alone."""
    calls = traffic.distinct_calls()
    _tell(f"learning the answers to {len(calls)} requests ...")
    run_closed(
        url,
        calls,
        connections=1,
        duration_s=LEARNING_TIMEOUT_S,
        timeout_s=TIMEOUT_S,
        tick=lambda now_s, count: answers.learned_count < len(calls) and not answers.wrong_count,
        inspect=answers.learn,
    )
    if answers.wrong_count:
        raise LoadTestError(f"a request that was alone has a wrong answer: {answers.first_wrong}")
    if answers.learned_count < len(calls):
        raise LoadTestError(f"{len(calls) - answers.learned_count} requests that were alone have no answer")


def _warm_up(settings: Settings, traffic: Traffic, answers: Answers, interrupted: threading.Event) -> float:
    """Send as much as the server takes. Returns the rate to go on with, of the second half."""
    _tell(f"warming up for {settings.warm_up_s:g} s ...")
    samples = run_closed(
        settings.url,
        traffic.calls,
        connections=WARM_UP_CONNECTIONS,
        duration_s=settings.warm_up_s / 2,
        warm_up_s=settings.warm_up_s / 2,
        timeout_s=TIMEOUT_S,
        tick=lambda now_s, count: not interrupted.is_set(),
        inspect=answers.check,
    )
    rate = _right_rate(samples)
    if not rate or interrupted.is_set():
        raise LoadTestError("interrupted in the warm-up" if interrupted.is_set() else "the warm-up got no answer")
    _tell(f"{WARM_UP_CONNECTIONS} connections got {rate:.1f} right answers a second")
    return RATE_SHARE * rate


def _right_rate(samples: Samples) -> float:
    in_window = (samples.done_s >= 0) & (samples.done_s < samples.duration_s)
    return float((in_window & (samples.failure == Failure.NONE)).sum() / samples.duration_s)


def _watching(
    settings: Settings, processes: Processes, answers: Answers, resources: list[dict[str, Any]], interrupted: threading.Event
) -> Tick:
    """Look at the processes from time to time, and say how far it is."""
    sample_s = min(SAMPLE_S, settings.duration_s / MIN_SAMPLES)
    next_sample_s, next_line_s = 0.0, PROGRESS_S - settings.warm_up_s

    def tick(now_s: float, request_count: int) -> bool:
        nonlocal next_sample_s, next_line_s
        if next_sample_s <= now_s < settings.duration_s:
            next_sample_s = now_s + sample_s
            resources.append({"s": now_s, "processes": processes.look()})
        if now_s >= next_line_s:
            next_line_s += PROGRESS_S
            resident = ", ".join(f"{name} {row['rss'] / MIB:.0f} MiB" for name, row in processes.look().items())
            _tell(
                f"{now_s / 60:.1f} of {settings.duration_s / 60:g} min: {request_count:,} requests, "
                f"{answers.wrong_count} wrong; {resident}"
            )
        return not interrupted.is_set()

    return tick


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write_report(raw_file: Path) -> Report:
    """Make text (to stdout), JSON and page of a raw file, beside it.

    Raises:
        LoadTestError: it is no such file, or there is nothing in it.
        OSError: a file cannot be written.
    """
    run = read_raw(raw_file)
    if "resources" not in run.about:
        raise LoadTestError(f"{raw_file} holds no samples of a soak")
    [samples] = run.steps
    report = build_report(run.about, samples)
    print(render_text(report))
    raw_file.with_suffix(".json").write_bytes(orjson.dumps(dataclasses.asdict(report), option=orjson.OPT_INDENT_2))
    try:
        raw_file.with_suffix(".html").write_text(render_page(report, draw_plots(run.about, samples)))
    except LoadTestError as error:
        _tell(f"no {raw_file.with_suffix('.html')}: {error}")
    return report


@contextlib.contextmanager
def _server(arguments: argparse.Namespace, interrupted: threading.Event) -> Iterator[tuple[str, str | None, str]]:
    """Address, management address and model of the server that is asked for, which runs inside."""
    if arguments.url is not None:
        yield arguments.url, arguments.management_url, arguments.model
        return
    _tell("starting TorchServe ...")
    settings = launcher.Settings(
        archive=arguments.archive, ports=launcher.Ports.free(), log_dir=Path(f"{arguments.output}-logs").resolve()
    )
    with launcher.TorchServe(settings, interrupted) as server:
        yield server.address, server.management_address, server.model_name


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.soak",
        description="Keep a server under mixed traffic with bad requests in it, and see whether it stays as it was.",
        epilog="example: %(prog)s --minutes 30",
    )
    parser.add_argument("--minutes", type=read_positive, default=30.0, metavar="N", help="default: 30; gates of time from 10 on")
    parser.add_argument(
        "--rate", type=read_positive, metavar="N", help="requests a second; default: 60 %% of what the warm-up got"
    )
    parser.add_argument("--warm-up", type=read_positive, default=60.0, metavar="S", help="twice, before; default: 60")
    parser.add_argument("--url", type=read_url, help="of a running server; default: one is started")
    parser.add_argument("--management-url", type=read_url, help="of the running server, where it is on this machine")
    parser.add_argument("--model", default=MODEL_NAME, help="of the running server; default: %(default)s")
    parser.add_argument(
        "--archive", type=Path, default=ROOT / "build" / f"{MODEL_NAME}.mar", help="to serve; default: build/digits.mar"
    )
    parser.add_argument("--report", type=Path, metavar="FILE.npz", help="send nothing: report again what this file holds")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "build" / "soak",
        metavar="NAME",
        help="of .npz, .json and .html; default: build/soak",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Soak and report, or report alone. Returns the exit code: 1 where a gate failed or the soak could not be made."""
    arguments = build_parser().parse_args(argv)
    raw_file = arguments.report or Path(f"{arguments.output}.npz")
    try:
        if arguments.report is None:
            with interruptible() as interrupted, _server(arguments, interrupted) as (url, management_url, model):
                settings = Settings(url, management_url, model, arguments.rate, arguments.minutes * 60, arguments.warm_up)
                write_raw(soak(settings, interrupted), raw_file)
        report = write_report(raw_file)
    except (LoadTestError, launcher.ServeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _tell(f"wrote {raw_file} and what was made of it, beside it")
    return int(not report.passed)


if __name__ == "__main__":
    sys.exit(main())
