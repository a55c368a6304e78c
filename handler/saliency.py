"""One forward, one backward: logits and input gradients.

Knows torch and nothing of HTTP, images or TorchServe, so that a batch job or a notebook can use it alone:

    logits, explanations = predict_and_explain(network, pixels, targets=[(7,), (), (None, 3)])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Explanation:
    """Saliency maps of one row.

    Attributes:
        classes: the classes explained, the predicted one by its index, in the order asked for.
        maps: float (len(classes), C, H, W), signed, unnormalised: logit per unit of input. Detached.
    """

    classes: tuple[int, ...]
    maps: torch.Tensor


def freeze(network: nn.Module) -> nn.Module:
    """Put a network into the state in which it is explained: eval mode, no parameter requires a gradient."""
    return network.eval().requires_grad_(False)


def predict_and_explain(
    network: nn.Module, pixels: torch.Tensor, targets: Sequence[Sequence[int | None]]
) -> tuple[torch.Tensor, list[Explanation | None]]:
    """Score a batch, and differentiate the chosen scores of the rows that ask by those rows' own pixels.

    Rows are independent in eval mode, so the gradient of the sum of each row's own target logit holds every row's own map:
    one forward for the whole batch, then one backward, or as many as the row with the most targets has. Where no row asks,
    there is no graph. Nothing shared changes: no gradient is accumulated anywhere, and `pixels` keeps its own state.

    Args:
        network: frozen (see `freeze`); takes (N, C, H, W), returns (N, K) logits.
        pixels: float (N, C, H, W), not an inference tensor.
        targets: one sequence a row: the classes to explain, None standing for the predicted one; empty for a prediction only.
    Returns:
        (N, K) logits, detached; and one Explanation a row, None where the row asked for none.
    Raises:
        ValueError: `targets` and `pixels` differ in length.
        IndexError: a target is no class of the network (also where it is negative).
        FloatingPointError: a score is NaN or infinite. The maps would look plausible all the same.
    Source: Simonyan, Vedaldi and Zisserman, arXiv 1312.6034, section 3.
    """
    if len(targets) != len(pixels):
        raise ValueError(f"got {len(targets)} rows of targets for {len(pixels)} rows of pixels")
    explained_rows = [row for row, wanted in enumerate(targets) if wanted]
    other_rows = [row for row, wanted in enumerate(targets) if not wanted]
    explained = pixels.detach()[explained_rows]  # a copy: the caller's tensor is left alone
    batch = torch.cat([explained.requires_grad_(), pixels.detach()[other_rows]]) if explained_rows else pixels.detach()
    with torch.set_grad_enabled(bool(explained_rows)):
        scores = network(batch)  # (N, K), explained rows first
    logits = torch.empty_like(scores, requires_grad=False)
    logits[explained_rows + other_rows] = scores.detach()
    if not torch.all(torch.isfinite(logits)):
        raise FloatingPointError("the network returned a score that is not finite")

    explanations: list[Explanation | None] = [None] * len(pixels)
    if explained_rows:
        predicted = logits.argmax(dim=1).tolist()
        classes = [_resolve(targets[row], predicted[row], logits.shape[1]) for row in explained_rows]
        for row, row_classes, maps in zip(explained_rows, classes, _differentiate(scores, explained, classes), strict=True):
            explanations[row] = Explanation(row_classes, torch.stack(maps))
    return logits, explanations


def _resolve(targets: Sequence[int | None], predicted: int, class_count: int) -> tuple[int, ...]:
    """Put the predicted class where None stands."""
    classes = tuple(predicted if target is None else target for target in targets)
    for target in classes:
        if not 0 <= target < class_count:
            raise IndexError(f"got class {target}; the network has the classes 0 to {class_count - 1}")
    return classes


def _differentiate(scores: torch.Tensor, pixels: torch.Tensor, classes: Sequence[tuple[int, ...]]) -> list[list[torch.Tensor]]:
    """Gradients of each row's target scores, the k-th targets of all rows in the k-th backward.

    Args:
        scores: (N, K), a function of `pixels`.
        pixels: (M, C, H, W), M <= N, requires a gradient.
        classes: for each of the first M rows, its target classes.
    Returns:
        for each of the M rows, one (C, H, W) gradient a target.
    """
    gradients: list[list[torch.Tensor]] = [[] for _ in classes]
    passes = max(len(row_classes) for row_classes in classes)
    for k in range(passes):
        rows = [row for row, row_classes in enumerate(classes) if k < len(row_classes)]
        total = scores[rows, [classes[row][k] for row in rows]].sum()
        (gradient,) = torch.autograd.grad(total, pixels, retain_graph=k < passes - 1)
        for row in rows:
            gradients[row].append(gradient[row])
    return gradients
