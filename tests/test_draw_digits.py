"""The committed test digits are what the recipe draws."""

import numpy as np
from PIL import Image

from tests.conftest import DIGIT_FILES, label_of
from tests.draw_digits import VARIANTS, draw_digit


def test_committed_digits_are_the_recipes() -> None:
    assert len(DIGIT_FILES) == 10 * VARIANTS
    for file in DIGIT_FILES:
        with Image.open(file) as image:
            assert image.mode == "L"
            drawn = draw_digit(label_of(file), int(file.stem[-1])).astype(int)
            assert np.abs(np.asarray(image) - drawn).max() <= 2, file  # rounding may differ between machines
