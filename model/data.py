"""MNIST on disk -> tensors of pixels and labels.

Reads through `torchvision.datasets.MNIST`, which downloads the four files where they are missing.
"""

from pathlib import Path

import torch
from torchvision.datasets import MNIST

HELD_OUT_SHARE = 1 / 30  # of the training images: 2,000 that training never sees, for calibration


def load_mnist(data_dir: Path, *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one of MNIST's two sets, whole, into memory.

    Args:
        data_dir: torchvision's root folder, holding `MNIST/raw`. Missing files are downloaded into it.
        train: the 60,000 training images, or else the 10,000 test images.
    Returns:
        uint8 (N, 1, 28, 28) grey levels 0-255, ink bright on dark; int64 (N,) labels 0-9.
    Raises:
        RuntimeError: the files are missing and could not be downloaded.
    Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
    """
    files_are_there = (data_dir / "MNIST" / "raw").is_dir()
    try:
        dataset = MNIST(str(data_dir), train=train, download=not files_are_there)
    except RuntimeError as error:
        raise RuntimeError(
            f"MNIST is neither in {data_dir} (as MNIST/raw/*-ubyte) nor could it be downloaded: {error}"
        ) from error
    return dataset.data.unsqueeze(1), dataset.targets


def split_held_out(
    images: torch.Tensor, labels: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Split the training set: the images and labels to train on, and the last ones, which training never sees."""
    count = len(images) - round(HELD_OUT_SHARE * len(images))
    return (images[:count], labels[:count]), (images[count:], labels[count:])
