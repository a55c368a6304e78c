"""What the Makefile installs is pinned by hash, and the locks hold what pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

import pytest

from scripts.paths import ROOT

LOCKS = sorted(ROOT.glob("requirements*.txt"))
MAKEFILE = (ROOT / "Makefile").read_text()


def locked(lock: Path) -> list[str]:
    """The requirements of a lock, each from its package's name to the next one's."""
    return [part for part in re.split(r"(?m)^(?=\S)", lock.read_text()) if part]


def package_of(requirement: str) -> str:
    return re.split(r"[=\[<>\s]", requirement, maxsplit=1)[0].lower()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda file: file.name)
def test_every_locked_package_has_a_version_and_hashes(lock: Path) -> None:
    for requirement in locked(lock):
        assert re.match(r"[a-z0-9][a-z0-9-]*==[\w.+]+( ; [^\\]+)? \\\n", requirement)
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", requirement)
        assert "://" not in requirement, "it names the place that it came from"


@pytest.mark.parametrize(
    ("lock", "group"),
    [("", None), ("-dev", None), *((f"-{name}", name) for name in ("dev", "peers", "fuzz", "audit"))],
    ids=str,
)
def test_lock_holds_what_is_asked_for(lock: str, group: str | None) -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = content["project"]["dependencies"] if group is None else content["dependency-groups"][group]
    held = {package_of(requirement) for requirement in locked(ROOT / f"requirements{lock}.txt")}
    assert {package_of(requirement) for requirement in asked} <= held


def test_everything_is_installed_by_hash_and_looked_up() -> None:
    installing = [line for line in MAKEFILE.splitlines() if re.search(r"(\$\(PIP\)|pip\b.*) install ", line)]
    assert len(installing) == len(LOCKS)
    assert all("install --require-hashes -r requirements" in line for line in installing)
    (looked_up,) = re.findall(r"(?m)^LOCKS := (.*)$", MAKEFILE)
    assert {*looked_up.split(), "requirements.txt"} == {file.name for file in LOCKS}


def test_lock_for_development_holds_the_same_versions() -> None:
    served, developed = (
        {requirement.partition(" \\\n")[0] for requirement in locked(ROOT / name)}
        for name in ("requirements.txt", "requirements-dev.txt")
    )
    assert served <= developed
