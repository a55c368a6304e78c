"""Kinds of images that people send: frames, lines, several digits, other ink. Each is drawn by `scripts.research.kinds`."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from handler.errors import SeveralDigits
from handler.images.digits import prepare_digit
from handler.images.preparation import Array, PreparedImage
from scripts.research.kinds import CANVAS, FINISHES, Draw, Kind, dashed_one, images_of, kinds, on_canvas, sample_inks

KINDS = {kind.name: kind for group in kinds().values() for kind in group}
DIGIT_COUNT = 10  # of each kind; `scripts.research.kinds` counts all 50


def names(*groups: str, photographed: bool = False) -> list[str]:
    """Kinds of bright ink on dark paper, or of photographs. Very large images take long to draw."""
    all_names = [kind.name for group in groups for kind in kinds()[group]]
    if photographed:
        return [name for name in all_names if name.endswith(", photograph")]
    return [name for name in all_names if not name.endswith(("dark on white", "photograph", "board", "in 1000", "in 2000"))]


def read(network: nn.Module, preparation: PreparedImage) -> int:
    return int(network(torch.from_numpy(preparation.pixels)[None, None]).argmax())


def warning_types(preparation: PreparedImage) -> set[str]:
    return {warning.type for warning in preparation.warnings}


def prepared(kind: Kind) -> list[tuple[PreparedImage, int]]:
    return [(prepare_digit(grey, 28, 28), digit) for grey, digit, _ in images_of(kind, DIGIT_COUNT)]


@pytest.mark.parametrize("name", names("frame", "line"))
def test_digit_is_read_without_its_frame_or_underline_and_the_reply_says_so(network: nn.Module, name: str) -> None:
    for preparation, digit in prepared(KINDS[name]):
        assert read(network, preparation) == digit
        assert "FrameRemoved" in warning_types(preparation)
        assert preparation.steps[0].startswith("removed ")


@pytest.mark.parametrize(
    ("name", "step", "warning"),
    [
        (
            "underlined 4 px, gap 8, whole width",
            "removed a line that is no stroke",
            "got a line of a frame, a box or ruled paper: it was",
        ),
    ],
)
def test_lines_are_counted_in_words_that_fit(name: str, step: str, warning: str) -> None:
    for preparation, _ in prepared(KINDS[name]):
        assert preparation.steps[0] == step
        (message,) = (one.message for one in preparation.warnings if one.type == "FrameRemoved")
        assert warning in message


@pytest.mark.parametrize("name", names("frame", "line", photographed=True))
def test_digit_on_a_photograph_is_read_without_its_frame_or_underline(network: nn.Module, name: str) -> None:
    pairs = prepared(KINDS[name])
    assert sum(read(network, preparation) == digit for preparation, digit in pairs) >= len(pairs) - 1


@pytest.mark.parametrize("name", names("ruled"))
def test_rules_and_squares_of_the_paper_are_removed(network: nn.Module, name: str) -> None:
    pairs = prepared(KINDS[name])
    assert sum(read(network, preparation) == digit for preparation, digit in pairs) >= len(pairs) - 1
    assert all("FrameRemoved" in warning_types(preparation) for preparation, _ in pairs)


@pytest.mark.parametrize("name", [name for name in names("several") if "column" not in name])
def test_several_digits_are_refused(name: str) -> None:
    for grey, _, _ in images_of(KINDS[name], DIGIT_COUNT):
        with pytest.raises(SeveralDigits, match=r"^expected one digit, got several"):
            prepare_digit(grey, 28, 28)


@pytest.mark.parametrize("name", [*names("one", "pen"), *names("one", "pen", photographed=True)])
def test_broken_fine_and_bold_digits_are_one_digit(network: nn.Module, name: str) -> None:
    pairs = prepared(KINDS[name])
    assert sum(read(network, preparation) == digit for preparation, digit in pairs) >= len(pairs) - 1


@pytest.mark.parametrize("name", ["small others in a corner", "another of half its size", "with specks"])
def test_other_ink_is_left_out_and_the_reply_says_how_much(name: str) -> None:
    for preparation, _ in prepared(KINDS[name]):
        (warning,) = (warning for warning in preparation.warnings if warning.type == "OtherInk")
        assert "% of all" in warning.message


@pytest.mark.parametrize("seed", range(5))
def test_dashed_one_is_one_digit(network: nn.Module, seed: int) -> None:
    ink, levels, _, _ = sample_inks()[0]
    page = dashed_one(ink, levels, np.random.default_rng(seed)).astype(np.float32)
    assert read(network, prepare_digit(page, 28, 28)) == 1


def stroke(page: NDArray[np.float32], y: slice, x: slice) -> None:
    page[y, x] = 1


def five_with_a_detached_hat(page: NDArray[np.float32]) -> None:
    stroke(page, slice(40, 58), slice(130, 210))
    stroke(page, slice(70, 130), slice(100, 118))
    stroke(page, slice(112, 130), slice(100, 180))
    stroke(page, slice(112, 220), slice(172, 190))
    stroke(page, slice(202, 220), slice(90, 190))


def four_of_two_strokes(page: NDArray[np.float32]) -> None:
    stroke(page, slice(40, 150), slice(80, 98))
    stroke(page, slice(132, 150), slice(80, 165))
    stroke(page, slice(50, 230), slice(174, 192))


@pytest.mark.parametrize(("draw", "digit"), [(five_with_a_detached_hat, 5), (four_of_two_strokes, 4)], ids=["5", "4"])
def test_digit_of_several_strokes_is_one_digit(network: nn.Module, draw: Callable[[Array], None], digit: int) -> None:
    page = np.zeros((CANVAS, CANVAS), np.float32)
    draw(page)
    preparation = prepare_digit(page, 28, 28)
    assert read(network, preparation) == digit
    assert preparation.warnings == ()


@pytest.mark.parametrize("finish", ["", "dark on white", "photograph"])
def test_clean_digit_has_no_warning(finish: str) -> None:
    draw: Draw = lambda ink, _, __: on_canvas(ink)  # noqa: E731
    for preparation, _ in prepared(Kind("clean", draw, FINISHES[finish])):
        assert preparation.warnings == ()


def test_ink_at_the_border_is_reported() -> None:
    ink = sample_inks()[15][0]
    page = on_canvas(ink)
    cropped = np.ascontiguousarray(page[:180], dtype=np.float32)
    assert warning_types(prepare_digit(cropped, 28, 28)) == {"TouchesBorder"}


def test_polarity_is_reported_only_where_it_was_a_close_call() -> None:
    """Half ink, half paper: either may be the digit."""
    page = np.kron(np.indices((4, 4)).sum(axis=0) % 2, np.ones((40, 40))).astype(np.float32)
    page[:40, :40] = 0.5
    assert "Inverted" in warning_types(prepare_digit(page, 28, 28))
