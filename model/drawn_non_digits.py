"""Images that are no digits, drawn for testing: letters of fonts and by hand, symbols, shapes, faces, textures, scribbles.

They share nothing with the non-digits that training sees (`model/non_digits.py`). What a digit may look like is left out: no O,
no l, no Z, no Y, no circle. What comes out is an image as people send it, to be preprocessed.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from model.drawn_digits import HABITS, Strokes, draw_habit, draw_ink

Grey = NDArray[np.uint8]  # (SIDE, SIDE)
Random = np.random.Generator

SIDE = 160  # pixels
LETTERS = "AEFHKMNRTVWXaefhkmnpruwx"
GREEK_LETTERS = "ΓΔΞΠΣΨΩαηκμξπχψω"
SYMBOLS = "@#%*+=÷±¥¶♥★☺→←↑↓∑∞√{}[]~<>♣♠♦☎✈☂♞"

HANDWRITTEN: dict[str, Strokes] = {
    "A": [[(0.1, 1), (0.3, 0.5), (0.5, 0)], [(0.5, 0), (0.7, 0.5), (0.9, 1)], [(0.22, 0.64), (0.5, 0.6), (0.8, 0.62)]],
    "E": [[(0.8, 0.04), (0.5, 0.02), (0.2, 0.05)], [(0.2, 0.05), (0.18, 0.5), (0.2, 0.98)],
          [(0.2, 0.98), (0.5, 0.96), (0.84, 0.98)],
          [(0.2, 0.5), (0.45, 0.48), (0.7, 0.5)]],
    "F": [[(0.2, 1), (0.22, 0.5), (0.2, 0.02)], [(0.2, 0.02), (0.5, 0.04), (0.86, 0)], [(0.2, 0.46), (0.45, 0.44), (0.7, 0.46)]],
    "H": [[(0.16, 0), (0.14, 0.5), (0.16, 1)], [(0.84, 0), (0.86, 0.5), (0.82, 1)], [(0.16, 0.5), (0.5, 0.46), (0.84, 0.5)]],
    "K": [[(0.2, 0), (0.18, 0.5), (0.2, 1)], [(0.8, 0.02), (0.5, 0.32), (0.22, 0.56)], [(0.34, 0.48), (0.6, 0.74), (0.86, 1)]],
    "M": [[(0.08, 1), (0.12, 0.5), (0.16, 0)], [(0.16, 0), (0.34, 0.36), (0.5, 0.66)], [(0.5, 0.66), (0.68, 0.34), (0.84, 0)],
          [(0.84, 0), (0.88, 0.5), (0.92, 1)]],
    "N": [[(0.16, 1), (0.18, 0.5), (0.2, 0)], [(0.2, 0), (0.5, 0.52), (0.8, 1)], [(0.8, 1), (0.82, 0.5), (0.84, 0)]],
    "R": [[(0.2, 1), (0.22, 0.5), (0.2, 0.04)], [(0.2, 0.04), (0.6, 0), (0.8, 0.2), (0.6, 0.46), (0.24, 0.5)],
          [(0.42, 0.5), (0.62, 0.74), (0.86, 1)]],
    "T": [[(0.06, 0.04), (0.5, 0.02), (0.94, 0.04)], [(0.5, 0.02), (0.52, 0.5), (0.5, 1)]],
    "W": [[(0.04, 0), (0.14, 0.5), (0.26, 1)], [(0.26, 1), (0.38, 0.66), (0.5, 0.3)], [(0.5, 0.3), (0.62, 0.64), (0.74, 1)],
          [(0.74, 1), (0.86, 0.5), (0.96, 0)]],
    "X": [[(0.14, 0), (0.5, 0.5), (0.88, 1)], [(0.86, 0), (0.5, 0.5), (0.12, 1)]],
    "h": [[(0.2, 0), (0.2, 0.5), (0.18, 1)], [(0.2, 0.62), (0.46, 0.44), (0.7, 0.52), (0.76, 0.8), (0.78, 1)]],
    "k": [[(0.24, 0), (0.22, 0.5), (0.22, 1)], [(0.7, 0.42), (0.44, 0.58), (0.24, 0.7)], [(0.36, 0.64), (0.56, 0.82), (0.76, 1)]],
    "m": [[(0.06, 0.2), (0.08, 0.6), (0.08, 1)], [(0.08, 0.44), (0.26, 0.22), (0.44, 0.34), (0.48, 0.7), (0.48, 1)],
          [(0.48, 0.44), (0.68, 0.22), (0.88, 0.34), (0.92, 0.7), (0.92, 1)]],
    "w": [[(0.02, 0.1), (0.1, 0.7), (0.26, 0.96), (0.44, 0.7), (0.48, 0.3)],
          [(0.48, 0.3), (0.56, 0.8), (0.74, 0.96), (0.9, 0.6), (0.94, 0.1)]],
    "Sigma": [[(0.84, 0.14), (0.82, 0.02)], [(0.82, 0.02), (0.5, 0.03), (0.16, 0.02)], [(0.16, 0.02), (0.36, 0.26), (0.54, 0.48)],
              [(0.54, 0.48), (0.34, 0.74), (0.14, 0.98)], [(0.14, 0.98), (0.5, 0.97), (0.88, 0.98)]],
    "Psi": [[(0.06, 0.04), (0.14, 0.44), (0.48, 0.62), (0.82, 0.44), (0.92, 0.02)], [(0.5, 0), (0.49, 0.5), (0.5, 1)]],
    "Omega": [[(0.06, 0.98), (0.34, 0.96)], [(0.34, 0.96), (0.12, 0.6), (0.24, 0.12), (0.52, 0.02), (0.8, 0.14), (0.88, 0.6),
              (0.66, 0.96)],
              [(0.66, 0.96), (0.96, 0.98)]],
    "pi": [[(0.04, 0.2), (0.3, 0.1), (0.94, 0.12)], [(0.34, 0.12), (0.32, 0.6), (0.2, 1)],
           [(0.68, 0.12), (0.66, 0.6), (0.74, 0.96), (0.9, 0.92)]],
}  # fmt: skip


def _paste(ink: NDArray[np.float64], random: Random) -> Grey:
    """Dark ink of about two thirds of the image's height somewhere near its middle, on bright paper."""
    side = random.uniform(0.55, 0.75) * SIDE
    scale = side / max(ink.shape)
    width, height = max(1, round(ink.shape[1] * scale)), max(1, round(ink.shape[0] * scale))
    drawn = Image.fromarray(np.rint(255 * ink).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(drawn, (int(random.uniform(0.3, 0.7) * (SIDE - width)), int(random.uniform(0.3, 0.7) * (SIDE - height))))
    return np.asarray(255 - np.asarray(canvas))


def _handwritten(fonts: Sequence[Path], random: Random) -> Grey:
    names = list(HANDWRITTEN)
    return _paste(draw_ink(HANDWRITTEN[names[random.integers(len(names))]], random), random)


def _printed(characters: str) -> Callable[[Sequence[Path], Random], Grey]:
    def draw(fonts: Sequence[Path], random: Random) -> Grey:
        text = characters[int(random.integers(len(characters)))]
        font = ImageFont.truetype(str(fonts[int(random.integers(len(fonts)))]), size=100)
        canvas = Image.new("L", (260, 260))
        ImageDraw.Draw(canvas).text((80, 60), text, font=font, fill=255)
        canvas = canvas.rotate(random.uniform(-8, 8), Image.Resampling.BILINEAR)
        box = canvas.getbbox()
        assert box is not None, f"the font has no {text!r}"
        return _paste(np.asarray(canvas.crop(box)) / 255, random)

    return draw


def _regular(corners: int, turn: float, *, inner: float = 1.0) -> NDArray[np.float64]:
    """Corners of a regular polygon, or of a star where every second corner is nearer to the middle."""
    angles = turn + np.arange(corners) * 2 * math.pi / corners
    radii = np.where(np.arange(corners) % 2, inner, 1)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _shape(fonts: Sequence[Path], random: Random) -> Grey:
    """A polygon, star, cross or arrow, filled or in outline; a grid or a board."""
    canvas = Image.new("L", (SIDE, SIDE), 255)
    pen = ImageDraw.Draw(canvas)
    kind = random.integers(6)
    if kind == 5:
        lines, width = int(random.integers(3, 6)), int(random.integers(3, 9))
        places = np.linspace(30, SIDE - 30, lines)
        for place in places:
            pen.line([(place, 30), (place, SIDE - 30)], fill=0, width=width)
            pen.line([(30, place), (SIDE - 30, place)], fill=0, width=width)
        return np.asarray(canvas)
    if kind == 0:
        outline = _regular(int(random.choice([3, 4, 5])), random.uniform(0, 6))
    elif kind == 1:
        outline = _regular(2 * int(random.integers(4, 8)), random.uniform(0, 6), inner=random.uniform(0.35, 0.6))
    elif kind == 2:
        arm = random.uniform(0.15, 0.35)
        quarter = np.array([(arm, -1), (arm, -arm)])
        outline = np.vstack([quarter @ _turn(k * math.pi / 2 + random.normal(0, 0.02)) for k in range(4)])
    else:
        half, neck = random.uniform(0.1, 0.25), random.uniform(-0.1, 0.3)
        outline = np.array([(-1, -half), (neck, -half), (neck, -0.6), (1, 0), (neck, 0.6), (neck, half), (-1, half)])
        outline = outline @ _turn(random.uniform(0, 2 * math.pi))
    points = [(float(x), float(y)) for x, y in outline * SIDE * 0.33 + SIDE / 2]
    if random.random() < 0.5:
        pen.polygon(points, fill=0)
    else:
        pen.line([*points, *points[:2]], fill=0, width=int(random.integers(5, 13)), joint="curve")
    return np.asarray(canvas)


def _turn(angle: float) -> NDArray[np.float64]:
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def _face(fonts: Sequence[Path], random: Random) -> Grey:
    """A head with eyes, nose and mouth, and sometimes ears, hair or a hat."""
    u = random.uniform
    canvas = Image.new("L", (SIDE, SIDE), 255)
    pen = ImageDraw.Draw(canvas)
    line = int(u(4, 10))
    middle, width, height = SIDE / 2, u(38, 52), u(42, 56)

    def oval(x: float, y: float, across: float, down: float, *, filled: bool = False) -> None:
        box = (middle + x - across, middle + y - down, middle + x + across, middle + y + down)
        pen.ellipse(box, outline=0, fill=0 if filled else None, width=line)

    oval(0, 0, width, height)
    for side in (-1, 1):
        oval(side * u(14, 20), -u(8, 18), u(4, 9), u(4, 9), filled=random.random() < 0.6)
        if random.random() < 0.4:
            oval(side * (width + 6), 0, 8, 12)
    if random.random() < 0.6:
        pen.line([(middle, middle - 4), (middle - u(2, 8), middle + u(8, 14)), (middle + 3, middle + 14)], fill=0, width=line)
    smile = u(8, 26)
    pen.arc((middle - 22, middle + 20 - smile, middle + 22, middle + 20 + smile), 20, 160, fill=0, width=line)
    if random.random() < 0.5:
        for x in np.linspace(-0.8, 0.8, int(u(4, 9))) * width:
            top = middle - height * math.sqrt(1 - (x / width) ** 2)
            pen.line([(middle + x, top), (middle + x * 1.2, top - u(8, 18))], fill=0, width=line)
    return np.asarray(canvas)


def _thing(fonts: Sequence[Path], random: Random) -> Grey:
    """A house, tree, car, fish, flower or cup, in outline."""
    u = random.uniform
    canvas = Image.new("L", (SIDE, SIDE), 255)
    pen = ImageDraw.Draw(canvas)
    line = int(u(4, 10))
    kind = random.integers(6)
    if kind == 0:
        roof = u(55, 75)
        pen.rectangle((35, roof, 125, 130), outline=0, width=line)
        pen.line([(25, roof + 4), (80, u(20, 40)), (135, roof + 4)], fill=0, width=line)
        pen.rectangle((u(50, 80), u(88, 100), u(85, 100), 130), outline=0, width=line)
    elif kind == 1:
        pen.rectangle((74 - u(0, 5), 90, 86 + u(0, 5), 140), fill=0)
        for level, half in ((100, u(35, 50)), (75, u(28, 40)), (50, u(18, 28))):
            pen.polygon([(80 - half, level), (80 + half, level), (80, level - u(30, 45))], fill=0)
    elif kind == 2:
        pen.line(
            [(20, 100), (22, 80), (50, 76), (66, u(48, 60)), (108, u(48, 60)), (122, 78), (142, 84), (142, 102), (20, 102)],
            fill=0,
            width=line,
        )
        for x in (u(42, 52), u(108, 118)):
            pen.ellipse((x - 15, 90, x + 15, 120), fill=0)
    elif kind == 3:
        pen.ellipse((25, 80 - u(20, 32), 115, 80 + u(20, 32)), outline=0, width=line)
        pen.line([(112, 80), (142, 80 - u(18, 28)), (142, 80 + u(18, 28)), (112, 80)], fill=0, width=line)
        pen.ellipse((40, 68, 52, 80), fill=0)
    elif kind == 4:
        petals, radius = int(random.integers(5, 9)), u(10, 15)
        for k in range(petals):
            x, y = 80 + 26 * math.cos(2 * math.pi * k / petals), 55 + 26 * math.sin(2 * math.pi * k / petals)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=0, width=line)
        pen.line([(80, 66), (80 + u(-8, 8), 145)], fill=0, width=line)
        pen.line([(80, 125), (80 + u(18, 34), 105)], fill=0, width=line)
    else:
        pen.line([(40, 50), (48, 128), (100, 128), (108, 50), (38, 50)], fill=0, width=line)
        pen.arc((92, 60, 140, 60 + u(36, 52)), -110, 100, fill=0, width=line)
        for x in (58, 88):
            pen.arc((x - 8, 16, x + 8, 40), 60, 260, fill=0, width=line)
    return np.asarray(canvas)


def _texture(fonts: Sequence[Path], random: Random) -> Grey:
    """Clouds of any roughness, wood, weave, halftone or bricks, over the whole image."""
    y, x = np.indices((SIDE, SIDE)) / SIDE
    kind = random.integers(5)
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.rfftfreq(SIDE), indexing="ij"))
    spectrum = np.fft.rfft2(random.normal(0, 1, (SIDE, SIDE))) / np.maximum(frequencies, 1 / SIDE) ** random.uniform(0.5, 2)
    clouds = np.fft.irfft2(spectrum, (SIDE, SIDE))
    clouds = (clouds - clouds.mean()) / clouds.std()
    if kind == 0:
        pattern = clouds
    elif kind == 1:
        pattern = 1.5 * np.sin(
            2 * math.pi * (random.uniform(3, 12) * np.hypot(x - random.uniform(-1, 1), y - 0.5) + 0.2 * clouds)
        )
    elif kind == 2:
        count = random.uniform(4, 16)
        pattern = np.sign(np.sin(2 * math.pi * count * x)) + np.sign(np.sin(2 * math.pi * count * y)) + 0.2 * clouds
    elif kind == 3:
        count = random.uniform(5, 14)
        dots = np.cos(2 * math.pi * count * (x + y)) + np.cos(2 * math.pi * count * (x - y))
        pattern = 2 * np.sign(dots + random.uniform(-0.8, 0.8) + 0.3 * ndimage.gaussian_filter(clouds, 8))
    else:
        rows = int(random.integers(4, 9))
        row = np.floor(y * rows)
        joints = (y * rows % 1 < 0.15) | ((x * rows / 2 + row % 2 / 2) % 1 < 0.08)
        pattern = np.where(joints, 1.5, -1) + 0.3 * clouds
    return np.asarray(np.clip(128 + random.uniform(30, 90) * pattern, 0, 255).astype(np.uint8))


def _scribble(fonts: Sequence[Path], random: Random) -> Grey:
    """A pen that wanders for long, as if to blacken a corner of the paper."""
    steps = int(random.integers(250, 700))
    turns = ndimage.gaussian_filter1d(random.normal(0, 1, steps), random.uniform(3, 8))
    angles = np.cumsum(turns / turns.std() * random.uniform(0.15, 0.4)) + random.uniform(0, 6)
    path = np.cumsum(np.stack([np.cos(angles), np.sin(angles)], axis=1), axis=0)
    path -= path.min(axis=0)
    path = 30 + path * (SIDE - 60) / path.max()
    canvas = Image.new("L", (SIDE, SIDE), 255)
    ImageDraw.Draw(canvas).line([(float(a), float(b)) for a, b in path], fill=0, width=int(random.integers(3, 8)), joint="curve")
    return np.asarray(canvas)


def _two_digits(fonts: Sequence[Path], random: Random) -> Grey:
    """Two digits that touch, as one piece of ink, so that they are looked at together."""
    names = list(HABITS)
    left, right = (draw_habit(names[random.integers(len(names))], [int(random.integers(1 << 30))]) for _ in range(2))
    height = max(len(left), len(right))
    overlap = max(2, round(0.06 * height))
    both = np.zeros((height, left.shape[1] + right.shape[1] - overlap))
    both[: len(left), : left.shape[1]] = left
    both[: len(right), -right.shape[1] :] = np.maximum(both[: len(right), -right.shape[1] :], right)
    return _paste(both, random)


KINDS: dict[str, Callable[[Sequence[Path], Random], Grey]] = {
    "handwritten letters": _handwritten,
    "printed letters": _printed(LETTERS),
    "printed Greek letters": _printed(GREEK_LETTERS),
    "symbols": _printed(SYMBOLS),
    "shapes": _shape,
    "faces": _face,
    "things": _thing,
    "textures": _texture,
    "scribbles": _scribble,
    "two digits": _two_digits,
}


def draw_non_digit(kind: str, seed: Sequence[int], fonts: Sequence[Path]) -> Grey:
    """Draw one image that is no digit.

    Args:
        kind: one of KINDS.
        seed: the same seed and fonts give the same image.
        fonts: TrueType files that have LETTERS, GREEK_LETTERS and SYMBOLS.
    Returns:
        uint8 (160, 160), grey levels.
    """
    return KINDS[kind](fonts, np.random.default_rng([sum(kind.encode()), *seed]))
