"""Make the image that the network scores highest for each class.

    python -m scripts.research.class_images --data-dir build/data

Simonyan, Vedaldi and Zisserman, arXiv 1312.6034, section 2: the image I that maximises S_c(I) - lambda ||I||^2, found by
gradient ascent, where I is counted from the training images' mean. The ascent starts at a little noise: at the zero image itself,
a flat grey, the network has no slope. There is no other prior, so the image need not look like a pen's stroke: it may go below
black, and show several strokes at once. Prints each class's score beside the mean score of real digits.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from handler.gradients.explain import predict_and_explain
from handler.render.drawing import Layout, Row, Style, draw
from handler.runtime.archive import ArchiveError
from model.data import load_mnist
from model.network import DigitNetwork
from scripts.command_line import HelpFormatter
from scripts.network import load_committed_network
from scripts.paths import BUILD, DATA_DIR, WEIGHTS_FILE

REGULARISATION = 0.8  # lambda, logit per squared intensity: so that made images have about the norm of real digits
STEPS = 500
STEP_SHARE = 0.05  # of the way to where the gradient at hand would be balanced by the regularisation
START_NOISE = 0.1  # standard deviation of the image that the ascent starts at, in intensity
BATCH_SIZE = 256
PANELS_A_ROW = 5


def make_class_images(
    network: nn.Module, class_count: int, start: torch.Tensor, *, regularisation: float, steps: int
) -> torch.Tensor:
    """Maximise each class's score, less the squared norm, by gradient ascent.

    Args:
        network: frozen.
        class_count: of the network.
        start: float (C, H, W), the image around which the ascent starts, and that norms are counted from.
        regularisation: lambda, above 0, in logit per squared intensity.
        steps: of the ascent.
    Returns:
        float (class_count, C, H, W), the images less `start`.
    """
    made = START_NOISE * torch.randn(class_count, *start.shape, generator=torch.Generator().manual_seed(0))
    targets = [(target,) for target in range(class_count)]
    for _ in tqdm(range(steps), desc="ascent", unit="step", disable=None):
        _, explanations = predict_and_explain(network, start + made, targets)
        slopes = np.concatenate([explanation.maps for explanation in explanations if explanation is not None])
        made += STEP_SHARE / (2 * regularisation) * (torch.from_numpy(slopes) - 2 * regularisation * made)  # grad S - 2 lambda I
    return made


def score(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Score many images, batch by batch: (N, C, H, W) -> logits (N, K)."""
    with torch.inference_mode():
        return torch.cat([network(batch) for batch in pixels.split(BATCH_SIZE)])


def draw_class_images(made: torch.Tensor) -> bytes:
    """Draw the images under their classes: red for more ink than the mean, blue for less; as a PNG."""
    rows = []
    for first in range(0, len(made), PANELS_A_ROW):
        maps = made[first : first + PANELS_A_ROW, 0].numpy()
        rows.append(Row(maps[0] * 0, maps, tuple(range(first, first + len(maps)))))
    return draw(rows, Style(size=168, layout=Layout.MAP))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.research.class_images",
        description="Make the image that maximises each class's score; exit with 1 where one does not beat real digits.",
        epilog="example:\n  %(prog)s --data-dir ~/data --regularisation 0.1",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="torchvision's root folder; downloads where missing")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FILE, metavar="FILE", help="the digits network's, safetensors")
    parser.add_argument(
        "--regularisation",
        type=_read_positive,
        default=REGULARISATION,
        metavar="LAMBDA",
        help="in logit per squared intensity; larger makes fainter images",
    )
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of the gradient ascent")
    parser.add_argument("--output", type=Path, default=BUILD / "classes.png", metavar="FILE", help="PNG to write")
    return parser


def _read_positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, without which there is no maximum; got {text}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Make, check, draw. Returns the exit code: 1 where an image does not beat real digits, 2 without weights or real digits."""
    arguments = build_parser().parse_args(argv)
    try:
        network = load_committed_network(arguments.weights)
        images, labels = load_mnist(arguments.data_dir, train=False)
    except (ArchiveError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    mean = network.get_buffer("mean").expand(DigitNetwork.INPUT_SHAPE)
    made = make_class_images(
        network, DigitNetwork.CLASS_COUNT, mean, regularisation=arguments.regularisation, steps=arguments.steps
    )
    logits = score(network, mean + made)
    digits = images.float() / 255
    digit_scores = score(network, digits)
    norms, digit_norms = made.flatten(1).norm(dim=1), (digits - mean).flatten(1).norm(dim=1)
    print("| class | read as | score | mean score of real digits | norm | mean norm of real digits |")
    print("| --- | --- | --- | --- | --- | --- |")
    failures = 0
    for target in range(DigitNetwork.CLASS_COUNT):
        shown = labels == target
        real_score, real_norm = float(digit_scores[shown, target].mean()), float(digit_norms[shown].mean())
        read, own_score = int(logits[target].argmax()), float(logits[target, target])
        print(f"| {target} | {read} | {own_score:.1f} | {real_score:.1f} | {float(norms[target]):.1f} | {real_norm:.1f} |")
        failures += read != target or own_score < real_score
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_bytes(draw_class_images(made))
    print(f"wrote {arguments.output}", file=sys.stderr)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
