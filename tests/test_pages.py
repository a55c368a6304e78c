"""The Markdown pages: their links lead somewhere, their commands exist, and the first one stays short."""

import importlib.util
import re
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest

from scripts.paths import ROOT

MAX_README_LINES = 220
PAGES = sorted(
    page
    for folder in (".", ".github", "handler", "model", "serve_config", "scripts", "scripts/research", "scripts/results")
    for page in (ROOT / folder).glob("*.md")
)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?s)```.*?```", "", page.read_text()))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_page
def test_every_link_to_a_file_or_heading_leads_there(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r"[a-z]+:", link):
            continue  # another site's
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@by_page
def test_every_command_of_the_project_is_a_module(page: Path) -> None:
    for name in re.findall(r"python -m ((?:handler|model|scripts|tests)[\w.]*)", page.read_text()):
        if "results" not in page.parts or not re.fullmatch(r"scripts\.\w+", name):  # a committed result names what it was made by
            assert importlib.util.find_spec(name) is not None, name


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_library_example_of_the_readme_runs() -> None:
    (example,) = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "README.md").read_text())
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["logits"].shape == (2, 1000)
    assert [explanation.maps.shape for explanation in names["explanations"]] == [(1, 3, 64, 64), (2, 3, 64, 64)]
    assert names["explanations"][1].classes == (3, 5)


@pytest.mark.parametrize("file", sorted((ROOT / "serve_config").glob("*.xml")), ids=lambda file: file.name)
def test_xml_is_well_formed(file: Path) -> None:
    """log4j falls back to its own settings where it cannot read a file, and says so among a thousand lines."""
    assert xml.dom.minidom.parse(str(file)).documentElement is not None
