"""The compiled pass of a network, written by `compiler` and carried by the archive, checked before it is used.

Scores and gradients without autograd: one function forwards, one backwards, both plain sequences of operators. Knows torch and
nothing of HTTP, images or TorchServe.
"""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from handler.gradients.explain import Autograd, Differentiable

COMPILED_PASS_FILE = "compiled_pass.py"  # noqa: S105  # no password
CHECKED_BATCH_SIZES = (1, 2, 9)
TOLERANCE = 1e-4  # of the largest logit or gradient of a row; float32 in another order of operations differs by 1e-6

logger = logging.getLogger(__name__)


class CompiledPass:
    """A network and its derivative, as derived from it."""

    def __init__(self, source: ModuleType, network: nn.Module) -> None:
        state = [tensor.detach() for tensor in network.state_dict().values()]
        # On CPUs convolutions and pools are up to three times as fast with channels last.
        self._layout = to_channels_last if all(tensor.device.type == "cpu" for tensor in state) else torch.Tensor.contiguous
        self._source = source
        with torch.inference_mode():
            self._constants = [self._layout(constant) for constant in source.fold([self._layout(tensor) for tensor in state])]

    def score(self, pixels: torch.Tensor, explained_count: int) -> tuple[torch.Tensor, Any]:
        """As `Differentiable`."""
        with torch.inference_mode():
            scores, saved = self._source.forward(self._constants, self._layout(pixels))
        return scores, (saved, len(pixels))

    def pull_back(self, saved: Any, cotangents: torch.Tensor) -> torch.Tensor:  # noqa: ANN401  # tensors, and how many rows
        """As `Differentiable`."""
        tensors, row_count = saved
        with torch.inference_mode():
            if len(cotangents) < row_count:  # only the rows that ask are paid for
                tensors = [tensor[: len(cotangents)] for tensor in tensors]
            gradients: torch.Tensor = self._source.backward(self._constants, tensors, cotangents)
        return gradients


def to_channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """Lay out (N, C, H, W) with channels last, also where there is one channel and PyTorch leaves open which layout it is.

    Without it the first convolution's output comes out with channels first, and the pool after it takes the slow path. Tensors
    of other ranks are returned as they are.
    """
    if tensor.dim() != 4:
        return tensor
    _, channels, height, width = tensor.shape
    strides = (channels * height * width, 1, channels * width, channels)
    if channels == 1:
        return tensor.contiguous().as_strided(tensor.shape, strides)
    return tensor.contiguous(memory_format=torch.channels_last)


def import_file(file: Path) -> ModuleType:
    """Run a Python file as a module, without making it known to others.

    Raises:
        FileNotFoundError: there is no such file. What the file itself raises comes through.
    """
    specification = importlib.util.spec_from_file_location(file.stem, file)
    if specification is None or specification.loader is None:
        raise FileNotFoundError(f"{file.name} is no Python file")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def load_compiled_pass(file: Path, network: nn.Module, input_shape: tuple[int, int, int]) -> Differentiable:
    """Load a derived pass and hold it against autograd on the device and the weights that it is for.

    Args:
        file: what `handler/gradients/compiler.py` wrote.
        network: frozen, on its device.
        input_shape: C, H, W.
    Returns:
        the pass; where it is missing, fails or differs, autograd, with a line in the log.
    """
    return build_checked(
        file.name,
        lambda: CompiledPass(import_file(file), network),
        Autograd(network),
        network,
        input_shape,
        CHECKED_BATCH_SIZES,
    )


def build_checked(
    name: str,
    build: Callable[[], Differentiable],
    reference: Differentiable,
    network: nn.Module,
    input_shape: tuple[int, int, int],
    batch_sizes: Sequence[int],
) -> Differentiable:
    """Build what should compute as the reference does, and hold it against that.

    Args:
        name: for the log.
        build: may raise whatever it likes.
        reference: the same numbers by a slower way.
        network: of both, on its device.
        input_shape: C, H, W.
        batch_sizes: of the random images that both are given.
    Returns:
        what was built; where that fails or differs, the reference, with a line in the log.
    """
    instead = type(reference).__name__
    try:
        built = build()
        difference = _largest_difference(built, reference, network, input_shape, batch_sizes)
    except Exception as error:  # noqa: BLE001  # made for another PyTorch or network, no memory: serving goes on without it
        logger.warning("%s: %s used instead, %s: %s", name, instead, type(error).__name__, str(error).partition("\n")[0])
        return reference
    if not difference <= TOLERANCE:  # true for NaN
        logger.warning("%s: %s used instead, off by %.1e of the largest value", name, instead, difference)
        return reference
    logger.info("%s: used, agrees to %.1e", name, difference)
    return built


def _largest_difference(
    one: Differentiable,
    other: Differentiable,
    network: nn.Module,
    input_shape: tuple[int, int, int],
    batch_sizes: Sequence[int],
) -> float:
    """Compare logits and gradients of random images; the largest difference as a share of each row's largest value.

    Of the gradients only three rows of four count: where two inputs of a max pool are equal but for rounding, both of two very
    different gradients are right. On random images of this size that is one row in fifty.
    """
    parameter = next(network.parameters())
    generator = torch.Generator().manual_seed(0)
    differences = []
    for size in batch_sizes:
        pixels = torch.rand(size, *input_shape, generator=generator).to(parameter)
        (logits, saved), (expected_logits, expected_saved) = one.score(pixels, size), other.score(pixels, size)
        cotangents = torch.randn(expected_logits.shape, generator=generator).to(parameter)
        gradients, expected_gradients = one.pull_back(saved, cotangents), other.pull_back(expected_saved, cotangents)
        differences.append((_row_differences(logits, expected_logits), _row_differences(gradients, expected_gradients)))
    logit_differences, gradient_differences = (torch.cat(column) for column in zip(*differences, strict=True))
    counted = gradient_differences.quantile(0.75, interpolation="higher")
    return float(torch.stack([logit_differences.max(), counted]).max())  # NaN where one is NaN


def _row_differences(values: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The largest difference in each row, as a share of the row's largest expected value: (N,); 0 where nothing differs."""
    if values.shape != expected.shape:
        raise ValueError(f"expected the shape {tuple(expected.shape)}, got {tuple(values.shape)}")
    differences, largest = (rows.flatten(1).abs().amax(dim=1) for rows in (values - expected, expected))
    return torch.where(differences == 0, differences, differences / largest)  # a row of zeros that agrees is not 0 / 0
