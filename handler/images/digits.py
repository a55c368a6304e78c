"""Any image of a digit -> the pixels that the network knows, and the way back.

What MNIST's makers did, for images that are less clean: find the ink, whatever the light; make it bright on dark; fit it into
20x20 with its aspect kept; put its centre of mass into the middle of 28x28; stretch its intensities. Knows nothing of image
files, of HTTP or of TorchServe.

Everything that is looked for (where the ink is, how bright the paper, which way round) is looked for in a small copy of it.
What comes out is one affine map of the image's grey levels, `PreparedImage`, whose transpose carries gradients back.
"""

import contextlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import ndimage, sparse

from handler.errors import BlankImage
from handler.images.framing import has_framing
from handler.images.preparation import Array, PreparedImage, leave_unchanged, resample

INK_SHARE = 20 / 28  # longer side of the ink, as a share of the network's image, as in MNIST
CENTRE_SHARE = 14.5 / 28  # where MNIST's makers put the centre of mass: the middle of pixel 14
WORKING_SIZE = 160  # pixels of the longer side in which ink is looked for
SMALLEST_WORKING_SIZE = 64  # smaller images are enlarged to this, so that filters have something to work on
DETAILED_INK_SIZE = 110  # pixels: ink that is smaller than this in the working copy is looked at again, closer
CLOSE_UP_MARGIN = 0.25  # of the ink's size, on each side, when it is looked at closer
PAPER_WINDOW = 0.4  # of the shorter side: wider than any stroke, narrower than most shadows
PAPER_WINDOW_STROKES = 3.0  # widths of the stroke, once that is known: narrower shadows are seen through then
POLARITY_SIZE = 32  # pixels of the longer side, about, in which polarity is looked for
POLARITY_WINDOW = 0.6  # of the shorter side: most of what it sees is paper, around bold strokes too
SMALL_RANGE = 0.25  # of the grey scale: less of it is stretched where the paper is flat
FLAT_SHARE = 0.4  # of all pixels, that are paper of one exact level
WEAK_INK, STRONG_INK = 0.3, 0.45  # of the strongest contrast: ink is weak pixels that touch a strong one
MIN_CONTRAST = 0.04  # of the grey scale: less is no ink
CLEAR_CONTRAST = 0.2  # more than this is ink, whatever the noise seems to be
MIN_CONTRAST_TO_NOISE = 5.0  # in standard deviations of the paper
SPECK_SHARE = 0.15  # a piece smaller than this share of the largest is dirt, unless it is near
NEAR_SPECK_SHARE = 0.03  # the same within NEAR_GAP of the largest piece's box: the dash of a 5, a broken stroke
NEAR_GAP = 0.12  # of the largest piece's size
LINK_SHARE = 0.02  # of the longer side: pieces that are as near to each other as twice this are one
BORDER_PIECE_FACTOR = 6  # a piece that touches the border is the digit only if it is this much larger than all others
FINEST_STROKE, BOLDEST_STROKE = 2.5, 4.0  # pixels of the network's image: others are drawn as wide; MNIST's are 2 to 4
RIDGE_SLOPE = 0.6  # of depth into the ink: 0 on a stroke's middle line, 0.7 towards a right-angled corner, 1 elsewhere
DRAWING_MARGIN = 20  # pixels of the working copy: hair lines at its border are drawn beyond it
CLEARANCE = 1.5  # pixels of the network's image around the ink that still count as its soft edge
FULL_INK_PERCENTILE = 70  # of the ink's intensities becomes 1, as most of MNIST's ink is


def prepare_digit(grey: Array, height: int, width: int, source: str = "pixels") -> PreparedImage:
    """Find the digit in an image and make it what the network knows.

    Args:
        grey: float32 (H, W), brightness in [0, 1], of either polarity.
        height, width: of the network's input.
    Returns:
        the preparation, which holds the prepared image.
    Raises:
        BlankImage: there is no ink.
    """
    if has_framing(grey):
        return leave_unchanged(grey, source)
    if has_framing(np.float32(1) - grey):
        nothing = leave_unchanged(np.float32(1) - grey, source)
        return replace(nothing, slope=-1.0, offset=np.ones_like(grey), steps=("inverted",))
    if not (grey != grey.flat[0]).any():
        raise BlankImage("expected a digit that differs from its paper, got an image of one single grey level")
    levels = _range_of_flat_paper(grey)
    if levels is not None:
        return _stretch(grey, *levels, height, width, source)
    view = _View.of(grey)
    ink = _find_ink(view)
    if max(ink.size) < DETAILED_INK_SIZE and view.shrinks:
        close_up = _View.of(grey, view.region_around(ink.box))
        with contextlib.suppress(BlankImage):  # what looked like ink from afar may dissolve; then it stays as it was seen
            view, ink = close_up, _find_ink(close_up)
    return _place(view, ink, height, width, source)


def _range_of_flat_paper(grey: Array) -> tuple[float, float] | None:
    """The lowest and highest level of an image that uses a small part of the scale, most of it paper of one exact level.

    So are grids of the integers 0 and 1, masks, and intensities that were divided by 255 twice. Noise has no such paper.
    """
    lowest, highest = float(grey.min()), float(grey.max())
    if highest - lowest >= SMALL_RANGE:
        return None
    share = max(np.count_nonzero(grey == level) for level in (lowest, highest)) / grey.size
    return (lowest, highest) if share > FLAT_SHARE else None


def _stretch(grey: Array, lowest: float, highest: float, height: int, width: int, source: str) -> PreparedImage:
    """Prepare an image by the part of the scale that it uses."""
    gain = 1 / (highest - lowest)
    stretched = ((grey - np.float32(lowest)) * np.float32(gain)).astype(np.float32)
    image = prepare_digit(stretched, height, width, source)
    shift = (
        image.slope * gain * lowest * (image.rows.sum(axis=1)[:, None] * image.columns.sum(axis=1))
    )  # of what was the lowest level
    offset = np.asarray(image.offset - shift, dtype=np.float32)
    step = f"stretched its levels, {lowest:.4f} to {highest:.4f}, to the whole scale"
    return replace(image, slope=image.slope * gain, offset=offset, steps=(step, *image.steps))


@dataclass(frozen=True, slots=True)
class _View:
    """A small copy of a part of the image: working = rows @ grey @ columns.T.

    Attributes:
        rows, columns: (h', H) and (w', W).
        working: (h', w').
        region: left, top, right, bottom of the part, in pixels of the image.
    """

    rows: Array
    columns: Array
    working: Array
    region: tuple[float, float, float, float]

    @classmethod
    def of(cls, grey: Array, region: tuple[float, float, float, float] | None = None) -> "_View":
        left, top, right, bottom = region or (0.0, 0.0, float(grey.shape[1]), float(grey.shape[0]))
        longer = max(right - left, bottom - top)
        scale = min(max(longer, SMALLEST_WORKING_SIZE), WORKING_SIZE) / longer
        rows = resample(grey.shape[0], top, bottom, max(2, round((bottom - top) * scale)))
        columns = resample(grey.shape[1], left, right, max(2, round((right - left) * scale)))
        working = np.asarray(sparse.csr_array(rows) @ grey @ columns.T, dtype=np.float32)  # nearly all of `rows` is zero
        return cls(rows, columns, working, (left, top, right, bottom))

    @property
    def shrinks(self) -> bool:
        """Whether the image has more detail than the working copy."""
        return bool(self.working.shape[0] < self.region[3] - self.region[1])

    @property
    def unit(self) -> tuple[float, float]:
        """Pixels of the image in one pixel of the working copy, along y and x."""
        left, top, right, bottom = self.region
        return (bottom - top) / self.working.shape[0], (right - left) / self.working.shape[1]

    def region_around(self, box: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
        """A square-ish region of the image around a box of the working copy."""
        left, top, right, bottom = self.to_image(box)
        margin = CLOSE_UP_MARGIN * max(right - left, bottom - top)
        limits = self.region
        return (
            max(left - margin, limits[0]),
            max(top - margin, limits[1]),
            min(right + margin, limits[2]),
            min(bottom + margin, limits[3]),
        )

    def to_image(self, box: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
        """A box of the working copy in pixels of the image."""
        unit_y, unit_x = self.unit
        left, top = self.region[:2]
        return left + box[0] * unit_x, top + box[1] * unit_y, left + box[2] * unit_x, top + box[3] * unit_y


@dataclass(frozen=True, slots=True)
class _Ink:
    """Where the ink is in a working copy.

    Attributes:
        sign: 1 where ink is brighter than paper, -1 where it is darker.
        contrast: (h', w'), how much more ink-like than the paper around it; about zero on paper.
        mask: (h', w') bool, the digit's pixels.
        others: (h', w') bool, pixels of pieces that were left out.
        threshold: contrast from which a pixel is ink.
        box: left, top, right, bottom of the mask.
    """

    sign: int
    contrast: Array
    mask: NDArray[np.bool_]
    others: NDArray[np.bool_]
    threshold: float
    box: tuple[int, int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the box."""
        return self.box[3] - self.box[1], self.box[2] - self.box[0]

    @property
    def thickness(self) -> float:
        """The stroke's width, in pixels of the working copy."""
        depth = ndimage.distance_transform_edt(np.pad(self.mask, 1))[1:-1, 1:-1]
        return 4 * (float(depth[self.mask].mean()) - 0.5)  # across a stroke of width w the depth's mean is w / 4 + 1/2


def _find_ink(view: _View) -> _Ink:
    working = view.working
    smooth = ndimage.gaussian_filter(working, 0.8 * max(working.shape) / WORKING_SIZE, mode="nearest")
    sign = _polarity(smooth)
    window = PAPER_WINDOW * min(working.shape)
    ink = _find_ink_with(working, smooth, sign, window)
    narrower = PAPER_WINDOW_STROKES * ink.thickness
    return _find_ink_with(working, smooth, sign, narrower) if narrower < window else ink


def _find_ink_with(working: Array, smooth: Array, sign: int, window: float) -> _Ink:
    """Find the ink where the paper's brightness is looked for in windows of this many pixels."""
    paper = _paper(sign * smooth, window)
    difference = sign * smooth - paper
    difference -= np.median(difference)
    noise = float(np.quantile(np.abs(difference), 0.3)) / 0.385  # standard deviation, were it Gaussian; ink may cover two thirds
    strongest = float(np.sort(difference, axis=None)[-max(4, difference.size // 400) :].mean())
    if strongest < min(max(MIN_CONTRAST, MIN_CONTRAST_TO_NOISE * noise), CLEAR_CONTRAST):
        raise BlankImage(f"expected a digit, got an image without ink: its contrast is {max(strongest, 0):.3f} of the grey scale")
    weak = difference > WEAK_INK * strongest
    linked = ndimage.binary_dilation(weak, iterations=max(1, round(LINK_SHARE * max(weak.shape))))
    pieces, count = ndimage.label(linked, structure=np.ones((3, 3)))
    pieces = np.where(weak, pieces, 0)
    has_strong = np.zeros(count + 1, dtype=bool)
    has_strong[pieces[difference > STRONG_INK * strongest]] = True
    has_strong[0] = False
    mask = _digit_pieces(np.where(has_strong[pieces], pieces, 0), count)
    others = (pieces > 0) & ~mask
    ys, xs = np.nonzero(mask)
    box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    contrast = (sign * working - paper - np.median(sign * working - paper)).astype(np.float32)
    return _Ink(sign, contrast, mask, others, WEAK_INK * strongest, box)


def _polarity(smooth: Array) -> int:
    """1 for bright ink on dark paper, -1 for dark on bright. Ink is the rarer of the two, so it gives the longer tail."""
    step = max(smooth.shape) // POLARITY_SIZE or 1
    small = ndimage.uniform_filter(smooth, step)[::step, ::step]
    window = int(POLARITY_WINDOW * min(small.shape)) | 1
    around = sliding_window_view(np.pad(small, window // 2, mode="edge"), (window, window)).reshape(*small.shape, -1)
    # A local median keeps a shadow's edge. In scipy.ndimage it takes twenty times as long.
    paper = np.partition(around, around.shape[-1] // 2, axis=-1)[..., around.shape[-1] // 2]
    return 1 if ((small - paper) ** 3).sum() > 0 else -1


def _paper(smooth: Array, window: float) -> Array:
    """The paper's brightness everywhere, where ink is brighter: what is left without things narrower than the window."""
    size = int(window) | 1
    opened = ndimage.grey_opening(smooth, size=(size, size), mode="nearest")
    paper: Array = ndimage.gaussian_filter(opened, size / 6, mode="nearest")
    return paper


def _digit_pieces(pieces: NDArray[np.int32], count: int) -> NDArray[np.bool_]:
    """Choose the connected pieces of ink that make the digit: the largest, and what is large or near enough to belong to it."""
    areas = np.bincount(pieces.ravel(), minlength=count + 1).astype(float)
    areas[0] = 0
    boxes = ndimage.find_objects(pieces, max_label=count)
    height, width = pieces.shape
    inside = areas.copy()
    for label, box in enumerate(boxes, start=1):
        if box is not None and (box[0].start == 0 or box[1].start == 0 or box[0].stop == height or box[1].stop == width):
            inside[label] /= BORDER_PIECE_FACTOR
    main = int(inside.argmax())
    main_y, main_x = boxes[main - 1]
    gap = NEAR_GAP * max(main_y.stop - main_y.start, main_x.stop - main_x.start)
    chosen = np.zeros(count + 1, dtype=bool)
    for label, box in enumerate(boxes, start=1):
        if box is None:
            continue
        y, x = box
        near = (
            y.start < main_y.stop + gap
            and y.stop > main_y.start - gap
            and x.start < main_x.stop + gap
            and x.stop > main_x.start - gap
        )
        chosen[label] = inside[label] >= (NEAR_SPECK_SHARE if near else SPECK_SHARE) * areas[main]
    return np.asarray(chosen[pieces])


def _place(view: _View, ink: _Ink, height: int, width: int, source: str) -> PreparedImage:
    """Fit the ink into the network's image, as MNIST's makers did."""
    full = float(np.percentile(ink.contrast[ink.mask], FULL_INK_PERCENTILE))
    if full <= 0:
        raise BlankImage("expected a digit, got an image whose ink is no different from its paper")
    strokes, drawn = _draw(ink, full, INK_SHARE * min(height, width))
    ys, xs = np.nonzero(drawn)
    scale = INK_SHARE * min(height, width) / _extent(drawn)  # pixels of the network's image in one of the working copy
    centre_y, centre_x = (float((axis * strokes[ys, xs]).sum() / strokes[ys, xs].sum()) + 0.5 for axis in (ys, xs))
    place_y = _placement(strokes.shape[0], ys.min(), ys.max() + 1, centre_y, scale, height)
    place_x = _placement(strokes.shape[1], xs.min(), xs.max() + 1, centre_x, scale, width)
    placed: Array = np.asarray(place_y @ strokes @ place_x.T, dtype=np.float32)
    gain = 1 / float(placed.max() * full)
    pixels: Array = placed / placed.max()
    place_y, place_x = place_y[:, DRAWING_MARGIN:-DRAWING_MARGIN], place_x[:, DRAWING_MARGIN:-DRAWING_MARGIN]

    rows, columns = place_y @ view.rows, place_x @ view.columns
    slope = ink.sign * gain
    offset = np.asarray(pixels - slope * (place_y @ view.working @ place_x.T), dtype=np.float32)
    left, top, right, bottom = view.to_image(ink.box)
    steps = [f"found ink {'brighter' if ink.sign > 0 else 'darker'} than its paper by more than {ink.threshold:.2f}"]
    if ink.sign < 0:
        steps.append("inverted")
    steps.append(f"scaled its {right - left:.0f}x{bottom - top:.0f} pixels to {INK_SHARE * min(height, width):.0f}")
    steps += ["centred by its mass", f"stretched its contrast by {gain:.2f}"]
    box = (int(np.floor(left)), int(np.floor(top)), int(np.ceil(right)), int(np.ceil(bottom)))
    return PreparedImage(rows, columns, slope, offset, pixels, tuple(steps), box, round(ink.threshold, 4), source)


def _draw(ink: _Ink, full: float, size: float) -> tuple[Array, NDArray[np.bool_]]:
    """Draw the digit with a pen like those of MNIST: hair lines as wide and as dark as its finest, bold strokes peeled.

    Args:
        full: contrast that becomes 1.
        size: of the digit in the network's image, in its pixels.
    Returns:
        float32 (h' + 2 margin, w' + 2 margin), strokes in [0, 1] with their soft edges, DRAWING_MARGIN wider on each side than
        the working copy; and bool of the same shape, without the edges.
    """
    mask, others = np.pad(ink.mask, DRAWING_MARGIN), np.pad(ink.others, DRAWING_MARGIN)
    contrast = np.pad(ink.contrast, DRAWING_MARGIN)
    depth = ndimage.distance_transform_edt(mask)
    slope_y, slope_x = np.gradient(depth)
    middle = mask & ((np.hypot(slope_y, slope_x) < RIDGE_SLOPE) | (depth >= ndimage.maximum_filter(depth, 3)))
    length = _extent(middle)  # a stroke of width w ends w / 2 beyond its middle line
    finest, boldest = (width / 2 * length / (size - width) for width in (FINEST_STROKE, BOLDEST_STROKE))
    hair = ndimage.distance_transform_edt(~middle) < finest
    peel = float(np.median(depth[middle])) - boldest
    edge = -peel if peel > 0 else max(CLEARANCE * _extent(mask) / size, 1)
    kept = (ndimage.distance_transform_edt(~mask) - depth <= edge) & ~others
    strokes = np.where(hair, 1, np.where(kept, np.clip(contrast / full, 0, 1), 0))
    return np.asarray(strokes, dtype=np.float32), hair | (mask & kept)


def _extent(mask: NDArray[np.bool_]) -> int:
    """The longer side of what is set."""
    return max(int(np.ptp(indices)) + 1 for indices in np.nonzero(mask))


def _placement(source: int, start: int, stop: int, centre: float, scale: float, target: int) -> Array:
    """Weights (target, source) that put `centre` into the middle, but keep all from `start` to `stop` inside."""
    middle = CENTRE_SHARE * target
    middle = min(max(middle, (centre - start) * scale), target - (stop - centre) * scale)
    wanted = centre + (np.arange(target) + 0.5 - middle) / scale  # where in the source each target pixel looks
    reach = max(1 / scale, 1.0)
    distances = np.abs(np.arange(source)[None, :] + 0.5 - wanted[:, None])
    return np.asarray(np.clip(1 - distances / reach, 0, None) / reach, dtype=np.float32)
