"""Draw the digits that the tests and the README use: pen strokes, slightly different in every variant.

    python -m model.draw_samples

Writes model/samples/DIGIT-VARIANT.png: 28x28, one channel, ink bright on dark, made as MNIST's makers did (the ink fitted into
20x20, its centre of mass in the middle). They are the project's own drawings, and owe nothing to MNIST's images.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SAMPLES_DIR = Path(__file__).resolve().parent / "samples"
VARIANTS = 5
CANVAS = 560  # pixels a side while drawing: 20 for each pixel of the result
MARGIN = 100
INK_BOX = 20  # pixels: the longer side of the ink in the result
SIZE = 28

Point = tuple[float, float]

# Each digit is a few strokes; each stroke is a smooth curve through its points, in a box of 1 by 1, y downwards.
STROKES: dict[int, list[list[Point]]] = {
    0: [[(0.52, 0.0), (0.2, 0.2), (0.14, 0.55), (0.3, 0.92), (0.55, 1.0), (0.8, 0.8), (0.86, 0.42), (0.72, 0.08), (0.5, 0.0)]],
    1: [[(0.52, 0.0), (0.5, 0.5), (0.48, 1.0)]],
    2: [
        [(0.18, 0.24), (0.36, 0.03), (0.66, 0.04), (0.78, 0.28), (0.6, 0.6), (0.16, 0.98)],
        [(0.16, 0.98), (0.5, 0.95), (0.86, 0.97)],
    ],
    3: [
        [(0.2, 0.1), (0.45, 0.0), (0.74, 0.12), (0.7, 0.36), (0.42, 0.47)],
        [(0.42, 0.47), (0.74, 0.54), (0.82, 0.78), (0.55, 0.99), (0.18, 0.9)],
    ],
    4: [
        [(0.3, 0.02), (0.22, 0.3), (0.16, 0.56)],
        [(0.16, 0.56), (0.5, 0.55), (0.86, 0.52)],
        [(0.72, 0.04), (0.68, 0.5), (0.66, 1.0)],
    ],
    5: [
        [(0.8, 0.02), (0.55, 0.03), (0.3, 0.04)],
        [(0.3, 0.04), (0.27, 0.22), (0.24, 0.42)],
        [(0.24, 0.42), (0.55, 0.38), (0.8, 0.6), (0.72, 0.88), (0.42, 1.0), (0.16, 0.9)],
    ],
    6: [[(0.68, 0.0), (0.36, 0.26), (0.2, 0.66), (0.34, 0.96), (0.66, 0.94), (0.78, 0.68), (0.56, 0.52), (0.28, 0.66)]],
    7: [[(0.14, 0.08), (0.5, 0.07), (0.84, 0.05)], [(0.84, 0.05), (0.62, 0.45), (0.42, 1.0)]],
    8: [
        [
            *((0.74, 0.12), (0.48, 0.0), (0.26, 0.18), (0.42, 0.42), (0.7, 0.62), (0.74, 0.88)),
            *((0.48, 1.0), (0.24, 0.84), (0.36, 0.58), (0.66, 0.36), (0.76, 0.14)),
        ]
    ],
    9: [
        [(0.74, 0.2), (0.5, 0.02), (0.24, 0.2), (0.34, 0.46), (0.62, 0.44), (0.76, 0.18)],
        [(0.76, 0.18), (0.7, 0.6), (0.6, 1.0)],
    ],
}


def draw_digit(digit: int, variant: int) -> NDArray[np.uint8]:
    """Draw one digit. The same digit and variant always give the same image.

    Returns:
        uint8 (28, 28), ink bright on dark.
    """
    random = np.random.default_rng([digit, variant])
    pen = random.uniform(0.085, 0.125) * (CANVAS - 2 * MARGIN)
    width = random.uniform(0.75, 1.0)
    slant, angle = random.uniform(-0.05, 0.2), math.radians(random.uniform(-7, 7))
    canvas = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(canvas)
    for stroke in STROKES[digit]:
        points = np.array(stroke) + random.normal(0, 0.012, (len(stroke), 2)) - 0.5
        points[:, 0] = points[:, 0] * width - slant * points[:, 1]
        rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        for x, y in _smooth(points @ rotation) * (CANVAS - 2 * MARGIN) + CANVAS / 2:
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    return _centre(canvas)


def _smooth(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points close together on the Catmull-Rom curve through the given ones: (N, 2) -> (M, 2)."""
    padded = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    t = np.linspace(0, 1, 60)[:, None]
    pieces = []
    for before, start, end, after in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        pieces.append(
            0.5
            * (
                2 * start
                + (end - before) * t
                + (2 * before - 5 * start + 4 * end - after) * t**2
                + (3 * start - before - 3 * end + after) * t**3
            )
        )
    return np.vstack(pieces)


def _centre(canvas: Image.Image) -> NDArray[np.uint8]:
    """Fit the ink into 20x20 and put its centre of mass into the middle of 28x28."""
    ink = canvas.crop(canvas.getbbox())
    scale = INK_BOX / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.BOX)
    weights = np.asarray(ink, dtype=np.float64)
    ys, xs = np.indices(weights.shape)
    left = round(SIZE / 2 - 0.5 - (xs * weights).sum() / weights.sum())
    top = round(SIZE / 2 - 0.5 - (ys * weights).sum() / weights.sum())
    image = Image.new("L", (SIZE, SIZE))
    image.paste(ink, (left, top))
    return np.asarray(image)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m model.draw_samples",
        description="Draw the test digits.",
        epilog="example: %(prog)s --output-dir /tmp/digits",
    )
    parser.add_argument("--output-dir", type=Path, default=SAMPLES_DIR, help="default: model/samples")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Draw all digits. Returns the exit code."""
    output_dir: Path = build_parser().parse_args(argv).output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    for digit in STROKES:
        for variant in range(VARIANTS):
            Image.fromarray(draw_digit(digit, variant)).save(output_dir / f"{digit}-{variant}.png")
    print(f"drew {len(STROKES) * VARIANTS} digits into {output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
