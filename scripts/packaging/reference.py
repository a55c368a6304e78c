"""A network -> an image and the reference answer to it, which the archive carries.

The answer is PyTorch's own, by autograd in float64, and shares nothing with the compiled pass that a worker uses.
`scripts/serving/ready.py` compares a server's answers with it, and `smoke_test.py` those of each new archive.
"""

import copy
import json
import math
import random
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from handler.gradients.compiler import Shape
from handler.gradients.explain import freeze

DIGITS = 7  # of the largest logit, and of the largest number of the map: as many as float32 has, the same on every machine
MARGIN = 1e-5  # of intensity: changes of this size must not change the map. float32 and other devices differ by less
MAX_CHANGE = 1e-5  # of the map's largest number, that such a change may make
NEIGHBOURS = 16
MIN_LEAD = 0.05  # of the largest logit: the best one's before the second, so that the digit is the same everywhere too
MAX_TRIES = 1000


def make_reference_answer(network: nn.Module, weights_sha256: str) -> bytes:
    """Answer an image that is clearly of one class, and so far from every kink that its saliency map is the same on any device.

    Args:
        network: has an INPUT_SHAPE of one channel.
        weights_sha256: SHA-256 of its weights, in hexadecimal.
    Returns:
        JSON, the fields of `scripts.serving.ready.ReferenceAnswer`. The same network gives the same bytes.
    Raises:
        ValueError: no such image was found.
    """
    exact = freeze(copy.deepcopy(network)).cpu().double()
    _, height, width = cast(Shape, network.INPUT_SHAPE)
    for seed in range(MAX_TRIES):
        source = random.Random(seed)  # noqa: S311  # no secret; numbers that every Python makes alike
        rows = [[round(source.random(), 3) for _ in range(width)] for _ in range(height)]  # noise: no two inputs of a pool tie
        pixels = torch.tensor(rows, dtype=torch.float64).reshape(1, 1, height, width)
        signs = torch.tensor([source.choice((-1, 1)) for _ in range(NEIGHBOURS * height * width)])
        neighbours = pixels + MARGIN * signs.reshape(NEIGHBOURS, 1, height, width)
        digit = int(exact(pixels).argmax())
        logits, maps = _explain(exact, torch.cat([pixels, neighbours]), digit)
        best, second = logits[0].topk(2).values.tolist()
        is_clear = best - second > MIN_LEAD * float(logits[0].abs().max())
        if is_clear and float((maps - maps[0]).abs().max()) <= MAX_CHANGE * float(maps[0].abs().max()):
            saliency = _round(maps[0].flatten().tolist())
            answer = {
                "digit": digit,
                "logits": _round(logits[0].tolist()),
                "saliency": [saliency[start : start + width] for start in range(0, len(saliency), width)],
            }
            return json.dumps({"weights_sha256": weights_sha256, "pixels": rows, **answer}).encode()
    raise ValueError(f"none of {MAX_TRIES} images is clearly of one class and far from every kink of the network")


def _explain(network: nn.Module, pixels: torch.Tensor, digit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Score pixels (N, 1, H, W): logits (N, K), and the gradient of one class's logit (N, 1, H, W)."""
    pixels.requires_grad_()
    logits = network(pixels)
    (gradient,) = torch.autograd.grad(logits[:, digit].sum(), pixels)
    return logits.detach(), gradient


def _round(numbers: Sequence[float]) -> list[float]:
    """Round all to the decimals with which the largest has DIGITS digits."""
    largest = max(abs(number) for number in numbers)
    decimals = DIGITS - 1 - math.floor(math.log10(largest)) if largest else 0
    return [round(number, decimals) for number in numbers]
