"""Random distortions of digit images, a whole batch at a time.

Float images in [0, 1] in, float images out (noise may leave the range), every row with its own random draw. What they
imitate: other hands (shift, rotation, scale, shear), other pens (stroke weight, broken strokes) and other cameras (blur, coarse
pixels, contrast, noise).
"""

import math

import torch
from torch.nn import functional

MAX_SHIFT_PIXELS = 1.0
MAX_ROTATION_RADIANS = math.radians(10)
MAX_SCALE_LOG = math.log(1.12)  # each axis between 1/1.12 and 1.12
MAX_SHEAR = 0.15  # tangent of the slant
MAX_STROKE_BLEND = 0.5  # 0 leaves the stroke, 1 is one whole pixel of dilation or erosion on each side
CAMERA_SHARE = 0.05  # share of rows that get each of: blur, coarse pixels, another contrast
MAX_GAMMA_LOG = math.log(1.5)
BROKEN_SHARE = 0.01  # share of rows that lose pixels, as worn strokes do; more would make deleted pixels cost too little
MAX_BROKEN = 0.5  # share of the pixels that such a row loses at most
NOISY_SHARE = 0.1  # share of rows with noise: it smooths the scores, and so the gradients, around an image
MAX_NOISE_STD = 0.2  # in intensity


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Distort every image of a batch by its own random draw.

    Args:
        pixels: float32 (N, 1, H, W), intensity in [0, 1], ink bright on dark.
        generator: where all randomness comes from; on the device of `pixels`.
    Returns:
        float32 (N, 1, H, W), intensity; noise may leave [0, 1].
    """
    return _photograph(_vary_stroke(_warp(pixels, generator), generator), generator)


def _uniform(rows: int, limit: float, generator: torch.Generator) -> torch.Tensor:
    """Draw `rows` numbers from U(-limit, limit)."""
    return (torch.rand(rows, generator=generator, device=generator.device) * 2 - 1) * limit


def _warp(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, rotate, scale and shear: one affine map a row, bilinear, dark outside."""
    rows, _, height, width = pixels.shape
    angle = _uniform(rows, MAX_ROTATION_RADIANS, generator)
    shear = _uniform(rows, MAX_SHEAR, generator)
    scale_x = _uniform(rows, MAX_SCALE_LOG, generator).exp()
    scale_y = _uniform(rows, MAX_SCALE_LOG, generator).exp()
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.empty(rows, 2, 3, device=pixels.device)
    matrix[:, 0, 0] = cos * scale_x
    matrix[:, 0, 1] = (cos * shear - sin) * scale_y
    matrix[:, 1, 0] = sin * scale_x
    matrix[:, 1, 1] = (sin * shear + cos) * scale_y
    matrix[:, 0, 2] = _uniform(rows, 2 * MAX_SHIFT_PIXELS / width, generator)
    matrix[:, 1, 2] = _uniform(rows, 2 * MAX_SHIFT_PIXELS / height, generator)
    grid = functional.affine_grid(matrix, list(pixels.shape), align_corners=False)  # (N, H, W, 2)
    return functional.grid_sample(pixels, grid, align_corners=False)


def _vary_stroke(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Make strokes thicker (blend towards the dilation) or thinner (towards the erosion)."""
    weight = _uniform(len(pixels), MAX_STROKE_BLEND, generator).view(-1, 1, 1, 1)
    dilated = functional.max_pool2d(pixels, 3, stride=1, padding=1)
    eroded = -functional.max_pool2d(-pixels, 3, stride=1, padding=1)
    thinner_weight = -weight.clamp(max=0) * 0.5  # MNIST's strokes are 2-3 pixels wide: a whole erosion would break them
    return pixels + weight.clamp(min=0) * (dilated - pixels) + thinner_weight * (eroded - pixels)


def _photograph(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, coarsen, change the contrast of, break the strokes of and add noise to some of the rows."""
    rows, _, height, width = pixels.shape

    def chosen(share: float = CAMERA_SHARE) -> torch.Tensor:
        return (torch.rand(rows, generator=generator, device=generator.device) < share).view(-1, 1, 1, 1)

    blurred = functional.avg_pool2d(pixels, 3, stride=1, padding=1)
    pixels = torch.where(chosen(), (pixels + blurred) / 2, pixels)
    coarse = functional.interpolate(pixels, size=(height * 4 // 7, width * 4 // 7), mode="area")
    pixels = torch.where(chosen(), functional.interpolate(coarse, size=(height, width), mode="bilinear"), pixels)
    gamma = _uniform(rows, MAX_GAMMA_LOG, generator).exp().view(-1, 1, 1, 1)
    pixels = torch.where(chosen(), pixels.clamp(0, 1) ** gamma, pixels)
    lost = (
        torch.rand(pixels.shape, generator=generator, device=generator.device)
        < torch.rand(rows, 1, 1, 1, generator=generator, device=generator.device) * MAX_BROKEN
    )
    pixels = torch.where(chosen(BROKEN_SHARE) & lost, 0, pixels)
    noise_std = torch.rand(rows, 1, 1, 1, generator=generator, device=generator.device) * MAX_NOISE_STD
    # The noise is not clamped: on paper a clamp's mean is not zero.
    noise = torch.randn(pixels.shape, generator=generator, device=generator.device) * noise_std
    return torch.where(chosen(NOISY_SHARE), pixels + noise, pixels)
