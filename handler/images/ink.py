"""A working copy of an image -> where its ink is, which way round, and by how much it differs from the paper around it.

Frames, boxes, underlines and rules are found first and filled with paper; see `frames`. What of the rest is the digit is said in
`pieces`. Knows nothing of the network.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import ndimage

from handler.errors import BlankImage
from handler.images.frames import Frames, find_frames
from handler.images.pieces import Digit, choose_digit
from handler.images.preparation import Array
from handler.images.view import WORKING_SIZE, Box, View

PAPER_WINDOW = 0.4  # of the shorter side: wider than any stroke, narrower than most shadows
LEVEL_STEPS, WINDOW_STEPS = 16, 4  # an octave: what is found in the whole image is rounded, so as not to follow every pixel
PAPER_WINDOW_STROKES = 3.0  # widths of the stroke, once that is known: narrower shadows are seen through then
POLARITY_SIZE = 32  # pixels of the longer side, about, in which polarity is looked for
POLARITY_WINDOW = 0.6  # of the shorter side: most of what it sees is paper, around bold strokes too
WEAK_INK, STRONG_INK = 0.3, 0.45  # of the strongest contrast: ink is weak pixels that touch a strong one
FLAT_WEAK_INK = 0.15  # the same on paper of one single level, where hair lines may be as weak
EDGE = 0.4  # of the strongest contrast beside it, in a copy that is larger than the image: less is no ink
LINE_INK = 0.15  # of the strongest contrast: lines may be fainter than the digit
LINE_CONTRAST_TO_NOISE = 2.5
MIN_CONTRAST = 0.04  # of the grey scale: less is no ink
FLAT_MIN_CONTRAST = 0.01  # the same on paper of one single level
CLEAR_CONTRAST = 0.2  # more than this is ink, whatever the noise seems to be
MIN_CONTRAST_TO_NOISE = 5.0  # in standard deviations of the paper
LINK_SHARE = 0.02  # of the longer side: pieces that are as near to each other as twice this are one

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Ink:
    """Where the ink is in a working copy.

    Attributes:
        sign: 1 where ink is brighter than paper, -1 where it is darker.
        certainty: of the sign, from 0 to 1.
        contrast: (h', w'), how much more ink-like than the paper around it; about zero on paper.
        threshold: contrast from which a pixel is ink.
        digit: the digit's pieces.
        frames: lines that were filled with paper.
    """

    sign: int
    certainty: float
    contrast: Array
    threshold: float
    digit: Digit
    frames: Frames | None

    @property
    def mask(self) -> Mask:
        """The digit's pixels: bool (h', w')."""
        return self.digit.mask

    @property
    def box(self) -> Box:
        """Left, top, right, bottom of the digit."""
        return self.digit.box

    @property
    def size(self) -> int:
        """The longer side of the box."""
        return max(self.box[3] - self.box[1], self.box[2] - self.box[0])


@dataclass(frozen=True, slots=True)
class _Surface:
    """How much the pixels of a copy differ from the paper around them.

    Attributes:
        sign: as `Ink.sign`.
        paper: (h', w') or one number, what a pixel's sign * brightness would be without ink.
        difference: (h', w'), of the smoothed copy.
        noise: standard deviation of the paper.
        strongest: the largest difference, about.
        is_flat: all paper has one level.
    """

    sign: int
    paper: Array | float
    difference: Array
    noise: float
    strongest: float
    is_flat: bool

    @classmethod
    def of(cls, smooth: Array, sign: int, window: float | None, level: float | None) -> "_Surface":
        """Look for the paper in windows of so many pixels, or take it to be of one level."""
        paper: Array | float = _paper(sign * smooth, window) if window else sign * (level or 0.0)
        difference = sign * smooth - paper
        if window:
            middle = np.median(difference)
            paper, difference = paper + middle, difference - middle
        distances = np.abs(difference)
        noise = float(np.partition(distances, int(0.3 * distances.size), axis=None)[int(0.3 * distances.size)]) / 0.385
        count = max(4, difference.size // 400)
        strongest = rounded(float(np.partition(difference, -count, axis=None)[-count:].mean()))
        return cls(sign, paper, difference, noise, strongest, level is not None)

    def require_ink(self) -> None:
        """Refuse an image in which nothing stands out from the paper and its noise.

        Raises:
            BlankImage
        """
        least = FLAT_MIN_CONTRAST if self.is_flat else MIN_CONTRAST
        if self.strongest < min(max(least, MIN_CONTRAST_TO_NOISE * self.noise), CLEAR_CONTRAST):
            raise BlankImage(
                f"expected a digit, got an image without ink: its contrast is {max(self.strongest, 0):.3f} of the grey scale"
            )

    @property
    def threshold(self) -> float:
        """The difference from which a pixel is ink."""
        return (FLAT_WEAK_INK if self.is_flat else WEAK_INK) * self.strongest

    def pieces(self, magnification: float) -> tuple[NDArray[np.int32], int]:
        """Label the pieces of ink: weak pixels that touch a strong one, linked where they are close.

        Args:
            magnification: pixels of the copy in one of the image.
        """
        weak = self.difference > self.threshold
        if magnification > 1:  # beside a stroke what is weak is its edge, or the paper in a small loop
            weak &= self.difference > EDGE * ndimage.maximum_filter(self.difference, 2 * round(magnification) + 1)
        linked = ndimage.binary_dilation(weak, iterations=max(1, round(LINK_SHARE * max(weak.shape))))
        pieces, count = ndimage.label(linked, structure=np.ones((3, 3)))
        pieces = np.where(weak, pieces, 0)
        has_strong = np.zeros(count + 1, dtype=bool)
        has_strong[pieces[self.difference > STRONG_INK * self.strongest]] = True
        has_strong[0] = False
        return np.where(has_strong[pieces], pieces, 0), count


def find_ink(view: View, level: float | None = None) -> Ink:
    """Find the digit in a working copy.

    Args:
        view: the copy.
        level: brightness of the paper, where all of it has the same.
    Raises:
        BlankImage: there is no ink.
        SeveralDigits: there is more than one digit.
    """
    working = view.working
    magnification = 1 / view.unit[0]
    smooth = _smooth(working)
    sign, certainty = polarity(smooth, level)
    window = None if level is not None else PAPER_WINDOW * min(working.shape)
    surface = _Surface.of(smooth, sign, window, level)
    surface.require_ink()
    frames = find_frames(surface.difference > max(LINE_INK * surface.strongest, LINE_CONTRAST_TO_NOISE * surface.noise))
    if frames is not None:
        working = _fill(working, surface, frames)
        smooth = _smooth(working)
        sign, certainty = polarity(smooth, level)
        surface = _Surface.of(smooth, sign, window, level)
        surface.require_ink()
    digit = choose_digit(*surface.pieces(magnification))
    if window is not None:
        narrower = rounded(PAPER_WINDOW_STROKES * digit.thickness, WINDOW_STEPS)
        if narrower < window:
            surface = _Surface.of(smooth, sign, narrower, level)
            digit = choose_digit(*surface.pieces(magnification))
    contrast = (sign * working - surface.paper).astype(np.float32)
    return Ink(sign, certainty, contrast, surface.threshold, digit, frames)


def rounded(size: float, steps: int = LEVEL_STEPS) -> float:
    """Round to steps of equal ratio, so many to an octave; what is not above zero stays as it is."""
    return float(2 ** (round(math.log2(size) * steps) / steps)) if size > 0 else size


def _smooth(working: Array) -> Array:
    smooth: Array = ndimage.gaussian_filter(working, 0.8 * max(working.shape) / WORKING_SIZE, mode="nearest")
    return smooth


def _fill(working: Array, surface: _Surface, frames: Frames) -> Array:
    """Paint over lines with paper."""
    return np.where(frames.mask, surface.sign * surface.paper, working).astype(np.float32)


def polarity(smooth: Array, level: float | None) -> tuple[int, float]:
    """Say which way round the ink is: 1 for bright on dark paper, -1 for dark on bright; and how certain that is, from 0 to 1.

    Ink is the rarer of the two, so it gives the longer tail.
    """
    step = max(smooth.shape) // POLARITY_SIZE or 1
    small = ndimage.uniform_filter(smooth, step)[::step, ::step]
    paper: Array | float
    if level is None:
        window = int(POLARITY_WINDOW * min(small.shape)) | 1
        around = sliding_window_view(np.pad(small, window // 2, mode="reflect"), (window, window)).reshape(*small.shape, -1)
        # A local median keeps a shadow's edge. In scipy.ndimage it takes twenty times as long.
        paper = np.partition(around, around.shape[-1] // 2, axis=-1)[..., around.shape[-1] // 2]
    else:
        paper = level
    tail = (small - paper) ** 3
    total, size = float(tail.sum()), float(np.abs(tail).sum())
    return (1 if total > 0 else -1), abs(total) / size if size else 0.0


def _paper(smooth: Array, window: float) -> Array:
    """The paper's brightness everywhere, where ink is brighter: what is left without things narrower than the window."""
    size = int(window) | 1
    opened = ndimage.grey_opening(smooth, size=(size, size), mode="nearest")
    closed = ndimage.grey_closing(opened, size=(size, size), mode="nearest")
    paper: Array = ndimage.gaussian_filter(closed, size / 6, mode="nearest")
    return paper
