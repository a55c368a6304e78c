"""The readiness probe against a real server: ready if the answers are right, and only then."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests
import safetensors.numpy

from scripts.packaging.package import build_archive, read_archive
from scripts.paths import MODEL_CONFIG, MODEL_FILE
from scripts.serving import ready
from scripts.serving.launcher import TorchServe
from tests.client import TIMEOUT_S
from tests.servers import RECOVERY_S


def probe(server: TorchServe, *options: str) -> int:
    return ready.main(["--address", server.address, "--model", "digits", *options])


def test_right_answers_are_ready(server: TorchServe, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe(server, "--archive", str(archive)) == 0
    reference = ready.read_reference_answer(archive)
    assert reference is not None
    assert probe(server, "--weights-sha256", reference.weights_sha256) == 0
    assert capsys.readouterr().err == ""


def test_other_weights_than_expected_are_not_ready(
    server: TorchServe, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = safetensors.numpy.load(read_archive(archive)["weights.safetensors"])
    weights["lin.bias"][3] += 1
    safetensors.numpy.save_file(weights, tmp_path / "weights.safetensors")
    build_archive(
        tmp_path / "new.mar",
        model_file=MODEL_FILE,
        weights_file=tmp_path / "weights.safetensors",
        model_config=MODEL_CONFIG,
    )
    assert probe(server, "--archive", str(tmp_path / "new.mar")) == 1
    assert "not ready: other weights are served: " in capsys.readouterr().err
    assert probe(server, "--weights-sha256", "0" * 64) == 1


def test_model_that_is_not_there_is_not_ready(server: TorchServe, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe(server, "--archive", str(archive), "--model", "letters") == 1
    assert "not ready: predictions answers 404: " in capsys.readouterr().err


def test_workers_that_do_not_answer_are_not_ready_while_ping_says_healthy(
    server: TorchServe, archive: Path, worker_pids: Callable[[], list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    workers = [psutil.Process(pid) for pid in worker_pids()]
    for worker in workers:
        worker.suspend()
    try:
        assert requests.get(f"{server.address}/ping", timeout=TIMEOUT_S).json() == {"status": "Healthy"}
        assert probe(server, "--archive", str(archive), "--timeout", "2") == 1
    finally:
        for worker in workers:
            worker.resume()
    assert f"not ready: no answer from {server.address} within 2 s" in capsys.readouterr().err
    started = time.monotonic()
    assert probe(server, "--archive", str(archive), "--wait", str(RECOVERY_S)) == 0
    print(f"ready again {time.monotonic() - started:.1f} s after the workers went on")
