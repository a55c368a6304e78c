"""Images and their saliency maps -> one PNG.

Knows Pillow and nothing of HTTP, torch or TorchServe, so that a notebook can use it alone:

    png = draw([Row(image, maps, classes=(7, 9))], Style(layout=Layout.SIDE_BY_SIDE))

A map is shrunk by averaging its numbers and enlarged by repeating its pixels, so that every colour is the colour of a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from io import BytesIO
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from handler.errors import InvalidOption
from handler.limits import MAX_PIXELS_DRAWN

OPACITY = 0.9  # of a full colour over the image: below 1, so that the digit shows through
HUE_SHARE = 0.6  # where a map that diverges has the two colours that it lays over an image: its ends are too dark on black
LEVELS = 255  # of a colour map: odd, so that zero is one of them
COMPRESSION = {"compress_level": 1, "compress_type": 3}  # zlib's Z_RLE: made for repeated pixels, and noise takes half the time


class Colormap(StrEnum):
    """Colour maps that colour-blind people can read too. In those that diverge zero is in the middle."""

    RDBU_R = "RdBu_r"
    PUOR = "PuOr"
    VIRIDIS = "viridis"
    PLASMA = "plasma"
    CIVIDIS = "cividis"


class Polarity(StrEnum):
    """Which numbers of a map are drawn; the others count as zero."""

    SIGNED = "signed"
    ABSOLUTE = "absolute"
    POSITIVE = "positive"
    NEGATIVE = "negative"


class Layout(StrEnum):
    """What is drawn for each map."""

    OVERLAY = "overlay"
    MAP = "map"
    SIDE_BY_SIDE = "side_by_side"


class Background(StrEnum):
    """Which image is under the maps: what the network got, or the image as it was sent."""

    CANONICAL = "canonical"
    SENT = "sent"


DIVERGING = (Colormap.RDBU_R, Colormap.PUOR)

# Colours at even distances, from the lowest number to the highest, with straight lines between them. RdBu and PuOr: ColorBrewer
# by Cynthia Brewer, Penn State, Apache licence 2.0. viridis, plasma and cividis: every 17th of matplotlib's 256 colours, CC0;
# cividis is of Nunez, Anderton and Renslow (2018).
ANCHORS = {
    Colormap.RDBU_R: "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f",
    Colormap.PUOR: "7f3b08 b35806 e08214 fdb863 fee0b6 f7f7f7 d8daeb b2abd2 8073ac 542788 2d004b",
    Colormap.VIRIDIS: "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e "
    "1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725",
    Colormap.PLASMA: "0d0887 330597 5002a2 6a00a8 8405a7 9c179e b12a90 c33d80 "
    "d35171 e16462 ed7953 f68f44 fca636 fec029 f9dc24 f0f921",
    Colormap.CIVIDIS: "00224e 002e6c 1e3a6f 35456c 47516c 575d6d 666970 757575 "
    "848279 948e77 a59c74 b7a96e c8b866 dbc75a eed649 fee838",
}


@dataclass(frozen=True, slots=True)
class Style:
    """How images are drawn.

    Attributes:
        size: pixels of the longer side of one panel, MIN_SIZE to MAX_SIZE.
        colormap: colours of the numbers.
        polarity: which numbers are drawn. Signed ones need a colour map that diverges.
        clip_percentile: percentile of a row's absolute numbers, without zeros, from which on they have the full colour,
            MIN_PERCENTILE to 100.
        layout: map over image, map alone, or image and maps side by side with a colour bar.
        background: which image is under the maps. On the image as sent they are laid in every layout.
    Raises:
        InvalidOption: signed numbers in a colour map that does not diverge, where zero would look like any other number; or maps
            alone on a background.
    """

    size: int = 448
    colormap: Colormap = Colormap.RDBU_R
    polarity: Polarity = Polarity.SIGNED
    clip_percentile: float = 99.0
    layout: Layout = Layout.OVERLAY
    background: Background = Background.CANONICAL

    def __post_init__(self) -> None:
        if self.polarity is Polarity.SIGNED and self.colormap not in DIVERGING:
            raise InvalidOption(
                f"expected one of {', '.join(DIVERGING)} as 'colormap' with 'polarity' {self.polarity}, got {self.colormap}; or "
                f"choose another 'polarity': {', '.join(list(Polarity)[1:])}"
            )
        if self.background is Background.SENT and self.layout is Layout.MAP:
            raise InvalidOption(
                f"expected 'layout' {Layout.OVERLAY} or {Layout.SIDE_BY_SIDE} with 'background' {self.background}, got "
                f"{self.layout}, which draws maps on no image"
            )

    @property
    def lays_over(self) -> bool:
        """Whether maps are laid over their image."""
        return self.layout is Layout.OVERLAY or self.background is Background.SENT


@dataclass(frozen=True, slots=True)
class Row:
    """One image and its maps.

    Attributes:
        image: float32 (H, W), intensity in [0, 1].
        maps: float32 (T, H', W'), T >= 1, finite, signed; of the image's extent, or the window's, and of any resolution.
        classes: what each map explains, T of them.
        unit: of the maps' numbers, beside the colour bar; empty where it is not known.
        title: stands above the row, such as the method that made its maps; empty for none.
        window: left, top, right, bottom of the maps, in pixels of the image; it may reach beyond. None for all of the image.
    """

    image: NDArray[np.float32]
    maps: NDArray[np.floating]
    classes: tuple[int, ...]
    unit: str = ""
    title: str = ""
    window: tuple[float, float, float, float] | None = None


def draw(rows: Sequence[Row], style: Style) -> bytes:
    """Draw one row of panels for each image, the rows below each other.

    One map of one image, over it or alone, is one bare panel of exactly the size asked for. Otherwise panels are labelled with
    their class. All maps of a row have the same limits, symmetric around zero, so that equal colours are equal numbers.

    Args:
        rows: at least one.
    Returns:
        a PNG, RGB; the same input gives the same bytes.
    Raises:
        InvalidOption: the drawing would have more than MAX_PIXELS_DRAWN pixels.
    """
    labelled = len(rows) > 1 or rows[0].title != "" or len(rows[0].classes) > 1 or style.layout is Layout.SIDE_BY_SIDE
    lettering = _Lettering.for_size(style.size)
    widths, heights = [], []
    for row in rows:
        width, height = _panel_size(row, style)
        panel_count = len(row.classes) + (style.layout is Layout.SIDE_BY_SIDE)
        widths.append(panel_count * max(width, labelled * 3 * lettering.line_height))  # 3: a narrow panel with label and bar
        heights.append(height + (labelled * 2 + (row.title != "")) * lettering.line_height)  # a label, a gap and a title
    pixel_count = max(widths) * sum(heights)
    if pixel_count > MAX_PIXELS_DRAWN:
        raise InvalidOption(
            f"expected a drawing of at most {MAX_PIXELS_DRAWN:,} pixels, got 'size' {style.size}, with which it would have about "
            f"{pixel_count:,}"
        )
    if labelled:
        lines = [_draw_row(row, style, lettering) for row in rows]
        drawing = ImageOps.expand(_join(lines, 2 * lettering.gap, down=True), lettering.gap, "white")
    else:
        ((drawing,), _) = _draw_panels(rows[0], style)
    content = BytesIO()
    drawing.save(content, format="PNG", **COMPRESSION)
    return content.getvalue()


# --- panels


def _draw_panels(row: Row, style: Style) -> tuple[list[Image.Image], float]:
    """Draw a row's panels, the image's own first where it has one.

    Returns:
        the panels, all of one size; and the limit: the absolute number from which on colours are full, 0 where all maps are flat.
    """
    size = _panel_size(row, style)
    grey = np.asarray(_shrink(Image.fromarray(row.image), size))
    levels = np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8)
    image = _enlarge(Image.fromarray(levels), size).convert("RGB")
    extent = _extent(row, size)
    maps = np.stack([np.asarray(_shrink(Image.fromarray(saliency), extent)) for saliency in row.maps])
    limit = _limit(maps, style.clip_percentile)
    panels = [image] if style.layout is Layout.SIDE_BY_SIDE else []
    for saliency in maps:
        shares = _shares(saliency, limit, style.polarity)
        if style.lays_over:
            panels.append(_lay_over(image, _place(shares, row, size), style.colormap))
        else:
            panels.append(_enlarge(_paint(shares, style.colormap), size))
    return panels, limit


def _lay_over(image: Image.Image, shares: NDArray[np.float32], colormap: Colormap) -> Image.Image:
    """Colour an image, more opaquely the larger the share; where it is zero the image stays as it is."""
    hues = np.sign(shares) * np.float32(HUE_SHARE) if colormap in DIVERGING else shares
    opacity = Image.fromarray(np.rint(np.abs(shares) * (255 * OPACITY)).astype(np.uint8))
    return Image.composite(_enlarge(_paint(hues, colormap), image.size), image, _enlarge(opacity, image.size))


def _extent(row: Row, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a row's maps in a panel of this size."""
    if row.window is None:
        return size
    left, top, right, bottom = row.window
    height, width = row.image.shape
    return max(1, round((right - left) * size[0] / width)), max(1, round((bottom - top) * size[1] / height))


def _place(shares: NDArray[np.float32], row: Row, size: tuple[int, int]) -> NDArray[np.float32]:
    """Put a map where its window is in a panel, with zeros around it; a map of the whole image stays as it is."""
    if row.window is None:
        return shares
    left, top, right, bottom = row.window
    height, width = row.image.shape
    y = _sources(size[1], height, top, bottom, shares.shape[0])
    x = _sources(size[0], width, left, right, shares.shape[1])
    return np.pad(shares, 1)[np.ix_(y + 1, x + 1)]


def _sources(panel_side: int, image_side: int, start: float, stop: float, count: int) -> NDArray[np.intp]:
    """Say for each pixel of a panel which of a window's `count` pixels is there: -1 before it, `count` behind it."""
    middles = (np.arange(panel_side) + 0.5) * (image_side / panel_side)  # in pixels of the image
    sources: NDArray[np.intp] = np.clip(np.floor((middles - start) * (count / (stop - start))), -1, count).astype(np.intp)
    return sources


def _panel_size(row: Row, style: Style) -> tuple[int, int]:
    """Width and height of a panel: the longer one is the style's size, and the other in proportion."""
    height, width = row.image.shape
    scale = style.size / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _shrink(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Average what is larger than `size` (width, height) down to it, each axis by itself."""
    smaller = (min(image.width, size[0]), min(image.height, size[1]))
    return image if smaller == image.size else image.resize(smaller, Image.Resampling.BOX)


def _enlarge(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Repeat pixels up to `size` (width, height)."""
    return image.resize(size, Image.Resampling.NEAREST)


def _limit(maps: NDArray[np.float32], percentile: float) -> float:
    """Percentile of the absolute numbers that are not zero, as most are around a digit in a large image; 0 where all are."""
    sizes = np.abs(maps[maps != 0])
    return float(np.percentile(sizes, percentile)) if sizes.size else 0.0


def _shares(saliency: NDArray[np.float32], limit: float, polarity: Polarity) -> NDArray[np.float32]:
    """Numbers as shares of the limit, those of another polarity as 0.

    Returns:
        float32 (H, W) in [-1, 1]; in [0, 1] where the polarity is absolute.
    """
    if limit == 0:
        return np.zeros_like(saliency)
    lowest, highest = (0 if polarity is Polarity.POSITIVE else -limit), (0 if polarity is Polarity.NEGATIVE else limit)
    shares = np.clip(saliency, lowest, highest) / np.float32(limit)  # clipped first: a quotient could overflow
    return np.abs(shares) if polarity is Polarity.ABSOLUTE else shares


def _paint(shares: NDArray[np.float32], colormap: Colormap) -> Image.Image:
    """Give each share its colour: in a map that diverges from -1 to 1, in another by its absolute value."""
    middle = LEVELS // 2
    levels = middle + middle * shares if colormap in DIVERGING else 2 * middle * np.abs(shares)
    return Image.fromarray(_colours(colormap)[np.rint(levels).astype(np.uint8)])


@cache
def _colours(colormap: Colormap) -> NDArray[np.uint8]:
    """Interpolate a colour map: (LEVELS, 3), RGB, lowest number first."""
    anchors = np.array([list(bytes.fromhex(anchor)) for anchor in ANCHORS[colormap].split()])  # (K, 3)
    places = np.linspace(0, LEVELS - 1, len(anchors))
    return np.stack([np.rint(np.interp(np.arange(LEVELS), places, channel)) for channel in anchors.T], axis=1).astype(np.uint8)


# --- what stands around panels


@dataclass(frozen=True, slots=True)
class _Lettering:
    """Measures of what stands around panels, in pixels."""

    font: ImageFont.FreeTypeFont
    line_height: int
    gap: int  # between panels

    @classmethod
    def for_size(cls, size: int) -> "_Lettering":
        """Choose by the size of a panel: readable at the smallest, in proportion to it above."""
        font = _load_font(min(max(size // 20, 12), 48))
        return cls(font, line_height=sum(font.getmetrics()), gap=max(size // 56, 3))


@cache
def _load_font(height: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(height)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as Pillow's wheels have it
    return font


def _draw_row(row: Row, style: Style, lettering: _Lettering) -> Image.Image:
    """Draw one row: its panels under their labels and, side by side, its colour bar where it fits and there is a limit."""
    panels, limit = _draw_panels(row, style)
    names = [("image", "")] if style.layout is Layout.SIDE_BY_SIDE else []
    names += [(f"class {target}", str(target)) for target in row.classes]
    cells = [_label(panel, choices, lettering) for panel, choices in zip(panels, names, strict=True)]
    if style.layout is Layout.SIDE_BY_SIDE and limit > 0 and panels[0].height >= 2 * lettering.font.size:
        cells.append(_label(_draw_bar(panels[0].height, limit, row, style, lettering), ("",), lettering))
    line = _join(cells, lettering.gap)
    return _label(line, (row.title,), lettering) if row.title else line


def _label(panel: Image.Image, choices: Sequence[str], lettering: _Lettering) -> Image.Image:
    """Set a panel under the first label that is no wider than it, or else under the last."""
    text = next((choice for choice in choices if lettering.font.getlength(choice) <= panel.width), choices[-1])
    width = max(panel.width, ceil(lettering.font.getlength(text)))
    cell = Image.new("RGB", (width, lettering.line_height + panel.height), "white")
    ImageDraw.Draw(cell).text((width / 2, 0), text, "black", lettering.font, anchor="ma")
    cell.paste(panel, ((width - panel.width) // 2, lettering.line_height))
    return cell


def _draw_bar(height: int, limit: float, row: Row, style: Style, lettering: _Lettering) -> Image.Image:
    """Draw the colours of all numbers from the highest down, with their limits and, where there is room, their unit.

    Where maps are laid over their image, these are the colours on its paper.
    """
    lowest = 0 if style.polarity in (Polarity.ABSOLUTE, Polarity.POSITIVE) else -1
    highest = 0 if style.polarity is Polarity.NEGATIVE else 1
    shares = np.linspace(highest, lowest, height, dtype=np.float32)[:, None]  # (height, 1)
    bar = _enlarge(_paint(shares, style.colormap), (lettering.line_height, height))
    if style.lays_over:
        paper = round(255 * min(max(float(np.median(row.image)), 0.0), 1.0))
        bar = _lay_over(Image.new("RGB", bar.size, (paper, paper, paper)), shares, style.colormap)
    ticks = [(0, f"{highest * limit:.3g}", "lt"), (height, f"{lowest * limit:.3g}", "lb")]
    if style.polarity is Polarity.SIGNED and height >= 4 * lettering.font.size:
        ticks.append((height // 2, "0", "lm"))
    scale = Image.new("RGB", (ceil(max(lettering.font.getlength(text) for _, text, _ in ticks)), height), "white")
    for y, text, anchor in ticks:
        ImageDraw.Draw(scale).text((0, y), text, "black", lettering.font, anchor=anchor)
    images = [bar, scale]
    if row.unit and ceil(lettering.font.getlength(row.unit)) <= height:
        column = Image.new("RGB", (height, lettering.line_height), "white")
        ImageDraw.Draw(column).text((height / 2, 0), row.unit, "black", lettering.font, anchor="ma")
        images.append(column.transpose(Image.Transpose.ROTATE_90))
    return _join(images, lettering.gap)


def _join(images: Sequence[Image.Image], gap: int, *, down: bool = False) -> Image.Image:
    """Set images beside or below each other on white, `gap` pixels apart, aligned at their upper or left edge."""
    widths, heights = [image.width for image in images], [image.height for image in images]
    gaps = gap * (len(images) - 1)
    size = (max(widths), sum(heights) + gaps) if down else (sum(widths) + gaps, max(heights))
    joined = Image.new("RGB", size, "white")
    place = 0
    for image in images:
        joined.paste(image, (0, place) if down else (place, 0))
        place += (image.height if down else image.width) + gap
    return joined
