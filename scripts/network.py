"""The digits network of model/, loaded in one place."""

from pathlib import Path

from torch import nn

from handler.gradients.explain import freeze
from handler.runtime.archive import load_network
from scripts.paths import MODEL_FILE, WEIGHTS_FILE


def load_committed_network(weights_file: Path = WEIGHTS_FILE) -> nn.Module:
    """Load the network of model/ onto the CPU, frozen: eval mode, no parameter requires a gradient.

    Args:
        weights_file: safetensors; the committed weights unless others are named.
    Raises:
        ArchiveError: the weights are missing, unreadable, or not the network's.
    """
    return freeze(load_network(MODEL_FILE, weights_file))
