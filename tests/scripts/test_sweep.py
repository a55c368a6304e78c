"""The sweep's list of changes, the files it writes for them, and its table of known numbers. The servers: tests/e2e."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from scripts.bench.load import Figures
from scripts.bench.sweep import (
    NOTHING,
    VALUES,
    Change,
    Pair,
    apply,
    build_parser,
    describe_errors,
    list_changes,
    read_property,
    render_table,
)
from scripts.paths import SERVE_CONFIG
from scripts.serving.launcher import Settings, write_property

BASE = Settings(device="cpu")
SAME = Change(NOTHING, "", "")
THREADS = Change("torch_threads", "2", "1")


def load(connections: int, rate: float, p50_ms: float, errors: dict[str, int] | None = None) -> Figures:
    return Figures(connections, 100, rate, p50_ms, 2 * p50_ms, errors or {}, 0.1)


def pair(index: int, change: Change, changed: tuple[float, float, float], committed: tuple[float, float, float]) -> Pair:
    """One round; a triple is a lone client's p50 in ms, the rate over 16 and the rate over 32 connections."""
    both = [[load(1, 9_999, p50), load(16, rate_16, 5), load(32, rate_32, 9)] for p50, rate_16, rate_32 in (changed, committed)]
    return Pair(index, change, changed=both[0], committed=both[1])


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_each_value_but_the_committed_one_is_a_change_of_its_own() -> None:
    changes = list_changes(list(VALUES))
    assert changes[0] == SAME
    assert len(set(changes)) == len(changes) == 1 + sum(len(values) - 1 for values in VALUES.values())
    assert all(change.value != change.committed in VALUES[change.setting] for change in changes[1:])


def test_committed_values_are_read_from_the_committed_files() -> None:
    committed = {change.setting: change.committed for change in list_changes(list(VALUES))[1:]}
    model_config = yaml.safe_load((SERVE_CONFIG / "model-config.yaml").read_text())
    assert committed["workers"] == str(model_config["minWorkers"])
    assert committed["batchSize"] == str(model_config["batchSize"])
    assert f"\njob_queue_size={committed['job_queue_size']}\n" in (SERVE_CONFIG / "config.properties").read_text()


def test_on_a_gpu_the_committed_values_are_those_for_gpus() -> None:
    model_config = yaml.safe_load((SERVE_CONFIG / "model-config-gpu.yaml").read_text())
    changes = list_changes(["workers", "batchSize"], "gpu")[1:]
    assert {change.setting: change.committed for change in changes} == {
        "workers": str(model_config["minWorkers"]),
        "batchSize": str(model_config["batchSize"]),
    }


def test_a_property_is_replaced_or_added_and_all_others_stay() -> None:
    text = "# job_queue_size=1\njob_queue_size=1000\nother=2\n"
    assert write_property(text, "job_queue_size", "100") == "# job_queue_size=1\nother=2\njob_queue_size=100\n"
    added = write_property(text, "vmargs", "-Xmx512m -Da=b")
    assert added == text + "vmargs=-Xmx512m -Da=b\n"
    assert read_property(added, "vmargs") == "-Xmx512m -Da=b"
    assert read_property(text, "vmargs") == ""


@pytest.mark.parametrize("change", list_changes(list(VALUES)), ids=lambda change: change.title)
def test_a_change_reaches_the_server_and_nothing_else_does(change: Change, tmp_path: Path) -> None:
    settings = apply(change, BASE, tmp_path)
    properties, log = settings.configuration.read_text(), settings.log_configuration.read_text()
    as_committed = {
        "model_config": settings.model_config == {},
        "properties": properties == BASE.configuration.read_text(),
        "log": log == BASE.log_configuration.read_text(),
    }
    if change == SAME:
        assert all(as_committed.values())
        return
    assert list(as_committed.values()).count(False) == 1
    if not as_committed["properties"]:
        assert f"\n{change.setting}={change.value}\n" in properties
        assert len(re.findall(rf"(?m)^{change.setting}=", properties)) == 1
    if not as_committed["log"]:
        assert "ACCESS_LOG" in {logger.get("name") for logger in ElementTree.fromstring(log).iter("Logger")}


def test_changed_threads_keep_the_handlers_other_settings(tmp_path: Path) -> None:
    committed = yaml.safe_load((SERVE_CONFIG / "model-config.yaml").read_text())["handler"]
    assert apply(THREADS, BASE, tmp_path).model_config == {"handler": {**committed, "torch_threads": 2}}


def test_ratios_are_taken_within_a_round_from_each_sides_best_number_of_connections() -> None:
    pairs = [
        pair(0, THREADS, (2.0, 300, 200), (1.0, 100, 150)),  # 2 times the rate
        pair(1, THREADS, (3.0, 10, 30), (2.0, 20, 5)),  # 1.5 times, in a slow minute
        pair(2, THREADS, (1.0, 90, 80), (4.0, 90, 90)),
    ]
    [row] = rows_of(render_table(pairs))
    assert row == [
        *("torch_threads", "2", "1"),
        *("90 (30 - 300)", "1.50 (1.00 - 2.00)"),
        *("2.00 (1.00 - 3.00)", "1.50 (0.25 - 2.00)", ""),
    ]


def test_errors_in_replies_make_the_row_invalid_and_are_shown() -> None:
    good = pair(0, THREADS, (2.0, 300, 200), (1.0, 100, 150))
    bad = Pair(1, THREADS, [load(16, 100, 5, {"HTTP 503": 3})], [load(16, 100, 5)])
    fine = pair(0, SAME, (1.0, 100, 100), (1.0, 100, 100))
    same, threads = rows_of(render_table([fine, good, bad]))
    assert same[0] == NOTHING
    assert same[3:] == ["100", "1.00", "1.00", "1.00", ""]
    assert threads[3:] == ["invalid", "", "", "", "changed, connections 16: 3 HTTP 503"]


def test_a_server_that_did_not_start_or_answer_makes_the_row_invalid() -> None:
    assert describe_errors(Pair(0, THREADS, problem="TorchServe ended at its start:\nlog")) == "TorchServe ended at its start"
    silent = Pair(0, THREADS, [Figures(1, 0, 0.0, None, None, {}, 0.1)], [load(1, 5, 5)])
    assert not silent.is_good
    assert describe_errors(silent) == "changed, connections 1: no reply in time"


def test_unknown_settings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_parser().parse_args(["--settings", "vmargs,workers,vmargs"]).settings == ["vmargs", "workers"]
    for option, message in (
        (["--settings", "vmargs,colour"], "expected some of batchSize, .*, got 'colour'"),
        (["--seconds", "0"], "expected a number above 0, got '0'"),
        (["--rounds", "0"], "expected a whole number from 1, got '0'"),
    ):
        with pytest.raises(SystemExit):
            build_parser().parse_args(option)
        assert re.search(message, capsys.readouterr().err)
