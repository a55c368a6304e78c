"""An independent implementation of the network and its gradient, in numpy and float64, without torch.

Written from the network's description alone, forward and backward by hand.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from scipy import special

from scripts.paths import ROOT

CALIBRATION_FILE = ROOT / "model" / "calibration.json"

Array = NDArray[np.float64]


class Oracle:
    """Logits and saliency of single images, from the weights in a safetensors file."""

    def __init__(self, weights: bytes | Path) -> None:
        content = weights.read_bytes() if isinstance(weights, Path) else weights
        self.weights = {name: array.astype(np.float64) for name, array in safetensors.numpy.load(content).items()}

    def explain(self, pixels: Array) -> tuple[Array, Array]:
        """Compute the logits of an image and differentiate each.

        Args:
            pixels: (28, 28), intensity in [0, 1].
        Returns:
            logits (10,); their derivatives by the pixels (10, 28, 28).
        """
        w = self.weights
        std = w["std"]
        x0 = ((pixels - w["mean"]) / std)[None]  # (1, 28, 28)
        z1 = _convolve(x0, w["conv1.weight"], w["conv1.bias"])  # (16, 30, 30)
        x1, winners1 = _pool(np.maximum(z1, 0))  # (16, 15, 15)
        z2 = _convolve(x1, w["conv2.weight"], w["conv2.bias"])  # (32, 17, 17)
        x2, winners2 = _pool(np.maximum(z2, 0))  # (32, 8, 8)
        logits = w["lin.weight"] @ x2.ravel() + w["lin.bias"]
        jacobian = []
        for row in w["lin.weight"]:
            g2 = _unpool(row.reshape(x2.shape), winners2, z2.shape) * (z2 > 0)
            g1 = _unpool(_convolve_back(g2, w["conv2.weight"], x1.shape), winners1, z1.shape) * (z1 > 0)
            jacobian.append(_convolve_back(g1, w["conv1.weight"], x0.shape)[0] / std)
        return logits, np.stack(jacobian)


def compute_probabilities(logits: Array) -> Array:
    """Make the probabilities that the committed network's logits stand for, (..., K): softmax, with the committed temperature."""
    temperature = json.loads(CALIBRATION_FILE.read_text())["temperature"]
    return np.asarray(special.softmax(logits / temperature, axis=-1))


def _convolve(x: Array, kernel: Array, bias: Array) -> Array:
    """3x3 cross-correlation with 2 zeros around: (C, H, W) -> (K, H + 2, W + 2)."""
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))  # (C, H + 2, W + 2, 3, 3)
    scores: Array = np.einsum("chwij,kcij->khw", windows, kernel) + bias[:, None, None]
    return scores


def _convolve_back(g: Array, kernel: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of `_convolve`: each output passes its gradient to its nine inputs."""
    _, height, width = shape
    padded = np.zeros((shape[0], height + 4, width + 4))
    for i in range(3):
        for j in range(3):
            padded[:, i : i + height + 2, j : j + width + 2] += np.einsum("khw,kc->chw", g, kernel[:, :, i, j])
    return padded[:, 2:-2, 2:-2]


def _pool(x: Array) -> tuple[Array, NDArray[np.intp]]:
    """2x2 maxima, and the index of the maximum in each window (the first of equals). An odd last row is left out."""
    channels, height, width = x.shape[0], x.shape[1] // 2, x.shape[2] // 2
    windows = x[:, : 2 * height, : 2 * width].reshape(channels, height, 2, width, 2).transpose(0, 1, 3, 2, 4)
    flat = windows.reshape(channels, height, width, 4)
    return flat.max(axis=3), flat.argmax(axis=3)


def _unpool(g: Array, winners: NDArray[np.intp], shape: tuple[int, ...]) -> Array:
    """Pass each window's gradient to its maximum."""
    spread = np.zeros(shape)
    channels, rows, columns = np.indices(g.shape)
    spread[channels, 2 * rows + winners // 2, 2 * columns + winners % 2] = g
    return spread
