"""Calibration against closed forms and known answers."""

import numpy as np
import pytest
from numpy.typing import NDArray

from model.calibration import (
    compute_energy,
    compute_probabilities,
    fit_energy_threshold,
    fit_temperature,
    measure_calibration_error,
)

Numbers = NDArray[np.float64]


@pytest.mark.parametrize("gap", [1.0, 4.0, 9.0])
@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
def test_temperature_of_two_classes_has_a_closed_form(gap: float, share: float) -> None:
    """`gap` between two logits, and `share` right: the best probability is `share`, so gap / T = log(share / (1 - share))."""
    logits = np.tile([gap, 0.0], (100, 1))
    labels = (np.arange(100) >= round(100 * share)).astype(np.int64)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(gap / np.log(share / (1 - share)), rel=1e-3)
    assert compute_probabilities(logits, temperature)[0, 0] == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 2.5])
def test_temperature_is_found_again(true_temperature: float) -> None:
    """Labels are drawn from the softmax of the logits by a temperature: the fit finds that."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (20_000, 10))
    cumulated = compute_probabilities(logits, true_temperature).cumsum(axis=1)
    labels = (random.random((20_000, 1)) > cumulated).sum(axis=1)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(true_temperature, rel=0.03)
    colder, fitted, warmer = (
        -np.log(compute_probabilities(logits, temperature * factor)[np.arange(len(labels)), labels]).mean()  # log loss
        for factor in (0.9, 1, 1.1)
    )
    assert fitted < min(colder, warmer)
    assert measure_calibration_error(compute_probabilities(logits, temperature), labels) < 0.01


def test_probabilities_sum_to_one_and_keep_the_answer() -> None:
    logits = np.random.default_rng(1).normal(0, 50, (100, 10))
    for temperature in (0.1, 1.0, 30.0):
        probabilities = compute_probabilities(logits, temperature)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
        np.testing.assert_array_equal(probabilities.argmax(axis=1), logits.argmax(axis=1))
    np.testing.assert_allclose(compute_probabilities(np.log([[0.2, 0.3, 0.5]])), [[0.2, 0.3, 0.5]])


def test_energy_is_the_log_of_the_sum_of_exponentials() -> None:
    logits = np.array([np.log([1.0, 2.0, 5.0]), [1000.0, 1000.0, -1000.0], [-1000.0, -1000.0, -1000.0]])
    np.testing.assert_allclose(compute_energy(logits), [np.log(8), 1000 + np.log(2), -1000 + np.log(3)])


def test_energy_threshold_leaves_the_share_of_false_alarms() -> None:
    energies = np.random.default_rng(2).permutation(np.arange(1000.0))
    threshold = fit_energy_threshold(energies, 0.02)
    assert (energies < threshold).sum() == 20


def sure_at(confidence: float, count: int) -> Numbers:
    """Rows that are this sure of class 0 of two."""
    return np.tile([confidence, 1 - confidence], (count, 1))


def test_calibration_error_is_the_mean_gap() -> None:
    """100 rows that are sure at 0.9 and right in 80, 50 that are sure at 0.6 and right in 40: (100 * 0.1 + 50 * 0.2) / 150."""
    probabilities = np.concatenate([sure_at(0.9, 100), sure_at(0.6, 50)])
    labels = np.concatenate([np.arange(100) >= 80, np.arange(50) >= 40]).astype(np.int64)
    assert measure_calibration_error(probabilities, labels) == pytest.approx((100 * 0.1 + 50 * 0.2) / 150)


def test_calibration_error_of_certainty() -> None:
    """A probability of 1 falls into the last bin."""
    assert measure_calibration_error(sure_at(1.0, 4), np.array([0, 0, 0, 1])) == pytest.approx(0.25)
    assert measure_calibration_error(sure_at(1.0, 4), np.zeros(4, dtype=np.int64)) == 0
