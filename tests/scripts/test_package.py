"""The archive: the same bytes every time, and able to live without the repo."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import yaml

from handler.runtime.archive import build_network
from scripts.packaging import compile as compile_command
from scripts.packaging.package import main, read_archive, smoke_test, write_archive
from scripts.paths import ROOT, SAMPLE_FILES


def test_same_tree_gives_the_same_bytes(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also from another temp folder, at another time, under the umask of another user."""
    assert main(["--output", str(tmp_path / "elsewhere" / "digits.mar")]) == 0
    again = tmp_path / "elsewhere" / "digits.mar"
    assert again.read_bytes() == archive.read_bytes()
    printed, _, name = capsys.readouterr().out.strip().partition("  ")
    finished = subprocess.run(["sha256sum", again], capture_output=True, text=True, check=True)
    assert finished.stdout.split()[0] == printed
    assert name == str(again)
    subprocess.run(["sha256sum", "--check", "--strict", "digits.mar.sha256"], cwd=again.parent, check=True, capture_output=True)


def test_archive_is_listed_in_its_own_checksums(unpack: Callable[[], Path]) -> None:
    model_dir = unpack()
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=model_dir, check=True, capture_output=True)
    listed = {line.split("  ")[1] for line in (model_dir / "SHA256SUMS").read_text().splitlines()}
    assert listed == {str(path.relative_to(model_dir)) for path in model_dir.rglob("*") if path.is_file()} - {"SHA256SUMS"}


def test_archive_holds_the_handler_package_and_one_entry_module(archive: Path) -> None:
    names = set(zipfile.ZipFile(archive).namelist())
    assert {
        "saliency_handler.py",
        "network.py",
        "weights.safetensors",
        "model-config.yaml",
        "handler/gradients/explain.py",
    } < names
    assert "handler/saliency_handler.py" not in names
    assert not {name for name in names if name.startswith(("model/", "tests/", "scripts/")) or name.endswith(".pyc")}


def test_model_of_the_archive_is_named_by_its_file(tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path / "other.mar"), "--model-config", "serve_config/model-config-gpu.yaml"]) == 0
    entries = read_archive(tmp_path / "other.mar")
    assert b'"modelName": "other"' in entries["MAR-INF/MANIFEST.json"]
    assert yaml.safe_load(entries["model-config.yaml"])["deviceType"] == "gpu"


def test_archive_that_does_not_load_is_not_passed_off_as_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(SAMPLE_FILES[0].parent / "0-0.png", tmp_path / "weights.safetensors")
    assert main(["--output", str(tmp_path / "digits.mar"), "--weights", str(tmp_path / "weights.safetensors")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "weights.safetensors are missing or unreadable" in captured.err


def write_linear_network(
    folder: Path, input_shape: str = "(1, 4, 6)", class_count: str = "3", output: str = "self.lin(x.flatten(1))"
) -> Path:
    """A model file, with random weights beside it, of a linear network that says what it is told to."""
    model_file = folder / "linear.py"
    model_file.write_text(f"""
import math
import torch
from torch import nn

class Linear(nn.Module):
    INPUT_SHAPE = {input_shape}
    CLASS_COUNT = {class_count}

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(24, 3)

    def forward(self, x):
        return 4 * {output}
""")
    safetensors.torch.save_file(build_network(model_file).state_dict(), folder / "linear.safetensors")
    return model_file


def test_any_network_of_one_channel_is_packaged(tmp_path: Path) -> None:
    """And gives its reference answer: main() runs the smoke test."""
    model_file, output = write_linear_network(tmp_path), tmp_path / "linear.mar"
    assert (
        main(["--model-file", str(model_file), "--weights", str(tmp_path / "linear.safetensors"), "--output", str(output)]) == 0
    )
    assert output.is_file()


def test_calibration_beside_the_weights_is_packaged(tmp_path: Path) -> None:
    model_file, weights = write_linear_network(tmp_path), tmp_path / "linear.safetensors"
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    content = json.dumps({"temperature": 1.5, "energy_threshold": -2.0, "weights_sha256": sha256}).encode()
    (tmp_path / "calibration.json").write_bytes(content)
    output = tmp_path / "linear.mar"
    assert main(["--model-file", str(model_file), "--weights", str(weights), "--output", str(output)]) == 0
    assert read_archive(output)["calibration.json"] == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            b'{"temperature": 1.5, "energy_threshold": -2, "weights_sha256": "0123"}',
            "to be fitted to the weights with SHA-256",
            id="other weights",
        ),
        pytest.param(b'{"temperature": 1.5, "energy_threshold": -2}', "got one of None", id="nobody's weights"),
        pytest.param(b'{"temperature": 0, "energy_threshold": -2}', "expected a positive temperature", id="no temperature"),
        pytest.param(b"temperature: 1.5", "expected 'temperature' and 'energy_threshold'", id="no JSON"),
    ],
)
def test_calibration_that_would_make_wrong_probabilities_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    model_file, output = write_linear_network(tmp_path), tmp_path / "linear.mar"
    (tmp_path / "calibration.json").write_bytes(content)
    arguments = ["--model-file", str(model_file), "--weights", str(tmp_path / "linear.safetensors"), "--output", str(output)]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        pytest.param(
            {"input_shape": "(3, 4, 2)"}, "expected a network of one input channel, got INPUT_SHAPE (3, 4, 2)", id="colour"
        ),
        pytest.param({"input_shape": "(4, 6)"}, "expected INPUT_SHAPE, a tuple of three positive integers", id="no channels"),
        pytest.param({"input_shape": "(1, 4, 0)"}, "(channels, height, width), got (1, 4, 0)", id="no width"),
        pytest.param({"input_shape": "(1, 4, 6.0)"}, "(channels, height, width), got (1, 4, 6.0)", id="a float"),
        pytest.param({"input_shape": "24"}, "(channels, height, width), got 24", id="one number"),
        pytest.param(
            {"input_shape": "(1, 5, 5)"}, "cannot score float32 images of its INPUT_SHAPE (1, 5, 5): mat1", id="other shape"
        ),
        pytest.param({"class_count": "10"}, "expected logits (2, 10), as CLASS_COUNT is 10, got (2, 3)", id="other class count"),
        pytest.param({"class_count": "1"}, "expected CLASS_COUNT, an integer of 2 or more, got 1", id="one class"),
        pytest.param({"class_count": "'three'"}, "expected CLASS_COUNT, an integer of 2 or more, got 'three'", id="a text"),
        pytest.param(
            {"output": "self.lin(x.flatten(1))[0]"}, "expected logits (2, 3), as CLASS_COUNT is 3, got (3,)", id="one row"
        ),
        pytest.param({"output": "(self.lin(x.flatten(1)),)"}, "as CLASS_COUNT is 3, got tuple", id="a tuple"),
    ],
)
def test_network_that_is_not_what_it_says_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], network: dict[str, str], message: str
) -> None:
    model_file, output = write_linear_network(tmp_path, **network), tmp_path / "linear.mar"
    assert (
        main(["--model-file", str(model_file), "--weights", str(tmp_path / "linear.safetensors"), "--output", str(output)]) == 1
    )
    captured = capsys.readouterr()
    assert (captured.out, message in captured.err) == ("", True), captured.err
    assert captured.err.startswith("error: ")
    assert not list(tmp_path.glob("linear.mar*"))
    assert compile_command.main(["--model-file", str(model_file)]) == 1
    assert message in capsys.readouterr().err


def test_missing_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path / "digits.mar"), "--model-config", str(tmp_path / "none.yaml")]
    assert main(arguments) == 1
    assert "error: [Errno 2] No such file or directory: " in (printed := capsys.readouterr().err)
    assert "none.yaml" in printed


def test_source_of_the_compiled_pass_is_the_archives(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_command.main([]) == 0
    assert capsys.readouterr().out.encode() == read_archive(archive)["compiled_pass.py"]


def test_smoke_test_sees_nothing_of_the_repo(archive: Path, tmp_path: Path) -> None:
    """Without its `handler` package the archive does not load, though the repo has one of that name."""
    entries = read_archive(archive)
    write_archive(
        tmp_path / "digits.mar", {name: content for name, content in entries.items() if name != "handler/images/decode.py"}
    )
    with pytest.raises(RuntimeError, match=r"No module named 'handler\.images\.decode'"):
        smoke_test(tmp_path / "digits.mar")


@pytest.mark.parametrize("name", ["model-config.yaml", "model-config-gpu.yaml"])
def test_configuration_has_what_torchserve_needs(name: str) -> None:
    config = yaml.safe_load((ROOT / "serve_config" / name).read_text())
    assert isinstance(config["minWorkers"], int)
    assert config["minWorkers"] == config["maxWorkers"] > 0
    assert config["batchSize"] > 1
    assert config["maxBatchDelay"] > 0  # TorchServe makes 0 into 100
    assert config["deviceType"] == ("gpu" if "gpu" in name else "cpu")


@pytest.mark.parametrize("name", ["config.properties", "model-config.yaml", "model-config-gpu.yaml"])
def test_every_setting_has_its_reason_above_it(name: str) -> None:
    """A comment, or a setting that shares the comment above."""
    lines = (ROOT / "serve_config" / name).read_text().splitlines()
    for number, line in enumerate(lines):
        if line.strip() and not line.strip().startswith("#"):
            assert number > 0
            assert lines[number - 1].strip(), f"{name}:{number + 1} has no reason: {line}"


def test_development_configuration_binds_to_loopback_alone() -> None:
    settings = dict(
        line.split("=", 1)
        for line in (ROOT / "serve_config" / "config.properties").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    addresses = {name: value for name, value in settings.items() if name.endswith("_address")}
    assert len(addresses) == 5
    assert all("127.0.0.1" in value for value in addresses.values())
    assert settings["allowed_urls"] == "file://.*"
