"""Digits of other habits that tests draw."""

import re

import numpy as np
import pytest

from model.drawn_digits import HABITS, draw_habit
from model.framing import Framing, frame_ink
from scripts.paths import ROOT
from tests.habits import ASKED_FOR


def test_habits_that_mnist_lacks_and_every_digit_are_there() -> None:
    assert set(ASKED_FOR) <= set(HABITS)
    assert {habit.digit for habit in HABITS.values()} == set(range(10))
    for name, habit in HABITS.items():
        assert name.startswith(str(habit.digit))


def test_hands_have_hand_placed_points_in_the_box() -> None:
    for name, habit in HABITS.items():
        assert len(habit.hands) >= 2, name
        points = np.array([point for hand in habit.hands for stroke in hand for point in stroke])
        assert points.min() >= 0, name
        assert points.max() <= 1.02, name


def test_same_seed_gives_the_same_ink_and_another_seed_another() -> None:
    assert np.array_equal(draw_habit("7, cross bar", [3]), draw_habit("7, cross bar", [3]))
    framed = [frame_ink(draw_habit(habit, [seed])).tobytes() for habit in HABITS for seed in range(3)]
    assert len(set(framed)) == len(framed)


@pytest.mark.parametrize("habit", HABITS)
def test_ink_is_cropped_and_can_be_framed(habit: str) -> None:
    inks = [draw_habit(habit, [seed]) for seed in range(4)]
    for ink in inks:
        assert ink.min() >= 0
        assert ink.max() <= 1
        assert all((edge > 0.1).any() for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
    framing = Framing.of(np.stack([frame_ink(ink) for ink in inks]))
    assert framing.shortest_side >= 19
    assert framing.longest_side <= 21
    assert framing.centre_distance < 0.6


@pytest.mark.parametrize("module", ["drawn_digits", "drawn_non_digits"])
def test_what_tests_draw_shares_no_code_with_what_training_draws(module: str) -> None:
    imported = re.findall(r"(?m)^from (model\S*) import", (ROOT / "model" / f"{module}.py").read_text())
    assert not {"model", "model.strokes", "model.non_digits"} & set(imported)
