"""The benchmark with real servers, briefly: this service beside a handler that does nothing; and its checks of answers."""

import json
from pathlib import Path

import psutil
import pytest

from scripts.bench import benchmark
from scripts.bench.benchmark import BenchmarkError, check_answers
from scripts.bench.peers.systems import SYSTEMS, Running, Workplace
from scripts.bench.rounds import LONE_CONNECTION
from scripts.paths import SAMPLE_FILES
from scripts.serving.launcher import TorchServe
from tests.kinks import dithered_png
from tests.tolerance import FLOAT32_SHARE


@pytest.mark.long
def test_benchmark_measures_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "BUSY_CONNECTIONS", (16,))
    options = [
        "--rounds",
        "1",
        "--warm-up-rounds",
        "1",
        "--seconds",
        "0.5",
        "--workers",
        "1",
        "--systems",
        "noop",
        "--output",
        str(tmp_path),
    ]
    assert benchmark.main(options) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip() == (tmp_path / "benchmark.md").read_text().rstrip()
    content = json.loads((tmp_path / "benchmark.json").read_text())
    loads = {(one["system"], one["route"], one["connections"]) for one in content["measurements"]}
    connections = (LONE_CONNECTION, 16)
    assert loads == {
        (system, route, number) for system in ("ours", "noop") for route in benchmark.ROUTES for number in connections
    }
    assert len(content["measurements"]) == len(loads)
    assert all(one["rate"] > 0 and 0 < one["p50_ms"] <= one["p99_ms"] for one in content["measurements"])
    assert all(one["error_counts"] == {} for one in content["measurements"])
    assert all(20 < one["worker_cpu_us"] < 100_000 and 20 < one["frontend_cpu_us"] < 100_000 for one in content["measurements"])
    assert all(100 < content["memory"][system]["rss_mib"] < 4000 for system in ("ours", "noop"))
    ours = content["memory"]["ours"]
    assert ours["uss_mib"] < ours["rss_mib"] <= ours["peak_mib"]
    reached = {goal["title"]: goal["reached"] for goal in content["summary"]["goals"]}
    assert sum(value is not None for value in reached.values()) == 4  # those against the no-op
    assert "| not asked for |" in printed


@pytest.fixture
def running(server: TorchServe) -> Running:
    return Running(server.address, "/explanations/digits", "/predictions/digits", server.processes, ready_s=1.0)


@pytest.fixture
def images() -> list[bytes]:
    return [dithered_png(file) for file in SAMPLE_FILES[5::20]]


def test_same_answers_pass(running: Running, images: list[bytes]) -> None:
    assert check_answers({"ours": running, "mosec": running, "stock-1": running}, images) == {
        "mosec": pytest.approx(0, abs=FLOAT32_SHARE)
    }


@pytest.mark.parametrize("name", ["saliency", "fastapi", "mosec"])
def test_peer_gives_the_same_answers(
    running: Running, images: list[bytes], tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    peer = SYSTEMS[name]
    if peer.missing():
        pytest.skip(f"not installed: {', '.join(peer.missing())}")
    with peer.start(Workplace(tmp_path_factory.mktemp(name), workers=1)) as started:
        assert check_answers({"ours": running, name: started}, images) == {name: pytest.approx(0, abs=FLOAT32_SHARE)}
        processes = started.processes()
        assert processes
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_another_map_is_found(running: Running, images: list[bytes]) -> None:
    """The system of that name explains class 0; the server behind it explains the predicted class."""
    with pytest.raises(BenchmarkError, match=r"saliency has maps that differ from those of ours by \d"):
        check_answers({"ours": running, "saliency": running}, images)


def test_reply_of_another_size_is_found(running: Running, images: list[bytes]) -> None:
    swapped = Running(running.address, running.predict_path, running.explain_path, running.processes, ready_s=1.0)
    with pytest.raises(BenchmarkError, match=r"noop replies to explain with \(\d+, 'application/json'\), ours with"):
        check_answers({"ours": running, "noop": swapped}, images)
