"""Pieces of ink -> the one digit that they make, and what else there is; or an error, where they make several.

A digit may be in pieces: a 5 with a detached hat, a 4 of two strokes, a broken or a dashed line. Two digits stand beside or below
each other, each as high as the other, with paper between them. Knows nothing of grey levels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from handler.errors import SeveralDigits

SPECK_SHARE = 0.05  # of the largest piece's area: a smaller piece is dirt, a dot or a comma
BROKEN_SPECK_SHARE = 0.02  # the same where the largest piece is less than BROKEN_SHARE of all ink: strokes are broken or dashed
BROKEN_SHARE = 0.6
NEAR_GAP = 0.12  # of the digit's size: what is as near belongs to it, such as the dash of a 5
FAR_GAP = 0.5  # the same of a piece as large as the largest; between, the larger the farther
BORDER_PIECE_FACTOR = 6  # a piece that touches the border is the digit only if it is this much larger than all others

# Two digits. Gaps are shares of the higher one's height.
MOST_RIVALS = 12  # largest pieces that are compared with each other
RIVAL_AREA = 0.12  # area of the smaller one as a share of the largest piece's
RIVAL_HEIGHT = 0.65  # height of the lower one as a share of the other's; the dash of a 5 is lower
BENT_RIVAL_HEIGHT = 0.4  # the same where neither is a straight stroke
STRAIGHT = 1.2  # length of the stroke to the box's diagonal: more is bent
CLEAR_GAP = 0.12  # beside each other: the strokes of a 4 are nearer
SMALL_GAP = 0.04  # where both are bent, or both together are wider than WIDEST_DIGIT
WIDEST_DIGIT = 1.1  # width to height
STACKED_GAP = 0.1  # below each other
HIGHEST_DIGIT = 2.2  # height to width, of a digit that is no single stroke
DIAGONAL_GAP = 0.3  # neither beside nor below

Mask = NDArray[np.bool_]
Slices = tuple[slice, slice]  # of a piece, along y and x


@dataclass(frozen=True, slots=True)
class Digit:
    """The ink that makes the digit.

    Attributes:
        mask: bool (h', w'), the digit's pixels.
        others: bool (h', w'), pixels of pieces that were left out.
        box: left, top, right, bottom of the mask.
    """

    mask: Mask
    others: Mask
    box: tuple[int, int, int, int]

    @property
    def other_share(self) -> float:
        """How much of all ink was left out."""
        return float(np.count_nonzero(self.others) / (np.count_nonzero(self.others) + np.count_nonzero(self.mask)))

    @property
    def thickness(self) -> float:
        """The stroke's width, in pixels of the copy."""
        return _thickness(self.mask)


def choose_digit(pieces: NDArray[np.int32], count: int) -> Digit:
    """Choose the pieces that make the digit: the largest, and what is large or near enough to belong to it.

    Args:
        pieces: (h', w'), labels from 1 to `count`, 0 on paper.
    Raises:
        SeveralDigits
    """
    areas = np.bincount(pieces.ravel(), minlength=count + 1).astype(float)
    areas[0] = 0
    boxes = {label: box for label, box in enumerate(ndimage.find_objects(pieces, max_label=count), start=1) if box is not None}
    inside = areas.copy()
    for label, box in boxes.items():
        if _touches_border(box, pieces.shape):
            inside[label] /= BORDER_PIECE_FACTOR
    main = int(inside.argmax())
    shares = np.minimum(inside / inside[main], areas / areas[main])
    require_one_digit(pieces, {label: boxes[label] for label in boxes if shares[label] >= RIVAL_AREA})
    is_broken = areas[main] < BROKEN_SHARE * areas.sum()
    left = {label for label in boxes if shares[label] >= (BROKEN_SPECK_SHARE if is_broken else SPECK_SHARE)} - {main}
    chosen, digit = {main}, boxes[main]
    while True:  # what belongs to the digit makes it larger, and then more is near
        size = max(_height(digit), _width(digit))
        near = {
            label for label in left if max(_gaps(boxes[label], digit)) < (NEAR_GAP + (FAR_GAP - NEAR_GAP) * shares[label]) * size
        }
        if not near:
            break
        chosen |= near
        left -= near
        digit = _union(digit, *(boxes[label] for label in near))
    mask: Mask = np.isin(pieces, list(chosen)) if len(chosen) > 1 else pieces == main
    return Digit(mask, (pieces > 0) & ~mask, (digit[1].start, digit[0].start, digit[1].stop, digit[0].stop))


def require_one_digit(pieces: NDArray[np.int32], boxes: dict[int, Slices] | None = None) -> None:
    """Refuse pieces of which two stand as two digits do.

    Args:
        pieces: (h', w'), labels from 1, 0 on paper.
        boxes: of the pieces that are large enough, by label; all that are where it is None.
    Raises:
        SeveralDigits
    """
    areas = np.bincount(pieces.ravel())
    areas[0] = 0
    if boxes is None:
        all_boxes = enumerate(ndimage.find_objects(pieces), start=1)
        boxes = {label: box for label, box in all_boxes if areas[label] >= RIVAL_AREA * areas.max()}
    if len(boxes) < 2:
        return
    largest = sorted(boxes, key=lambda label: -areas[label])[:MOST_RIVALS]
    rivals = [(boxes[label], _is_straight(pieces, label, boxes[label])) for label in largest]
    height = _height(_union(*boxes.values()))
    if any(_are_two_digits(one, other, height) for one, other in combinations(rivals, 2)):
        raise SeveralDigits("expected one digit, got several pieces of ink of its size: send each digit as an image of its own")


def _are_two_digits(one: tuple[Slices, bool], other: tuple[Slices, bool], height: int) -> bool:
    """Say whether two pieces, each with whether it is straight, are digits by themselves.

    Args:
        height: of all ink.
    """
    straight_count = one[1] + other[1]
    low, high = sorted((_height(one[0]), _height(other[0])))
    if low < (RIVAL_HEIGHT if straight_count else BENT_RIVAL_HEIGHT) * high:
        return False
    if straight_count == 2 and low < RIVAL_HEIGHT * height:  # dashes
        return False
    gap_y, gap_x = _gaps(one[0], other[0])
    both = _union(one[0], other[0])
    if gap_x > 0 and gap_y > 0:
        return straight_count == 0 and max(gap_y, gap_x) >= DIAGONAL_GAP * high
    if gap_x > 0:
        is_wide = not straight_count or _width(both) > WIDEST_DIGIT * _height(both)
        return gap_x >= (SMALL_GAP if is_wide else CLEAR_GAP) * high
    return gap_y >= STACKED_GAP * high and straight_count < 2 and _height(both) > HIGHEST_DIGIT * _width(both)


def _is_straight(pieces: NDArray[np.int32], label: int, box: Slices) -> bool:
    """Whether a piece is one straight stroke."""
    mask = pieces[box] == label
    length = np.count_nonzero(mask) / max(_thickness(mask), 1)
    return bool(length <= STRAIGHT * math.hypot(*mask.shape))


def _thickness(mask: Mask) -> float:
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return 4 * (float(depth[mask].mean()) - 0.5)  # across a stroke of width w the depth's mean is w / 4 + 1/2


def _touches_border(box: Slices, shape: Sequence[int]) -> bool:
    return any(side.start == 0 or side.stop == length for side, length in zip(box, shape, strict=True))


def _height(box: Slices) -> int:
    return int(box[0].stop - box[0].start)


def _width(box: Slices) -> int:
    return int(box[1].stop - box[1].start)


def _union(*boxes: Slices) -> Slices:
    """The box around several."""
    y, x = (slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)) for axis in (0, 1))
    return y, x


def _gaps(box: Slices, other: Slices) -> tuple[int, int]:
    """Pixels between two boxes along y and x; negative where they overlap."""
    y, x = (max(a.start, b.start) - min(a.stop, b.stop) for a, b in zip(box, other, strict=True))
    return y, x
