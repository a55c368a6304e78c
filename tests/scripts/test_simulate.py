"""The simulation of an autoscaler, against queueing theory and against Kubernetes' own rules."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from scripts.cluster import simulate as program
from scripts.cluster.simulation import Cluster, Outcome, Simulation, desired_pods, draw_arrivals, simulate, trapezoid

FIXED = Cluster(workers=1, batch_size=1, queue_size=10**6, least=1, target=None)


def constant(rate: float, seconds: int) -> NDArray[np.float64]:
    return np.full(seconds, rate)


def test_wait_of_one_worker_is_that_of_pollaczek_and_khinchine() -> None:
    """Service times of 50 and 150 ms, at 60 % load: a mean wait of rate * E[s^2] / (2 * (1 - load))."""
    service_s = np.array([0.05, 0.15])
    rate = 6.0
    outcome = simulate(FIXED, service_s, constant(rate, 40_000))
    wait_s = rate * (service_s**2).mean() / (2 * (1 - rate * service_s.mean()))
    assert outcome.latencies_s.mean() == pytest.approx(service_s.mean() + wait_s, rel=0.05)
    assert len(outcome.refused_s) == 0
    assert outcome.pod_seconds == 40_000


def test_two_workers_wait_as_erlang_says() -> None:
    """Exponential service times: Erlang's C formula for two workers at 70 % load."""
    service_s = np.random.default_rng(1).exponential(0.1, 100_000)
    rate, mean_s = 14.0, service_s.mean()
    load = rate * mean_s / 2
    waits = 2 * load**2 / (1 + load)  # the share of requests that find both workers busy
    outcome = simulate(replace(FIXED, workers=2), service_s, constant(rate, 40_000))
    assert outcome.latencies_s.mean() == pytest.approx(mean_s + waits * mean_s / (2 * (1 - load)), rel=0.05)


def test_batch_is_answered_as_a_whole() -> None:
    """Three requests at once, of 1 s each, in a batch of three: the first goes alone, the others together."""
    arrivals = np.array([0.0, 0.1, 0.2])
    run = Simulation(replace(FIXED, batch_size=3), np.array([1.0]), np.random.default_rng(0)).run(arrivals, 10.0)
    assert run.latencies_s.tolist() == pytest.approx([1.0, 2.9, 2.8])


def test_full_queue_refuses() -> None:
    """One worker that is busy for the whole time: the first works, five wait."""
    outcome = simulate(replace(FIXED, queue_size=5), np.array([10_000.0]), constant(10, 60))
    assert len(outcome.latencies_s) == 6
    assert len(outcome.refused_s) == len(draw_arrivals(constant(10, 60), np.random.default_rng(0))) - 6


@pytest.mark.parametrize(
    ("value", "current", "expected"),
    [
        pytest.param(None, 7, 7, id="no value"),
        pytest.param(16 * 5, 5, 5, id="on target"),
        pytest.param(16 * 5.4, 5, 5, id="within the tolerance"),
        pytest.param(16 * 5.6, 5, 6, id="above it"),
        pytest.param(16 * 4.4, 5, 5, id="below it, rounded up"),
        pytest.param(16 * 3.9, 5, 4, id="fewer"),
        pytest.param(0.0, 5, 2, id="fewest"),
        pytest.param(1e6, 5, 20, id="most"),
    ],
)
def test_desired_pods(value: float | None, current: int, expected: int) -> None:
    assert desired_pods(value, current, Cluster()) == expected


@pytest.fixture(scope="module")
def risen() -> Outcome:
    """From 20 to 100 requests a second at 600 s, and back at 2,400 s; a pod can answer 40."""
    rates = np.concatenate([constant(20, 600), constant(100, 1800), constant(20, 3600)])
    return simulate(Cluster(target=4.0), np.array([0.05]), rates)


def test_pods_follow_the_load_up_and_down(risen: Outcome) -> None:
    before = [count for time, count in risen.pods if time <= 600]
    assert before == [2]
    up = [time for time, count in risen.pods if count > 2]
    assert 600 < up[0] < 720  # two minutes: window, scrape, rule and period
    assert max(count for _, count in risen.pods) >= math.ceil(100 * 0.05 / 2)
    assert risen.pods[-1][1] == 2
    last_up_s = 0.0
    for (_, earlier), (time, later) in itertools.pairwise(risen.pods):
        if later > earlier:
            last_up_s = time
            assert later <= earlier + max(earlier, 4)
        else:
            assert time >= last_up_s + 300  # five quiet minutes
            assert later >= int(0.9 * earlier)  # a tenth a minute


def test_all_requests_are_answered_once_or_refused(risen: Outcome) -> None:
    rates = np.concatenate([constant(20, 600), constant(100, 1800), constant(20, 3600)])
    came = draw_arrivals(rates, np.random.default_rng(0))
    assert np.array_equal(np.sort(np.concatenate([risen.arrivals_s, risen.refused_s])), came)
    assert risen.latencies_s.min() >= 0.05 - 1e-9


def test_trapezoid() -> None:
    rise = trapezoid(np.arange(8.0), start_s=1, ramp_s=2, plateau_s=2)
    assert rise.tolist() == [0, 0, 0.5, 1, 1, 1, 0.5, 0]


def test_program_reports_each_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"what": "a test", "service_s": [0.05, 0.06]}))
    options = ["--rate=2", "--peak=40", "--in-flight", "2", "8", "--plateau-minutes=5", "--ramp-minutes=2"]
    assert program.main([f"--service-times={times}", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 1 + 2 + 4
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    fixed = next(line for line in lines if line.startswith("| fixed, 2 pods"))
    assert " 48 |" in fixed


def test_missing_service_times_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([f"--service-times={tmp_path / 'none.json'}"]) == 1
    assert "error: no service times: " in capsys.readouterr().err
    assert program.main([f"--service-times={tmp_path / 'none.json'}", "--measure=http://127.0.0.1:9"]) == 1
