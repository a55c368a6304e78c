"""Images that are no digits, as training sees them and as tests draw them."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from numpy.typing import NDArray

from model import drawn_non_digits
from model.drawn_non_digits import draw_non_digit
from model.non_digits import GREEK, KINDS, KINDS_OF_DIGITS, LETTERS, SHARES, draw_non_digits

LOOK_ALIKES = set("0123456789OoQDIl|iZzSsBbGgqYy")  # and circles, which are no letters
FONTS = [Path(mpl.get_data_path()) / "fonts" / "ttf" / name for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")]


@pytest.fixture(scope="module")
def digits(digit_pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.rint(digit_pixels * 255).astype(np.uint8)


LABELS = np.repeat(np.arange(10), 5)


def test_letters_that_look_like_digits_are_left_out() -> None:
    assert not LOOK_ALIKES & (set(LETTERS) | set(drawn_non_digits.LETTERS) | set(drawn_non_digits.HANDWRITTEN))
    assert not set("ΟοΘθΙιΒβδσρΛγ") & set(drawn_non_digits.GREEK_LETTERS)
    assert len(LETTERS) >= 20
    assert len(GREEK) >= 10


def test_kinds_come_by_their_shares_in_random_order(digits: NDArray[np.uint8]) -> None:
    assert sum(SHARES.values()) == pytest.approx(1)
    assert set(SHARES) == {*KINDS, *KINDS_OF_DIGITS}
    images, kinds = draw_non_digits(600, 0, digits, LABELS)
    assert images.dtype == np.uint8
    assert images.shape == (600, 28, 28)
    for kind, share in SHARES.items():
        assert kinds.count(kind) == pytest.approx(600 * share, abs=4 * np.sqrt(600 * share))
    assert kinds != sorted(kinds)
    assert len(np.unique(images, axis=0)) > 590
    assert (images.max(axis=(1, 2)) > 0).mean() > 0.99


def test_same_seed_gives_the_same_images(digits: NDArray[np.uint8]) -> None:
    one, two, other = (draw_non_digits(50, seed, digits, LABELS) for seed in (1, 1, 2))
    assert np.array_equal(one[0], two[0])
    assert one[1] == two[1]
    assert not np.array_equal(one[0], other[0])


def test_a_zero_on_its_side_is_no_non_digit(digits: NDArray[np.uint8]) -> None:
    images, kinds = draw_non_digits(400, 3, digits, LABELS)
    lying = images[[kind == "lying digits" for kind in kinds]]
    assert len(lying)
    sides = np.concatenate([np.rot90(digits, turns, axes=(1, 2)) for turns in (1, 3)])
    labels = np.tile(LABELS, 2)
    for image in lying:
        shown = labels[(sides == image).all(axis=(1, 2))]
        assert len(shown)
        assert not set(shown) & {0, 8}


@pytest.mark.parametrize("kind", drawn_non_digits.KINDS)
def test_drawings_for_tests_are_images_that_differ(kind: str) -> None:
    images = [draw_non_digit(kind, [seed], FONTS) for seed in range(6)]
    assert all(image.dtype == np.uint8 and image.shape == (drawn_non_digits.SIDE,) * 2 for image in images)
    assert all(np.ptp(image) > 60 for image in images)
    assert len({image.tobytes() for image in images}) == 6
    assert np.array_equal(images[0], draw_non_digit(kind, [0], FONTS))


def test_fonts_have_all_characters() -> None:
    """A character that a font lacks comes out as an empty box, the same for all."""
    from PIL import ImageFont

    for file in FONTS:
        font = ImageFont.truetype(str(file), size=40)
        missing = bytes(font.getmask("\U0010fffd"))
        for character in drawn_non_digits.LETTERS + drawn_non_digits.GREEK_LETTERS + drawn_non_digits.SYMBOLS:
            assert bytes(font.getmask(character)) != missing, (file.name, character)
