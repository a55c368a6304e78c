"""The reference answer of an archive, for networks of any scale; and the smoke test, which finds another one."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from handler.gradients.explain import freeze, predict_and_explain
from scripts.packaging.package import read_archive, smoke_test, write_archive
from scripts.packaging.reference import make_reference_answer
from tests.tolerance import FLOAT32_SHARE, require_close


class Small(nn.Module):
    """A network of 6x5 pixels whose logits have some scale."""

    INPUT_SHAPE = (1, 6, 5)

    def __init__(self, activation: nn.Module, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.activation, self.lin = nn.Conv2d(1, 4, 3), activation, nn.Linear(4 * 4 * 3, 3)
        with torch.no_grad():
            self.lin.weight.mul_(scale)
            self.lin.bias.mul_(scale)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lin(self.activation(self.conv(pixels)).flatten(1))
        return logits


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e3])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()], ids=str)
def test_reference_is_as_exact_for_every_scale_of_logits(activation: nn.Module, scale: float) -> None:
    network = freeze(Small(activation, scale))
    answer = json.loads(make_reference_answer(network, "0" * 64))
    pixels = torch.tensor(answer["pixels"])[None, None]
    logits, (explanation,) = predict_and_explain(network, pixels, [(answer["digit"],)])
    assert explanation is not None
    assert answer["digit"] == logits.argmax()
    require_close(answer["logits"], logits[0])
    require_close(answer["saliency"], explanation.maps[0, 0], row_axes=2)
    assert np.abs(answer["logits"]).max() > scale / 100


def test_map_of_zeros_is_a_reference_too() -> None:
    """What a network says that looks at no pixel."""
    network = freeze(Small(nn.ReLU(), 0.0))
    with torch.no_grad():
        network.get_parameter("lin.bias").copy_(torch.tensor([0.0, 2.0, -3.0]))
    answer = json.loads(make_reference_answer(network, "0" * 64))
    assert (answer["digit"], answer["logits"]) == (1, [0, 2, -3])
    assert answer["saliency"] == [[0.0] * 5] * 6


@pytest.mark.parametrize("row", ["logits", "saliency"])
@pytest.mark.parametrize(
    ("share", "passes"), [(FLOAT32_SHARE, True), (1e-5, False), (math.nan, False)], ids=["rounding", "more", "NaN"]
)
def test_smoke_test_finds_an_answer_that_differs_by_more_than_rounding(
    archive: Path, tmp_path: Path, row: str, share: float, passes: bool
) -> None:
    """The smallest number, changed by a share of the largest."""
    entries = read_archive(archive)
    reference: dict[str, Any] = json.loads(entries["reference.json"])
    numbers = np.array(reference[row])
    numbers.flat[np.abs(numbers).argmin()] += share * np.abs(numbers).max()
    write_archive(
        tmp_path / "digits.mar", {**entries, "reference.json": json.dumps(reference | {row: numbers.tolist()}).encode()}
    )
    if passes:
        assert 0 < smoke_test(tmp_path / "digits.mar")["difference"] < 2 * share
    else:
        with pytest.raises(
            RuntimeError, match=r"its answer is not the reference answer: digit \d, off by (1\.\de-05|9\.\de-06|inf|nan) of "
        ):
            smoke_test(tmp_path / "digits.mar")
