"""One forward, one backward: logits and input gradients, and what methods that look at other points need beside.

Knows torch and numpy, and nothing of HTTP, images or TorchServe.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from handler.gradients.methods import GRADIENT, Gradient, Method, Sampled, SamplingMethod

# At which sampling methods differentiate at once, so that memory stays bounded. What 64 take stays in a CPU's caches: 256 at once
# need a third longer.
MAX_POINTS = 64


@dataclass(frozen=True, slots=True)
class Explanation:
    """Saliency maps of one row.

    Attributes:
        classes: the classes explained, the predicted one by its index, in the order asked for.
        maps: float (len(classes), C, H, W), signed, unnormalised: by the gradient, logit per unit of input.
        gradients: what the method's `finish` makes the maps of; the maps themselves where it changes nothing.
        convergence_deltas: float64 (len(classes),), by how much the sum of each map misses what it should be; None where the
            method has none.
    """

    classes: tuple[int, ...]
    maps: NDArray[np.floating]
    gradients: NDArray[np.floating]
    convergence_deltas: NDArray[np.floating] | None = None


class Differentiable(Protocol):
    """A network and its derivative. Rows must be independent of each other."""

    def score(self, pixels: torch.Tensor, explained_count: int) -> tuple[torch.Tensor, Any]:
        """Score (N, C, H, W) pixels: detached (N, K) logits, and what is needed to differentiate the first explained rows."""

    def pull_back(self, saved: Any, cotangents: torch.Tensor) -> torch.Tensor:  # noqa: ANN401  # each keeps its own
        """Take the vector-Jacobian product: weights of logits (M, K), of the first M rows -> by their pixels (M, C, H, W)."""


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
    network: nn.Module | Differentiable,
    pixels: torch.Tensor,
    targets: Sequence[Sequence[int | None]],
    methods: Sequence[Method] | None = None,
    mean: NDArray[np.floating] | None = None,
) -> tuple[NDArray[np.floating], list[Explanation | None]]:
    """Score a batch, and explain the chosen scores of the rows that ask by those rows' own pixels.

    Rows are independent in eval mode, so the gradient of the sum of each row's own target logit holds every row's own map:
    one forward for the whole batch, then one backward over the rows that ask, or as many as the row with the most targets has.
    Methods that look at other points than the image come after that, some rows together. Nothing shared changes: no gradient is
    accumulated anywhere, and `pixels` keeps its own state.

    Args:
        network: frozen (see `freeze`); takes (N, C, H, W), returns (N, K) logits. Or one with its derivative.
        pixels: float (N, C, H, W), not an inference tensor.
        targets: one sequence a row: the classes to explain, None standing for the predicted one; empty for a prediction only.
        methods: one a row; without it the gradient for all.
        mean: the mean pixel, of a shape that fits (C, H, W), for methods that need it.
    Returns:
        float (N, K) logits; and one Explanation a row, None where the row asked for none.
    Raises:
        ValueError: `targets` and `pixels` differ in length, or a method needs the mean and there is none.
        IndexError: a target is no class of the network.
        FloatingPointError: a logit is NaN or infinite; the gradients might look plausible all the same.
    Source: Simonyan et al., arXiv 1312.6034, section 3; for the methods see `handler.gradients.methods`.
    """
    if len(targets) != len(pixels) or (methods is not None and len(methods) != len(pixels)):
        counts = f"{len(targets)} targets" + ("" if methods is None else f" and {len(methods)} methods")
        raise ValueError(f"expected one target and one method for each of {len(pixels)} rows, got {counts}")
    differentiable = Autograd(network) if isinstance(network, nn.Module) else network
    sampling = {row: method for row, method in enumerate(methods or ()) if isinstance(method, SamplingMethod) and targets[row]}
    in_place = [() if row in sampling else row_targets for row, row_targets in enumerate(targets)] if sampling else targets
    logits, differentiated = _score_and_differentiate(differentiable, pixels, in_place, methods)
    explanations = [
        None if one is None else _finish(one, methods[row] if methods else GRADIENT, pixels[row])
        for row, one in enumerate(differentiated)
    ]
    if sampling:
        rows = [
            _SampledRow(
                method, pixels[row].cpu().numpy(), _resolve(targets[row], int(logits[row].argmax()), logits.shape[1]), logits[row]
            )
            for row, method in sampling.items()
        ]
        for row, explanation in zip(sampling, _explain_by_sampling(differentiable, rows, mean, pixels.device), strict=True):
            explanations[row] = explanation
    return logits, explanations


# --- at the image itself


Differentiated = tuple[tuple[int, ...], NDArray[np.floating]]  # of one row: the classes, and their gradients (T, C, H, W)


def _finish(differentiated: Differentiated, method: Method, pixels: torch.Tensor) -> Explanation:
    """Make the maps of a row's gradients."""
    classes, gradients = differentiated
    maps = gradients if isinstance(method, Gradient) else method.finish(gradients, pixels.cpu().numpy())
    return Explanation(classes, maps, gradients)


def _score_and_differentiate(
    differentiable: Differentiable,
    pixels: torch.Tensor,
    targets: Sequence[Sequence[int | None]],
    methods: Sequence[Method] | None = None,
) -> tuple[NDArray[np.floating], list[Differentiated | None]]:
    """Score a batch, and differentiate what the rows that ask chose, at their own pixels. All rows share the passes.

    Returns:
        (N, K) logits; and for each row its classes and their gradients, None where it asked for none.
    """
    # Rows with the most targets first, so that those that have a k-th target are always the first ones.
    counts = [len(row_targets) for row_targets in targets]
    order = sorted(range(len(counts)), key=counts.__getitem__, reverse=True)  # of equal rows the first stays the first
    is_sorted = order == list(range(len(order)))
    asking = [row for row in order if counts[row]]
    scores, saved = differentiable.score(pixels if is_sorted else pixels[order], len(asking))
    logits = scores.cpu().numpy()
    if np.count_nonzero(np.isfinite(logits)) != logits.size:
        raise FloatingPointError("the network returned a score that is not finite")

    differentiated: list[Differentiated | None] = [None] * len(targets)
    if asking:
        predicted = logits.argmax(axis=1).tolist()
        classes = [_resolve(targets[row], predicted[place], logits.shape[1]) for place, row in enumerate(asking)]
        passes = [
            differentiable.pull_back(saved, torch.from_numpy(cotangents).to(scores.device)).cpu().numpy()
            for cotangents in _cotangents(logits, classes, [methods[row] for row in asking] if methods else ())
        ]
        first_gradients = passes[0][:, None]  # (M, 1, C, H, W)
        for place, row in enumerate(asking):
            count = counts[row]
            gradients = first_gradients[place] if count == 1 else np.stack([passes[k][place] for k in range(count)])
            differentiated[row] = (classes[place], gradients)
    return (logits if is_sorted else logits[np.argsort(order)]), differentiated


def _cotangents(
    logits: NDArray[np.floating], classes: Sequence[tuple[int, ...]], methods: Sequence[Method]
) -> Iterator[NDArray[np.floating]]:
    """Say what each backward pass differentiates: the k-th, the k-th targets of the rows that have so many.

    Args:
        logits: (N, K), of the rows in order: those with the most targets first.
        classes: of the rows that ask, in that order.
        methods: of these rows; empty for the gradient of all.
    Returns:
        for each pass the weights (M, K) of the first M rows' logits.
    """
    weighing = [(place, method) for place, method in enumerate(methods) if not isinstance(method, Gradient)]
    for k in range(len(classes[0])):
        chosen = [row_classes[k] for row_classes in classes if k < len(row_classes)]
        cotangents = _basis(logits.shape[1], logits.dtype).take(chosen, axis=0)
        for place, method in weighing:
            weights = method.weigh(logits[place], chosen[place]) if place < len(chosen) else None
            if weights is not None:
                cotangents[place] = weights
        yield cotangents


@functools.lru_cache(maxsize=8)
def _basis(size: int, dtype: np.dtype[Any]) -> NDArray[np.floating]:
    """The unit vectors: (size, size). For looking up; `take` copies."""
    return np.eye(size, dtype=dtype)


def _resolve(targets: Sequence[int | None], predicted: int, class_count: int) -> tuple[int, ...]:
    """Put the predicted class where None stands."""
    classes = tuple([predicted if target is None else target for target in targets])
    for target in classes:
        if not 0 <= target < class_count:
            raise IndexError(f"expected a class from 0 to {class_count - 1}, got {target}")
    return classes


# --- at other points


@dataclass(frozen=True, slots=True)
class _SampledRow:
    """A row whose method looks at other points: its pixels (C, H, W), classes to explain, and logits (K,)."""

    method: SamplingMethod
    pixels: NDArray[np.floating]
    classes: tuple[int, ...]
    logits: NDArray[np.floating]


def _explain_by_sampling(
    differentiable: Differentiable, rows: Sequence[_SampledRow], mean: NDArray[np.floating] | None, device: torch.device
) -> Iterator[Explanation]:
    """Explain rows at their methods' points, as many rows together as have MAX_POINTS, and at most that many points at once."""
    for group in _group(rows):
        points = [_points_of(row, mean) for row in group]
        targets = [row.classes if row.method.needs_gradients else () for row, own in zip(group, points, strict=True) for _ in own]
        together = torch.from_numpy(points[0] if len(points) == 1 else np.concatenate(points))
        none = np.empty((0, *together.shape[1:]), together.numpy().dtype)  # the gradients of a point that is only scored
        logits: list[NDArray[np.floating]] = []
        gradients: list[NDArray[np.floating]] = []
        for start in range(0, len(together), MAX_POINTS):
            part = slice(start, start + MAX_POINTS)
            part_logits, differentiated = _score_and_differentiate(differentiable, together[part].to(device), targets[part])
            logits += list(part_logits)
            gradients += [none if one is None else one[1] for one in differentiated]
        start = 0
        for row, own in zip(group, points, strict=True):
            part = slice(start, start + len(own))
            chosen = list(row.classes)
            sampled = Sampled(row.pixels, row.logits[chosen], own, np.stack(logits[part])[:, chosen], np.stack(gradients[part]))
            maps, deltas = row.method.combine(sampled)
            yield Explanation(row.classes, maps, maps, deltas)
            start += len(own)


def _points_of(row: _SampledRow, mean: NDArray[np.floating] | None) -> NDArray[np.floating]:
    if row.method.needs_mean and mean is None:
        raise ValueError(f"{row.method} needs the network's mean pixel; there is none")
    return row.method.points(row.pixels, mean)


def _group(rows: Sequence[_SampledRow]) -> Iterator[list[_SampledRow]]:
    """Take rows together that have MAX_POINTS points at most, or one that has more."""
    group: list[_SampledRow] = []
    point_count = 0
    for row in rows:
        if group and point_count + row.method.gradient_count > MAX_POINTS:
            yield group
            group, point_count = [], 0
        group.append(row)
        point_count += row.method.gradient_count
    if group:
        yield group
