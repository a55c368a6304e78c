"""Any image of a digit -> the pixels that the network knows, and the way back.

What MNIST's makers did, for images that are less clean: find the ink, whatever the light; make it bright on dark; fit it into
20x20 with its aspect kept; put its centre of mass into the middle of 28x28; stretch its intensities. Knows nothing of image
files, of HTTP or of TorchServe.

Everything that is looked for (where the ink is, how bright the paper, which way round) is looked for in a small copy of it.
What comes out is one affine map of the image's grey levels, `PreparedImage`, whose transpose carries gradients back. What is
decided by looking at the whole image is rounded, so that small changes of the image leave the map as it is.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from handler.errors import BlankImage
from handler.images.framing import MNIST_FRAMING, Framing, has_framing
from handler.images.ink import Ink, find_ink, rounded
from handler.images.pen import MARGIN, draw_strokes, extent
from handler.images.pieces import require_one_digit
from handler.images.preparation import Array, ImageWarning, Placement, PreparedImage, leave_unchanged, whole
from handler.images.view import View

INK_SHARE = 20 / 28  # longer side of the ink, as a share of the network's image, as in MNIST
CENTRE_SHARE = 14.5 / 28  # where MNIST's makers put the centre of mass: the middle of pixel 14
CENTRE_STEPS = 4  # the centre of mass is rounded to so many parts of the network's pixel
DETAILED_INK_SIZE = 110  # pixels: ink that is smaller than this in the working copy is looked at again, closer
CLOSE_UP_MARGIN = 0.25  # of the ink's size, on each side, when it is looked at closer
FULL_INK_PERCENTILE = 95  # of the ink's contrasts is full ink; strokes saturate softly towards it
SATURATED_INK = 1.0
OTHER_INK_SHARE = 0.03  # of all ink: more that was left out is worth a warning
CLOSE_CALL = 0.25  # certainty of the polarity, from 0 to 1: less is worth a warning
TINY_RANGE = 0.2  # of the grey scale: a narrower range on flat paper is the image's whole range
STRETCH_STEPS = 12  # an octave, to which the stretch is rounded
PEAK = 0.97  # of the brightest of the network's pixels becomes 1
SAMPLED_PIXELS = 64  # a side, of the grid in which the paper's level is looked for


def prepare_digit(
    grey: Array, height: int, width: int, source: str = "pixels", framing: Framing = MNIST_FRAMING
) -> PreparedImage:
    """Find the digit in an image and make it what the network knows.

    Args:
        grey: float32 (H, W), brightness in [0, 1], of either polarity.
        height, width: of the network's input.
        source: what the image was sent as.
        framing: of the training set. An image that has it goes to the network bit for bit; one that has it but for its range or
            its polarity is given these, and nothing else.
    Returns:
        the preparation, which holds the prepared image.
    Raises:
        BlankImage: there is no ink.
        SeveralDigits: there is more than one digit.
    """
    if grey.shape == (height, width):
        if has_framing(grey, framing):
            return leave_unchanged(grey, source)
        levels = _Levels.of(grey, framing.least_maximum)
        for sign in (1, -1):
            framed = levels.stretch(grey, sign)
            if has_framing(framed, framing):
                return _only_stretched(grey, framed, levels, sign, source)
    levels = _Levels.of(grey, TINY_RANGE)
    stretched = levels.stretch(grey, 1)
    view = View.of(stretched)
    ink = overview = find_ink(view, levels.paper)
    if ink.size < DETAILED_INK_SIZE and view.shrinks:
        close_up = View.of(stretched, view.region_around(ink.box, CLOSE_UP_MARGIN))
        with contextlib.suppress(BlankImage):  # what looked like ink from afar may dissolve; then it stays as it was seen
            view, ink = close_up, find_ink(close_up, levels.paper)
    require_one_digit(ndimage.label(ink.mask, structure=np.ones((3, 3)))[0])
    line_count = max(seen.frames.line_count if seen.frames else 0 for seen in (overview, ink))
    prepared = _place(view, ink, levels, height, width, source)
    if line_count:
        removed = "a line that is no stroke" if line_count == 1 else f"{line_count} lines that are no strokes"
        prepared = replace(prepared, steps=(f"removed {removed}", *prepared.steps))
    return replace(prepared, warnings=tuple(_warnings(prepared, grey, overview, ink, line_count)))


def _warnings(prepared: PreparedImage, grey: Array, overview: Ink, ink: Ink, line_count: int) -> Iterator[ImageWarning]:
    """Say what may make the answer wrong."""
    if line_count:
        lines, were = ("a line", "it was") if line_count == 1 else (f"{line_count} lines", "they were")
        yield ImageWarning(
            "FrameRemoved", f"expected a digit alone, got {lines} of a frame, a box or ruled paper: {were} removed"
        )
    if overview.digit.other_share >= OTHER_INK_SHARE:
        yield ImageWarning(
            "OtherInk",
            f"expected one digit, got other ink beside it, {overview.digit.other_share:.0%} of all: the largest piece was read",
        )
    left, top, right, bottom = prepared.ink_box or whole(grey)
    if left <= 0 or top <= 0 or right >= grey.shape[1] or bottom >= grey.shape[0]:
        yield ImageWarning(
            "TouchesBorder", "expected paper all around the digit, got ink at the image's border: it may be cut off"
        )
    if min(overview.certainty, ink.certainty) < CLOSE_CALL or overview.sign != ink.sign:
        bright, dark = ("bright", "dark") if ink.sign > 0 else ("dark", "bright")
        yield ImageWarning(
            "Inverted",
            f"expected ink that is clearly brighter or darker than its paper, got either: it was read as {bright} on {dark}",
        )


@dataclass(frozen=True, slots=True)
class _Levels:
    """The range of an image's grey levels, where it has to be stretched before anything can be seen in it.

    Attributes:
        lowest: becomes 0.
        gain: how much the levels are stretched; 1 where they stay as they are.
        paper: the level of the paper, after the stretch, where all of it has the same; else None.
    """

    lowest: float
    gain: float
    paper: float | None

    @classmethod
    def of(cls, grey: Array, widest: float) -> "_Levels":
        """Look at an image (H, W): a range narrower than `widest` is stretched, but in a photograph, where it may be noise."""
        lowest, highest = float(grey.min()), float(grey.max())
        if lowest == highest:
            raise BlankImage("expected a digit that differs from its paper, got an image of one single grey level")
        paper = _flat_paper(grey)
        if paper is None or highest - lowest >= widest:
            return cls(0.0, 1.0, paper)
        gain = 1 / (highest - lowest)
        return cls(lowest, gain, (paper - lowest) * gain)

    def stretch(self, grey: Array, sign: int) -> Array:
        """Give the image its full range, inverted where the sign is negative."""
        stretched = (grey - np.float32(self.lowest)) * np.float32(self.gain) if self.gain != 1 else grey
        return stretched if sign > 0 else np.float32(1) - stretched

    def describe(self) -> list[str]:
        """Say what was done, as steps."""
        if self.gain == 1:
            return []
        return [f"stretched its levels, {self.lowest:.4f} to {self.lowest + 1 / self.gain:.4f}, to the whole scale"]


def _flat_paper(grey: Array) -> float | None:
    """The grey level that most pixels share exactly; None where there is none, as in a photograph."""
    step_y, step_x = (max(1, side // SAMPLED_PIXELS) for side in grey.shape)
    sample = grey[::step_y, ::step_x]
    values, counts = np.unique(sample, return_counts=True)
    most = int(counts.argmax())
    return float(values[most]) if counts[most] * 2 > sample.size else None


def _only_stretched(grey: Array, framed: Array, levels: _Levels, sign: int, source: str) -> PreparedImage:
    """An image that has the framing but for its range or its polarity."""
    slope = sign * levels.gain
    offset = np.full_like(grey, (1 if sign < 0 else 0) - slope * levels.lowest)
    steps = [*levels.describe(), *(["inverted"] if sign < 0 else [])]
    return replace(leave_unchanged(framed, source), slope=slope, offset=offset, steps=tuple(steps))


def _place(view: View, ink: Ink, levels: _Levels, height: int, width: int, source: str) -> PreparedImage:
    """Fit the ink into the network's image, as MNIST's makers did."""
    usual = float(np.percentile(ink.contrast[ink.mask], FULL_INK_PERCENTILE))
    if usual <= 0:
        raise BlankImage("expected a digit, got an image whose ink is no different from its paper")
    full = rounded(usual, STRETCH_STEPS)
    size = INK_SHARE * min(height, width)
    strokes = draw_strokes(ink.mask, ink.digit.others, ink.contrast, full, size)
    mass = np.where(strokes.mask, strokes.intensity, 0)
    if not mass.any():
        raise BlankImage("expected a digit's strokes, got ink of specks and holes that leaves none")
    scale = size / extent(strokes.mask)  # pixels of the network's image in one of the working copy
    place_y = _placement(mass.sum(axis=1), np.asarray(strokes.mask.any(axis=1)), scale, height)
    place_x = _placement(mass.sum(axis=0), np.asarray(strokes.mask.any(axis=0)), scale, width)
    placed: Array = np.asarray(place_y.weights @ strokes.intensity @ place_x.weights.T, dtype=np.float32)
    peak = rounded(float(placed.max()) * PEAK, STRETCH_STEPS)
    pixels: Array = np.minimum(placed / np.float32(peak), 1)
    placement = Placement(
        place_y.weights,
        place_x.weights,
        strokes.source,
        strokes.weight,
        (placed < peak).astype(np.float32),
    )
    gain = 1 / (full * peak)
    slope = ink.sign * levels.gain * gain
    offset = pixels - placement.apply(np.float32(ink.sign * gain) * view.working + np.float32(slope * levels.lowest))
    left, top, right, bottom = view.to_image(ink.box)
    steps = [
        *levels.describe(),
        f"found ink {'brighter' if ink.sign > 0 else 'darker'} than its paper by more than {ink.threshold:.2f}",
    ]
    if ink.sign < 0:
        steps.append("inverted")
    steps.append(f"scaled its {right - left:.0f}x{bottom - top:.0f} pixels to {size:.0f}")
    window = view.to_image((place_x.start, place_y.start, place_x.stop, place_y.stop))
    edges = ", ".join(f"{edge:.2f}" for edge in window)
    steps += [f"centred by its mass, in the window {edges}", f"stretched its contrast by {gain:.2f}"]
    box = (int(np.floor(left)), int(np.floor(top)), int(np.ceil(right)), int(np.ceil(bottom)))
    return PreparedImage(
        view.rows, view.columns, slope, offset, pixels, tuple(steps), window, placement, box, round(ink.threshold, 4), source
    )


@dataclass(frozen=True, slots=True)
class _Axis:
    """Where the network's pixels come from along one axis.

    Attributes:
        weights: float32 (target, source), source pixels being MARGIN more on both sides than the working copy's.
        start, stop: of all target pixels, in pixels of the working copy.
    """

    weights: Array
    start: float
    stop: float


def _placement(mass: Array, drawn: NDArray[np.bool_], scale: float, target: int) -> _Axis:
    """Put the centre of mass into the middle, but keep all that is drawn inside.

    Args:
        mass: (source,), of the strokes along the axis.
        drawn: bool (source,), where there are strokes.
        scale: target pixels in one source pixel.
    """
    first, last = (int(place) for place in np.flatnonzero(drawn)[[0, -1]])
    source = np.arange(len(mass)) + 0.5
    centre = float((source * mass).sum() / mass.sum())
    middle = CENTRE_SHARE * target
    middle = min(max(middle, (centre - first) * scale), target - (last + 1 - centre) * scale)
    start = round((centre - middle / scale) * scale * CENTRE_STEPS) / (scale * CENTRE_STEPS)
    wanted = start + (np.arange(target) + 0.5) / scale  # where in the source each target pixel looks
    reach = max(1 / scale, 1.0)
    weights = np.clip(1 - np.abs(source - wanted[:, None]) / reach, 0, None) / reach
    return _Axis(weights.astype(np.float32), start - MARGIN, start - MARGIN + target / scale)
