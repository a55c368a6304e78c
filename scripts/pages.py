"""Reports as HTML pages and SVG plots. A page is one file that loads nothing from elsewhere.

The templates stand in scripts/templates; all of them extend base.html. Knows nothing of what is reported.
"""

import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.figure import Figure

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


class MatplotlibMissing(ImportError):
    """A page's plots need matplotlib, which is not installed."""


def render_page(template: str, **content: Any) -> str:  # noqa: ANN401  # each template has its own
    """Fill a template. All text is escaped, but for `Markup`.

    Args:
        template: a file of scripts/templates, such as "load.html".
        content: every variable that the template names.
    """
    return _TEMPLATES.get_template(template).render(**content)


def draw_svg(salt: str, size_inches: tuple[float, float], plot: Callable[["Figure"], None]) -> Markup:
    """Draw a figure as an SVG element that can stand in a page.

    Args:
        salt: for the ids in it: the same figure gives the same text every time.
        size_inches: width and height.
        plot: draws into the empty figure.
    Raises:
        MatplotlibMissing: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # slow, large, and needed for plots alone
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MatplotlibMissing("the page's plots need matplotlib: pip install matplotlib") from error

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}):
        figure = Figure(figsize=size_inches, layout="constrained")
        plot(figure)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    return Markup(svg[svg.index("<svg") :])  # noqa: S704  # matplotlib escapes the text in it


def write_report(raw_file: Path, report: "DataclassInstance", render: Callable[[], str]) -> None:
    """Write a report beside its raw file: all its numbers as .json, its page as .html where matplotlib is installed.

    Args:
        render: gives the page; it may raise MatplotlibMissing, which goes to stderr.
    Raises:
        OSError: a file cannot be written.
    """
    raw_file.with_suffix(".json").write_bytes(orjson.dumps(dataclasses.asdict(report), option=orjson.OPT_INDENT_2))
    page = raw_file.with_suffix(".html")
    try:
        page.write_text(render())
    except MatplotlibMissing as error:
        print(f"no {page}: {error}", file=sys.stderr)
