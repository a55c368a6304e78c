"""The load test against a real TorchServe."""

import json
from pathlib import Path

import pytest

from scripts.bench import load_test
from scripts.bench.digit_requests import KINDS
from scripts.serving.launcher import TorchServe

MIX = ",".join(f"{name}=1" for name in KINDS)


@pytest.mark.long
@pytest.mark.parametrize("loop", [["--connections", "8"], ["--rates", "40"]], ids=["closed", "open"])
def test_every_kind_of_request_gets_replies_of_the_right_form(server: TorchServe, loop: list[str], tmp_path: Path) -> None:
    arguments = ["--url", server.address, *loop, "--mix", MIX, "--duration", "1.5", "--warm-up", "0.2", "--timeout", "30"]
    assert load_test.main([*arguments, "--output", str(tmp_path / "a")]) == 0
    [step] = json.loads((tmp_path / "a.json").read_text())["steps"]
    assert step["errors"] == {}
    assert step["kinds"].keys() == KINDS.keys()
    assert all(kind["requests"] > 0 for kind in step["kinds"].values())


def test_an_unknown_model_is_an_error_by_its_status(
    server: TorchServe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--url", server.address, "--model", "letters", "--connections", "1", "--duration", "0.2", "--warm-up", "0"]
    assert load_test.main([*arguments, "--output", str(tmp_path / "a")]) == 1
    assert "HTTP 404" in capsys.readouterr().out
