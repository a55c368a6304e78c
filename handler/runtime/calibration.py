"""What the archive says of the network's scores: how sure they are, and from where on an image is unlike the training images.

Knows nothing of TorchServe.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.gradients.methods import softmax
from handler.images.preparation import ImageWarning
from handler.runtime.archive import ArchiveError

CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """How to read scores.

    Attributes:
        temperature: logits are divided by it before they become probabilities (Guo et al., arXiv 1706.04599).
        energy_threshold: logsumexp of the logits, below which an image is unlike the training images (Liu et al., arXiv
            2010.03759).
    """

    temperature: float = 1.0
    energy_threshold: float = -np.inf

    def probabilities(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Make calibrated probabilities of logits: (N, K) -> (N, K)."""
        return softmax(logits if self.temperature == 1 else logits.astype(np.float64) / self.temperature)

    def warnings(self, logits: NDArray[np.floating]) -> list[tuple[ImageWarning, ...]]:
        """Say of each image whether its scores are those of a training image: (N, K) -> N."""
        return [
            () if energy >= self.energy_threshold else (self._unlike_training(float(energy)),)
            for energy in np.logaddexp.reduce(logits.astype(np.float64), axis=1)
        ]

    def _unlike_training(self, energy: float) -> ImageWarning:
        return ImageWarning(
            "UnlikeTraining",
            f"expected an energy of {self.energy_threshold:.2f} or more, as images of the training have, got {energy:.2f}: the "
            "image may show none of the classes",
        )


def read_calibration(model_dir: Path) -> Calibration:
    """Read an archive's calibration; where it has none, probabilities are the softmax and nothing is unlike the training.

    Raises:
        ArchiveError: the file is damaged.
    """
    file = model_dir / CALIBRATION_FILE
    if not file.is_file():
        return Calibration()
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        calibration = Calibration(float(content["temperature"]), float(content["energy_threshold"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ArchiveError(f"expected 'temperature' and 'energy_threshold' in {CALIBRATION_FILE}, got another file") from error
    if not (np.isfinite((calibration.temperature, calibration.energy_threshold)).all() and calibration.temperature > 0):
        raise ArchiveError(f"expected a positive temperature and a finite threshold in {CALIBRATION_FILE}, got {content}")
    return calibration
