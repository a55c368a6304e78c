"""Everything that the Makefile installs is pinned by hash, and the locks hold what pyproject.toml asks for."""

import re
import tomllib

import pytest

from scripts.paths import ROOT

LOCKS = {  # by the group of dependencies that pyproject.toml asks for
    "": "requirements.txt",
    "dev": "tests/requirements.txt",
    "image": "serve_config/cluster/requirements.txt",
    "peers": "scripts/bench/peers/requirements.txt",
    "fuzz": "tests/requirements-fuzz.txt",
    "clients": "tests/requirements-clients.txt",
    "audit": ".github/requirements-audit.txt",
}
MAKEFILE = (ROOT / "Makefile").read_text()


def locked(lock: str) -> list[str]:
    """The requirements of a lock, each from its package's name to the next one's."""
    return [part for part in re.split(r"(?m)^(?=\S)", (ROOT / lock).read_text()) if part]


def package_of(requirement: str) -> str:
    return re.split(r"[=\[<>\s]", requirement, maxsplit=1)[0].lower()


@pytest.mark.parametrize("lock", LOCKS.values())
def test_every_locked_package_has_a_version_and_hashes(lock: str) -> None:
    for requirement in locked(lock):
        assert re.match(r"[a-z0-9][a-z0-9-]*==[\w.+]+( ; [^\\]+)? \\\n", requirement)
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", requirement)
        assert "://" not in requirement, "the lock names a registry"


@pytest.mark.parametrize(("lock", "group"), [("dev", ""), *((group, group) for group in LOCKS)])
def test_lock_holds_what_is_asked_for(lock: str, group: str) -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = content["dependency-groups"][group] if group else content["project"]["dependencies"]
    held = {package_of(requirement) for requirement in locked(LOCKS[lock])}
    assert {package_of(requirement) for requirement in asked} <= held


def test_everything_is_installed_by_hash_and_looked_up() -> None:
    folders = (".github", "handler", "model", "scripts", "serve_config", "tests")
    found = {*ROOT.glob("requirements*.txt"), *(file for name in folders for file in (ROOT / name).rglob("requirements*.txt"))}
    assert found == {ROOT / lock for lock in LOCKS.values()}
    in_image = "serve_config/cluster/requirements.txt"  # by the Dockerfile: see below
    installing = re.findall(r"(?m)^\t.*(?:\$\(PIP\)|pip\b.*) install (.*)$", MAKEFILE)
    assert sorted(installing) == sorted(f"--require-hashes -r {lock}" for lock in LOCKS.values() if lock != in_image)
    (looked_up,) = re.findall(r"(?m)^LOCKS := (.*)$", MAKEFILE)
    assert {*looked_up.split(), "requirements.txt"} == set(LOCKS.values())


def test_lock_for_development_holds_the_same_versions() -> None:
    served, developed = ({requirement.partition(" \\\n")[0] for requirement in locked(LOCKS[group])} for group in ("", "dev"))
    assert served <= developed


def test_image_installs_locked_packages_alone() -> None:
    """All that serving needs but torch, in the same versions; torch by its own hash; nothing else."""
    installing = re.findall(r"pip install (.*?)(?: \\\n|\n)", (ROOT / "Dockerfile").read_text())
    assert len(installing) == 2
    assert all("--require-hashes --" in line and "--no-deps" in line for line in installing)
    names = {package_of(requirement) for requirement in locked(LOCKS["image"])}
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = {package_of(requirement) for requirement in content["project"]["dependencies"]}
    assert asked - names == {"torch", "torchvision"}  # torchvision has MNIST, for training
    assert not {name for name in names if name.startswith(("nvidia", "cuda"))}
    image, served = ({requirement.partition(" \\\n")[0] for requirement in locked(LOCKS[name])} for name in ("image", ""))
    assert {line.partition(" ;")[0] for line in image} <= {line.partition(" ;")[0] for line in served}
    torch = (ROOT / "serve_config" / "cluster" / "torch-cpu.txt").read_text()
    assert re.search(r"(?m)^torch==2\.\d+\.\d+\+cpu \\\n +--hash=sha256:[0-9a-f]{64}$", torch)
