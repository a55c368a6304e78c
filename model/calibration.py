"""Calibration: probabilities that say how often the network is right, and a threshold for images unlike those of training.

Logits in, two numbers out, which are fitted after training, on images that training has not seen; the weights stay as they are.
Divided by the temperature, logits give probabilities that are as high as the share of right answers (Guo et al., "On Calibration
of Modern Neural Networks", arXiv 1706.04599). The energy of an image is the logarithm of the sum of the exponentials of its
logits: high for images like those of training, low for others (Liu et al., "Energy-based Out-of-distribution Detection", arXiv
2010.03759; they write it with a minus). Knows nothing of the network or of images.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import special

Numbers = NDArray[np.float64]
Labels = NDArray[np.int64]

BINS = 15  # of confidence, for the calibration error, as in arXiv 1706.04599
TEMPERATURES = (0.05, 50.0)  # where the best is looked for
STEPS = 60  # temperatures that are tried between two, and again between the best one's neighbours
REFINEMENTS = 3


def compute_probabilities(logits: Numbers, temperature: float = 1.0) -> Numbers:
    """Softmax of logits divided by a temperature: (N, K) -> (N, K)."""
    return np.asarray(special.softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1))


def compute_energy(logits: Numbers) -> Numbers:
    """log(sum(exp(logits))) of each row: (N, K) -> (N,). The lower, the less like the images of training."""
    return np.asarray(special.logsumexp(np.asarray(logits, dtype=np.float64), axis=1))


def fit_temperature(logits: Numbers, labels: Labels) -> float:
    """The temperature of the lowest expected calibration error.

    The log loss, which is fitted elsewhere, hangs on the few images that are read wrongly and surely: of some thousand held-out
    digits it makes probabilities that are too low for all others.

    Args:
        logits: (N, K), of images that training has not seen.
        labels: (N,), what they show.
    Returns:
        a number within TEMPERATURES: above 1 where the network is too sure, below 1 where it is too cautious.
    """
    lowest, highest = TEMPERATURES
    for _ in range(REFINEMENTS):  # the error has steps, where images change their bins: no gradient leads to its minimum
        tried = np.geomspace(lowest, highest, STEPS)
        errors = [measure_calibration_error(compute_probabilities(logits, temperature), labels) for temperature in tried]
        best = int(np.argmin(errors))
        lowest, highest = tried[max(best - 1, 0)], tried[min(best + 1, STEPS - 1)]
    return float(tried[best])


def fit_energy_threshold(energies: Numbers, false_alarms: float) -> float:
    """The energy below which this share (0-1) of some digits lies."""
    return float(np.quantile(energies, false_alarms))


def measure_calibration_error(probabilities: Numbers, labels: Labels) -> float:
    """Expected calibration error: how far confidence and the share of right answers are apart, on average.

    Images are put into BINS of equal width by the probability of their answer; each bin counts by its number of images.

    Args:
        probabilities: (N, K).
        labels: (N,).
    Returns:
        0 to 1.
    """
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - is_right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))
