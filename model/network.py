"""The network: pixels in, class scores (logits) out.

This file travels in the archive as TorchServe's model file, so it stands alone and defines exactly one class.
"""

from typing import ClassVar

import torch
from torch import nn

MNIST_MEAN = 0.1307  # mean pixel intensity of MNIST's 60,000 training images
MNIST_STD = 0.3081  # their standard deviation


class DigitNetwork(nn.Module):
    """Two convolutions and one linear layer over 28x28 digits, 25,290 parameters.

    Pixels are intensities in [0, 1], ink bright on dark. The normalisation lives inside, as buffers, so that the gradient
    with respect to the input has one meaning: logit per unit of pixel intensity. There is no softmax inside.
    """

    INPUT_SHAPE: ClassVar[tuple[int, int, int]] = (1, 28, 28)  # channels, height, width of one image
    CLASS_COUNT: ClassVar[int] = 10  # class k is the digit k

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MNIST_MEAN))
        self.register_buffer("std", torch.tensor(MNIST_STD))
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, stride=1, padding=2)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, stride=1, padding=2)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.5)
        self.lin = nn.Linear(32 * 8 * 8, self.CLASS_COUNT)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Score every class.

        Args:
            pixels: float (N, 1, 28, 28), intensity in [0, 1].
        Returns:
            float (N, 10), logits (unnormalised class scores).
        """
        x = (pixels - self.mean) / self.std  # (N, 1, 28, 28)
        x = self.pool(self.relu(self.conv1(x)))  # (N, 16, 15, 15)
        x = self.pool(self.relu(self.conv2(x)))  # (N, 32, 8, 8)
        x = self.dropout(x.flatten(1))  # (N, 2048)
        logits: torch.Tensor = self.lin(x)  # (N, 10)
        return logits
