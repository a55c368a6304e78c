"""What is counted is what is served; counting itself needs valgrind and minutes, and is PyTorch's own."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from handler.gradients.compiled import COMPILED_PASS_FILE
from handler.gradients.compiler import compile_pass
from handler.gradients.explain import Explanation, predict_and_explain
from scripts.bench.benchmark_step import FORWARD, OURS, make_batch
from scripts.bench.count_instructions import prepare_call, render_table
from tests.tolerance import require_close


def test_calls_score_and_explain(network: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / COMPILED_PASS_FILE
    file.write_text(compile_pass(network, (1, 28, 28)))
    logits, explanations = predict_and_explain(network, make_batch(3), [(None,)] * 3)
    scored = prepare_call(FORWARD, str(file), 3)()
    assert isinstance(scored, torch.Tensor)
    require_close(scored, logits)
    own_logits, own_explanations = cast(tuple[NDArray[np.float32], list[Explanation]], prepare_call(OURS, str(file), 3)())
    require_close(own_logits, logits)
    for own, expected in zip(own_explanations, explanations, strict=True):
        assert expected is not None
        require_close(own.maps, expected.maps, row_axes=2)


def test_counts_are_given_as_multiples_of_the_forward() -> None:
    table = render_table({FORWARD: {1: 2_000_000, 8: 11_000_000}, OURS: {1: 3_000_000, 8: 10_000_000}})
    assert table.splitlines()[2:] == [
        f"| {FORWARD} | 2.00 (1.000) | 11.00 (1.000) |",
        f"| {OURS} | 3.00 (1.500) | 10.00 (0.909) |",
    ]
