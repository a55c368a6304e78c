"""The GPU report, run for real on the CPU in a small form; and what it does where a part fails or dies."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from handler.gradients.explain import predict_and_explain
from scripts.bench import benchmark, gpu_report
from scripts.bench.digits import read_pixels
from scripts.bench.gpu_report import (
    TOLERANCE,
    Outcome,
    Plan,
    Row,
    Table,
    main,
    measure,
    measure_peers,
    measure_speed,
    read_junit,
    run_parts,
)
from scripts.bench.peers.systems import SYSTEMS
from scripts.paths import SAMPLE_FILES
from tests.tolerance import require_close

PLAN = Plan("cpu", 0.1, [1], [1], [1])


@pytest.mark.long
def test_report_on_the_cpu_has_every_figure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "report.json"
    command = ["--device=cpu", "--parts=exactness,serving", "--seconds=0.5", "--workers=1", "--connections=2"]
    exit_code = main([*command, "--served-batch-sizes=4,32", f"--output={output}"])
    report, captured = json.loads(output.read_text()), capfd.readouterr()
    assert [result["problems"] for result in report["parts"].values()] == [[], []]
    assert exit_code == 0
    assert report["about"]["torch"] == torch.__version__.partition("+")[0]
    assert "--parts=exactness,serving" in report["about"]["command"]
    (exactness,) = report["parts"]["exactness"]["tables"]
    assert f"{len(SAMPLE_FILES)} digits, {10 * len(SAMPLE_FILES)} maps" in exactness["title"]
    differences = {row["by"]: row["largest difference of maps"] for row in exactness["rows"]}
    assert 0 < differences["compiled pass"] <= TOLERANCE  # it computes in another order than autograd
    assert differences["autograd"] == 0
    (serving,) = report["parts"]["serving"]["tables"]
    assert [(row["workers"], row["batches of up to"], row["connections"], row["kind"]) for row in serving["rows"]] == [
        (1, 32, 2, "predict"),
        (1, 32, 2, "explain-npy"),
        (2, 4, 2, "predict"),
        (2, 4, 2, "explain-npy"),
    ]
    assert all(row["requests/s"] > 0 for row in serving["rows"])
    assert captured.out.strip() == output.with_suffix(".md").read_text().strip()
    assert all(f"{name}: done after" in captured.err for name in report["parts"])


def test_speed_is_measured_for_every_batch_size_and_way() -> None:
    served, ways = measure_speed(Plan("cpu", 0.05, [1, 60], [], [])).tables
    assert [row["batch"] for row in served.rows] == [1] * 4 + [60] * 4
    assert len({row["what"] for row in served.rows}) == 4
    assert [row["what"] for row in ways.rows] == ["class chosen on the device"] * 2
    for row in served.rows + ways.rows:
        quantiles = [float(row[f"{name} ms"] or 0) for name in ("p10", "median", "p90")]
        assert quantiles[0] > 0
        assert quantiles == sorted(quantiles)


@pytest.mark.long
def test_peers_are_those_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "PEERS", "noop")
    monkeypatch.setattr(gpu_report, "PEER_ROUNDS", 1)
    monkeypatch.setattr(benchmark, "BUSY_CONNECTIONS", (4,))
    outcome = measure_peers(replace(PLAN, seconds=0.5, folder=tmp_path))
    systems, ratios = outcome.tables
    assert outcome.problems == []
    assert [row["system"] for row in systems.rows] == [SYSTEMS["ours"].title, SYSTEMS["noop"].title]
    rates = [float(row["explanations/s"] or 0) for row in systems.rows]
    assert rates[0] / rates[1] == pytest.approx(ratios.rows[0]["median"])
    assert "on the cpu" in (tmp_path / "peers" / "benchmark.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_no_part_passes_the_cpu_off_as_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for part in gpu_report.PARTS.values():
        with pytest.raises(RuntimeError, match="sees no GPU"):
            part(replace(PLAN, device="gpu"))
    assert main(["--device=gpu", "--parts=speed", f"--output={tmp_path / 'report.json'}"]) == 1
    assert "## speed: FAILED" in capfd.readouterr().out


def raise_an_error(plan: Plan) -> Outcome:
    raise ValueError(f"no {plan.device}")


def die(_plan: Plan) -> Outcome:
    os.abort()


def find_a_problem(plan: Plan) -> Outcome:
    row: Row = {"process": os.getpid(), "what": plan.device, "GiB": None, "rate": float("nan")}
    return Outcome([Table("one", [row])], ["two lines\nof a problem"])


def test_part_survives_whatever_happens_to_another(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    assert not run_parts({"error": raise_an_error, "death": die, "problem": find_a_problem}, PLAN, {}, output)
    results = json.loads(output.read_text())["parts"]
    assert [result["ok"] for result in results.values()] == [False, False, False]
    assert results["error"]["problems"] == ["ValueError: no cpu"]
    assert "BrokenProcessPool" in results["death"]["problems"][0]
    (row,) = results["problem"]["tables"][0]["rows"]
    assert row.pop("process") != os.getpid()
    assert row == {"what": "cpu", "GiB": None, "rate": None}
    page = output.with_suffix(".md").read_text()
    assert "- two lines of a problem\n" in page
    assert "| process | what | GiB | rate |\n| --- | --- | --- | --- |\n" in page


def test_digits_are_dithered_away_from_every_kink(network: nn.Module) -> None:
    """Two inputs of a pool that tie, or a ReLU at zero, would make a map jump under a change that rounding could make."""
    digits = read_pixels()[:5]
    dithered = gpu_report.dither_digits(digits)
    assert np.abs(dithered - digits).max() <= gpu_report.DITHER + 1e-6
    assert dithered.min() >= 0
    assert dithered.max() <= 1
    moved = np.nextafter(dithered, np.float32(2))
    for classes in ([0], [7]):
        maps, moved_maps = (
            [one.maps for one in predict_and_explain(network, torch.from_numpy(pixels), [classes] * 5)[1] if one]
            for pixels in (dithered, moved)
        )
        require_close(maps, moved_maps, row_axes=2)


def test_class_chosen_on_the_device_gives_what_is_served(network: nn.Module, digit_batch: torch.Tensor) -> None:
    compiled_pass = gpu_report._differentiables(network)["compiled pass"]
    logits, explanations = predict_and_explain(compiled_pass, digit_batch, [(None,)] * len(digit_batch))
    found_logits, found_maps = gpu_report._to_host(gpu_report._explain_predicted(compiled_pass, digit_batch))
    np.testing.assert_array_equal(found_logits, logits)
    np.testing.assert_array_equal(found_maps, np.concatenate([one.maps for one in explanations if one]))


def test_rate_is_that_of_the_median_call() -> None:
    calls: list[int] = []
    row = measure(lambda: calls.append(1), 5, 0.01)
    assert row["calls"] == len(calls) - gpu_report.WARM_UP_CALLS >= gpu_report.MIN_CALLS
    assert isinstance(row["median ms"], float)
    assert row["images/s"] == pytest.approx(5000 / row["median ms"])


TESTS_OF_EVERY_KIND = """
import pytest

def test_good(): pass
def test_bad(): assert 0
@pytest.fixture
def broken(): raise ValueError
def test_without_its_fixture(broken): pass
def test_skipped(): pytest.skip()
"""


@pytest.mark.parametrize(
    ("chosen", "counts", "problems"),
    [
        ("test", [1, 2, 1], ["test_kinds::test_bad failed", "test_kinds::test_without_its_fixture failed"]),
        ("good", [1, 0, 0], []),
    ],
)
def test_results_of_tests_are_counted(tmp_path: Path, chosen: str, counts: list[int], problems: list[str]) -> None:
    (tmp_path / "test_kinds.py").write_text(TESTS_OF_EVERY_KIND)
    command = [sys.executable, "-m", "pytest", "--junitxml=results.xml", "-k", chosen, "-p", "no:cacheprovider"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    results = (tmp_path / "results.xml").read_text()
    outcome = read_junit(results, finished.returncode)
    assert [outcome.tables[0].rows[0][name] for name in ("passed", "failed", "skipped")] == counts
    assert outcome.problems == problems
    assert read_junit(results, 3).problems == (problems or ["pytest ended with 3"])


def test_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--parts", "speed,magic"])
    assert "expected some of exactness, speed, tests, serving, peers, got 'magic'" in capsys.readouterr().err
