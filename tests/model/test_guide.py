"""What training erases and keeps, against closed forms: the gradient of a linear network is its weights."""

import pytest
import torch
from torch import nn

from model.guide import (
    ERASED_SHARE,
    KEPT_SHARE,
    MAX_ERASED,
    MAX_KEPT,
    MIN_INK_LOST,
    MIN_PIXELS,
    compute_guidance,
    compute_loss_of_erased,
)

ROWS = 100


@pytest.fixture
def linear() -> nn.Module:
    """Each class has weights of its own over 784 pixels, no two of them equal; dropout would double half of them."""
    layer = nn.Linear(784, 10, bias=False)
    generator = torch.Generator().manual_seed(1)
    layer.weight.data = torch.stack([torch.randperm(784, generator=generator) for _ in range(10)]) / 784 - 0.5
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), layer).train()


def test_highest_weights_of_the_label_are_erased_or_kept(linear: nn.Module) -> None:
    pixels = torch.ones(ROWS, 1, 28, 28)
    labels = torch.arange(ROWS) % 10
    erased, is_gone, kept = compute_guidance(linear, pixels, labels, torch.Generator().manual_seed(0))
    assert (len(erased), len(kept)) == (int(ROWS * ERASED_SHARE), int(ROWS * KEPT_SHARE))
    weights = linear[2].weight.detach()  # type: ignore[index]
    for rows, first, is_kept, highest in ((erased, 0, False, MAX_ERASED), (kept, len(erased), True, MAX_KEPT)):
        counts = set()
        for row, image in enumerate(rows.flatten(1)):
            chosen = (image == 1) == is_kept
            counts.add(int(chosen.sum()))
            scores = weights[labels[first + row]]
            assert scores[chosen].min() > scores[~chosen].max()
        assert len(counts) > 5
        assert min(counts) >= MIN_PIXELS
        assert max(counts) <= highest
    lost = 1 - erased.mean(dim=(1, 2, 3))
    assert torch.equal(is_gone, lost > MIN_INK_LOST)


def test_ink_that_is_gone_is_told_from_dark_paper(linear: nn.Module) -> None:
    """All the ink stands where the weights are highest, so that any row loses all of it, or where they are lowest: none."""
    scores = linear[2].weight.detach()[3]  # type: ignore[index]
    order = scores.argsort(descending=True)
    labels = torch.full((ROWS,), 3)
    for places, expected in ((order[:MIN_PIXELS], True), (order[-MIN_PIXELS:], False)):
        image = torch.zeros(784)
        image[places] = 1
        pixels = image.view(1, 1, 28, 28).repeat(ROWS, 1, 1, 1)
        _, is_gone, _ = compute_guidance(linear, pixels, labels, torch.Generator().manual_seed(0))
        assert is_gone.tolist() == [expected] * len(is_gone)


def test_network_is_left_in_training_mode_and_without_gradients(linear: nn.Module) -> None:
    compute_guidance(linear, torch.rand(ROWS, 1, 28, 28), torch.zeros(ROWS, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert linear.training
    assert all(parameter.grad is None for parameter in linear.parameters())


def test_few_rows_have_none_to_erase(linear: nn.Module) -> None:
    erased, is_gone, kept = compute_guidance(linear, torch.rand(3, 1, 28, 28), torch.tensor([1, 2, 3]), torch.Generator())
    assert (len(erased), len(is_gone), len(kept)) == (0, 0, 0)


def test_seeing_what_is_gone_costs_its_log_probability() -> None:
    logits = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5], [1e-9, 1.0]]))
    losses = compute_loss_of_erased(logits, torch.tensor([0, 1, 1]))
    expected = -torch.log(torch.tensor([0.75, 0.5, 0.001]))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
