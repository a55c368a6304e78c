"""How near numbers must be to the expected ones: a share of the largest absolute value of their row, logits and maps apart.

An absolute tolerance fits one size of numbers and one processor: a sum is rounded in proportion to what is summed, and the order
of summing is another one with other kernels or another batch. Where inputs of a max pool tie, or a ReLU is at zero, rounding may
choose another branch, and no tolerance covers that: such comparisons take images away from every kink, or float64.
"""

import numpy as np
from numpy.typing import ArrayLike

# float32 beside float32 in another order of operations, or beside float64, of the committed network. Seen are at most 9e-7, for
# logits as for maps, alone and in batches, by autograd and by the compiled pass, with oneDNN's and MKL's kernels for SSE4.1, AVX2
# and AVX-512. (NNPACK's, which PyTorch takes for batches from 16 where oneDNN is switched off, are off by 7e-6.)
FLOAT32_SHARE = 2e-6
FLOAT64_SHARE = 2e-13  # the same for float64; seen are at most 3e-15


def relative_difference(actual: ArrayLike, expected: ArrayLike, *, row_axes: int = 1, of: ArrayLike | None = None) -> float:
    """Find the row that differs most.

    Args:
        actual, expected: of the same shape.
        row_axes: how many of the last axes make a row: 1 for logits (..., K), 2 for maps (..., H, W).
        of: what a row's difference is a share of: one number a row (...), or one for all; None: the row's largest absolute
            expected value. Give it for what is left of larger numbers that cancel, which has their rounding.
    Returns:
        the largest difference of a number, as a share; 0 where nothing differs, NaN where a number is NaN.
    """
    found, wanted = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert found.shape == wanted.shape, f"expected the shape {wanted.shape}, got {found.shape}"
    axes = tuple(range(-row_axes, 0))
    differences = np.abs(found - wanted).max(axis=axes)
    largest = np.abs(wanted).max(axis=axes) if of is None else np.asarray(of, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(differences == 0, 0, differences / largest).max())


def require_close(
    actual: ArrayLike,
    expected: ArrayLike,
    share: float = FLOAT32_SHARE,
    *,
    row_axes: int = 1,
    of: ArrayLike | None = None,
) -> None:
    """Fail where a number differs from the expected one by more than this share; see `relative_difference`."""
    difference = relative_difference(actual, expected, row_axes=row_axes, of=of)
    assert difference <= share, f"expected at most {share:.1e} of the row's largest value, got a difference of {difference:.1e}"
