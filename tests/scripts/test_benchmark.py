"""The benchmarks' arithmetic and tables with known numbers, and the step's benchmark for real. The servers: tests/e2e."""

import dataclasses
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from handler.gradients.compiled import COMPILED_PASS_FILE
from handler.gradients.compiler import compile_pass
from handler.gradients.explain import Explanation, predict_and_explain
from scripts.bench import benchmark, benchmark_step
from scripts.bench.benchmark import (
    GOALS,
    BenchmarkError,
    Measurement,
    Memory,
    Results,
    render_costs,
    render_table,
    require_same_digits,
    require_same_maps,
    summarize,
)
from scripts.bench.benchmark_step import FORWARD, OURS, Timing, build_ways, check_maps, make_batch, prepare_call, render_counts
from scripts.bench.digits import dither
from scripts.bench.peers.systems import SYSTEMS, System, read_digit, read_map
from scripts.bench.rounds import Spread
from scripts.paths import ROOT, SAMPLE_FILES
from tests.tolerance import FLOAT32_SHARE, require_close

GOAL = {(goal.quantity, goal.other): goal for goal in GOALS}


def measured(round_index: int, system: str, route: str, connections: int, rate: float, p50_ms: float = 1.0) -> Measurement:
    return Measurement(round_index, system, route, connections, rate, p50_ms, 9 * p50_ms, {}, 0.5, 300 + connections, 100)


@pytest.fixture
def results() -> Results:
    """Two rounds of four systems."""
    rates: dict[str, list[tuple[float, float]]] = {  # by system: (16 connections, 32 connections) of each round
        "ours": [(4000, 5000), (3000, 2400)],
        "stock-1": [(100, 90), (60, 50)],
        "stock-8": [(50, 80), (70, 75)],
        "noop": [(9000, 10_000), (12_000, 11_000)],
    }
    p50_ms: dict[str, list[float]] = {"ours": [1.5, 2.4], "stock-1": [7, 8], "stock-8": [6, 9], "noop": [1.0, 1.2]}
    measurements = []
    for system, rounds in rates.items():
        for index, (rate_16, rate_32) in enumerate(rounds):
            measurements += [
                measured(index, system, "explain", 1, 99_999, p50_ms[system][index]),
                measured(index, system, "explain", 16, rate_16, 50),
                measured(index, system, "explain", 32, rate_32, 70),
                measured(index, system, "predict", 1, 120, 0.5),
                measured(index, system, "predict", 64, 6000),
            ]
    memory = {
        "ours": Memory(575, 300, 600),
        "stock-1": Memory(700, 400, 720),
        "stock-8": Memory(720, 410, 740),
        "noop": Memory(500, 280, 500),
    }
    return Results(tuple(measurements), memory, {"ours": 10.0, "stock-1": 11.0, "stock-8": 12.0, "noop": 9.0})


def test_a_rounds_rate_is_that_of_the_best_number_of_connections(results: Results) -> None:
    assert results.by_round("ours", "explain_rate") == [5000, 3000]
    assert results.by_round("noop", "explain_rate") == [10_000, 12_000]


def test_latency_is_the_lone_clients(results: Results) -> None:
    assert results.by_round("ours", "explain_p50_ms") == [1.5, 2.4]


@pytest.mark.parametrize(
    ("quantity", "other", "ratios", "reached"),
    [
        pytest.param("explain_rate", "stock-1", [50, 50], True, id="rates, where more is better"),
        pytest.param("explain_rate", "noop", [0.5, 0.25], False, id="a median that just falls short"),
        pytest.param("explain_p50_ms", "noop", [1.5, 2.0], False, id="latency, where less is better"),
        pytest.param("predict_rate", "noop", [1.0, 1.0], True, id="the other route"),
        pytest.param("peak_mib", "noop", [1.2], None, id="memory at its peak, without a bound"),
        pytest.param("rss_mib", "noop", [1.15], True, id="memory, looked at once, exactly at the bound"),
    ],
)
def test_ratios_are_taken_within_a_round(results: Results, quantity: str, other: str, ratios: list[float], reached: bool) -> None:
    goal = GOAL[quantity, other]
    assert results.ratios(goal) == pytest.approx(ratios)
    assert goal.is_reached(Spread.of(results.ratios(goal)).median) == reached


def test_ratio_to_a_system_that_was_not_measured_is_none(results: Results) -> None:
    assert results.ratios(GOAL["explain_rate", "mosec"]) == []


def test_round_without_replies_of_the_other_has_no_ratio(results: Results) -> None:
    silent = [dataclasses.replace(one, rate=0.0) if one.system == "noop" else one for one in results.measurements]
    with pytest.raises(BenchmarkError, match=r"expected replies from noop in every round; give it more --seconds"):
        dataclasses.replace(results, measurements=tuple(silent)).ratios(GOAL["explain_rate", "noop"])


def test_ratio_without_a_bound_is_neither_reached_nor_missed(results: Results) -> None:
    goal = GOAL["explain_rate", "stock-tuned"]
    assert goal.is_reached(3.0) is None
    tuned = [dataclasses.replace(one, system="stock-tuned") for one in results.measurements if one.system == "stock-1"]
    ready_s = {**results.ready_s, "stock-tuned": 1.0}
    memory = {**results.memory, "stock-tuned": Memory(700, 400, 720)}
    more = dataclasses.replace(results, measurements=(*results.measurements, *tuned), ready_s=ready_s, memory=memory)
    assert f"| {goal.title} | 50.00 |  |  |" in render_table(more)


def test_costs_are_those_at_the_most_connections(results: Results) -> None:
    rows = [line.strip("| ").split(" | ") for line in render_costs(results).splitlines()]
    assert rows[0][1:] == [
        f"{route}: {part}" for route in ("explain", "predict") for part in ("workers", "JVM", "load generator")
    ]
    ours = dict(zip(rows[0], next(row for row in rows if row[0] == "this service"), strict=True))
    assert (ours["explain: workers"], ours["explain: JVM"]) == ("332", "100")  # of 32 connections
    assert ours["predict: workers"] == "364"  # of 64
    # Half a core at 5,000 and at 2,400 replies a second.
    assert ours["explain: load generator"] == f"{(0.5e6 / 5000 + 0.5e6 / 2400) / 2:.0f}"


def test_spread_is_median_least_and_largest() -> None:
    assert Spread.of([5, 1, 2, 9]) == Spread(3.5, 1, 9)
    assert f"{Spread(3.5, 1, 9):.2f}" == "3.50 (1.00 - 9.00)"
    assert f"{Spread(3500, 3500, 3500):,.0f}" == "3,500"


def test_errors_of_all_loads_are_counted(results: Results) -> None:
    first = dataclasses.replace(results.measurements[0], error_counts={"HTTP 503": 2, "timeout": 1})
    last = dataclasses.replace(results.measurements[1], error_counts={"HTTP 503": 4})
    spoiled = dataclasses.replace(results, measurements=(first, last, *results.measurements[2:]))
    assert (spoiled.error_count("ours"), spoiled.error_count("noop")) == (7, 0)


def test_table_names_every_system_also_those_that_are_missing(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYSTEMS, "mosec", dataclasses.replace(SYSTEMS["mosec"], needs=("torch", "no_such_package")))
    monkeypatch.setitem(SYSTEMS, "fastapi", dataclasses.replace(SYSTEMS["fastapi"], needs=()))
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in render_table(results).splitlines()}
    assert rows["this service"] == (
        "| this service | 4,000 (3,000 - 5,000) | 1.95 (1.50 - 2.40) | 6,000 | 0.50 | 575 (300; 600) | 10.0 | 0 |"
    )
    assert "| not installed (no_such_package) |" in rows[SYSTEMS["mosec"].title]
    assert "| not asked for |" in rows[SYSTEMS["fastapi"].title]
    assert all(system.title in rows for system in SYSTEMS.values())
    assert len({line.count("|") for line in rows.values() if "p50, ms" in line or "service |" in line}) == 1


def test_table_says_which_goals_are_reached(results: Results) -> None:
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in render_table(results).splitlines()}
    assert rows[GOAL["explain_rate", "stock-1"].title].endswith("| 50.00 | at least 40 | reached |")
    assert rows[GOAL["explain_rate", "noop"].title].endswith("| 0.38 (0.25 - 0.50) | at least 0.4 | **not reached** |")
    assert rows[GOAL["explain_p50_ms", "noop"].title].endswith("| 1.75 (1.50 - 2.00) | at most 1.6 | **not reached** |")
    assert rows[GOAL["explain_rate", "mosec"].title].endswith("| not measured | at least 4 |  |")


def test_summary_is_the_table_as_data(results: Results) -> None:
    summary = json.loads(json.dumps(summarize(results)))
    assert summary["systems"]["ours"]["explain_rate"] == {"median": 4000, "low": 3000, "high": 5000}
    by_title = {goal["title"]: goal for goal in summary["goals"]}
    assert by_title[GOAL["explain_rate", "noop"].title]["median"] == pytest.approx(0.375)
    assert by_title[GOAL["explain_rate", "noop"].title]["reached"] is False
    assert by_title[GOAL["explain_rate", "mosec"].title]["reached"] is None


@pytest.mark.parametrize(
    ("reply", "digit"), [pytest.param({"digit": 7, "logits": []}, 7, id="object"), pytest.param(3, 3, id="TorchServe's number")]
)
def test_digit_is_read_from_each_kind_of_reply(reply: object, digit: int) -> None:
    assert read_digit(reply) == digit


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param({"explanation": {"saliency": [[1.5]]}}, id="ours"),
        pytest.param({"explanation": [[1.5]]}, id="a program's"),
        pytest.param([[1.5]], id="TorchServe's bare map"),
    ],
)
def test_map_is_read_from_each_kind_of_reply(reply: object) -> None:
    assert read_map(reply) == [[1.5]]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        pytest.param("--systems=noop,mosaic", "expected some of ours, stock-1", id="unknown system"),
        pytest.param("--rounds=0", "expected a whole number from 1, got '0'", id="no rounds"),
        pytest.param("--seconds=0", "expected a number above 0, got '0'", id="no time"),
    ],
)
def test_bad_option_is_named(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.build_parser().parse_args([option])
    assert message in capsys.readouterr().err


def test_this_service_needs_no_mention_among_the_systems() -> None:
    assert benchmark.build_parser().parse_args(["--systems", "ours,noop,noop"]).systems == ["noop"]


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_missing_packages_are_those_that_cannot_be_imported(system: System) -> None:
    for package in system.needs:
        try:
            __import__(package)
        except ModuleNotFoundError:
            assert package in system.missing()
        else:
            assert package not in system.missing()


def test_dithered_image_is_the_same_one_with_a_little_noise() -> None:
    with Image.open(SAMPLE_FILES[0]) as image:
        before = np.asarray(image).astype(int)
    with Image.open(BytesIO(dither(SAMPLE_FILES[0].read_bytes(), seed=1))) as image:
        after = np.asarray(image).astype(int)
    assert after.shape == (28, 28)
    assert 5 < (after - before).max() < 14
    assert dither(SAMPLE_FILES[0].read_bytes(), seed=1) != dither(SAMPLE_FILES[0].read_bytes(), seed=2)


def test_system_that_reads_another_digit_is_not_compared() -> None:
    require_same_digits("mosec", [1, 2, 3], [1, 2, 3])
    with pytest.raises(BenchmarkError, match=r"mosec reads other digits than ours: a 2 as 7, a 3 as 2$"):
        require_same_digits("mosec", [1, 7, 2], [1, 2, 3])


@pytest.mark.parametrize("number", [50.0011, -50.0, float("nan")])
def test_system_with_a_wrong_number_in_several_maps_is_not_compared(number: float) -> None:
    expected = np.full((20, 28, 28), 50.0)
    found = expected.copy()
    found[:9, 4, 5] = 50.0009
    found[19] = 5  # as where two inputs of a max pool tie
    assert require_same_maps("mosec", found, expected) == pytest.approx(1.8e-5)
    found[:4, 27, 0] = number  # too many to be ties in a max pool
    with pytest.raises(BenchmarkError, match=r"mosec has maps that differ from those of ours by "):
        require_same_maps("mosec", found, expected)


def test_maps_of_zeros_are_the_same_as_zeros_alone() -> None:
    zeros = np.zeros((20, 28, 28))
    assert require_same_maps("mosec", zeros, zeros) == 0
    with pytest.raises(BenchmarkError, match=r"mosec has maps that differ from those of ours by inf of their largest number"):
        require_same_maps("mosec", zeros + 1e-300, zeros)


# --- the step


def test_step_is_timed_in_turns_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert benchmark_step.main(["--batch-sizes", "1", "8", "--seconds", "0.01", "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert printed.rstrip() == (tmp_path / "benchmark_step.md").read_text().rstrip()
    for way in build_ways():
        assert len(re.findall(r"[\d,]+ \(\d+\.\d\d\)", next(line for line in printed.splitlines() if f"| {way} |" in line))) == 2
    timings = json.loads((tmp_path / "benchmark_step.json").read_text())["timings"]
    assert all(timing["turns"] >= benchmark_step.MIN_TURNS for timing in timings)
    assert {timing["multiple_quartiles"][1] for timing in timings if timing["way"] == FORWARD} == {1.0}


def test_step_is_timed_beside_the_forward_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert benchmark_step.main(["--batch-sizes", "2", "--seconds", "0.01", "--alone", "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == [FORWARD, OURS]


def test_step_compares_nothing_that_gives_wrong_gradients() -> None:
    ways = build_ways()
    pixels = make_batch(3)
    targets = ways[FORWARD](pixels, torch.empty(0)).argmax(dim=1).clone()
    assert check_maps(ways, pixels, targets) <= FLOAT32_SHARE
    with pytest.raises(ValueError, match=r"the ways differ by \d.* at batch size 3"):
        check_maps(ways, pixels, (targets + 1) % 10)  # ours explains the predicted classes, whatever it is told


def test_step_table_has_medians_of_durations_and_of_multiples() -> None:
    timings = [Timing("a way", 8, (10.0, 20.0, 90.0), (2.0, 2.5, 3.0)), Timing("a way", 1, (1.0,), (1.25,))]
    assert benchmark_step.render_timings(timings).splitlines()[-1] == "| a way | 20 (2.50) | 1 (1.25) |"


# --- its instructions: what is counted is what is served; counting itself needs valgrind and minutes, and is PyTorch's own


def test_calls_score_and_explain(network: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / COMPILED_PASS_FILE
    file.write_text(compile_pass(network, (1, 28, 28)))
    logits, explanations = predict_and_explain(network, make_batch(3), [(None,)] * 3)
    scored = prepare_call(FORWARD, str(file), 3)()
    assert isinstance(scored, torch.Tensor)
    require_close(scored, logits)
    own_logits, own_explanations = cast(tuple[NDArray[np.float32], list[Explanation]], prepare_call(OURS, str(file), 3)())
    require_close(own_logits, logits)
    for own, expected in zip(own_explanations, explanations, strict=True):
        assert expected is not None
        require_close(own.maps, expected.maps, row_axes=2)


def test_a_counting_process_makes_its_call_by_itself(network: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / COMPILED_PASS_FILE
    file.write_text(compile_pass(network, (1, 28, 28)))
    process: dict[str, Any] = {}
    exec(benchmark_step.SETUP.format(root=str(ROOT), way=OURS, compiled_pass=str(file), batch_size=2), process)
    logits, explanations = process["call"]()
    assert (logits.shape, len(explanations)) == ((2, 10), 2)


def test_counts_are_given_as_multiples_of_the_forward() -> None:
    table = render_counts({FORWARD: {1: 2_000_000, 8: 11_000_000}, OURS: {1: 3_000_000, 8: 10_000_000}})
    assert table.splitlines()[2:] == [
        f"| {FORWARD} | 2.00 (1.000) | 11.00 (1.000) |",
        f"| {OURS} | 3.00 (1.500) | 10.00 (0.909) |",
    ]
