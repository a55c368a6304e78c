"""Frames, form boxes, underlines, ruled and squared paper: found among the ink of a working copy, so that they can be left out.

They are made of lines: straight, thin, nearly level or upright. So are strokes of digits; what tells them apart is where a line
lies beside everything else. A line is left out where

- it runs from border to border, and beyond what else there is at both ends;
- it is a side of a rectangle of which at least three sides are there, with something inside;
- it is level, below everything else, and reaches beyond it at both ends: an underline.

A line that crosses a stroke is cut out only where it is by itself: the stroke stays whole. A piece of ink of any other shape is a
frame where it lies all around another one: a circle, a cloud. Knows nothing of grey levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]

# Shares of the longer side of the copy, unless another is named.
THICKEST_LINE = 0.08
SHORTEST_LINE = 0.2
SHORTEST_PART = 0.12  # of a line, without gaps but those of other lines that cross it
CROSSING = 0.04  # widest gap where another line crosses
WIDEST_GAP = 0.13  # in a line; where a stroke crosses there is none
STEEPEST = 0.07  # slope of a line that is still level or upright: four degrees
SLOPES = np.linspace(-STEEPEST, STEEPEST, 11)
BIN = 1.5  # pixels: points of a line lie within it
LEAST_COVER = 0.6  # share of a line's length that is ink
LEAST_THIN = 0.2  # share of a line's length at which it is by itself, crossed by nothing
BORDER = 0.04  # what ends as near to the border ends there
OVERHANG = 0.03  # of the line's length, by which it reaches beyond what is no line, at each end
TOUCHING_OVERHANG = 0.1  # the same, where both are one piece
CLEAR_BORDER = 0.015  # what comes nearer to the border than this may be cropped to its ink
SMALLEST_DIGIT = 0.12  # longer side of what is worth keeping
SIDE_TOLERANCE = 0.12  # of a rectangle's longer side, by which the ends of its sides may miss its corners
SHORTEST_SIDE = 0.35  # of a rectangle's side: one side may be broken off
MOST_SIDES = 5  # that are tried as each side of a rectangle, longest first
SIGNIFICANT = 0.15  # of the largest piece's area: smaller pieces do not say where the digit is
UNDERLINE_LENGTH = 0.7  # of the width of what is above it, at least
SMALLEST_INSIDE = 0.35  # longer side of what an outline lies around, as a share of the outline's
CENTRED = 0.15  # of the outline's longer side: how far from its middle that lies, at most; a loop of a hollow digit lies farther
DIRECTIONS, SEEN_DIRECTIONS = 36, 33  # in which an outline is looked for from within, and has to be found
BELOW = 0.85  # share of the ink that lies above an underline


@dataclass(frozen=True, slots=True)
class Frames:
    """Lines that are no digit's.

    Attributes:
        mask: bool (h, w), their pixels.
        line_count: how many they are.
    """

    mask: Mask
    line_count: int


@dataclass(frozen=True, slots=True, eq=False)
class _Line:
    """A thin straight line that is level, or upright in the transposed copy.

    Attributes:
        upright: whether rows and columns are exchanged in what follows.
        middle, slope: y = middle + slope * x, its middle, in pixel centres.
        start, stop: columns.
        thickness: pixels.
        mask: bool (h, w), not transposed: where it is by itself.
    """

    upright: bool
    middle: float
    slope: float
    start: int
    stop: int
    thickness: float
    mask: Mask

    @property
    def length(self) -> int:
        """Pixels from end to end."""
        return self.stop - self.start

    @property
    def place(self) -> float:
        """The row of its centre."""
        return self.middle + self.slope * (self.start + self.stop) / 2

    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Both ends: along the line's own direction, and across it."""
        first, last = float(self.start), float(self.stop)
        return (first, self.middle + self.slope * first), (last, self.middle + self.slope * last)

    def band(self) -> Mask:
        """All pixels on the line, whatever crosses it: bool (h, w)."""
        height, width = self.mask.T.shape if self.upright else self.mask.shape
        distance = np.abs(np.arange(height)[:, None] - (self.middle + self.slope * np.arange(width)))
        columns = np.arange(width)
        reach = self.thickness / 2 + 1
        band: Mask = (distance <= reach) & (columns >= self.start - reach) & (columns < self.stop + reach)
        return band.T if self.upright else band


def find_frames(ink: Mask) -> Frames | None:
    """Find the lines among the ink that are no strokes of a digit.

    Args:
        ink: bool (h, w), all that differs from the paper.
    Returns:
        the lines, None where there are none, or where nothing would be left without them.
    """
    outline = _outline(ink)
    if outline is not None:
        inner = find_frames(ink & ~outline)
        return Frames(outline | inner.mask, 1 + inner.line_count) if inner else Frames(outline, 1)
    lines = [*_find_lines(ink, upright=False), *_find_lines(np.ascontiguousarray(ink.T), upright=True)]
    if not lines:
        return None
    chosen = _from_border_to_border(ink, lines)
    for _ in range(2):  # frames of two lines
        rest = [line for line in lines if line not in chosen]
        rectangle = _rectangle(_without(ink, chosen), rest)
        if not rectangle:
            break
        chosen += rectangle
    chosen += _underlines(_without(ink, chosen), [line for line in lines if not line.upright and line not in chosen])
    return Frames(ink & ~_without(ink, chosen), len(chosen)) if chosen else None


def _outline(ink: Mask) -> Mask | None:
    """Find a piece of ink that lies all around another one."""
    pieces, count = ndimage.label(ink, structure=np.ones((3, 3)))
    if count < 2:
        return None
    boxes = ndimage.find_objects(pieces)
    sizes = [max(side.stop - side.start for side in box) for box in boxes]
    outer, inner = np.argsort(sizes)[[-1, -2]]
    if sizes[inner] < SMALLEST_INSIDE * sizes[outer]:
        return None
    middles = [[(side.start + side.stop) / 2 for side in boxes[piece]] for piece in (outer, inner)]
    if max(abs(a - b) for a, b in zip(*middles, strict=True)) > CENTRED * sizes[outer]:
        return None
    outline: Mask = pieces == outer + 1
    y, x = np.nonzero(outline)
    directions = np.arctan2(y - middles[1][0], x - middles[1][1]) * (DIRECTIONS / (2 * np.pi))
    return outline if len(np.unique(np.floor(directions))) >= SEEN_DIRECTIONS else None


# --- lines


@dataclass(frozen=True, slots=True)
class _Runs:
    """Vertical runs of ink that are no longer than a line is thick, from left to right.

    Attributes:
        columns, tops, bottoms: (n,), where they are: a bottom is the row after the last.
    """

    columns: NDArray[np.intp]
    tops: NDArray[np.intp]
    bottoms: NDArray[np.intp]

    @classmethod
    def of(cls, ink: Mask) -> "_Runs":
        height, width = ink.shape
        padded = np.zeros((width, height + 2), dtype=np.int8)
        padded[:, 1:-1] = ink.T
        change = np.diff(padded, axis=1).ravel()  # (w * (h + 1),)
        columns, tops = np.divmod(np.flatnonzero(change == 1), height + 1)
        bottoms = np.flatnonzero(change == -1) - columns * (height + 1)
        thin = bottoms - tops <= THICKEST_LINE * max(ink.shape) + 1
        return cls(columns[thin], tops[thin], bottoms[thin])

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def middles(self) -> NDArray[np.floating]:
        """The row of each one's middle."""
        middles: NDArray[np.floating] = (self.tops + self.bottoms - 1) / 2
        return middles

    @property
    def thicknesses(self) -> NDArray[np.intp]:
        """Pixels of each."""
        return self.bottoms - self.tops

    def mask(self, chosen: NDArray[np.intp], shape: tuple[int, int]) -> Mask:
        """Where the chosen ones are: bool (h, w)."""
        edges = np.zeros((shape[0] + 1, shape[1]), dtype=np.int8)
        edges[self.tops[chosen], self.columns[chosen]] = 1  # a run's top is no other run's bottom
        edges[self.bottoms[chosen], self.columns[chosen]] = -1
        return np.cumsum(edges, axis=0, dtype=np.int8)[:-1] > 0


def _find_lines(ink: Mask, *, upright: bool) -> list[_Line]:
    """Find the thin, straight, level lines, longest first.

    Args:
        ink: bool (h, w); transposed where `upright`.
    """
    runs = _Runs.of(ink)
    free = np.ones(len(runs), dtype=bool)
    lines: list[_Line] = []
    for part in _straight_parts(runs, ink.shape):
        if not free[part[len(part) // 2]] or np.count_nonzero(free[part]) < 0.7 * len(part):
            continue
        line, own = _follow(ink, runs, part, upright=upright)
        is_new = np.count_nonzero(free[own]) >= 0.5 * len(own)
        free[part] = free[own] = False
        if line is not None and is_new:
            lines.append(line)
    return sorted(lines, key=lambda line: -line.length)


def _straight_parts(runs: _Runs, shape: tuple[int, ...]) -> list[NDArray[np.intp]]:
    """Find runs that lie side by side on a line: the indices of each such part, longest part first; parts overlap."""
    width, size = shape[1], max(shape)
    if len(runs) < SHORTEST_PART * size:
        return []
    levels = runs.middles - SLOPES[:, None] * (runs.columns - width / 2)  # (S, n)
    bins = np.floor(np.stack([levels, levels + BIN / 2]) / BIN).astype(np.int64)  # (2, S, n)
    bins += 1 - int(bins.min())
    keys = (np.arange(2 * len(SLOPES)).reshape(2, -1, 1) * (int(bins.max()) + 1) + bins) * (3 * width) + runs.columns
    order = np.argsort(keys, axis=None, kind="stable")
    sorted_keys = keys.ravel()[order]
    breaks = np.flatnonzero(np.diff(sorted_keys) > max(2, CROSSING * size)) + 1
    starts, stops = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(order)]])
    lengths = sorted_keys[stops - 1] - sorted_keys[starts]
    long_enough = np.flatnonzero(lengths >= SHORTEST_PART * size)
    longest_first = long_enough[np.argsort(-lengths[long_enough], kind="stable")]
    return [order[starts[part] : stops[part]] % len(runs) for part in longest_first]


def _follow(ink: Mask, runs: _Runs, part: NDArray[np.intp], *, upright: bool) -> tuple[_Line | None, NDArray[np.intp]]:
    """Follow a straight part to both ends of its line.

    Returns:
        the line, None where it is too short or mostly crossed; and the runs that lie on it.
    """
    height, width = ink.shape
    size = max(ink.shape)
    middles, thicknesses = runs.middles, runs.thicknesses
    own = part
    start, stop = int(runs.columns[part].min()), int(runs.columns[part].max()) + 1
    for _ in range(3):
        thickness = float(np.median(thicknesses[own]))
        x, y = runs.columns[own] - runs.columns[own].mean(), middles[own]
        slope = float((x * y).sum() / max((x * x).sum(), 1e-9))
        middle = float(y.mean() - slope * runs.columns[own].mean())
        on_line = (
            (np.abs(middles - (middle + slope * runs.columns)) <= 1 + thickness / 4)
            & (thicknesses <= 1.5 * thickness + 1.5)
            & (thicknesses >= thickness / 2 - 0.5)
        )
        own = np.flatnonzero(on_line)
        path = np.rint(middle + slope * np.arange(width)).astype(int)
        bare = (
            (path < 0) | (path >= height) | ~ink[np.clip(path, 0, height - 1), np.arange(width)]
        ).cumsum()  # (w,), to the left
        own = own[_reached(runs.columns[own], bare, (start + stop) // 2, WIDEST_GAP * size)]
        if len(own) < 3:
            return None, part
        start, stop = int(runs.columns[own[0]]), int(runs.columns[own[-1]]) + 1
    length = stop - start
    is_line = (
        abs(slope) <= STEEPEST * 1.2
        and length >= max(SHORTEST_LINE * size, 4 * thickness)
        and bare[stop - 1] - bare[start] <= (1 - LEAST_COVER) * length
        and len(own) >= LEAST_THIN * length
    )
    return _Line(
        upright, middle, slope, start, stop, thickness, _turned(runs.mask(own, ink.shape), upright)
    ) if is_line else None, own


def _reached(columns: NDArray[np.intp], bare: NDArray[np.intp], origin: int, gap: float) -> slice:
    """Choose of ascending columns those that are reached from `origin` without crossing more bare columns at once than `gap`."""
    breaks = np.flatnonzero(np.diff(bare[columns]) > gap) + 1
    bounds = np.concatenate([[0], breaks, [len(columns)]])
    for first, last in pairwise(bounds.tolist()):
        if last == len(columns) or columns[last] > origin:
            return slice(first, last)
    return slice(0, 0)


def _turned(mask: Mask, upright: bool) -> Mask:
    return mask.T if upright else mask


# --- which of them are no strokes


def _without(ink: Mask, lines: Sequence[_Line]) -> Mask:
    """Ink without these lines, and without the crossings of level with upright ones."""
    rest = ink.copy()
    for line in lines:
        rest &= ~line.mask
    level, upright = (
        np.logical_or.reduce([line.band() for line in lines if line.upright is is_upright] or [np.zeros_like(ink)])
        for is_upright in (False, True)
    )
    crossings = level & upright & rest
    if crossings.any():
        around = round(2 * max(line.thickness for line in lines)) + 3
        rest &= ~(crossings & (ndimage.uniform_filter((rest & ~crossings).astype(np.float32), around) < 0.4))
    return rest


@dataclass(frozen=True, slots=True)
class _Digit:
    """What is no line: the significant pieces together.

    Attributes:
        mask: bool (h, w).
        surroundings: bool (h, w), the mask and what is as near as two pixels.
        box: first row, row after the last, first column, column after the last.
    """

    mask: Mask
    surroundings: Mask
    box: tuple[int, int, int, int]

    def extent(self, *, upright: bool) -> tuple[int, int]:
        """Where it begins and ends along a level line, or an upright one."""
        return self.box[:2] if upright else self.box[2:]


def _digit(rest: Mask) -> _Digit | None:
    """Find what could be a digit, or several; None where there is nothing, or nothing but a dash."""
    pieces, count = ndimage.label(
        ndimage.binary_dilation(rest, iterations=max(1, max(rest.shape) // 80)), structure=np.ones((3, 3))
    )
    if not count:
        return None
    pieces = np.where(rest, pieces, 0)
    areas = np.bincount(pieces.ravel(), minlength=count + 1).astype(float)
    areas[0] = 0
    mask: Mask = (areas >= SIGNIFICANT * areas.max())[pieces]
    mask[pieces == 0] = False
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
    if box[1] - box[0] < SMALLEST_DIGIT * max(rest.shape):
        return None
    return _Digit(mask, ndimage.binary_dilation(mask, iterations=2), box)


def _overhangs(line: _Line, digit: _Digit, share: float) -> bool:
    """Whether a line reaches beyond the digit at both ends, by this share of its length."""
    first, last = digit.extent(upright=line.upright)
    margin = max(2, share * line.length)
    return first - line.start >= margin and line.stop - last >= margin


def _touches(line: _Line, digit: _Digit) -> bool:
    """Whether a line and the digit are one piece of ink."""
    return bool((line.mask & digit.surroundings).any())


def _from_border_to_border(ink: Mask, lines: Sequence[_Line]) -> list[_Line]:
    """Choose the lines that end at the image's border at both ends, unless the digit is one piece with them and as wide."""
    near = BORDER * max(ink.shape)

    def ends_at_borders(line: _Line) -> bool:
        height, width = ink.T.shape if line.upright else ink.shape
        reach = near + line.thickness / 2
        return all(
            min(along, width - along, across + near / 2, height - across + near / 2) <= reach for along, across in line.ends()
        )

    chosen = [line for line in lines if ends_at_borders(line)]
    while chosen:
        digit = _digit(_without(ink, chosen))
        if digit is None:
            chosen = [line for line in chosen if not line.upright] if any(line.upright for line in chosen) else []
            continue
        kept = [line for line in chosen if not _is_stroke(line, digit, chosen)]
        if len(kept) == len(chosen):
            break
        chosen = kept
    return chosen


def _is_stroke(line: _Line, digit: _Digit, lines: Sequence[_Line]) -> bool:
    """Whether a line from border to border may be a bar of the digit, in an image that is cropped to its ink."""
    if not _touches(line, digit):
        return False
    size = max(digit.mask.shape)
    low, high = digit.extent(upright=not line.upright)
    across = digit.mask.shape[1 if line.upright else 0]
    is_cropped = min(low, across - high) <= CLEAR_BORDER * size and sum(other.upright is line.upright for other in lines) == 1
    return is_cropped or not _overhangs(line, digit, OVERHANG)


def _rectangle(ink: Mask, lines: Sequence[_Line]) -> list[_Line]:
    """Choose three or four lines that are the sides of the largest rectangle with something inside."""
    level = [line for line in lines if not line.upright][:MOST_SIDES]
    upright = [line for line in lines if line.upright][:MOST_SIDES]
    found: list[tuple[float, list[_Line]]] = []
    for top, bottom in product([*level, None], repeat=2):
        if top is not None and bottom is not None and top.place >= bottom.place:
            continue
        for left, right in product([*upright, None], repeat=2):
            sides = [side for side in (top, bottom, left, right) if side is not None]
            if len(sides) < 3 or (left is not None and right is not None and left.place >= right.place):
                continue
            area = _area_of_rectangle(top, bottom, left, right)
            if area > 0:
                found.append((area, sides))
    for _, sides in sorted(found, key=lambda pair: (-len(pair[1]), -pair[0])):
        digit = _digit(_without(ink, sides))
        if digit is not None and _is_inside(digit, sides):
            return sides
    return []


def _area_of_rectangle(top: _Line | None, bottom: _Line | None, left: _Line | None, right: _Line | None) -> float:
    """The area between sides of which at most one is missing; 0 where they are no rectangle."""
    level, upright = [line for line in (top, bottom) if line], [line for line in (left, right) if line]
    x0 = left.place if left else min(line.start for line in level)
    x1 = right.place if right else max(line.stop for line in level)
    y0 = top.place if top else min(line.start for line in upright)
    y1 = bottom.place if bottom else max(line.stop for line in upright)
    tolerance = SIDE_TOLERANCE * max(x1 - x0, y1 - y0)
    meeting = [
        (abs(line.start - first) <= tolerance) + (abs(line.stop - last) <= tolerance)
        for lines, first, last in ((level, x0, x1), (upright, y0, y1))
        for line in lines
        if line.length >= SHORTEST_SIDE * (last - first)
    ]
    fits = len(meeting) == len(level) + len(upright) and min(meeting) >= 1 and meeting.count(1) <= 1
    return (x1 - x0) * (y1 - y0) if fits and x1 > x0 and y1 > y0 else 0.0


def _is_inside(digit: _Digit, sides: Sequence[_Line]) -> bool:
    """Whether the digit lies on the inner side of all these sides, or touches them."""
    centre_y, centre_x = (
        float(np.mean([end for side in sides for end in ((side.start, side.stop) if side.upright is upright else (side.place,))]))
        for upright in (True, False)
    )
    for side in sides:
        low, high = digit.extent(upright=not side.upright)
        reach = 2 * side.thickness + 2
        if side.place < (centre_x if side.upright else centre_y):
            if low < side.place - reach:
                return False
        elif high > side.place + reach:
            return False
    return True


def _underlines(ink: Mask, lines: Sequence[_Line]) -> list[_Line]:
    """Choose level lines below everything else."""
    chosen: list[_Line] = []
    for line in sorted(lines, key=lambda line: -line.place):
        digit = _digit(_without(ink, [*chosen, line]))
        if digit is None:
            continue
        first, last = digit.extent(upright=False)
        rows = np.nonzero(digit.mask)[0]
        is_below = np.count_nonzero(rows < line.place + line.thickness / 2 + 1) >= BELOW * len(rows)
        share = TOUCHING_OVERHANG if _touches(line, digit) else 0
        if is_below and line.length >= UNDERLINE_LENGTH * (last - first) and (not share or _overhangs(line, digit, share)):
            chosen.append(line)
    return chosen
