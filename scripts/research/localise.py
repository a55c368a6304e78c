"""Find a digit in an image by its saliency map: ask a running server for the map, and grow the most salient pixels to the digit.

    python -m scripts.research.localise build/photographs/*.jpg

Simonyan, Vedaldi and Zisserman, arXiv 1312.6034, section 3.2: the most salient pixels are the seed of GrabCut (Rother et al.,
2004), which then separates ink from paper by colour. Prints the overlap of the box found with the box of the ink that the server
reports, beside the overlap that a seed of random pixels reaches, and writes a PNG. Needs OpenCV: opencv-python-headless.
"""

import argparse
import base64
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

from handler.images.decode import decode_image
from handler.render.drawing import Row, Style, draw
from scripts.command_line import HelpFormatter
from scripts.paths import BUILD, MODEL_NAME
from scripts.serving.explain import ExplainError, request_explanation

SEED_QUANTILE = 0.8  # of the absolute map where it is not zero: about as many pixels as a digit has of ink seed the foreground
# GrabCut has every pixel on one side from the start, so all others start as background, and may change sides. The paper fixes the
# lowest 30 % as background: that would cut holes into broad strokes, in the middle of which the gradient is as small as on paper.
ITERATIONS = 5
WORKING_SIDE = 280  # pixels of the longer side: GrabCut takes seconds for a photograph, and finds nothing in a thumbnail
ACCEPTED_OVERLAP = 0.5  # of boxes, intersection over union: the ILSVRC's bound, which the paper uses

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom lie outside


class LocaliseError(RuntimeError):
    """No digit was found; the message says why, for a person."""


@dataclass(frozen=True, slots=True)
class Location:
    """The place of a digit in an image.

    Attributes:
        ink: bool (H, W), the largest connected piece of the foreground.
        box: the ink's bounding box.
    """

    ink: NDArray[np.bool_]
    box: Box


def localise(grey: NDArray[np.float32], saliency: NDArray[np.float32]) -> Location:
    """Find the digit that the most salient pixels belong to.

    Args:
        grey: float32 (H, W), grey levels in [0, 1].
        saliency: float32 (H, W), the saliency map of the same image.
    Raises:
        LocaliseError: the map is flat, or GrabCut finds no foreground.
        ImportError: there is no OpenCV.
    """
    import cv2  # serving does not need it

    scale = WORKING_SIDE / max(grey.shape)
    height, width = (max(1, round(length * scale)) for length in grey.shape)
    levels = np.rint(np.clip(_resize(grey, height, width), 0, 1) * 255).astype(np.uint8)
    sizes = _resize(np.abs(saliency), height, width)
    seed = sizes > sizes.min()  # nowhere, where the map is flat
    if seed.any():
        seed &= sizes >= np.quantile(sizes[sizes > 0], SEED_QUANTILE)
    if not seed.any():
        raise LocaliseError("the map is flat: no pixel is more salient than the others")
    sides = np.where(seed, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)  # (height, width), changed in place
    cv2.setRNGSeed(0)  # of the clustering of colours
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(np.dstack([levels] * 3), sides, (0, 0, 1, 1), *models, ITERATIONS, cv2.GC_INIT_WITH_MASK)
    pieces, count = ndimage.label(sides == cv2.GC_PR_FGD, structure=np.ones((3, 3)))
    if not count:
        raise LocaliseError("GrabCut finds no foreground")
    largest = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    ink = np.asarray(Image.fromarray(largest).resize(grey.shape[::-1], Image.Resampling.NEAREST))
    ys, xs = np.nonzero(ink)
    if not len(ys):
        raise LocaliseError("GrabCut finds no foreground of a pixel or more")
    return Location(ink, (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1))


def _resize(numbers: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Average down, or interpolate up."""
    shrinks = height < numbers.shape[0]
    resampling = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(numbers.astype(np.float32)).resize((width, height), resampling))


def lay_on_image(
    saliency: NDArray[np.float32], window: tuple[float, float, float, float], height: int, width: int
) -> NDArray[np.float32]:
    """Lay a map of the network's pixels onto the image, at the place that these came from: sizes, interpolated, zero elsewhere.

    The derivative by the image's own pixels is zero where ink is saturated, as most of it is in a photograph.

    Args:
        saliency: float32 (28, 28).
        window: left, top, right, bottom of the network's pixels, in pixels of the image.
        height, width: of the image.
    Returns:
        float32 (height, width).
    """
    left, top, right, bottom = window
    step_x, step_y = saliency.shape[1] / (right - left), saliency.shape[0] / (bottom - top)
    affine = (step_x, 0, -left * step_x, 0, step_y, -top * step_y)
    sizes = Image.fromarray(np.abs(saliency))
    return np.asarray(sizes.transform((width, height), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR))


def overlap(box: Sequence[int], other: Sequence[int]) -> float:
    """Compute the intersection over union of two boxes (left, top, right, bottom), 0-1."""
    width = max(0, min(box[2], other[2]) - max(box[0], other[0]))
    height = max(0, min(box[3], other[3]) - max(box[1], other[1]))
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (box, other)]
    return width * height / (sum(areas) - width * height)


def overlap_at_random(grey: NDArray[np.float32], saliency: NDArray[np.float32], box: Sequence[int]) -> float:
    """Compute the control: the overlap of the same map with its numbers in random places; 0 where that finds nothing."""
    shuffled = np.random.default_rng(0).permutation(saliency.ravel()).reshape(saliency.shape)
    try:
        return overlap(localise(grey, shuffled).box, box)
    except LocaliseError:
        return 0.0


def read_map(explanation: dict[str, Any]) -> NDArray[np.float32]:
    """Decode the saliency map of a reply with `encoding` "base64": float32, of the reply's `shape`."""
    numbers = np.frombuffer(base64.b64decode(explanation["saliency"]), "<f4")
    return numbers.reshape(explanation["shape"]).astype(np.float32)


def draw_location(
    grey: NDArray[np.float32], saliency: NDArray[np.float32], digit: int, location: Location, size: int
) -> Image.Image:
    """Draw the saliency map over the image, and beside it the outline of the ink and its box.

    Args:
        grey: float32 (H, W), grey levels in [0, 1].
        saliency: float32 (H, W).
        digit: the class of the map.
        location: the digit's place.
        size: longer side of each of the two panels, in pixels.
    """
    with Image.open(BytesIO(draw([Row(grey, saliency[None], (digit,))], Style(size=size)))) as opened:
        overlay = opened.convert("RGB")
    panel_size, (left, top, right, bottom) = overlay.size, location.box
    levels = Image.fromarray(np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8)).resize(panel_size, Image.Resampling.BILINEAR)
    ink = np.asarray(Image.fromarray(location.ink).resize(panel_size, Image.Resampling.NEAREST))
    pixels = np.dstack([np.asarray(levels)] * 3)
    pixels[ndimage.binary_dilation(ink, iterations=1) & ~ndimage.binary_erosion(ink, iterations=1)] = (220, 30, 30)
    panel = Image.fromarray(pixels)
    x_scale, y_scale = panel_size[0] / grey.shape[1], panel_size[1] / grey.shape[0]
    corners = (left * x_scale, top * y_scale, right * x_scale - 1, bottom * y_scale - 1)
    ImageDraw.Draw(panel).rectangle(corners, outline=(0, 150, 60), width=max(2, size // 100))
    joined = Image.new("RGB", (2 * size + size // 20, size), "white")
    joined.paste(overlay, (0, 0))
    joined.paste(panel, (size + size // 20, 0))
    return joined


def arrange(drawings: Sequence[Image.Image], columns: int) -> Image.Image:
    """Set drawings onto one white sheet, from left to right and down."""
    width, height = (max(lengths) for lengths in zip(*(drawing.size for drawing in drawings), strict=True))
    gap = height // 10
    sheet = Image.new("RGB", (columns * (width + gap) + gap, -(-len(drawings) // columns) * (height + gap) + gap), "white")
    for number, drawing in enumerate(drawings):
        row, column = divmod(number, columns)
        sheet.paste(drawing, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.research.localise",
        description="Find the digit in images, by the saliency maps of a running server.",
        epilog="example:\n  %(prog)s build/photographs/*.jpg --output build/localised.png",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="image files")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="address of the inference API")
    parser.add_argument("--model", default=MODEL_NAME, help="the served model's name")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="longer side of one panel")
    parser.add_argument("--columns", type=int, default=1, metavar="N", help="images in a row of the PNG")
    parser.add_argument("--output", type=Path, default=BUILD / "localised.png", metavar="FILE", help="PNG to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, find, print, draw. Returns the exit code: 1 where a digit is not found, 2 where there is no answer."""
    arguments = build_parser().parse_args(argv)
    drawings, lines = [], []
    overlaps = []  # by the map, and by random pixels
    try:
        import cv2  # noqa: F401  # say that it is missing before anything is asked

        for image in tqdm(arguments.images, unit="image", disable=None):
            options = {"pixels": "true", "encoding": "base64"}
            reply = request_explanation(
                image, url=arguments.url.rstrip("/"), model=arguments.model, target="predicted", **options
            )
            decoded = decode_image(image.read_bytes())
            grey = decoded.grey
            left, top, right, bottom = (side / decoded.reduction for side in reply["preparation"]["window"])
            saliency = lay_on_image(read_map(reply["explanation"]), (left, top, right, bottom), *grey.shape)
            line = f"{image}: digit {reply['digit']}"
            found = 0.0
            ink_box = reply["preparation"].get("ink_box")  # absent where the image is canonical already
            try:
                location = localise(grey, saliency)
            except LocaliseError as error:
                line += f", {error}"
            else:
                drawings.append(draw_location(grey, saliency, reply["digit"], location, arguments.size))
                line += f", box {location.box}"
                found = overlap(location.box, ink_box) if ink_box else 0.0
            if ink_box:
                overlaps.append((found, overlap_at_random(grey, saliency, ink_box)))
                line += ", overlap {:.2f}, from random pixels {:.2f}".format(*overlaps[-1])
            lines.append(line)
    except ImportError:
        print("error: OpenCV is missing; install it with: pip install opencv-python-headless", file=sys.stderr)
        return 2
    except ExplainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    hits = (np.reshape(overlaps, (-1, 2)) >= ACCEPTED_OVERLAP).sum(axis=0)
    if overlaps:
        means = np.mean(overlaps, axis=0)
        print(
            f"{hits[0]} of {len(overlaps)} found, mean overlap {means[0]:.2f}; "
            f"from random pixels {hits[1]}, mean overlap {means[1]:.2f}"
        )
    if drawings:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arrange(drawings, arguments.columns).save(arguments.output, optimize=True)
        print(f"wrote {arguments.output}", file=sys.stderr)
    return int(len(drawings) < len(lines) or hits[0] < len(overlaps))


if __name__ == "__main__":
    sys.exit(main())
