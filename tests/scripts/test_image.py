"""The Dockerfile by its linter, and the command that builds the image. The image itself: tests/e2e/test_image.py."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from scripts.cluster import image
from scripts.paths import ROOT, SAMPLE_IMAGE

HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"


def lint(dockerfile: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, "-"], input=dockerfile, capture_output=True, text=True, check=False, timeout=60)


def test_hadolint_finds_the_dockerfile_right() -> None:
    found = lint((ROOT / "Dockerfile").read_text())
    assert (found.returncode, found.stdout) == (0, "")
    wrong = lint((ROOT / "Dockerfile").read_text().replace("USER 1000:1000", "USER root"))
    assert wrong.returncode == 1
    assert "DL3002" in wrong.stdout


@pytest.mark.parametrize(
    ("installed", "command"),
    [
        (["docker", "podman", "buildah"], "docker build"),
        (["podman", "buildah"], "podman build"),
        (["buildah"], "buildah bud"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whichever_builder_is_there_builds(
    installed: list[str], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is a program that notes how it was called."""
    for name in installed:
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" > {tmp_path}/called\n')
        program.chmod(0o755)
    (tmp_path / "ca.pem").touch()
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), "/usr/bin", "/bin"]))
    monkeypatch.setattr("scripts.cluster.image.shutil.which", lambda name: str(tmp_path / name) if name in installed else None)
    assert image.main(["--device=cuda", f"--ca-bundle={tmp_path / 'ca.pem'}", "--", "--network", "host"]) == 0
    called = (tmp_path / "called").read_text()
    assert called.startswith(f"{command} --tag localhost/saliency-serve:cuda --build-arg DEVICE=cuda ")
    assert re.search(r"--build-arg VERSION=\d+\.\d+\.\d+ --build-arg REVISION=([0-9a-f]{40}(-dirty)?|unknown) ", called)
    assert f"--network host --volume {tmp_path}/ca.pem:/ca-bundle.pem:ro {ROOT}" in called
    assert capsys.readouterr().out == "localhost/saliency-serve:cuda\n"


def test_no_builder_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("scripts.cluster.image.shutil.which", lambda name: None)
    assert image.main([]) == 1
    assert "there is none of docker, podman, buildah" in capsys.readouterr().err


def test_image_carries_all_that_its_programs_read() -> None:
    """.dockerignore leaves out all but what it names."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for needed in ("requirements.txt", "handler", "model/network.py", "scripts/serving", "scripts/packaging", "serve_config"):
        assert needed in kept
    assert str(SAMPLE_IMAGE.relative_to(ROOT)) in kept
