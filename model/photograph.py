"""Images as people send them, made from clean digits: photographs, scans, drawings, thumbnails.

    python -m model.photograph model/samples/*.png

Nothing here is a real photograph: paper, light, pen and camera are drawn, each image from its own seed. They are what
robustness is tested and measured on, so that it can be measured by anyone, without anyone's photographs.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Ink = NDArray[np.float64]  # (h, w), how much of each pixel is covered by ink, 0-1


@dataclass(frozen=True, slots=True)
class Scene:
    """What a kind of image looks like. Pairs are the ends of a range that each image draws from.

    Attributes:
        longer_side: pixels.
        digit_share: the digit's height, as a share of the image's shorter side.
        paper: brightness of the paper, 0-1.
        ink: brightness of the ink, 0-1.
        tint: how far colours stray from grey.
        texture: standard deviation of the paper's grain.
        light: relative change of the light across the image.
        shadow: how dark a shadow with a soft edge is, relative to the light around it; 1 for none.
        blur: standard deviation, as a share of the longer side.
        noise: standard deviation of the camera's noise.
        rotation: degrees.
        specks: number of small dark dots.
        ruled: brightness of ruled lines relative to the paper; 1 for none.
        jpeg_quality: None for a lossless file.
        thicken: pixels of pen added (or taken, where negative) on each side, as a share of the digit's height.
        transparent: the paper is left out, as a drawing canvas in a browser leaves it.
    """

    longer_side: tuple[float, float]
    digit_share: tuple[float, float]
    paper: tuple[float, float] = (1.0, 1.0)
    ink: tuple[float, float] = (0.0, 0.0)
    tint: float = 0.0
    texture: tuple[float, float] = (0.0, 0.0)
    light: tuple[float, float] = (0.0, 0.0)
    shadow: tuple[float, float] = (1.0, 1.0)
    blur: tuple[float, float] = (0.0, 0.0)
    noise: tuple[float, float] = (0.0, 0.0)
    rotation: tuple[float, float] = (0.0, 0.0)
    specks: tuple[int, int] = (0, 0)
    ruled: tuple[float, float] = (1.0, 1.0)
    jpeg_quality: tuple[int, int] | None = None
    thicken: tuple[float, float] = (0.0, 0.0)
    transparent: bool = False


SCENES: dict[str, Scene] = {
    "scan": Scene(longer_side=(60, 400), digit_share=(0.5, 0.95)),
    "inverted scan": Scene(longer_side=(60, 400), digit_share=(0.5, 0.95), paper=(0, 0.1), ink=(0.8, 1)),
    "canvas": Scene(longer_side=(200, 400), digit_share=(0.5, 0.9), ink=(0, 0.3), tint=0.2, transparent=True),
    "thumbnail": Scene(longer_side=(16, 24), digit_share=(0.9, 1), paper=(0.7, 1), ink=(0, 0.3)),
    "inverted thumbnail": Scene(longer_side=(16, 24), digit_share=(0.9, 1), paper=(0, 0.1), ink=(0.6, 1)),
    "fine pen": Scene(longer_side=(200, 800), digit_share=(0.4, 0.9), paper=(0.8, 1), ink=(0, 0.3), thicken=(-0.045, -0.025)),
    "marker": Scene(longer_side=(200, 800), digit_share=(0.4, 0.9), paper=(0.8, 1), ink=(0, 0.2), thicken=(0.02, 0.05)),
    "grey paper": Scene(
        longer_side=(300, 1200), digit_share=(0.3, 0.8), paper=(0.45, 0.75), ink=(0.05, 0.25), tint=0.06, texture=(0.01, 0.03),
        light=(0, 0.25), blur=(0.0005, 0.003), noise=(0.005, 0.02), rotation=(-8, 8),
        jpeg_quality=(60, 95), thicken=(-0.025, 0.01),
    ),
    "phone": Scene(
        longer_side=(400, 1600), digit_share=(0.25, 0.7), paper=(0.55, 0.9), ink=(0.05, 0.3), tint=0.1, texture=(0.01, 0.03),
        light=(0.1, 0.5), shadow=(0.55, 0.9), blur=(0.0005, 0.004), noise=(0.005, 0.03), rotation=(-10, 10), specks=(0, 20),
        jpeg_quality=(40, 95), thicken=(-0.03, 0.015),
    ),
    "ruled paper": Scene(
        longer_side=(300, 900), digit_share=(0.3, 0.7), paper=(0.75, 0.95), ink=(0.05, 0.25), tint=0.05, texture=(0.005, 0.015),
        light=(0, 0.2), blur=(0.0005, 0.002), noise=(0.005, 0.015), rotation=(-5, 5), ruled=(0.8, 0.93), jpeg_quality=(60, 95),
    ),
    "blackboard": Scene(
        longer_side=(300, 1200), digit_share=(0.3, 0.8), paper=(0.1, 0.25), ink=(0.65, 0.95), tint=0.06, texture=(0.01, 0.03),
        light=(0, 0.3), blur=(0.0005, 0.003), noise=(0.005, 0.02), rotation=(-8, 8), specks=(0, 10), jpeg_quality=(60, 95),
    ),
    "faint pencil": Scene(
        longer_side=(300, 900), digit_share=(0.4, 0.8), paper=(0.8, 0.95), ink=(0.5, 0.65), texture=(0.005, 0.015),
        light=(0, 0.15), blur=(0.0005, 0.002), noise=(0.005, 0.015), jpeg_quality=(70, 95), thicken=(-0.03, 0),
    ),
    "huge": Scene(
        longer_side=(3000, 4000), digit_share=(0.2, 0.7), paper=(0.6, 0.9), ink=(0.05, 0.3), texture=(0.01, 0.02),
        light=(0.1, 0.3), blur=(0.0003, 0.001), noise=(0.01, 0.02), rotation=(-8, 8), jpeg_quality=(70, 90),
        thicken=(-0.03, 0.01),
    ),
}  # fmt: skip


def photograph(ink: Ink, kind: str, seed: Sequence[int]) -> bytes:
    """Make one image of a digit.

    Args:
        ink: the digit, cropped to its ink, at a resolution that shows the pen (see `ink_of`).
        kind: one of SCENES.
        seed: the same seed gives the same image.
    Returns:
        an image file: JPEG, or PNG where the scene says no JPEG quality.
    """
    scene = SCENES[kind]
    random = np.random.default_rng([sum(kind.encode()), *seed])

    def draw(ends: tuple[float, float]) -> float:
        return float(random.uniform(*ends))

    longer = round(draw(scene.longer_side))
    shorter = longer if longer < 100 else round(longer * random.choice([1, 0.75]))
    height, width = (longer, shorter) if random.random() < 0.5 else (shorter, longer)
    cover = _place(ink, height, width, draw(scene.digit_share), draw(scene.rotation), draw(scene.thicken), random)

    paper, pen = draw(scene.paper), draw(scene.ink)
    grain = _grain((height, width), random) * draw(scene.texture)
    surface = np.full((height, width), paper) + grain
    line_level = draw(scene.ruled)
    if line_level < 1:
        spacing = max(8, round(height * random.uniform(0.08, 0.14)))
        surface[random.integers(spacing) :: spacing] *= line_level
    for _ in range(random.integers(scene.specks[0], scene.specks[1] + 1)):
        y, x, radius = random.integers(height), random.integers(width), max(1, round(longer * random.uniform(0.001, 0.003)))
        surface[max(0, y - radius) : y + radius, max(0, x - radius) : x + radius] *= 0.5
    light = _light((height, width), draw(scene.light), draw(scene.shadow), random)
    grey = (surface * (1 - cover) + pen * cover) * light
    sigma = draw(scene.blur) * longer
    if sigma > 0:
        grey = ndimage.gaussian_filter(grey, sigma, mode="nearest")
    colours = 1 + scene.tint * random.uniform(-1, 1, 3)
    rgb = grey[:, :, None] * colours + random.normal(0, 1, (height, width, 1)) * draw(scene.noise)
    levels = np.clip(np.rint(rgb * 255), 0, 255).astype(np.uint8)
    content = BytesIO()
    if scene.transparent:
        alpha = np.rint(cover * 255).astype(np.uint8)
        solid = np.broadcast_to(np.clip(pen * colours * 255, 0, 255).astype(np.uint8), levels.shape)
        Image.fromarray(np.dstack([solid, alpha])).save(content, format="PNG")
    elif scene.jpeg_quality is None:
        Image.fromarray(levels[:, :, 0]).save(content, format="PNG")
    else:
        Image.fromarray(levels).save(content, format="JPEG", quality=int(random.integers(*scene.jpeg_quality)))
    return content.getvalue()


def _place(ink: Ink, height: int, width: int, share: float, rotation: float, thicken: float, random: np.random.Generator) -> Ink:
    """Lay the digit onto an empty image: scaled, turned, with another pen, somewhere near the middle."""
    digit_height = ink.shape[0]
    if thicken and ink.any():
        ink = np.pad(ink, round(0.06 * max(ink.shape)) + 1)
        inside = ink > 0.5
        distance = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)  # (h, w), pixels into the ink
        middle = inside & (ndimage.maximum_filter(distance, 3) == distance)
        finest = 1 - float(np.percentile(distance[middle], 20))  # however fine the pen, it leaves most of its line
        ink = np.clip(ndimage.gaussian_filter(distance, 1) + max(thicken * max(ink.shape), finest) + 0.5, 0, 1)
    image = Image.fromarray(np.rint(ink * 255).astype(np.uint8))
    if rotation:
        image = image.rotate(rotation, Image.Resampling.BILINEAR, expand=True)
    factor = share * min(height, width) / max(digit_height, 0.8 * ink.shape[1])
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    image = image.resize(size, Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC)
    canvas = Image.new("L", (width, height))
    free_x, free_y = max(0, width - size[0]), max(0, height - size[1])
    canvas.paste(image, (int(free_x * random.uniform(0.25, 0.75)), int(free_y * random.uniform(0.25, 0.75))))
    return np.asarray(canvas) / 255


def _grain(shape: tuple[int, int], random: np.random.Generator) -> NDArray[np.float64]:
    """Paper: noise at three scales, standard deviation about 1."""
    total = np.zeros(shape)
    for cell in (1, 4, 16):
        coarse = random.normal(0, 1, (shape[0] // cell + 2, shape[1] // cell + 2))
        total += np.kron(coarse, np.ones((cell, cell)))[: shape[0], : shape[1]]
    return total / math.sqrt(3)


def _light(shape: tuple[int, int], change: float, shadow: float, random: np.random.Generator) -> NDArray[np.float64]:
    """Light that falls from one side, and a shadow with a soft edge across a part of the image."""
    y, x = np.meshgrid(np.linspace(-0.5, 0.5, shape[0]), np.linspace(-0.5, 0.5, shape[1]), indexing="ij")
    angle = random.uniform(0, 2 * math.pi)
    light = 1 + change * (x * math.cos(angle) + y * math.sin(angle))
    angle, offset, softness = random.uniform(0, 2 * math.pi), random.uniform(-0.3, 0.3), random.uniform(0.03, 0.15)
    edge = 1 / (1 + np.exp(-(x * math.cos(angle) + y * math.sin(angle) - offset) / softness))
    return np.asarray(light * (1 - (1 - shadow) * edge))


def ink_of(levels: NDArray[np.uint8]) -> Ink:
    """Make a small digit, ink bright on dark, into smooth ink at eight times its resolution, cropped."""
    ys, xs = np.nonzero(levels > 40)
    cropped = levels[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] / 255
    large = ndimage.zoom(np.pad(cropped, 1), 8, order=3, grid_mode=True, mode="grid-constant")
    ink: Ink = np.clip((large - 0.4) * 4 + 0.5, 0, 1)
    return ink


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m model.photograph",
        description="Write images of every kind, made from small digits.",
        epilog="example: %(prog)s model/samples/*.png --output-dir build/photographs",
    )
    parser.add_argument("digits", metavar="DIGIT", type=Path, nargs="+", help="small images, ink bright on dark")
    parser.add_argument("--output-dir", type=Path, default=Path("build/photographs"), help="default: build/photographs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write one image of every kind for every digit. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(arguments.digits):
        with Image.open(file) as image:
            ink = ink_of(np.asarray(image.convert("L")))
        for kind in SCENES:
            content = photograph(ink, kind, [number])
            suffix = "jpg" if content.startswith(b"\xff\xd8") else "png"
            (arguments.output_dir / f"{file.stem} {kind}.{suffix}").write_bytes(content)
    print(f"wrote {len(arguments.digits) * len(SCENES)} images into {arguments.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
