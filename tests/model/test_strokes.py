"""Digits of other habits that training sees."""

import numpy as np
import pytest

from model.framing import Framing
from model.strokes import HABITS, PENS, draw_strokes
from tests.habits import ASKED_FOR


def test_habits_that_mnist_lacks_and_every_digit_are_there() -> None:
    assert set(ASKED_FOR) <= set(HABITS)
    assert {habit.digit for habit in HABITS.values()} == set(range(10))
    for name, habit in HABITS.items():
        assert name.startswith(str(habit.digit))


def test_habits_take_turns() -> None:
    images, labels = draw_strokes(2 * len(HABITS) + 1, seed=0)
    digits = [habit.digit for habit in HABITS.values()]
    assert labels.tolist() == [*digits, *digits, digits[0]]
    assert images.dtype == np.uint8
    assert images.shape == (len(labels), 28, 28)


def test_same_seed_gives_the_same_images_and_another_seed_others() -> None:
    one, two, other = (draw_strokes(30, seed)[0] for seed in (4, 4, 5))
    assert np.array_equal(one, two)
    assert len(np.unique(np.concatenate([one, other]), axis=0)) == 60


def test_none_can_be_asked_for() -> None:
    images, labels = draw_strokes(0, seed=0)
    assert (images.shape, labels.shape) == ((0, 28, 28), (0,))


def test_images_are_framed_as_mnist() -> None:
    images, _ = draw_strokes(8 * len(HABITS), seed=1)
    framing = Framing.of(images)
    assert framing.shortest_side >= 18
    assert framing.longest_side <= 21
    assert framing.centre_distance < 0.52
    assert framing.lowest_maximum == 1
    assert framing.highest_margin_median == 0


def test_pens_differ() -> None:
    """Thin strokes cover less than bold ones do: the images of one habit have all amounts of ink."""
    images, _ = draw_strokes(24 * len(HABITS), seed=2)
    for place, name in enumerate(HABITS):
        ink = images[place :: len(HABITS)].mean(axis=(1, 2))
        assert ink.max() > 1.8 * ink.min(), name
    assert list(PENS) == ["thin", "normal", "bold"]


def test_digits_can_be_told_apart() -> None:
    """A digit's nearest neighbour among other drawings mostly shows the same digit."""
    known, known_labels = draw_strokes(40 * len(HABITS), seed=3)
    asked, asked_labels = draw_strokes(8 * len(HABITS), seed=4)
    flat, asked_flat = (images.reshape(len(images), -1).astype(np.float64) for images in (known, asked))
    distances = (flat**2).sum(axis=1) - 2 * asked_flat @ flat.T  # and a constant of the row
    is_right = known_labels[distances.argmin(axis=1)] == asked_labels
    assert is_right.mean() > 0.85
    for digit in range(10):
        assert is_right[asked_labels == digit].mean() > 0.6, digit


@pytest.mark.parametrize("name", HABITS)
def test_strokes_of_a_habit_stay_near_their_box(name: str) -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        points = np.vstack(HABITS[name].draw(random))
        assert np.isfinite(points).all()
        assert points.min() > -0.35
        assert points.max() < 1.35
