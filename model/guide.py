"""Images without, and with nothing but, the pixels that the network's own gradients point at.

Trained on both, a network means what its gradients say: without the evidence that its map of a class names, it does not answer
that class, and that evidence alone is enough. After Ismail et al., "Improving Deep Learning Interpretability by Saliency Guided
Training" (arXiv 2111.14338), which trains on the images with the rest masked.
"""

import torch
from torch import nn
from torch.nn import functional

ERASED_SHARE = 0.15  # share of a batch's rows that are seen a second time without their most salient pixels
KEPT_SHARE = 0.25  # and of other rows, with their most salient pixels alone
MIN_PIXELS = 28  # erased or kept, drawn for each row
MAX_ERASED = 168  # pixels; a digit has some 150 of ink
MAX_KEPT = 252
MIN_INK_LOST = 0.4  # share of the ink; with less of it gone the digit is still there


def compute_guidance(
    network: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take from some rows the pixels with the highest gradients of their label's score, and from others all but these.

    Args:
        network: in training mode, and left in it.
        pixels: float32 (N, 1, H, W), intensity.
        labels: int64 (N,).
        generator: of the numbers of pixels.
    Returns:
        the first rows erased, float32 (E, 1, H, W); for each whether so much of its ink is gone that its label no longer holds,
        bool (E,); and the next rows, of which little is kept, float32 (K, 1, H, W).
    """
    erased_count, kept_count = int(len(pixels) * ERASED_SHARE), int(len(pixels) * KEPT_SHARE)
    count = erased_count + kept_count
    ranks = _rank_pixels(network, pixels[:count], labels[:count]).view(count, *pixels.shape[1:])
    to_erase = _draw_counts(erased_count, MAX_ERASED, generator)
    to_keep = _draw_counts(kept_count, MAX_KEPT, generator)
    erased = pixels[:erased_count] * (ranks[:erased_count] >= to_erase)
    kept = pixels[erased_count:count] * (ranks[erased_count:] < to_keep)
    ink_left = _sum_ink(erased) / _sum_ink(pixels[:erased_count]).clamp(min=1e-6)
    return erased, ink_left < 1 - MIN_INK_LOST, kept


def compute_loss_of_erased(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log(1 - p) of the probability p of each row's label: what it costs to see a class whose evidence is gone.

    Args:
        logits: float32 (N, K).
        labels: int64 (N,).
    Returns:
        float32 (N,), 0 or more; bounded, so that one sure row does not rule the batch.
    """
    probabilities = functional.softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)  # (N,)
    return -torch.log1p(-probabilities.clamp(max=0.999))


def _rank_pixels(network: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each pixel's place by the signed gradient of its row's label, 0 for the highest: int64 (N, H * W)."""
    network.eval()  # as it is served: without dropout
    inputs = pixels.clone().requires_grad_()
    score = network(inputs).gather(1, labels[:, None]).sum()
    (gradients,) = torch.autograd.grad(score, inputs)
    network.train()
    return gradients.flatten(1).argsort(dim=1, descending=True).argsort(dim=1)


def _draw_counts(rows: int, highest: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(MIN_PIXELS, highest + 1, (rows, 1, 1, 1), generator=generator, device=generator.device)


def _sum_ink(pixels: torch.Tensor) -> torch.Tensor:
    """Sum of each row's intensities: (N, 1, H, W) -> (N,). Noise below zero is no ink."""
    return pixels.clamp(min=0).sum(dim=(1, 2, 3))
