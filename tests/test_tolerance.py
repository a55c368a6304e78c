"""What the other tests compare by: shares of each row's largest number, and images away from every kink."""

import numpy as np
import pytest
import torch
from torch import nn

from scripts.paths import SAMPLE_FILES
from tests.kinks import MAX_LEVEL, RADIUS, are_at_a_kink, dithered_digits
from tests.tolerance import relative_difference, require_close


def test_difference_is_a_share_of_its_own_rows_largest_number() -> None:
    expected = [[0.0, -40.0], [1.0, 0.5]]
    assert relative_difference([[4e-3, -40.0], [1.0, 0.5]], expected) == pytest.approx(1e-4)
    found = [[0.0, -40.0], [1.0, 0.504]]
    assert relative_difference(found, expected) == pytest.approx(4e-3)
    assert relative_difference(found, expected, row_axes=2) == pytest.approx(1e-4)
    assert relative_difference(found, expected, of=[1, 8]) == pytest.approx(5e-4)


def test_row_of_zeros_is_close_to_zeros_alone() -> None:
    zeros = [[0.0, 0.0], [0.0, 0.0]]
    assert relative_difference(zeros, zeros) == 0
    assert relative_difference([[0.0, 0.0], [0.0, 1e-300]], zeros) == np.inf


def test_number_that_is_none_is_close_to_nothing() -> None:
    for one, other in ((np.nan, 1.0), (1.0, np.nan), (np.nan, np.nan)):
        with pytest.raises(AssertionError, match="got a difference of nan"):
            require_close([2.0, one], [2.0, other])
    with pytest.raises(AssertionError, match=r"expected the shape \(2,\), got \(1,\)"):
        require_close([1.0], [1.0, 1.0])
    with pytest.raises(AssertionError, match=r"at most 1\.0e-03 of the row's largest value, got a difference of 2\.0e-03"):
        require_close([50.1], [50], 1e-3)


def test_kinks_are_found() -> None:
    """A ReLU at zero, and a pool whose two largest inputs tie; not one that is a thousandth away."""

    class Kinked(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            pooled = torch.max_pool2d(pixels, (1, 2)).flatten(1)  # (N, 1)
            return torch.cat([pooled, torch.relu(pixels.flatten(1) - 0.5)], dim=1)

    pixels = np.array([[0.3, 0.3], [0.3, 0.301], [0.2, 0.5], [0.2, 0.499]]).reshape(4, 1, 1, 2)
    assert are_at_a_kink(Kinked(), pixels).tolist() == [True, False, True, False]


def test_dithered_digits_lie_away_from_every_kink(network: nn.Module, digit_batch: torch.Tensor) -> None:
    """As they are drawn, on flat ground, they do not."""
    assert are_at_a_kink(network, digit_batch.numpy()).all()
    levels = dithered_digits()
    assert levels.shape == (len(SAMPLE_FILES), 28, 28)
    added = levels - np.rint(255 * digit_batch[:, 0].numpy())
    assert added.min() == 0
    assert added.max() == MAX_LEVEL
    assert not are_at_a_kink(network, levels[:, None].astype(np.float32) / np.float32(255), RADIUS / 3).any()
