"""The committed digits network, loaded in one place."""

from torch import nn

from handler.gradients.explain import freeze
from handler.runtime.archive import load_network
from scripts.paths import MODEL_FILE, WEIGHTS_FILE


def load_committed_network() -> nn.Module:
    """Load the network of model/ with its committed weights: frozen (eval mode, no parameter requires a gradient), on the CPU."""
    return freeze(load_network(MODEL_FILE, WEIGHTS_FILE))
