"""One forward, one backward: logits and input gradients.

Knows torch and numpy, and nothing of HTTP, images or TorchServe, so that a batch job or a notebook can use it alone:

    logits, explanations = predict_and_explain(freeze(network), pixels, targets=[(7,), (), (None, 3)])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


@dataclass(frozen=True, slots=True)
class Explanation:
    """Saliency maps of one row.

    Attributes:
        classes: the classes explained, the predicted one by its index, in the order asked for.
        maps: float (len(classes), C, H, W), signed, unnormalised: logit per unit of input.
    """

    classes: tuple[int, ...]
    maps: NDArray[np.floating]


class Differentiable(Protocol):
    """A network and its derivative. Rows must be independent of each other."""

    def score(self, pixels: torch.Tensor, explained_count: int) -> tuple[torch.Tensor, Any]:
        """Score (N, C, H, W) pixels: detached (N, K) logits, and what is needed to differentiate the first explained rows."""

    def pull_back(self, saved: Any, cotangents: torch.Tensor) -> torch.Tensor:  # noqa: ANN401  # each keeps its own
        """Carry weights of logits (M, K), of the first M rows, back to these rows' pixels: (M, C, H, W)."""


class Autograd:
    """Differentiates any network by `torch.autograd.grad`: the reference."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def score(self, pixels: torch.Tensor, explained_count: int) -> tuple[torch.Tensor, Any]:
        """As `Differentiable`. Where no row is explained there is no graph."""
        with torch.set_grad_enabled(explained_count > 0):
            explained = pixels[:explained_count].detach().requires_grad_(explained_count > 0)
            scores = self.network(torch.cat([explained, pixels[explained_count:].detach()]))
        return scores.detach(), (explained, scores)

    def pull_back(self, saved: Any, cotangents: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        """As `Differentiable`. Nothing is accumulated anywhere, and the graph remains."""
        explained, scores = saved
        # The sum, and not `grad_outputs`: checking these imports symbolic shapes, 37 MB and half a second in each worker.
        total = (scores[: len(cotangents)] * cotangents).sum()
        gradients: torch.Tensor = torch.autograd.grad(total, explained, retain_graph=True)[0]
        return gradients[: len(cotangents)]


def freeze(network: nn.Module) -> nn.Module:
    """Put a network into the state in which it is explained: eval mode, no parameter requires a gradient."""
    return network.eval().requires_grad_(False)


def compute_exactly() -> None:
    """Have this process compute float32 as float32 on every device, whatever has allowed less before.

    On newer GPUs PyTorch's convolutions use TF32, with 10 bits of mantissa in place of 23, unless told otherwise, and matrix
    products where an import, a call or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE says so.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # alone it only leaves the choice to the switches below
    backends: Any = torch.backends  # its parts have no types
    cuda, mkldnn = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn), backends.mkldnn
    for switch in (backends, *cuda, mkldnn.matmul, mkldnn.conv, mkldnn.rnn):
        switch.fp32_precision = "ieee"


def predict_and_explain(
    network: nn.Module | Differentiable, pixels: torch.Tensor, targets: Sequence[Sequence[int | None]]
) -> tuple[NDArray[np.floating], list[Explanation | None]]:
    """Score a batch, and differentiate the chosen scores of the rows that ask by those rows' own pixels.

    Rows are independent in eval mode, so the gradient of the sum of each row's own target logit holds every row's own map:
    one forward for the whole batch, then one backward over the rows that ask, or as many as the row with the most targets has.
    Nothing shared changes: no gradient is accumulated anywhere, and `pixels` keeps its own state.

    Args:
        network: frozen (see `freeze`); takes (N, C, H, W), returns (N, K) logits. Or one with its derivative.
        pixels: float (N, C, H, W), not an inference tensor.
        targets: one sequence a row: the classes to explain, None standing for the predicted one; empty for a prediction only.
    Returns:
        float (N, K) logits; and one Explanation a row, None where the row asked for none.
    Raises:
        ValueError: `targets` and `pixels` differ in length.
        IndexError: a target is no class of the network.
        FloatingPointError: a logit is NaN or infinite; the gradients might look plausible all the same.
    Source: Simonyan et al., arXiv 1312.6034, section 3.
    """
    if len(targets) != len(pixels):
        raise ValueError(f"got {len(targets)} targets for {len(pixels)} rows; one for each is needed")
    differentiable = Autograd(network) if isinstance(network, nn.Module) else network
    # Rows with the most targets first, so that those that have a k-th target are always the first ones.
    order = sorted(range(len(targets)), key=lambda row: -len(targets[row]))
    is_sorted = order == list(range(len(order)))
    asking = [row for row in order if targets[row]]
    scores, saved = differentiable.score(pixels if is_sorted else pixels[order], len(asking))
    logits = scores.cpu().numpy()
    if not np.isfinite(logits).all():
        raise FloatingPointError("the network returned a score that is not finite")

    explanations: list[Explanation | None] = [None] * len(targets)
    if asking:
        predicted = logits.argmax(axis=1).tolist()
        classes = [_resolve(targets[row], predicted[place], logits.shape[1]) for place, row in enumerate(asking)]
        passes = []  # the k-th holds the maps of the k-th targets of the first rows
        for k in range(len(classes[0])):
            chosen = [row_classes[k] for row_classes in classes if k < len(row_classes)]
            cotangents = np.zeros((len(chosen), logits.shape[1]), logits.dtype)
            cotangents[range(len(chosen)), chosen] = 1
            passes.append(differentiable.pull_back(saved, torch.from_numpy(cotangents).to(scores.device)).cpu().numpy())
        for place, row in enumerate(asking):
            maps = [passes[k][place] for k in range(len(classes[place]))]
            explanations[row] = Explanation(classes[place], maps[0][None] if len(maps) == 1 else np.stack(maps))
    if not is_sorted:
        logits = logits[np.argsort(order)]
    return logits, explanations


def _resolve(targets: Sequence[int | None], predicted: int, class_count: int) -> tuple[int, ...]:
    """Put the predicted class where None stands."""
    classes = tuple(predicted if target is None else target for target in targets)
    for target in classes:
        if not 0 <= target < class_count:
            raise IndexError(f"got class {target}; the network has the classes 0 to {class_count - 1}")
    return classes
