"""Measures of saliency maps: what the most salient pixels do to a score, how like two maps are, what a map does not say.

A library: pixels and maps in, one number for each image out. Knows nothing of reports, gates or files. METHODS holds every
method that the handler offers, with its default parameters.

Sources: deletion and insertion, Petsiuk et al., arXiv 1806.07421; randomised layers, Adebayo et al., arXiv 1810.03292.
"""

import copy
from collections.abc import Callable, Collection
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import nn
from tqdm import tqdm

from handler.gradients import methods
from handler.gradients.explain import freeze, predict_and_explain
from handler.gradients.methods import CROSS_ENTROPY, GRADIENT, LossGradient, Method

MapFunction = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
Values = NDArray[np.float64]

PIXELS_A_STEP = 28  # that are deleted or inserted at once: 28 steps for a digit
BATCH_SIZE = 128  # images through the network at once; larger batches fall out of a core's cache
FLIP_BLOCK = 16  # counts of inverted pixels that are tried at once for an image
NOISE = 0.05  # highest intensity that is added to a pixel
DIFFERENCE_STEP = 1e-6  # intensity; small against the distance to the next kink, large against float64's rounding
DIFFERENCE_TOLERANCE = 1e-5  # between a central difference and the gradient


def gradient(network: nn.Module, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Make the saliency maps that the handler serves by default.

    Args:
        network: frozen.
        pixels: float (N, 1, H, W), intensity in [0, 1].
        targets: int64 (N,), the classes to explain.
    Returns:
        float (N, H, W), signed.
    """
    return _map_by(GRADIENT, network, pixels, targets)


def _map_by(method: Method, network: nn.Module, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    chosen = [(target,) for target in targets.tolist()]
    _, explanations = predict_and_explain(network, pixels, chosen, [method] * len(chosen))
    maps = np.concatenate([explanation.maps for explanation in explanations if explanation is not None])  # (N, 1, H, W)
    return torch.from_numpy(maps).squeeze(1)


def _find_evidence(method: Method, network: nn.Module, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Make maps in which a higher number speaks for the class, as in the gradient's: a loss falls where the class gains."""
    maps = _map_by(method, network, pixels, targets)
    return -maps if method.output == CROSS_ENTROPY else maps


METHODS: dict[str, MapFunction] = {name: partial(_find_evidence, method()) for name, method in methods.METHODS.items()}


def predict(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Predict the probabilities of all classes, batch by batch: float (N, C, H, W) -> (N, K)."""
    with torch.inference_mode():
        return torch.cat([network(batch).softmax(dim=1) for batch in pixels.split(BATCH_SIZE)])


def explain(
    method: MapFunction, network: nn.Module, pixels: torch.Tensor, targets: torch.Tensor, *, name: str = "maps"
) -> torch.Tensor:
    """Make the maps of many images, float (N, H, W), batch by batch, with a progress bar under `name`."""
    batches = zip(pixels.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True)
    count = -(-len(pixels) // BATCH_SIZE)
    maps = [method(network, *batch) for batch in tqdm(batches, desc=name, total=count, unit="batch", leave=False, disable=None)]
    return torch.cat(maps)


# --- orders of pixels: the most salient ones first


def rank_pixels(maps: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Rank each pixel, the largest number first; equal numbers in random order, so a flat map is a random order.

    Args:
        maps: float (N, H, W).
    Returns:
        int64 (N, H * W), 0 for the first.
    """
    numbers = maps.flatten(1)
    shuffled = torch.rand(numbers.shape, generator=random).argsort(dim=1)
    order = shuffled.gather(1, torch.argsort(numbers.gather(1, shuffled), dim=1, descending=True, stable=True))
    places = torch.arange(numbers.shape[1]).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def trace_probabilities(
    network: nn.Module,
    pixels: torch.Tensor,
    ranks: torch.Tensor,
    targets: torch.Tensor,
    *,
    insert: bool,
    step: int = PIXELS_A_STEP,
    name: str = "curves",
) -> Values:
    """Trace the probability of a class while pixels are deleted (set to 0) in order, or inserted into an empty image.

    Args:
        pixels: float (N, C, H, W).
        ranks: int64 (N, H * W), see `rank_pixels`.
        targets: int64 (N,).
        step: pixels that change at once.
    Returns:
        (N, points): after 0, step, 2 * step, ... and all pixels.
    """
    pixel_count = ranks.shape[1]
    counts = torch.tensor([*range(0, pixel_count, step), pixel_count])
    rows = max(1, BATCH_SIZE // len(counts))
    curves = []
    batches = list(zip(pixels.split(rows), ranks.split(rows), targets.split(rows), strict=True))
    for some_pixels, some_ranks, some_targets in tqdm(batches, desc=name, unit="batch", leave=False, disable=None):
        changed = some_ranks[:, None] < counts[:, None]  # (n, points, H * W)
        kept = (changed == insert).unflatten(2, pixels.shape[2:])[:, :, None]  # (n, points, 1, H, W)
        images = (some_pixels[:, None] * kept).flatten(0, 1)  # (n * points, C, H, W)
        probabilities = predict(network, images).unflatten(0, changed.shape[:2])  # (n, points, K)
        curves.append(probabilities[torch.arange(len(some_targets)), :, some_targets])
    return torch.cat(curves).double().numpy()


def count_inversions_to_flip(
    network: nn.Module, pixels: torch.Tensor, ranks: torch.Tensor, *, name: str = "inversions"
) -> Values:
    """Count the pixels, first ones first, that have to be inverted (x becomes 1 - x) until the predicted class changes.

    Args:
        pixels: float (N, C, H, W).
        ranks: int64 (N, H * W), see `rank_pixels`.
    Returns:
        (N,): 1 or more; all pixels where the class never changes.
    """
    predicted = predict(network, pixels).argmax(dim=1)
    flips = torch.full((len(pixels),), ranks.shape[1])
    with tqdm(total=len(pixels), desc=name, unit="image", leave=False, disable=None) as progress:
        waiting = torch.arange(len(pixels))
        for first in range(1, ranks.shape[1] + 1, FLIP_BLOCK):
            counts = torch.arange(first, min(first + FLIP_BLOCK, ranks.shape[1] + 1))
            inverted = ranks[waiting][:, None] < counts[:, None]  # (n, counts, H * W)
            inverted = inverted.unflatten(2, pixels.shape[2:])[:, :, None]
            images = torch.where(inverted, 1 - pixels[waiting][:, None], pixels[waiting][:, None]).flatten(0, 1)
            answers = predict(network, images).argmax(dim=1).unflatten(0, (len(waiting), len(counts)))
            flipped = answers != predicted[waiting][:, None]  # (n, counts)
            found = flipped.any(dim=1)
            flips[waiting[found]] = counts[flipped[found].int().argmax(dim=1)]  # argmax: the first
            waiting = waiting[~found]
            progress.update(int(found.sum()))
            if not len(waiting):
                break
    return flips.double().numpy()


# --- likeness of maps


def correlate_ranks(maps: torch.Tensor, others: torch.Tensor) -> Values:
    """Compute Spearman's rank correlation of each pair of maps, (N, H, W) -> (N,); 0 where one is flat."""
    ranks, other_ranks = (rankdata(some.flatten(1).numpy(), axis=1) for some in (maps, others))
    middle = (ranks.shape[1] + 1) / 2  # the mean of all ranks, also where some are shared
    return _cosines(ranks - middle, other_ranks - middle)


def compare_directions(maps: torch.Tensor, others: torch.Tensor) -> Values:
    """Compute the cosine of the angle between each pair of maps, (N, H, W) -> (N,); 0 where one is zero."""
    return _cosines(maps.flatten(1).double().numpy(), others.flatten(1).double().numpy())


def _cosines(vectors: Values, others: Values) -> Values:
    lengths: Values = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    products: Values = (vectors * others).sum(axis=1)
    return products / np.where(lengths > 0, lengths, np.inf)


def randomise(network: nn.Module, layers: Collection[str], seed: int) -> nn.Module:
    """Copy a network, give the named layers new random weights, and freeze it."""
    copied = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            copied.get_submodule(layer).reset_parameters()  # type: ignore[operator]
    return freeze(copied)


def choose_layers(network: nn.Module) -> dict[str, tuple[str, ...]]:
    """Choose sets of layers that get random weights, by a name for people: from the last to all, and each alone."""
    layers = [name for name, module in network.named_modules() if hasattr(module, "reset_parameters")]
    cascade = {f"{layers[first]} and later": tuple(layers[first:]) for first in range(len(layers) - 2, 0, -1)}
    alone = {f"{layer} alone": (layer,) for layer in layers}
    return {**cascade, "all layers": tuple(layers), **alone}


# --- what a map does not say


def share_tied_windows(network: nn.Module, pixels: torch.Tensor) -> Values:
    """Compute the share of the first pool's windows whose largest input, above zero, is in them twice.

    Args:
        network: the digits network, of the pixels' float type.
        pixels: float (N, 1, 28, 28).
    Returns:
        float64 (N,), 0-1.
    """
    mean, std, conv1 = network.get_buffer("mean"), network.get_buffer("std"), network.get_submodule("conv1")
    with torch.no_grad():
        inputs = conv1((pixels - mean) / std).relu()  # (N, 16, 30, 30)
    windows = inputs.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # (N, 16, 15, 15, 4)
    largest = windows.amax(dim=4, keepdim=True)
    tied = ((windows == largest) & (largest > 0)).sum(dim=4) > 1
    shares: Values = tied.double().mean(dim=(1, 2, 3)).numpy()
    return shares


def share_differing_pixels(
    network: nn.Module, pixels: torch.Tensor, targets: torch.Tensor, *, name: str = "differences"
) -> Values:
    """Compute the share of pixels at which central differences disagree with the gradient: float64 (N, C, H, W) -> (N,)."""
    shares = []
    steps = DIFFERENCE_STEP * torch.eye(pixels[0].numel(), dtype=pixels.dtype).unflatten(1, pixels.shape[1:])
    for image, target in tqdm(list(zip(pixels, targets, strict=True)), desc=name, unit="image", leave=False, disable=None):
        with torch.no_grad():
            above, below = (
                torch.cat([network(image + sign * some)[:, target] for some in steps.split(BATCH_SIZE)]) for sign in (1, -1)
            )
        differences = (above - below) / (2 * DIFFERENCE_STEP)
        saliency = gradient(network, image[None], target[None]).flatten()
        shares.append(float(((saliency - differences).abs() > DIFFERENCE_TOLERANCE).double().mean()))
    return np.array(shares)


def differentiate_loss(network: nn.Module, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Differentiate the cross entropy, as `criterion(network(x), y).backward()` does: another quantity than the score's gradient.

    Args:
        pixels: float64 (N, 1, H, W); in float32 the probability of a confident prediction rounds to 1, and the loss to 0.
        targets: int64 (N,), the right classes.
    Returns:
        float64 (N, H, W).
    """
    return _map_by(LossGradient(), network, pixels, targets)


def dither(pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """Add noise, uniform in [0, NOISE], to every pixel."""
    return pixels + NOISE * torch.rand(pixels.shape, generator=torch.Generator().manual_seed(seed), dtype=pixels.dtype)


def measure_norms(maps: torch.Tensor) -> Values:
    """Compute the Euclidean norm of each map: (N, H, W) -> (N,)."""
    norms: Values = maps.flatten(1).norm(dim=1).numpy()
    return norms
