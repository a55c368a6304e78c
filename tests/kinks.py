"""Images away from every kink of a network: inputs of a max pool that tie, and ReLUs at zero.

The network is piecewise linear. At a kink two very different gradients are right, and rounding chooses between them: another one
with other kernels, or in another batch. Away from the kinks a small change of the pixels leaves a map as it is.
"""

import functools
import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from handler.gradients.explain import freeze
from scripts.network import load_committed_network
from scripts.paths import SAMPLE_FILES

RADIUS = 3e-6  # of intensity; moves what pools and ReLUs are given thirty times as far as float32's rounding does
PROBE_COUNT = 8  # changes of that size that must leave a map as it is
MAX_LEVEL = 13  # of 255, of the noise
MAX_TRIES = 100


def are_at_a_kink(network: nn.Module, pixels: NDArray[np.floating], radius: float = RADIUS) -> NDArray[np.bool_]:
    """Whether changes of an image by so much, with random signs, change its map: (N, C, H, W) -> (N,)."""
    exact = freeze(type(network)().double())
    exact.load_state_dict(network.state_dict())
    random = torch.Generator().manual_seed(0)
    centres = torch.from_numpy(pixels).double()
    weights = torch.randn(exact(centres[:1]).shape, generator=random, dtype=torch.float64)  # of all logits at once

    def differentiate(inputs: torch.Tensor) -> torch.Tensor:
        inputs.requires_grad_()
        (maps,) = torch.autograd.grad((exact(inputs) * weights).sum(), inputs)
        return maps

    expected = differentiate(centres.clone())
    found = torch.zeros(len(pixels), dtype=torch.bool)
    for _ in range(PROBE_COUNT):
        signs = torch.randint(0, 2, centres.shape, generator=random) * 2 - 1
        changes = (differentiate(centres + radius * signs) - expected).abs().flatten(1).amax(dim=1)
        found |= changes > 1e-9 * expected.abs().flatten(1).amax(dim=1)
    return found.numpy()


def dither(network: nn.Module, levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Add noise until no image lies at a kink.

    Args:
        levels: (N, H, W), 0 to 255. Divided by 255 they are the pixels of a network of one channel.
    Returns:
        the same shape; the same for the same levels.
    """
    random = np.random.default_rng(0)
    dithered, pending = levels.copy(), np.arange(len(levels))
    for _ in range(MAX_TRIES):
        noise = random.integers(0, MAX_LEVEL + 1, levels[pending].shape)
        dithered[pending] = np.clip(levels[pending] + noise, 0, 255)
        pending = pending[are_at_a_kink(network, dithered[pending, None].astype(np.float32) / np.float32(255))]
        if not len(pending):
            return dithered
    raise RuntimeError(f"{len(pending)} images are at a kink of the network under each of {MAX_TRIES} noises")


@functools.cache
def dithered_digits() -> NDArray[np.uint8]:
    """All test digits with noise, away from every kink of the committed network: (50, 28, 28), in the order of SAMPLE_FILES."""
    return dither(load_committed_network(), np.stack([np.asarray(Image.open(file)) for file in SAMPLE_FILES]))


def dithered_png(file: Path) -> bytes:
    """One of them as an image, by the file of the digit that it was."""
    content = io.BytesIO()
    Image.fromarray(dithered_digits()[SAMPLE_FILES.index(file)]).save(content, format="PNG")
    return content.getvalue()
