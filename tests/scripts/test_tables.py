"""Tables as text."""

import pytest

from scripts.tables import render_aligned, render_markdown

ROWS = [("a way", "1,234"), ("other", "5")]


def test_markdown_has_a_line_for_names_a_rule_and_each_row() -> None:
    assert render_markdown(("name", "us"), ROWS) == "| name | us |\n| --- | --- |\n| a way | 1,234 |\n| other | 5 |"


def test_padded_markdown_has_columns_of_one_width() -> None:
    assert render_markdown(("", "us"), ROWS, padded=True).splitlines() == [
        "|       | us    |",
        "| ----- | ----- |",
        "| a way | 1,234 |",
        "| other | 5     |",
    ]


def test_table_without_rows_keeps_its_columns() -> None:
    assert render_markdown(("name", "us"), [], padded=True) == "| name | us |\n| ---- | -- |"


def test_row_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected 2 cells, got 1: \['alone'\]"):
        render_markdown(("name", "us"), [("alone",)])


def test_aligned_text_has_names_left_and_numbers_right() -> None:
    assert render_aligned([("name", "us"), *ROWS]).splitlines() == ["name      us", "a way  1,234", "other      5"]
    assert render_aligned([("longer name", ""), ("  x", "1")]).splitlines() == ["longer name", "  x          1"]
