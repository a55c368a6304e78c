"""Stand-ins that several tests share."""

import torch


class CountsRows:
    """A network of two pixels and two scores, their sum and their difference, that counts the rows of each step.

    As `handler.gradients.explain.Differentiable`, for pixels (N, 1, 1, 2).
    """

    def __init__(self) -> None:
        self.paid: list[int] = []

    def score(self, pixels: torch.Tensor, explained_count: int) -> tuple[torch.Tensor, object]:
        self.paid.append(len(pixels))
        return pixels.flatten(1) @ torch.tensor([[1.0, 1.0], [1.0, -1.0]]), pixels.shape

    def pull_back(self, saved: object, cotangents: torch.Tensor) -> torch.Tensor:
        self.paid.append(len(cotangents))
        return (cotangents @ torch.tensor([[1.0, 1.0], [1.0, -1.0]])).reshape(-1, 1, 1, 2)
