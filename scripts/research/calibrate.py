"""Fit what the committed network's logits are worth, and measure it: calibrated probabilities, and a threshold for non-digits.

    python -m scripts.research.calibrate --data-dir build/data

Fits a temperature and an energy threshold (`model/calibration.py`) on training images that training has not seen, as they are and
as photographs of them, prepared as a request's are. Measures both on other images: MNIST's test images, photographs of them,
drawn digits of many habits, and drawn non-digits of many kinds. Writes model/calibration.json, with MNIST's framing in it, and
the last section of the model card.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from handler.errors import BlankImage, SeveralDigits
from handler.images.decode import decode_image
from handler.images.digits import prepare_digit
from model import drawn_digits, drawn_non_digits
from model.calibration import (
    compute_energy,
    compute_probabilities,
    fit_energy_threshold,
    fit_temperature,
    measure_calibration_error,
)
from model.data import load_mnist, split_held_out
from model.drawn_digits import draw_habit
from model.drawn_non_digits import draw_non_digit
from model.framing import Framing
from model.network import DigitNetwork
from model.photograph import SCENES, ink_of, photograph
from scripts.network import load_committed_network
from scripts.paths import ROOT, WEIGHTS_FILE

FALSE_ALARMS = 0.01  # share of the digits of the fit that lie below the threshold
SLOW_SCENES = {"huge"}  # left out: a photograph takes seconds
HABIT_MARGIN = 0.3  # of bright paper around a drawn digit, by its longer side
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")  # of matplotlib; they have Greek letters and symbols
BATCH_SIZE = 250
SECTION = "## Calibration"
CALIBRATION_FILE = ROOT / "model" / "calibration.json"
CARD_FILE = ROOT / "model" / "MODEL_CARD.md"

Pixels = NDArray[np.float32]  # (N, 28, 28), intensity in [0, 1]


@dataclass(frozen=True, slots=True)
class Scored:
    """Logits of some digits, and what they show.

    Attributes:
        logits: float64 (N, 10).
        labels: int64 (N,).
    """

    logits: NDArray[np.float64]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, network: nn.Module, pixels: Pixels, labels: NDArray[np.int64]) -> "Scored":
        """Send prepared digits through the network."""
        return cls(compute_logits(network, pixels), labels)

    @classmethod
    def join(cls, parts: Sequence["Scored"]) -> "Scored":
        """All rows of some."""
        return cls(np.concatenate([part.logits for part in parts]), np.concatenate([part.labels for part in parts]))

    def measure(self, temperature: float, energy_threshold: float) -> dict[str, float]:
        """Share of right answers, of false alarms, and the calibration error before and after."""
        return {
            "images": len(self.labels),
            "accuracy": _share(self.logits.argmax(axis=1) == self.labels),
            "false_alarms": _share(compute_energy(self.logits) < energy_threshold),
            "calibration_error_before": round(measure_calibration_error(compute_probabilities(self.logits), self.labels), 4),
            "calibration_error": round(
                measure_calibration_error(compute_probabilities(self.logits, temperature), self.labels), 4
            ),
        }


def _share(is_so: NDArray[np.bool_]) -> float:
    return round(float(is_so.mean()), 4)


def compute_logits(network: nn.Module, pixels: Pixels) -> NDArray[np.float64]:
    """Logits of prepared images: float32 (N, 28, 28) -> float64 (N, 10)."""
    with torch.inference_mode():
        batches = torch.from_numpy(pixels)[:, None].split(BATCH_SIZE)
        return torch.cat([network(batch) for batch in batches]).double().numpy()


def prepare_pixels(grey: NDArray[np.float32]) -> Pixels:
    """Prepare an image as a request's is: float32 (H, W) -> (28, 28). One that is refused gives an empty one, and is flagged."""
    height, width = DigitNetwork.INPUT_SHAPE[1:]
    try:
        return prepare_digit(grey, height, width).pixels
    except (BlankImage, SeveralDigits):
        return np.zeros((height, width), dtype=np.float32)


def photograph_digits(digits: NDArray[np.uint8], count: int, seed: int) -> dict[str, tuple[Pixels, NDArray[np.intp]]]:
    """Photograph some digits in every scene, and prepare the photographs.

    Args:
        digits: uint8 (N, 28, 28).
        count: of photographs of each scene; each of another digit, as long as there are enough.
        seed: of the choice and of the photographs.
    Returns:
        by scene: prepared photographs float32 (count, 28, 28), and which digits they show, int (count,).
    """
    random = np.random.default_rng(seed)
    photographs = {}
    for scene in SCENES:
        if scene in SLOW_SCENES:
            continue
        chosen = random.permutation(len(digits))[:count] if count <= len(digits) else random.integers(len(digits), size=count)
        pixels = [
            prepare_pixels(decode_image(photograph(ink_of(digits[k]), scene, [seed, int(k)])).grey)
            for k in tqdm(chosen, desc=f"photographs: {scene}", unit="image", leave=False, disable=None)
        ]
        photographs[scene] = np.stack(pixels), chosen
    return photographs


def draw_digits_of_habits(count: int, seed: int) -> dict[str, tuple[Pixels, NDArray[np.int64]]]:
    """Draw and prepare digits of every habit: prepared float32 (count, 28, 28) and labels int64 (count,)."""
    drawn = {}
    for habit, recipe in tqdm(drawn_digits.HABITS.items(), desc="habits", unit="habit", leave=False, disable=None):
        inks = [draw_habit(habit, [seed, k]) for k in range(count)]
        greys = [1 - np.pad(ink, round(HABIT_MARGIN * max(ink.shape))) for ink in inks]
        pixels = np.stack([prepare_pixels(grey.astype(np.float32)) for grey in greys])
        drawn[habit] = pixels, np.full(count, recipe.digit, dtype=np.int64)
    return drawn


def draw_non_digits_of_kinds(count: int, seed: int) -> dict[str, Pixels]:
    """Draw and prepare non-digits of every kind: prepared float32 (count, 28, 28)."""
    import matplotlib as mpl

    fonts = [Path(mpl.get_data_path()) / "fonts" / "ttf" / name for name in FONTS]
    drawn = {}
    for kind in tqdm(drawn_non_digits.KINDS, desc="non-digits", unit="kind", leave=False, disable=None):
        images = [draw_non_digit(kind, [seed, k], fonts) for k in range(count)]
        drawn[kind] = np.stack([prepare_pixels((image / 255).astype(np.float32)) for image in images])
    return drawn


def calibrate(
    network: nn.Module,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    photographs: int,
    seed: int,
) -> tuple[float, float]:
    """Fit the temperature and the energy threshold.

    Args:
        network: frozen.
        images: uint8 (N, 28, 28), digits that training has not seen.
        labels: int64 (N,).
        photographs: of each scene.
        seed: of the photographs.
    Returns:
        the temperature, and the energy below which FALSE_ALARMS of the digits lie, in nats.
    """
    parts = [Scored.of(network, images.astype(np.float32) / np.float32(255), labels)]
    for pixels, chosen in photograph_digits(images, photographs, seed).values():
        parts.append(Scored.of(network, pixels, labels[chosen]))
    fit = Scored.join(parts)
    return fit_temperature(fit.logits, fit.labels), fit_energy_threshold(compute_energy(fit.logits), FALSE_ALARMS)


def measure(
    network: nn.Module,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    temperature: float,
    energy_threshold: float,
    count: int,
    seed: int,
) -> dict[str, dict[str, object]]:
    """Measure a calibration on images that it was not fitted on.

    Args:
        network: frozen.
        images: uint8 (N, 28, 28), test images.
        labels: int64 (N,).
        temperature, energy_threshold: see `calibrate`.
        count: of photographs of each scene, of digits of each habit, and of non-digits of each kind.
        seed: of all that is drawn.
    Returns:
        "digits": name -> what `Scored.measure` says; "non_digits": kind -> share that is flagged.
    """
    digits = {"MNIST's test images": Scored.of(network, images.astype(np.float32) / np.float32(255), labels)}
    scenes = {
        scene: Scored.of(network, pixels, labels[chosen])
        for scene, (pixels, chosen) in photograph_digits(images, count, seed).items()
    }
    digits |= {
        "photographs": Scored.join(list(scenes.values())),
        **{f"photographs: {name}": part for name, part in scenes.items()},
    }
    habits = {habit: Scored.of(network, *drawn) for habit, drawn in draw_digits_of_habits(count, seed).items()}
    digits |= {
        "drawn digits": Scored.join(list(habits.values())),
        **{f"drawn digits: {name}": part for name, part in habits.items()},
    }
    energies = {
        kind: compute_energy(compute_logits(network, pixels)) for kind, pixels in draw_non_digits_of_kinds(count, seed).items()
    }
    flagged = {kind: _share(some < energy_threshold) for kind, some in energies.items()}
    return {
        "digits": {name: scored.measure(temperature, energy_threshold) for name, scored in digits.items()},
        "non_digits": {"all": _share(np.concatenate(list(energies.values())) < energy_threshold), **flagged},
    }


def render_section(calibration: Mapping[str, object]) -> str:
    """Write the card's section, as Markdown."""
    digits, non_digits = calibration["digits"], calibration["non_digits"]
    assert isinstance(digits, dict)
    assert isinstance(non_digits, dict)
    lines = [
        SECTION,
        "",
        f"Written by `{calibration['command']}`. The fit and the measurement share no images. Photographs are those of",
        "`model/photograph.py`, drawn digits those of `model/drawn_digits.py`, all prepared as a request's image is.",
        "",
        "| | |",
        "| --- | --- |",
        f"| temperature | {calibration['temperature']}: probabilities are the softmax of the logits divided by it |",
        f"| energy threshold | {calibration['energy_threshold']}: an image is unlike those of training where the logarithm of "
        f"the sum of the exponentials of its logits is lower |",
        f"| non-digits that are flagged or refused | **{non_digits['all']:.1%}**, every kind equally often |",
        "",
        "| digits | images | accuracy | falsely flagged | calibration error | before |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {row['images']:,} | {row['accuracy']:.2%} | {row['false_alarms']:.2%} | {row['calibration_error']:.2%} "
            f"| {row['calibration_error_before']:.2%} |"
            for name, row in digits.items()
        ),
        "",
        "| non-digits (`model/drawn_non_digits.py`) | flagged |",
        "| --- | --- |",
        *(f"| {kind} | {share:.1%} |" for kind, share in non_digits.items() if kind != "all"),
        "",
    ]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.research.calibrate",
        description="Fit temperature and energy threshold; write model/calibration.json and the card's last section.",
        epilog="example: %(prog)s --data-dir ~/data",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("build/data"), help="torchvision's root folder; downloads where missing"
    )
    parser.add_argument("--photographs", type=int, default=150, help="of each scene, for the fit")
    parser.add_argument("--drawn", type=int, default=100, help="of each scene, habit and kind, for the measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=CALIBRATION_FILE)
    parser.add_argument("--card", type=Path, default=CARD_FILE, help="the model card, whose last section is written again")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, measure, write. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    network = load_committed_network()
    images, labels = load_mnist(arguments.data_dir, train=True)
    test_images, test_labels = load_mnist(arguments.data_dir, train=False)
    _, (held_out, held_out_labels) = split_held_out(images, labels)
    temperature, energy_threshold = calibrate(
        network, held_out[:, 0].numpy(), held_out_labels.numpy(), photographs=arguments.photographs, seed=arguments.seed
    )
    temperature, energy_threshold = round(temperature, 4), round(energy_threshold, 4)
    calibration = {
        "temperature": temperature,
        "energy_threshold": energy_threshold,
        "framing": asdict(Framing.of(images[:, 0].numpy())),
        "weights_sha256": hashlib.sha256(WEIGHTS_FILE.read_bytes()).hexdigest(),
        "command": f"python -m scripts.research.calibrate --photographs {arguments.photographs} --drawn {arguments.drawn} "
        f"--seed {arguments.seed}",
        "fit": {
            "images": len(held_out),
            "photographs": arguments.photographs * (len(SCENES) - len(SLOW_SCENES)),
            "false_alarms": FALSE_ALARMS,
        },
        **measure(
            network,
            test_images[:, 0].numpy(),
            test_labels.numpy(),
            temperature=temperature,
            energy_threshold=energy_threshold,
            count=arguments.drawn,
            seed=arguments.seed + 1,
        ),
    }
    arguments.output.write_text(json.dumps(calibration, indent=1) + "\n")
    card = arguments.card.read_text().partition(SECTION)[0].rstrip("\n")
    arguments.card.write_text(f"{card}\n\n{render_section(calibration)}")
    print(f"temperature {temperature}, energy threshold {energy_threshold}; wrote {arguments.output} and {arguments.card}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
