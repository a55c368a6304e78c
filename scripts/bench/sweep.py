"""Measure what each setting of the server is worth: change one at a time, against the committed settings.

    python -m scripts.bench.sweep --rounds 3 --seconds 2 --settings batchSize,vmargs

A setting takes effect at the start, and no two starts of a JVM are alike, nor two minutes of a machine. So in every round each
value gets a server of its own, beside a server of the same age with the committed settings. Both are warmed up and then measured
in turn, and the ratio of the two counts. The first row changes nothing: its ratios' distance from 1 is noise.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.bench.arguments import names_reader, read_count, read_positive
from scripts.bench.digit_requests import build_calls
from scripts.bench.digits import read_files
from scripts.bench.load import Figures
from scripts.bench.machine import join_facts
from scripts.bench.rounds import BUSY_CONNECTIONS, LONE_CONNECTION, Spread, closed_load, describe_conditions, measure
from scripts.paths import ARCHIVE, BUILD, SERVE_CONFIG
from scripts.serving.launcher import Ports, ServeError, Settings, TorchServe, find_property, read_model_config, write_property
from scripts.tables import render_markdown

NOTHING = "nothing"  # the setting of the first row
WARM_UP_CONNECTIONS = 64
WARM_UP_FACTOR = 4.0  # of a measurement's seconds, once for each server: its JVM compiles what it runs often
PROPERTY_DEFAULTS = {"number_of_netty_threads": "0", "netty_client_threads": "0", "vmargs": ""}  # 0: TorchServe chooses

VALUES: Mapping[str, Sequence[str]] = {  # all values tried of each setting; the committed one is among them
    "batchSize": ("1", "4", "8", "16", "32"),
    "maxBatchDelay": ("1", "2", "5"),
    "workers": ("1", "2", "3"),
    "torch_threads": ("1", "2"),
    "number_of_netty_threads": ("0", "1", "2", "4"),
    "netty_client_threads": ("0", "1", "2", "4"),
    "job_queue_size": ("100", "1000"),
    "metrics_mode": ("log", "prometheus"),
    "log_configuration": ("serve_config", "serve_config without access log", "as shipped"),
    "vmargs": (
        "",
        "-XX:+UseSerialGC",
        "-XX:+UseSerialGC -Xms256m -XX:+AlwaysPreTouch",
        "-XX:+UseSerialGC -Xms256m -XX:+AlwaysPreTouch -Dio.netty.allocator.maxOrder=7",
        "-XX:+UseSerialGC -Xms256m -Xmx1g -XX:+AlwaysPreTouch -XX:MaxDirectMemorySize=768m -Dio.netty.allocator.type=unpooled",
        "-XX:+UseSerialGC -Xmn256m",
        "-XX:+UseParallelGC",
        "-XX:+UseParallelGC -Xmx512m",
        "-XX:TieredStopAtLevel=1",
    ),
}


@dataclass(frozen=True, slots=True)
class Change:
    """One setting with another value than the committed one.

    Attributes:
        setting: a key of VALUES, or NOTHING.
        value, committed: as VALUES writes them.
    """

    setting: str
    value: str
    committed: str

    @property
    def title(self) -> str:
        """As the progress bar shows it."""
        return f"{self.setting} {self.value}".strip()


@dataclass(frozen=True, slots=True)
class Pair:
    """One round of one change: the figures of its server under each load, beside those of the committed settings.

    Attributes:
        problem: why there are none, where a server did not start.
    """

    round_index: int
    change: Change
    changed: list[Figures] = field(default_factory=list)
    committed: list[Figures] = field(default_factory=list)
    problem: str = ""

    @property
    def is_good(self) -> bool:
        """Whether all requests to both servers had good replies."""
        return not self.problem and all(one.is_good for one in (*self.changed, *self.committed))

    @property
    def rate_ratio(self) -> float:
        """Divide explanations a second: changed by committed."""
        return busy_rate(self.changed) / busy_rate(self.committed)

    @property
    def p50_ratio(self) -> float:
        """Divide a lone client's median latencies: changed by committed."""
        return lone_p50_ms(self.changed) / lone_p50_ms(self.committed)


def busy_rate(figures: Sequence[Figures]) -> float:
    """Good replies a second, at the best number of connections."""
    return max(one.rate for one in figures if one.connections != LONE_CONNECTION)


def lone_p50_ms(figures: Sequence[Figures]) -> float:
    """Median latency of a lone client."""
    [p50_ms] = [one.p50_ms for one in figures if one.connections == LONE_CONNECTION]
    assert p50_ms is not None, "expected good replies, got none"
    return p50_ms


# --- what is changed


def read_property(properties: str, name: str) -> str:
    """Find the value of a key in the text of config.properties, or its default."""
    found = find_property(properties, name)
    return PROPERTY_DEFAULTS[name] if found is None else found


def list_changes(settings: Sequence[str], device: str = "cpu") -> list[Change]:
    """List every value of these settings but the one committed for a device, after a first change that changes nothing."""
    model_config = read_model_config(device)
    properties = (SERVE_CONFIG / "config.properties").read_text()
    committed = {
        "batchSize": model_config["batchSize"],
        "maxBatchDelay": model_config["maxBatchDelay"],
        "workers": model_config["minWorkers"],
        "torch_threads": model_config["handler"]["torch_threads"],
        "log_configuration": "serve_config",
    }
    changes = [Change(NOTHING, "", "")]
    for setting in settings:
        own = str(committed[setting]) if setting in committed else read_property(properties, setting)
        changes += [Change(setting, value, own) for value in VALUES[setting] if value != own]
    return changes


def apply(change: Change, base: Settings, folder: Path) -> Settings:
    """Apply a change to a server's settings; the files that it needs are written into the folder."""
    model_config: dict[str, Any] = {}
    configuration, log_configuration = base.configuration, base.log_configuration
    match change.setting:
        case "nothing":  # NOTHING; a bare name would match everything
            pass
        case "workers":
            model_config = {"minWorkers": int(change.value), "maxWorkers": int(change.value)}
        case "torch_threads":
            model_config = {"handler": read_model_config(base.device)["handler"] | {"torch_threads": int(change.value)}}
        case "batchSize" | "maxBatchDelay":
            model_config = {change.setting: int(change.value)}
        case "log_configuration":
            log_configuration = folder / "log4j2.xml"
            log_configuration.write_text(_read_log_configuration(change.value))
        case _:
            configuration = folder / "config.properties"
            configuration.write_text(write_property(base.configuration.read_text(), change.setting, change.value))
    return Settings(
        archive=base.archive,
        ports=Ports.free(),
        device=base.device,
        log_dir=folder / "logs",
        model_config=model_config,
        configuration=configuration,
        log_configuration=log_configuration,
    )


def _read_log_configuration(value: str) -> str:
    if value == "as shipped":  # what TorchServe takes where no --log-config is given
        with zipfile.ZipFile(_torchserve_folder() / "frontend" / "model-server.jar") as jar:
            return jar.read("log4j2.xml").decode()
    text = (SERVE_CONFIG / "log4j2.xml").read_text()
    silent = text.replace('<Logger name="ACCESS_LOG" level="info"', '<Logger name="ACCESS_LOG" level="off"')
    assert silent != text, "log4j2.xml has no access log at the level info"
    return silent


def _torchserve_folder() -> Path:
    spec = importlib.util.find_spec("ts")
    assert spec is not None, "torchserve is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent


# --- measuring


def measure_changes(
    changes: Sequence[Change], base: Settings, *, rounds: int, seconds: float, keep: Callable[[list[Pair]], None]
) -> list[Pair]:
    """Measure all changes, round by round; every other round backwards.

    Args:
        seconds: of each measurement.
        keep: called with all pairs so far, after each.
    """
    pairs: list[Pair] = []
    with tqdm(total=rounds * len(changes), unit="pair", disable=None) as progress:
        for round_index in range(rounds):
            for change in changes if round_index % 2 == 0 else reversed(changes):
                progress.set_postfix_str(change.title)
                pairs.append(_measure_pair(change, base, round_index, seconds))
                keep(pairs)
                progress.update()
    return pairs


def _measure_pair(change: Change, base: Settings, round_index: int, seconds: float) -> Pair:
    both = [change, Change(NOTHING, "", "")]
    turn = -1 if round_index % 2 else 1  # which of both starts first and is measured first
    images = read_files()
    try:
        with contextlib.ExitStack() as stack:
            addresses = [stack.enter_context(_started(one, base)) for one in both[::turn]][::turn]
            calls = [build_calls("explain", address, images) for address in addresses]
            for address, own in zip(addresses, calls, strict=True):
                measure(closed_load(address, own, WARM_UP_CONNECTIONS, WARM_UP_FACTOR * seconds))
            figures: list[list[Figures]] = [[], []]
            for connections in (LONE_CONNECTION, *BUSY_CONNECTIONS):
                for which in (0, 1)[::turn]:
                    figures[which].append(measure(closed_load(addresses[which], calls[which], connections, seconds)))
                turn = -turn
    except ServeError as error:
        return Pair(round_index, change, problem=str(error))
    return Pair(round_index, change, changed=figures[0], committed=figures[1])


@contextlib.contextmanager
def _started(change: Change, base: Settings) -> Iterator[str]:
    """Run a server with one change; gives its address."""
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder, TorchServe(apply(change, base, Path(folder))) as server:
        yield server.address


# --- reporting

COLUMNS = (
    "setting",
    "value",
    "committed",
    "explanations/s",
    "times committed",
    "lone client's p50, ms",
    "times committed",
    "errors",
)


def render_table(pairs: Sequence[Pair]) -> str:
    """Write one row a change, as Markdown: medians over the rounds, with the least and the largest."""
    rows = []
    for change in dict.fromkeys(pair.change for pair in pairs):
        values = ["", ""] if change.setting == NOTHING else [change.value or "none", change.committed or "none"]
        own = [pair for pair in pairs if pair.change == change]
        if all(pair.is_good for pair in own):
            cells = [
                format(Spread.of([busy_rate(pair.changed) for pair in own]), ",.0f"),
                format(Spread.of([pair.rate_ratio for pair in own]), ".2f"),
                format(Spread.of([lone_p50_ms(pair.changed) for pair in own]), ".2f"),
                format(Spread.of([pair.p50_ratio for pair in own]), ".2f"),
                "",
            ]
        else:
            cells = ["invalid", "", "", "", "; ".join(dict.fromkeys(filter(None, map(describe_errors, own))))]
        rows.append([change.setting, *values, *cells])
    return render_markdown(COLUMNS, rows)


def describe_errors(pair: Pair) -> str:
    """Say in a line what went wrong in a round; empty where all is good."""
    if pair.problem:
        return pair.problem.partition("\n")[0].rstrip(":")
    found = []
    for who, figures in (("changed", pair.changed), ("committed", pair.committed)):
        for one in figures:
            problems = [f"{count} {kind}" for kind, count in one.error_counts.items()] if one.requests else ["no reply in time"]
            found += [f"{who}, connections {one.connections}: {problem}" for problem in problems]
    return ", ".join(found)


def _summarize(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Give each pair with its ratios, for JSON."""
    return [
        asdict(pair) | ({"rate_ratio": pair.rate_ratio, "p50_ratio": pair.p50_ratio} if pair.is_good else {}) for pair in pairs
    ]


# --- the command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.sweep",
        description="Measure what each setting of the server is worth, changed alone, against the committed settings.",
        epilog="example: %(prog)s --rounds 3 --seconds 2 --settings batchSize,vmargs",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=read_count, default=3, help="how often everything is measured")
    parser.add_argument("--seconds", type=read_positive, default=2.0, help="of each of a server's four measurements in a round")
    parser.add_argument("--settings", type=names_reader(VALUES), default=",".join(VALUES), help="which are changed, with commas")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="what is served")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="cpu", help="as of scripts.serving.launcher")
    parser.add_argument("--output", metavar="FILE", type=Path, default=BUILD / "sweep.json", help="all single numbers")
    return parser


def _write(conditions: Mapping[str, Any], file: Path, pairs: Sequence[Pair]) -> None:
    file.write_text(json.dumps({**conditions, "pairs": _summarize(pairs)}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit code: 1 where a row is invalid."""
    arguments = build_parser().parse_args(argv)
    conditions = describe_conditions("sweep", argv, arguments, device=arguments.device)
    print(join_facts(conditions["machine"]), file=sys.stderr)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    keep = functools.partial(_write, conditions, arguments.output)
    base = Settings(archive=arguments.archive, device=arguments.device)
    changes = list_changes(arguments.settings, arguments.device)
    pairs = measure_changes(changes, base, rounds=arguments.rounds, seconds=arguments.seconds, keep=keep)
    print(render_table(pairs))
    return int(not all(pair.is_good for pair in pairs))


if __name__ == "__main__":
    sys.exit(main())
