"""How far to trust a map: measure the maps of the committed network beside controls, and hold them against gates.

    python -m scripts.research.evaluate --data-dir build/data

Writes build/evaluation/report.json and report.html, and prints the same as text.

Deletion and insertion take away, or put in, the most salient pixels first (Petsiuk et al., arXiv 1806.07421). Randomisation gives
layers of the network new random weights: a map that stays as it was does not show what the network has learned (Adebayo et al.,
arXiv 1810.03292). Every method that the handler offers is measured, with its default parameters.
"""

import argparse
import copy
import hashlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import nn
from tqdm import tqdm

from handler.gradients import methods
from handler.gradients.explain import freeze, predict_and_explain
from handler.gradients.methods import CROSS_ENTROPY, GRADIENT, LossGradient, Method
from handler.render.drawing import Layout, Row, Style, draw
from handler.runtime.archive import ArchiveError, load_weights
from model.data import load_mnist
from model.network import DigitNetwork
from scripts.research.evaluation_report import (
    ABSOLUTE,
    Estimate,
    Gate,
    Report,
    Table,
    judge,
    render_html,
    render_json,
    render_text,
)

MapFunction = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
Values = NDArray[np.float64]

PIXELS_A_STEP = 28  # of the curves: 28 steps for a digit
BATCH_SIZE = 128  # images through the network at once; larger batches fall out of a core's cache
FLIP_BLOCK = 16  # counts of inverted pixels that are tried at once for an image
RANDOM_NETWORKS = 5  # for each set of layers that gets random weights
NOISE = 0.05  # highest intensity that is added to a pixel, where maps are repeated
DIFFERENCE_STEP = 1e-6  # intensity; small against the distance to the next kink, large against float64's rounding
DIFFERENCE_TOLERANCE = 1e-5  # between a central difference and the gradient
DIFFERENCE_IMAGES = 20  # each takes 3,136 forward passes
EXAMPLES = 8  # images on the page


def gradient(network: nn.Module, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The map that the handler serves.

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
    """Maps in which a higher number speaks for the class, as `gradient`: a loss falls where the class gains."""
    maps = _map_by(method, network, pixels, targets)
    return -maps if method.output == CROSS_ENTROPY else maps


METHODS: dict[str, MapFunction] = {name: partial(_find_evidence, method()) for name, method in methods.METHODS.items()}

GATES = (
    Gate("deletion by the signed gradient", "order", "gradient", "deletion", highest=0.15),
    Gate("insertion by the signed gradient", "order", "gradient", "insertion", lowest=0.93),
    Gate("signed maps after randomisation", "randomisation", "gradient, all layers", "signed", lowest=-0.1, highest=0.1),
    Gate("absolute maps after randomisation", "randomisation", "gradient, all layers", "absolute", lowest=-0.35, highest=0.35),
)


# --- scores and maps, batch by batch


def predict(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Probabilities of all classes: float (N, C, H, W) -> (N, K)."""
    with torch.inference_mode():
        return torch.cat([network(batch).softmax(dim=1) for batch in pixels.split(BATCH_SIZE)])


def explain(
    method: MapFunction, network: nn.Module, pixels: torch.Tensor, targets: torch.Tensor, *, name: str = "maps"
) -> torch.Tensor:
    """Maps of many images, float (N, H, W), with a progress bar under `name`."""
    batches = zip(pixels.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True)
    count = -(-len(pixels) // BATCH_SIZE)
    maps = [method(network, *batch) for batch in tqdm(batches, desc=name, total=count, unit="batch", leave=False, disable=None)]
    return torch.cat(maps)


# --- orders of pixels: what happens when the most salient ones go first


def rank_pixels(maps: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Each pixel's place when the largest number comes first; equal numbers in random order, so a flat map is a random order.

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
    """Probability of a class while pixels are deleted (set to 0) in order, or inserted into an empty image.

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
    """How many of the first pixels have to be inverted (x becomes 1 - x) until the predicted class changes.

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
    """Spearman's rank correlation of each pair of maps, (N, H, W) -> (N,); 0 where one is flat: it agrees with nothing."""
    ranks, other_ranks = (rankdata(some.flatten(1).numpy(), axis=1) for some in (maps, others))
    middle = (ranks.shape[1] + 1) / 2  # the mean of all ranks, also where some are shared
    return _cosines(ranks - middle, other_ranks - middle)


def compare_directions(maps: torch.Tensor, others: torch.Tensor) -> Values:
    """Cosine of the angle between each pair of maps, (N, H, W) -> (N,); 0 where one is zero."""
    return _cosines(maps.flatten(1).double().numpy(), others.flatten(1).double().numpy())


def _cosines(vectors: Values, others: Values) -> Values:
    lengths: Values = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    products: Values = (vectors * others).sum(axis=1)
    return products / np.where(lengths > 0, lengths, np.inf)


def randomise(network: nn.Module, layers: Collection[str], seed: int) -> nn.Module:
    """A frozen copy of a network, the named layers of which have new random weights."""
    copied = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            copied.get_submodule(layer).reset_parameters()  # type: ignore[operator]
    return freeze(copied)


def choose_layers(network: nn.Module) -> dict[str, tuple[str, ...]]:
    """Sets of layers that get random weights, by their name in the report: from the last to all, and each alone."""
    layers = [name for name, module in network.named_modules() if hasattr(module, "reset_parameters")]
    cascade = {f"{layers[first]} and later": tuple(layers[first:]) for first in range(len(layers) - 2, 0, -1)}
    alone = {f"{layer} alone": (layer,) for layer in layers}
    return {**cascade, "all layers": tuple(layers), **alone}


# --- what a map does not say


def share_tied_windows(network: DigitNetwork, pixels: torch.Tensor) -> Values:
    """Share of the first pool's windows whose largest input, above zero, stands there twice: (N, 1, 28, 28) -> (N,)."""
    with torch.no_grad():
        inputs = network.conv1((pixels - network.mean) / network.std).relu()  # (N, 16, 30, 30)
    windows = inputs.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # (N, 16, 15, 15, 4)
    largest = windows.amax(dim=4, keepdim=True)
    tied = ((windows == largest) & (largest > 0)).sum(dim=4) > 1
    shares: Values = tied.double().mean(dim=(1, 2, 3)).numpy()
    return shares


def share_differing_pixels(
    network: nn.Module, pixels: torch.Tensor, targets: torch.Tensor, *, name: str = "differences"
) -> Values:
    """Share of pixels at which the gradient is not what central differences say: float64 (N, C, H, W) -> (N,)."""
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
    """Gradient of the cross entropy: what `criterion(network(x), y).backward()` gives, another quantity than the score's.

    Args:
        pixels: float64 (N, 1, H, W); in float32 the probability of a confident prediction rounds to 1, and the loss to 0.
        targets: int64 (N,), the right classes.
    Returns:
        float64 (N, H, W).
    """
    return _map_by(LossGradient(), network, pixels, targets)


# --- the report


def measure_orders(
    network: nn.Module, pixels: torch.Tensor, maps: Mapping[str, torch.Tensor], seed: int
) -> tuple[Table, dict[str, dict[str, tuple[Estimate, ...]]]]:
    """Deletion, insertion and inversion, by the maps, by their absolute numbers, and by two controls that ask no network.

    Args:
        pixels: float (N, 1, H, W).
        maps: method -> float (N, H, W), of the predicted class.
    Returns:
        the table, and the curves by "deletion" and "insertion".
    """
    generator, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    predicted = predict(network, pixels).argmax(dim=1)
    orders: dict[str, torch.Tensor] = {}
    for method, some_maps in maps.items():
        orders |= {method: some_maps, f"{method}{ABSOLUTE}": some_maps.abs()}
    orders |= {"intensity (control)": pixels[:, 0], "random (control)": torch.zeros_like(pixels[:, 0])}
    curves: dict[str, dict[str, tuple[Estimate, ...]]] = {"deletion": {}, "insertion": {}}
    rows = {}
    for name, numbers in orders.items():
        ranks = rank_pixels(numbers, generator)
        estimates = []
        for kind, points in curves.items():
            traced = trace_probabilities(
                network, pixels, ranks, predicted, insert=kind == "insertion", name=f"{kind} by {name}"
            )  # (N, points)
            points[name] = tuple(Estimate.of(column, random) for column in traced.T)
            estimates.append(Estimate.of(traced.mean(axis=1), random))
        flips = count_inversions_to_flip(network, pixels, ranks, name=f"inversion by {name}")
        estimates += [Estimate.of(numbers, random, statistic="median") for numbers in (flips, flips / ranks.shape[1])]
        rows[name] = tuple(estimates)
    table = Table(
        "order",
        "The most salient pixels first",
        "Mean probability of the predicted class while pixels are deleted (lower is better) or inserted (higher is better), "
        f"{PIXELS_A_STEP} a step; and the median number, and share, of pixels that have to be inverted until the predicted class "
        "changes (lower is better).",
        ("deletion", "insertion", "inverted pixels", "share of all"),
        rows,
    )
    return table, curves


def compare(maps: torch.Tensor, others: torch.Tensor, random: np.random.Generator) -> tuple[Estimate, ...]:
    """Likeness of two maps of each image: Spearman's correlation and cosine, signed, then absolute."""
    pairs = ((maps, others), (maps.abs(), others.abs()))
    return tuple(Estimate.of(how(*pair), random) for pair in pairs for how in (correlate_ranks, compare_directions))


LIKENESS = ("Spearman, signed", "cosine, signed", "Spearman, absolute", "cosine, absolute")


def measure_targets(network: nn.Module, pixels: torch.Tensor, maps: Mapping[str, torch.Tensor], seed: int) -> Table:
    """How like the maps of the predicted class and of the runner-up are."""
    random = np.random.default_rng(seed)
    runner_up = predict(network, pixels).topk(2, dim=1).indices[:, 1]
    rows = {
        method: compare(some_maps, explain(METHODS[method], network, pixels, runner_up), random)
        for method, some_maps in maps.items()
    }
    note = (
        "Maps of the predicted class against those of the runner-up, of the same image. Near 1, a map would not say what "
        "speaks for this class rather than the other."
    )
    return Table("targets", "Another class, another map", note, LIKENESS, rows)


def measure_repeats(network: nn.Module, pixels: torch.Tensor, maps: Mapping[str, torch.Tensor], seed: int) -> Table:
    """How like the maps of an image and of the same with a little noise are."""
    random = np.random.default_rng(seed)
    predicted = predict(network, pixels).argmax(dim=1)
    noisy = dither(pixels, seed)
    rows = {
        method: compare(some_maps, explain(METHODS[method], network, noisy, predicted), random)
        for method, some_maps in maps.items()
    }
    note = (
        f"Maps of the same class before and after noise, uniform in [0, {NOISE}], was added to every pixel. Higher is steadier."
    )
    return Table("repeats", "A little noise, nearly the same map", note, LIKENESS, rows)


def dither(pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """Add noise, uniform in [0, NOISE], to every pixel."""
    return pixels + NOISE * torch.rand(pixels.shape, generator=torch.Generator().manual_seed(seed), dtype=pixels.dtype)


def measure_randomisation(network: nn.Module, pixels: torch.Tensor, maps: Mapping[str, torch.Tensor], seed: int) -> Table:
    """How like the maps of the network and of networks with random weights are, for the same class."""
    random = np.random.default_rng(seed)
    predicted = predict(network, pixels).argmax(dim=1)
    rows = {}
    for method, some_maps in maps.items():
        for name, layers in choose_layers(network).items():
            signed, absolute = [], []
            for number in range(RANDOM_NETWORKS):
                network_at_random = randomise(network, layers, seed + number)
                others = explain(METHODS[method], network_at_random, pixels, predicted, name=f"{name} at random")
                signed.append(correlate_ranks(some_maps, others))
                absolute.append(correlate_ranks(some_maps.abs(), others.abs()))
            rows[f"{method}, {name}"] = tuple(Estimate.of(np.mean(found, axis=0), random) for found in (signed, absolute))
    note = (
        "Spearman's correlation of maps before and after layers got new random weights, for the same class; the mean over "
        f"{RANDOM_NETWORKS} random networks. Nearer to zero is better: a map that stays does not show what was learned."
    )
    return Table("randomisation", "Random weights, another map", note, ("signed", "absolute"), rows)


def measure_limits(network: DigitNetwork, pixels: torch.Tensor, seed: int) -> Table:
    """Where the gradient is one of several right answers, and what another derivative would have said; in float64."""
    random = np.random.default_rng(seed)
    exact = copy.deepcopy(network).double()
    clean = pixels.double()
    noisy = dither(clean, seed)
    predicted = predict(exact, clean).argmax(dim=1)
    some = slice(0, DIFFERENCE_IMAGES)
    score = explain(gradient, exact, clean, predicted)
    loss = explain(differentiate_loss, exact, clean, predicted)
    rows = {}
    for name, images in (("clean digits", clean), ("digits with a little noise", noisy)):
        rows[f"{name}: share of the first pool's windows that tie"] = Estimate.of(share_tied_windows(exact, images), random)
        differing = share_differing_pixels(exact, images[some], predicted[some], name=f"differences, {name}")
        rows[f"{name}: share of pixels where central differences are not the gradient"] = Estimate.of(differing, random)
    rows["norm of the score's gradient"] = Estimate.of(_norms(score), random, statistic="median")
    rows["norm of the loss's gradient"] = Estimate.of(_norms(loss), random, statistic="median")
    rows["cosine of the two"] = Estimate.of(compare_directions(score, loss), random, statistic="median")
    note = (
        "Where two inputs of a max pool tie, the score has a kink, and the gradient is one of several right answers. The loss is "
        "the cross entropy of the predicted class: for a confident prediction its gradient nearly vanishes and points elsewhere. "
        "Norms and cosine are medians."
    )
    return Table("limits", "What a map does not say", note, ("value",), {name: (value,) for name, value in rows.items()})


def _norms(maps: torch.Tensor) -> Values:
    norms: Values = maps.flatten(1).norm(dim=1).numpy()
    return norms


def measure_misread(network: nn.Module, pixels: torch.Tensor, seed: int) -> tuple[Table, ...]:
    """The curves, and the likeness of the maps of the two best classes, of images that the network misreads."""
    predicted = predict(network, pixels).argmax(dim=1)
    maps = {name: explain(method, network, pixels, predicted) for name, method in METHODS.items()}
    orders, _ = measure_orders(network, pixels, maps, seed)
    targets = measure_targets(network, pixels, maps, seed)
    return tuple(
        Table(
            f"misread {table.name}",
            f"Misread images: {table.title[0].lower()}{table.title[1:]}",
            table.note,
            table.columns,
            table.rows,
        )
        for table in (orders, targets)
    )


def evaluate(
    network: DigitNetwork, pixels: torch.Tensor, misread: torch.Tensor, *, seed: int, settings: Mapping[str, str | int]
) -> Report:
    """Measure everything.

    Args:
        network: frozen.
        pixels: float (N, 1, 28, 28), N >= 2, intensity in [0, 1].
        misread: the same (M, ...), images that the network misreads; left out where there are less than 2.
        seed: of ties, random networks, noise and intervals. The same seed gives the same report.
        settings: for the report's head.
    """
    predicted = predict(network, pixels).argmax(dim=1)
    maps = {name: explain(method, network, pixels, predicted, name=name) for name, method in METHODS.items()}
    orders, curves = measure_orders(network, pixels, maps, seed)
    tables = [
        orders,
        measure_randomisation(network, pixels, maps, seed),
        measure_targets(network, pixels, maps, seed),
        measure_repeats(network, pixels, maps, seed),
        measure_limits(network, pixels, seed),
    ]
    if len(misread) > 1:
        tables += measure_misread(network, misread, seed)
    return Report(settings, judge(GATES, tables), tuple(tables), curves)


def draw_examples(network: nn.Module, pixels: torch.Tensor) -> bytes:
    """Draw images beside the maps of their predicted class and of the runner-up: (N, 1, H, W) -> a PNG."""
    best = predict(network, pixels).topk(2, dim=1).indices
    maps = torch.stack([gradient(network, pixels, targets) for targets in best.T], dim=1)  # (N, 2, H, W)
    rows = [
        Row(image[0].numpy(), some.numpy(), tuple(classes.tolist()))
        for image, some, classes in zip(pixels, maps, best, strict=True)
    ]
    return draw(rows, Style(size=224, layout=Layout.SIDE_BY_SIDE))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.research.evaluate",
        description="Measure the saliency maps of MNIST's test images beside controls; exit with 1 where a gate is not passed.",
        epilog="example: %(prog)s --data-dir ~/data --images 200",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("build/data"), help="torchvision's root folder; downloads where missing"
    )
    parser.add_argument("--images", type=_read_count, default=1000, help="drawn at random from the test images; 2 or more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=Path("model/weights.safetensors"))
    parser.add_argument("--output-dir", type=Path, default=Path("build/evaluation"), help="for report.json and report.html")
    return parser


def _read_count(text: str) -> int:
    count = int(text)
    if count < 2:
        raise argparse.ArgumentTypeError(f"got {count}; 2 or more are accepted, as an interval needs")
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, report. Returns the exit code: 1 where a gate is not passed, 2 where nothing could be measured."""
    arguments = build_parser().parse_args(argv)
    network = DigitNetwork()
    try:
        import matplotlib  # noqa: F401 - the page needs it: say so before minutes have passed

        load_weights(network, arguments.weights)
        images, labels = load_mnist(arguments.data_dir, train=False)
    except (ImportError, ArchiveError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    freeze(network).to(memory_format=torch.channels_last)  # a third faster
    pixels = images.float() / 255
    misread = pixels[predict(network, pixels).argmax(dim=1) != labels]
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(arguments.seed))[: arguments.images]
    settings: dict[str, str | int] = {
        "weights": hashlib.sha256(arguments.weights.read_bytes()).hexdigest()[:12],
        "images": len(chosen),
        "misread": f"{len(misread)} of {len(pixels)}",
        "seed": arguments.seed,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }
    report = evaluate(network, pixels[chosen], misread, seed=arguments.seed, settings=settings)
    print(render_text(report))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "report.json").write_text(render_json(report))
    (arguments.output_dir / "report.html").write_text(render_html(report, draw_examples(network, pixels[chosen[:EXAMPLES]])))
    print(f"wrote {arguments.output_dir / 'report.json'} and report.html", file=sys.stderr)
    return int(not report.passed)


if __name__ == "__main__":
    sys.exit(main())
