"""Pages escape what they show, name what they lack, and draw without other files."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import pytest

from scripts.pages import MatplotlibMissing, draw_svg, render_page, write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTENT = {
    "title": "A <title>",
    "described": ["one & two"],
    "tables": [(("name", "ms"), [("all", "1"), ("  part", "<2>")])],
    "concluded": ["good", "warning: late"],
    "plots": "<svg>",
    "machine": {"CPU": "a 'CPU'"},
}


def test_all_text_is_escaped() -> None:
    page = render_page("load.html", **CONTENT)
    for text in (
        "<h1>A &lt;title&gt;</h1>",
        "<p>one &amp; two</p>",
        "<td>&lt;2&gt;</td>",
        "<td>a &#39;CPU&#39;</td>",
        "&lt;svg&gt;",
    ):
        assert text in page
    assert page.count("<tr") == 4
    assert '<tr class="part"><td>  part</td>' in page
    assert '<p class="warning">warning: late</p>' in page


def test_content_that_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'machine' is undefined"):
        render_page("load.html", **{name: value for name, value in CONTENT.items() if name != "machine"})


def plot(figure: "Figure") -> None:
    figure.subplots().plot([1, 2], label="a <line>")


def test_plot_is_one_element_that_stands_in_a_page_as_it_is() -> None:
    svg = draw_svg("salt", (3, 2), plot)
    assert svg == draw_svg("salt", (3, 2), plot)
    assert svg.startswith("<svg")
    assert str(svg) in render_page("load.html", **CONTENT | {"plots": svg})


@dataclass(frozen=True)
class Report:
    """Something to report."""

    rate: float


def test_report_without_matplotlib_has_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MatplotlibMissing):
        draw_svg("salt", (3, 2), plot)
    write_report(tmp_path / "a.1.npz", Report(2.5), lambda: str(draw_svg("salt", (3, 2), plot)))
    assert json.loads((tmp_path / "a.1.json").read_text()) == {"rate": 2.5}
    assert not (tmp_path / "a.1.html").exists()
    assert "pip install matplotlib" in capsys.readouterr().err
