"""The training set is split the same way for training and for calibration."""

import torch

from model.data import split_held_out


def test_last_images_are_held_out() -> None:
    images, labels = torch.arange(60).view(60, 1, 1, 1), torch.arange(60)
    (kept, kept_labels), (held_out, held_out_labels) = split_held_out(images, labels)
    assert kept_labels.tolist() == list(range(58))
    assert held_out_labels.tolist() == [58, 59]
    assert torch.equal(kept.flatten(), kept_labels)
    assert torch.equal(held_out.flatten(), held_out_labels)


def test_mnist_has_2000_held_out() -> None:
    labels = torch.zeros(60_000)
    assert len(split_held_out(labels, labels)[1][0]) == 2000
