"""Rows of text -> a table: in Markdown, or in plain text with aligned columns.

Every cell is text that its caller has formatted. Imports nothing of the project.
"""

from collections.abc import Iterable, Sequence


def render_markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], *, padded: bool = False) -> str:
    """Write a Markdown table.

    Args:
        columns: their names.
        rows: each with one cell a column.
        padded: fill up all cells of a column to the same width, for readers of the text itself.
    Raises:
        ValueError: a row has another number of cells than there are columns.
    """
    lines = [list(columns), ["---"] * len(columns), *map(list, rows)]
    for line in lines:
        if len(line) != len(columns):
            raise ValueError(f"expected {len(columns)} cells, got {len(line)}: {line}")
    if padded:
        widths = _widths([lines[0], *lines[2:]])
        lines[1] = ["-" * width for width in widths]
        lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_aligned(rows: Sequence[Sequence[str]]) -> str:
    """Write plain text: the first column flush left, all others, which hold numbers, flush right."""
    widths = _widths(rows)
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    )


def _widths(rows: Iterable[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
