"""Tests, and what they share: clients and servers, oracles, doubles, hostile requests."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest


def missing_packages() -> list[str]:
    """Name the packages that pyproject.toml asks for, to serve and to develop, and that are not installed here."""
    content = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    asked = content["project"]["dependencies"] + content["dependency-groups"]["dev"]
    names = [re.split(r"[=\[<>\s]", requirement, maxsplit=1)[0] for requirement in asked]
    installed = {one.name.lower().replace("_", "-") for one in importlib.metadata.distributions()}
    return [name for name in names if name.lower() not in installed]


if missing := missing_packages():
    sys.exit(
        f"not installed: {', '.join(missing)}. Run `make test` first, which installs all into .venv; then .venv/bin/pytest works"
    )
pytest.register_assert_rewrite("tests.client", "tests.servers", "tests.openapi", "tests.worker")
