"""The committed test digits are what the recipe draws."""

import numpy as np
from PIL import Image

from model.draw_samples import VARIANTS, draw_digit
from scripts.paths import SAMPLE_FILES
from tests.conftest import label_of


def test_committed_digits_are_the_recipes() -> None:
    assert len(SAMPLE_FILES) == 10 * VARIANTS
    for file in SAMPLE_FILES:
        with Image.open(file) as image:
            assert image.mode == "L"
            drawn = draw_digit(label_of(file), int(file.stem[-1])).astype(int)
            assert np.abs(np.asarray(image) - drawn).max() <= 2, file  # rounding may differ between machines
