"""Measure how far the network's saliency maps can be trusted, beside controls, and judge them by gates.

    python -m scripts.research.evaluate --data-dir build/data

Writes build/evaluation/report.json and report.html, and prints the same as text. The measures, and their sources, are in
`faithfulness.py`; every method that the handler offers is measured, with its default parameters.
"""

import argparse
import copy
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy
import torch
from torch import nn

from handler.render.drawing import Layout, Row, Style, draw
from handler.runtime.archive import ArchiveError
from model.data import load_mnist
from scripts.command_line import HelpFormatter
from scripts.network import load_committed_network
from scripts.paths import BUILD, DATA_DIR, WEIGHTS_FILE
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
from scripts.research.faithfulness import (
    METHODS,
    NOISE,
    PIXELS_A_STEP,
    choose_layers,
    compare_directions,
    correlate_ranks,
    count_inversions_to_flip,
    differentiate_loss,
    dither,
    explain,
    gradient,
    measure_norms,
    predict,
    randomise,
    rank_pixels,
    share_differing_pixels,
    share_tied_windows,
    trace_probabilities,
)

RANDOM_NETWORKS = 5  # for each set of layers that gets random weights
RANDOMISED_IMAGES = 200  # whose maps these networks make: with methods that sample it is most of the work
DIFFERENCE_IMAGES = 20  # compared with central differences; each takes 3,136 forward passes
EXAMPLES = 8  # images on the page

GATES = (
    Gate("deletion by the signed gradient", "order", "gradient", "deletion", highest=0.15),
    Gate("insertion by the signed gradient", "order", "gradient", "insertion", lowest=0.93),
    Gate("signed maps after randomisation", "randomisation", "gradient, all layers", "signed", lowest=-0.1, highest=0.1),
    Gate("absolute maps after randomisation", "randomisation", "gradient, all layers", "absolute", lowest=-0.35, highest=0.35),
)


def measure_orders(
    network: nn.Module, pixels: torch.Tensor, maps: Mapping[str, torch.Tensor], seed: int
) -> tuple[Table, dict[str, dict[str, tuple[Estimate, ...]]]]:
    """Measure deletion, insertion and inversion, by the maps, by their absolute numbers, and by two controls without a network.

    Args:
        pixels: float (N, 1, H, W).
        maps: method -> float (N, H, W), maps of the predicted class.
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
    """Measure how like two maps of each image are: Spearman's correlation and cosine, signed, then absolute."""
    pairs = ((maps, others), (maps.abs(), others.abs()))
    return tuple(Estimate.of(how(*pair), random) for pair in pairs for how in (correlate_ranks, compare_directions))


LIKENESS = ("Spearman, signed", "cosine, signed", "Spearman, absolute", "cosine, absolute")


def measure_targets(network: nn.Module, pixels: torch.Tensor, maps: Mapping[str, torch.Tensor], seed: int) -> Table:
    """Measure how like the maps of the predicted class and of the runner-up are."""
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
    """Measure how like the maps of an image and of the same image with a little noise are."""
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


def measure_randomisation(network: nn.Module, pixels: torch.Tensor, maps: Mapping[str, torch.Tensor], seed: int) -> Table:
    """Measure how like the maps of the network and of networks with random weights are, for the same class and some images."""
    random = np.random.default_rng(seed)
    pixels, maps = pixels[:RANDOMISED_IMAGES], {method: some_maps[:RANDOMISED_IMAGES] for method, some_maps in maps.items()}
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
        f"{RANDOM_NETWORKS} random networks and {len(pixels)} images. Nearer to zero is better: a map that stays does not show "
        "what was learned."
    )
    return Table("randomisation", "Random weights, another map", note, ("signed", "absolute"), rows)


def measure_limits(network: nn.Module, pixels: torch.Tensor, seed: int) -> Table:
    """Measure where the gradient is one of several right answers, and how the loss's gradient differs; in float64."""
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
    rows["norm of the score's gradient"] = Estimate.of(measure_norms(score), random, statistic="median")
    rows["norm of the loss's gradient"] = Estimate.of(measure_norms(loss), random, statistic="median")
    rows["cosine of the two"] = Estimate.of(compare_directions(score, loss), random, statistic="median")
    note = (
        "Where two inputs of a max pool tie, the score has a kink, and the gradient is one of several right answers. The loss is "
        "the cross entropy of the predicted class: for a confident prediction its gradient nearly vanishes and points elsewhere. "
        "Norms and cosine are medians."
    )
    return Table("limits", "What a map does not say", note, ("value",), {name: (value,) for name, value in rows.items()})


def measure_misread(network: nn.Module, pixels: torch.Tensor, seed: int) -> tuple[Table, ...]:
    """Measure the curves, and the likeness of the maps of the two best classes, of images that the network misreads."""
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
    network: nn.Module, pixels: torch.Tensor, misread: torch.Tensor, *, seed: int, settings: Mapping[str, str | int]
) -> Report:
    """Measure everything.

    Args:
        network: the digits network, frozen.
        pixels: float (N, 1, 28, 28), N >= 2, intensity in [0, 1].
        misread: float (M, 1, 28, 28), images that the network misreads; left out where there are fewer than 2.
        seed: of ties, random networks, noise and intervals. The same seed gives the same report.
        settings: what was evaluated and with what, for the report's head.
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
        epilog="example:\n  %(prog)s --data-dir ~/data --images 200",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="torchvision's root folder; downloads where missing")
    parser.add_argument("--images", type=_read_count, default=1000, metavar="N", help="test images, drawn at random; 2 or more")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is random")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FILE, metavar="FILE", help="the digits network's, safetensors")
    parser.add_argument("--output-dir", type=Path, default=BUILD / "evaluation", help="folder for report.json and report.html")
    return parser


def _read_count(text: str) -> int:
    count = int(text)
    if count < 2:
        raise argparse.ArgumentTypeError(f"expected 2 or more, as an interval needs them; got {count}")
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, report. Returns the exit code: 1 where a gate is not passed, 2 where nothing could be measured."""
    arguments = build_parser().parse_args(argv)
    try:
        import matplotlib  # noqa: F401  # the page needs it: say so before minutes have passed

        network = load_committed_network(arguments.weights)
        images, labels = load_mnist(arguments.data_dir, train=False)
    except (ImportError, ArchiveError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    network.to(memory_format=torch.channels_last)  # a third faster
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
