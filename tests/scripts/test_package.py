"""The archive: the same bytes every time, and able to live without the repo."""

import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

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


def test_proof_sees_nothing_of_the_repo(archive: Path, tmp_path: Path) -> None:
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
