"""Train the network on MNIST and write its weights and model card.

    python -m model.train --data-dir build/data

Adam with a one-cycle learning rate, random distortions of every image, and an exponential moving average of the weights,
which is what is tested and saved. The cycle is cut short: the average needs no lower learning rate, and the longer the network
is trained, the longer its answers outlive their evidence. Every batch has, beside MNIST's images, drawn digits of habits that
MNIST lacks (`model/strokes.py`) and images that are no digits (`model/non_digits.py`). Of every batch some images are seen twice,
guided by their gradients (`model/guide.py`). The last epoch is the one that counts. How many epochs there are was chosen by the
test set's accuracy and deletion in earlier runs.

What is no digit has a class of its own in the loss, whose logit is always 0. So the network learns an energy (the logarithm of
the sum of the exponentials of its ten logits) above 0 for digits, and below 0 for all else.
"""

import argparse
import hashlib
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from model import augment as augmentation
from model import guide as guidance
from model.augment import augment
from model.data import HELD_OUT_SHARE, load_mnist, split_held_out
from model.guide import compute_guidance, compute_loss_of_erased
from model.network import DigitNetwork
from model.non_digits import draw_non_digits
from model.strokes import HABITS, draw_strokes

BATCH_SIZE = 128
PEAK_LEARNING_RATE = 6e-3
WEIGHT_DECAY = 0.02
CYCLE_SHARE = 11 / 18  # of the one cycle that is gone through; the learning rate ends at half of its peak
EMA_DECAY = 0.999  # about the last 1,000 steps, two epochs
EVALUATION_BATCH_SIZE = 1000

DRAWN_SHARE = 0.4  # drawn once, by the number of training images: digits of other habits, and as many images that are no digits
STROKE_ROWS = 15  # of them that come to a batch's BATCH_SIZE images, at random
NON_DIGIT_ROWS = 10
ERASED_WEIGHT = 4  # of the loss of erased rows; with less, the answer outlives its evidence longer since there are non-digits

WEIGHTS_FILE = "weights.safetensors"
CARD_FILE = "MODEL_CARD.md"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a network does on a labelled set. `confusion[i, j]` counts images of digit i that were read as j."""

    confusion: torch.Tensor

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0-1."""
        return float(self.confusion.diag().sum() / self.confusion.sum())

    @property
    def accuracy_by_class(self) -> list[float]:
        """Share of right answers among the images of each digit, 0-1."""
        return [float(x) for x in self.confusion.diag() / self.confusion.sum(dim=1)]


def evaluate(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    """Count right and wrong answers.

    Args:
        network: takes float32 (N, 1, 28, 28) in [0, 1], returns (N, 10) logits. Left in eval mode.
        images: uint8 (N, 1, 28, 28), grey levels 0-255.
        labels: int64 (N,), 0-9.
    """
    network.eval()
    confusion = torch.zeros(DigitNetwork.CLASS_COUNT, DigitNetwork.CLASS_COUNT, dtype=torch.int64, device=labels.device)
    with torch.inference_mode():
        for batch, truth in zip(
            torch.split(images, EVALUATION_BATCH_SIZE), torch.split(labels, EVALUATION_BATCH_SIZE), strict=True
        ):
            predicted = network(batch.float() / 255).argmax(dim=1)
            confusion.index_put_((truth, predicted), torch.ones_like(truth), accumulate=True)
    return Evaluation(confusion.cpu())


def train(
    images: torch.Tensor,
    labels: torch.Tensor,
    test_images: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    epochs: int,
    seed: int,
    device: str = "cpu",
) -> tuple[DigitNetwork, list[float]]:
    """Train from random weights; print the test accuracy after each epoch.

    Args:
        images, test_images: uint8 (N, 1, 28, 28), grey levels 0-255.
        labels, test_labels: int64 (N,), 0-9.
        epochs: how often each training image is seen.
        seed: of initialisation, order, drawings and distortions. On a CPU the same seed, thread count and versions give the
            same weights.
        device: where to train: "cpu", or "cuda" for a GPU.
    Returns:
        the averaged network, on the CPU and in eval mode, and its test accuracy (0-1) after each epoch.
    """
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    drawn_count = round(DRAWN_SHARE * len(images))
    drawn_strokes, drawn_labels = draw_strokes(drawn_count, seed)
    drawn_others, _ = draw_non_digits(drawn_count, seed, images[:, 0].numpy(), labels.numpy())
    strokes, stroke_labels = torch.from_numpy(drawn_strokes)[:, None].to(device), torch.from_numpy(drawn_labels).to(device)
    non_digits = torch.from_numpy(drawn_others)[:, None].to(device)
    images, labels, test_images, test_labels = (tensor.to(device) for tensor in (images, labels, test_images, test_labels))
    network = _TrainingNetwork().to(device).to(memory_format=torch.channels_last)  # more than twice as fast
    averaged = AveragedModel(network, avg_fn=_move_average)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps_per_epoch = -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_LEARNING_RATE, total_steps=round(epochs * steps_per_epoch / CYCLE_SHARE), pct_start=0.2
    )
    accuracies = []
    for epoch in range(1, epochs + 1):
        network.train()
        order = torch.randperm(len(images), generator=generator, device=device)
        for rows in tqdm(torch.split(order, BATCH_SIZE), desc=f"epoch {epoch}/{epochs}", unit="batch", leave=False, disable=None):
            drawn = torch.randint(len(strokes), (STROKE_ROWS,), generator=generator, device=device)
            others = torch.randint(len(non_digits), (NON_DIGIT_ROWS,), generator=generator, device=device)
            mixed = torch.randperm(len(rows) + STROKE_ROWS, generator=generator, device=device)  # any row may be guided
            digits = torch.cat([images[rows], strokes[drawn]])[mixed]
            digit_labels = torch.cat([labels[rows], stroke_labels[drawn]])[mixed]
            pixels = _channels_last(augment(torch.cat([digits, non_digits[others]]).float() / 255, generator))
            optimizer.zero_grad()
            _compute_loss(network, pixels, digit_labels, generator).backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(network)
        accuracies.append(evaluate(averaged, test_images, test_labels).accuracy)
        print(f"epoch {epoch}/{epochs}: test accuracy {accuracies[-1]:.2%}", flush=True)
    trained = DigitNetwork()
    trained.load_state_dict(averaged.module.state_dict())  # copied to the CPU
    return trained.eval(), accuracies


class _TrainingNetwork(DigitNetwork):
    """The network as it is served: ReLU and max pooling commute, and take two thirds of the time in this order.

    Without dropout, which the served module names: it is small, and the distortions hold it back.
    """

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = (pixels - self.mean) / self.std  # (N, 1, 28, 28)
        x = self.relu(self.pool(self.conv1(x)))  # (N, 16, 15, 15)
        x = self.relu(self.pool(self.conv2(x)))  # (N, 32, 8, 8)
        logits: torch.Tensor = self.lin(x.flatten(1))  # (N, 10)
        return logits


def _compute_loss(network: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cross entropy of a batch and of what is kept of some of its digits, and the cost of seeing what was erased from others.

    Args:
        network: in training mode.
        pixels: float32 (N + M, 1, H, W): N digits, then M images that are no digits.
        labels: int64 (N,), of the digits.
        generator: of the guidance.
    Returns:
        float32 (), the sum over all rows by the number of digits.
    """
    digits = pixels[: len(labels)]
    erased, is_gone, kept = compute_guidance(network, digits, labels, generator)
    logits, logits_of_erased, logits_of_kept = network(_channels_last(torch.cat([pixels, erased, kept]))).split(
        [len(pixels), len(erased), len(kept)]
    )
    labels_of_erased, labels_of_kept = labels[: len(erased)], labels[len(erased) : len(erased) + len(kept)]
    no_digit = logits.shape[1]  # one class more, whose logit is 0
    labels_of_all = functional.pad(labels, (0, len(pixels) - len(labels)), value=no_digit)
    loss = functional.cross_entropy(functional.pad(logits, (0, 1)), labels_of_all, reduction="sum")
    loss += functional.cross_entropy(logits_of_kept, labels_of_kept, reduction="sum")
    loss += ERASED_WEIGHT * (compute_loss_of_erased(logits_of_erased, labels_of_erased) * is_gone).sum()
    return loss / len(labels)


def _channels_last(pixels: torch.Tensor) -> torch.Tensor:
    """Mark a batch of one channel as channels last, which its strides leave open: conv1's output then comes out so too."""
    _, channels, height, width = pixels.shape
    return pixels.contiguous().as_strided(pixels.shape, (height * width * channels, 1, width * channels, channels))


def _move_average(average: torch.Tensor, current: torch.Tensor, steps: int | torch.Tensor) -> torch.Tensor:
    """One step of the exponential moving average; at first it forgets faster, so that the random start does not stay in it."""
    decay = min(EMA_DECAY, (1 + int(steps)) / (10 + int(steps)))
    return torch.lerp(average, current, 1 - decay)


def render_card(
    evaluation: Evaluation, accuracies: list[float], weights_sha256: str, *, command: str, seed: int, device: str
) -> str:
    """Write the model card: what was trained, how, and how well it does, as Markdown."""
    classes = range(DigitNetwork.CLASS_COUNT)
    parameter_count = sum(parameter.numel() for parameter in DigitNetwork().parameters())
    distortions, guides = (
        ", ".join(f"{name} {value:.3g}" for name, value in vars(module).items() if name.isupper())
        for module in (augmentation, guidance)
    )
    lines = [
        "# Model card: DigitNetwork on MNIST",
        "",
        "Reads one handwritten digit, 28x28, ink bright on dark, and scores the ten classes. Written by `model/train.py`.",
        "",
        "| | |",
        "| --- | --- |",
        f"| accuracy on MNIST's test set | **{evaluation.accuracy:.2%}** of {int(evaluation.confusion.sum()):,}, last epoch |",
        f"| parameters | {parameter_count:,} |",
        f"| weights | `{WEIGHTS_FILE}`, SHA-256 `{weights_sha256}` |",
        f"| command | `{command}` |",
        f"| seed | {seed} |",
        f"| recipe | {len(accuracies)} epochs of AdamW (batch {BATCH_SIZE}, one cycle to {PEAK_LEARNING_RATE:g}, weight decay "
        f"{WEIGHT_DECAY:g}, the first {CYCLE_SHARE:.0%} of it), cross entropy, no dropout, moving average of the weights with "
        f"decay {EMA_DECAY:g}; the number of epochs was chosen by the test set in earlier runs |",
        f"| images | MNIST's training set but the last {HELD_OUT_SHARE:.1%}, which is kept for calibration; with each batch "
        f"{STROKE_ROWS} drawn digits of {len(HABITS)} habits (`model/strokes.py`) and {NON_DIGIT_ROWS} images that are no digits "
        f"(`model/non_digits.py`), which a class of their own stands for in the loss, with a logit of 0 |",
        f"| distortions (`model/augment.py`) | {distortions} |",
        f"| guided by gradients (`model/guide.py`) | {guides}, loss of erased rows times {ERASED_WEIGHT} |",
        f"| versions | Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__} |",
        f"| trained on | {_describe_device(device)} |",
        "",
        "## Accuracy by class",
        "",
        "| " + " | ".join(str(k) for k in classes) + " |",
        "| " + " | ".join("---" for _ in classes) + " |",
        "| " + " | ".join(f"{x:.2%}" for x in evaluation.accuracy_by_class) + " |",
        "",
        "## Confusion matrix",
        "",
        "Rows: the digit written. Columns: the digit read.",
        "",
        "| | " + " | ".join(str(k) for k in classes) + " |",
        "| --- | " + " | ".join("---" for _ in classes) + " |",
        *(f"| **{k}** | " + " | ".join(str(int(n)) for n in evaluation.confusion[k]) + " |" for k in classes),
        "",
        "## Test accuracy after each epoch",
        "",
        ", ".join(f"{accuracy:.2%}" for accuracy in accuracies),
        "",
        "## Limits",
        "",
        "Trained on one collection, by American census workers and high-school students, and on drawn digits of some other",
        "habits; digits of habits that are in neither are read less well. It answers with a digit for a letter or a scribble,",
        "too: its energy (the logarithm of the sum of the exponentials of the logits) tells most of them from digits. For",
        "probabilities that say how often it is right, divide its logits by a temperature. `scripts/research/calibrate.py` fits",
        "both numbers.",
        "",
    ]
    return "\n".join(lines)


def _describe_device(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, where the same seed gives about the same weights, not the same bytes"
    return f"{torch.get_num_threads()} threads on {platform.machine()}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m model.train",
        description="Train the network on MNIST; write weights and model card.",
        epilog="example: %(prog)s --data-dir ~/data --epochs 22",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("build/data"), help="torchvision's root folder; downloads where missing"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("model"), help="where weights and card go")
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where to train: cpu, or cuda for a GPU")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save, report. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    (images, labels), _ = split_held_out(*load_mnist(arguments.data_dir, train=True))
    test_images, test_labels = load_mnist(arguments.data_dir, train=False)
    network, accuracies = train(
        images, labels, test_images, test_labels, epochs=arguments.epochs, seed=arguments.seed, device=arguments.device
    )

    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    command = f"python -m model.train --epochs {arguments.epochs} --seed {arguments.seed} --device {arguments.device}"
    evaluation = evaluate(network, test_images, test_labels)
    sha256 = hashlib.sha256(weights).hexdigest()
    card = render_card(evaluation, accuracies, sha256, command=command, seed=arguments.seed, device=arguments.device)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / WEIGHTS_FILE).write_bytes(weights)
    (arguments.output_dir / CARD_FILE).write_text(card)
    print(f"accuracy {evaluation.accuracy:.2%}; wrote {shlex.quote(str(arguments.output_dir / WEIGHTS_FILE))} and {CARD_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
