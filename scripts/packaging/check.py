"""Checks of a network, before an archive is built from it."""

from typing import Any, cast

import torch
from torch import nn

from handler.gradients.compiler import Shape
from handler.runtime.archive import ArchiveError

CHECKED_ROWS = 2  # in the batch that is scored


def require_servable(network: nn.Module) -> Shape:
    """Check that a network takes what it says (INPUT_SHAPE), answers what it says (CLASS_COUNT), and can be served.

    Args:
        network: frozen, on the CPU.
    Returns:
        its INPUT_SHAPE: channels, height, width.
    Raises:
        ArchiveError: it has more than one input channel, or is not what it says.
    """
    shape, class_count = cast(Any, network.INPUT_SHAPE), cast(Any, network.CLASS_COUNT)
    if not (isinstance(shape, tuple) and len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)):
        raise ArchiveError(f"expected INPUT_SHAPE, a tuple of three positive integers (channels, height, width), got {shape!r}")
    if shape[0] != 1:
        raise ArchiveError(f"expected a network of one input channel, got INPUT_SHAPE {shape}")
    if type(class_count) is not int or class_count < 2:
        raise ArchiveError(f"expected CLASS_COUNT, an integer of 2 or more, got {class_count!r}")
    try:
        with torch.inference_mode():
            logits = network(torch.zeros(CHECKED_ROWS, *shape))
    except Exception as error:  # others write networks, which may raise anything
        raise ArchiveError(f"the network cannot score float32 images of its INPUT_SHAPE {shape}: {error}") from error
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != (CHECKED_ROWS, class_count):
        raise ArchiveError(f"expected logits {(CHECKED_ROWS, class_count)}, as CLASS_COUNT is {class_count}, got {found}")
    return cast(Shape, shape)
