"""Keep a server under mixed traffic with bad requests and attacks for half an hour, and check that it stays as it was.

    python -m scripts.bench.soak --minutes 30

Starts a server of its own (or uses a running one: --url), learns the right answers from requests sent one at a time
(soak_traffic.py), warms up with as many requests as the server takes, then sends requests by the clock, by default at 60 % of
that rate, and compares every answer. Meanwhile it samples resident memory, descriptors and threads of the workers and the JVM;
before and after, with the server idle, it counts descriptors and temp files. All samples go to OUTPUT.npz first; the text,
OUTPUT.json and OUTPUT.html are made of that file alone (soak_report.py defines the figures), and `--report OUTPUT.npz` makes them
again. Exits with 1 where a gate fails.
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

import psutil
import requests

from scripts.bench.arguments import read_address, read_positive
from scripts.bench.interruption import interruptible
from scripts.bench.load import Failure, Load, Samples, Tick, run_load
from scripts.bench.load.recording import LoadTestError, Recording, read_recording, write_recording
from scripts.bench.machine import describe_machine
from scripts.bench.soak_report import MIB, Report, build_report, render_html, render_text
from scripts.bench.soak_traffic import KINDS, Answers, Traffic, build_traffic, read_samples
from scripts.pages import write_report
from scripts.paths import ARCHIVE, BUILD, MODEL_NAME, SAMPLE_FILES
from scripts.serving import launcher

IMAGES = [file for file in SAMPLE_FILES if file.stem.endswith("-1")]  # one of each class
RATE_SHARE = 0.6  # of what the closed loop gives: near the knee, with room for the machine's other work
WARM_UP_CONNECTIONS = 32
TIMEOUT_S = 60.0
LEARNING_TIMEOUT_S = 300.0
SAMPLE_S = 5.0  # between samples of the processes; shorter in a short soak
MIN_SAMPLES = 40
PROGRESS_S = 30.0
SETTLING_S = 2.0  # without a change, before descriptors are counted
SETTLING_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. The processes of one without a management address are not sampled."""

    address: str
    management_address: str | None
    model: str


class Processes:
    """The workers and the JVM of a server on this machine, and the folders of their temp files."""

    def __init__(self, server: Server) -> None:
        self._processes: dict[str, psutil.Process] = {}
        self._temp_dirs: set[Path] = set()
        if server.management_address is None:
            return
        try:
            reply = requests.get(f"{server.management_address}/models/{server.model}", timeout=TIMEOUT_S)
            reply.raise_for_status()
            workers = [psutil.Process(worker["pid"]) for worker in reply.json()[0]["workers"]]
            jvm = workers[0].parent()
            if jvm is None:
                raise LoadTestError("a worker has no parent process")
            environment = jvm.environ()
        except (requests.RequestException, psutil.Error, ValueError, LookupError) as error:
            raise LoadTestError(f"the server's processes cannot be found by {server.management_address}: {error}") from error
        self._processes = {f"worker {number}": worker for number, worker in enumerate(workers, 1)} | {"JVM": jvm}
        self._temp_dirs = {Path(environment[name]) for name in ("TMPDIR", "TEMP") if environment.get(name)}

    def sample(self) -> dict[str, dict[str, int]]:
        """Read resident bytes, descriptors and threads of each process that still runs, by its name."""
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

    def sample_at_rest(self, before: dict[str, Any] | None = None) -> dict[str, Any]:
        """Sample the idle processes: once descriptors no longer change and, given an earlier sample, are down to its counts.

        Returns:
            "processes" as of `sample`, and "temp_files": their paths; None where their folder is not known.
        """
        deadline = time.monotonic() + SETTLING_TIMEOUT_S
        found, unchanged_since = self.sample(), time.monotonic()
        while self._processes and time.monotonic() < deadline:
            time.sleep(SETTLING_S / 10)
            latest = self.sample()
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


def soak(server: Server, load: Load, traffic: Traffic, interrupted: threading.Event) -> Recording:
    """Learn the answers, warm up, and send the load.

    Args:
        load: the traffic's calls; its warm-up is made in a closed loop first, then again at the rate. Without a rate it gets
            RATE_SHARE of what the closed loop gives.
    Returns:
        one step, and in `about` all that `soak_report.build_report` reads.
    Raises:
        LoadTestError: the server does not answer, or answers wrongly to a request that is alone.
        OSError: the address has no such host.
    """
    answers = Answers(traffic)
    processes = Processes(server)
    about: dict[str, Any] = {
        "url": server.address,
        "model": server.model,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "warm_up_s": load.warm_up_s,
        "kinds": [kind.name for kind in KINDS if not kind.attack],
        "attacks": [kind.name for kind in KINDS if kind.attack],
        "machine": describe_machine(),
        "resources": [],
    }
    _learn(load.address, traffic, answers)
    rate = _warm_up(load, answers, interrupted)
    source = f"{RATE_SHARE:.0%} of what {WARM_UP_CONNECTIONS} connections got" if load.rate is None else "as asked for"
    load = dataclasses.replace(load, rate=load.rate or rate)
    about |= {"rate": load.rate, "rate_source": source, "wrong_before": answers.wrong_count}
    about["before"] = processes.sample_at_rest()
    samples = run_load(load, tick=_watch(load, processes, answers, about["resources"], interrupted), inspect=answers.check)
    about["after"] = processes.sample_at_rest(about["before"])
    about |= {"duration_s": samples.duration_s, "first_wrong": answers.first_wrong, "interrupted": interrupted.is_set()}
    return Recording(about, [samples])


def _learn(address: str, traffic: Traffic, answers: Answers) -> None:
    """Send every distinct call alone."""
    calls = traffic.distinct_calls()
    _tell(f"learning the answers to {len(calls)} requests ...")
    run_load(
        Load(address, calls, LEARNING_TIMEOUT_S, connections=1, timeout_s=TIMEOUT_S),
        tick=lambda now_s, count: answers.learned_count < len(calls) and not answers.wrong_count,
        inspect=answers.learn,
    )
    if answers.wrong_count:
        raise LoadTestError(f"a request that was alone has a wrong answer: {answers.first_wrong}")
    if answers.learned_count < len(calls):
        raise LoadTestError(f"{len(calls) - answers.learned_count} requests that were alone have no answer")


def _warm_up(load: Load, answers: Answers, interrupted: threading.Event) -> float:
    """Send as much as the server takes. Returns the rate to go on with, by the second half."""
    _tell(f"warming up for {load.warm_up_s:g} s ...")
    half_s = load.warm_up_s / 2
    closed = dataclasses.replace(load, rate=None, connections=WARM_UP_CONNECTIONS, duration_s=half_s, warm_up_s=half_s)
    samples = run_load(closed, tick=lambda now_s, count: not interrupted.is_set(), inspect=answers.check)
    rate = _right_rate(samples)
    if not rate or interrupted.is_set():
        raise LoadTestError("interrupted in the warm-up" if interrupted.is_set() else "the warm-up got no answer")
    _tell(f"{WARM_UP_CONNECTIONS} connections got {rate:.1f} right answers a second")
    return RATE_SHARE * rate


def _right_rate(samples: Samples) -> float:
    in_window = (samples.done_s >= 0) & (samples.done_s < samples.duration_s)
    return float((in_window & (samples.failure == Failure.NONE)).sum() / samples.duration_s)


def _watch(
    load: Load, processes: Processes, answers: Answers, resources: list[dict[str, Any]], interrupted: threading.Event
) -> Tick:
    """Make a tick that samples the processes into `resources` from time to time, and reports progress."""
    sample_s = min(SAMPLE_S, load.duration_s / MIN_SAMPLES)
    next_sample_s, next_line_s = 0.0, PROGRESS_S - load.warm_up_s

    def tick(now_s: float, request_count: int) -> bool:
        nonlocal next_sample_s, next_line_s
        if next_sample_s <= now_s < load.duration_s:
            next_sample_s = now_s + sample_s
            resources.append({"s": now_s, "processes": processes.sample()})
        if now_s >= next_line_s:
            next_line_s += PROGRESS_S
            resident = ", ".join(f"{name} {row['rss'] / MIB:.0f} MiB" for name, row in processes.sample().items())
            _tell(
                f"{now_s / 60:.1f} of {load.duration_s / 60:g} min: {request_count:,} requests, "
                f"{answers.wrong_count} wrong; {resident}"
            )
        return not interrupted.is_set()

    return tick


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report_again(raw_file: Path) -> Report:
    """Make text (to stdout), JSON and page of a raw file, beside it.

    Raises:
        LoadTestError: the file is of another kind, or empty.
        OSError: a file cannot be written.
    """
    recording = read_recording(raw_file)
    about = recording.about
    if "resources" not in about:
        raise LoadTestError(f"{raw_file} holds no samples of a soak")
    [samples] = recording.steps
    report = build_report(about, samples)
    print(render_text(report))
    write_report(raw_file, report, lambda: render_html(report, about, samples))
    return report


@contextlib.contextmanager
def _serving(arguments: argparse.Namespace, interrupted: threading.Event) -> Iterator[Server]:
    """Name the running server, or start one that runs inside."""
    if arguments.url is not None:
        yield Server(arguments.url, arguments.management_url, arguments.model)
        return
    _tell("starting TorchServe ...")
    settings = launcher.Settings(
        archive=arguments.archive, ports=launcher.Ports.free(), log_dir=Path(f"{arguments.output}-logs").resolve()
    )
    with launcher.TorchServe(settings, interrupted) as started:
        yield Server(started.address, started.management_address, started.model_name)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.soak",
        description="Keep a server under mixed traffic with bad requests and attacks, and check that it stays as it was.",
        epilog="example: %(prog)s --minutes 30",
    )
    parser.add_argument("--minutes", type=read_positive, default=30.0, metavar="N", help="default: 30; gates of time from 10 on")
    parser.add_argument(
        "--rate", type=read_positive, metavar="N", help="requests a second; default: 60 %% of what the warm-up got"
    )
    parser.add_argument("--warm-up", type=read_positive, default=60.0, metavar="S", help="twice, before; default: 60")
    parser.add_argument("--url", type=read_address, help="of a running server; default: one is started")
    parser.add_argument("--management-url", type=read_address, help="of the running server, where it is on this machine")
    parser.add_argument("--model", default=MODEL_NAME, help="of the running server; default: %(default)s")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="to serve; default: build/digits.mar")
    parser.add_argument("--report", type=Path, metavar="FILE.npz", help="send nothing: report again what this file holds")
    parser.add_argument(
        "--output",
        type=Path,
        default=BUILD / "soak",
        metavar="NAME",
        help="of .npz, .json and .html; default: build/soak",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Soak and report, or report alone. Returns the exit code: 1 where a gate failed or the soak could not run."""
    arguments = build_parser().parse_args(argv)
    raw_file = arguments.report or Path(f"{arguments.output}.npz")
    try:
        if arguments.report is None:
            with interruptible() as interrupted, _serving(arguments, interrupted) as server:
                traffic = build_traffic(server.address, server.model, read_samples(IMAGES))
                load = Load(
                    server.address,
                    traffic.calls,
                    duration_s=arguments.minutes * 60,
                    rate=arguments.rate,
                    warm_up_s=arguments.warm_up,
                    timeout_s=TIMEOUT_S,
                )
                write_recording(soak(server, load, traffic, interrupted), raw_file)
        report = report_again(raw_file)
    except (LoadTestError, launcher.ServeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _tell(f"wrote {raw_file} and, beside it, the reports made from it")
    return int(not report.passed)


if __name__ == "__main__":
    sys.exit(main())
