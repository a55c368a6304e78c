"""Passes recorded on a GPU: the same numbers, and never used where they are not."""

import logging
import re
from typing import Any

import pytest
import torch
from torch import nn

from handler.gradients.compiler import compile_and_load
from handler.gradients.cuda_graphs import CHECKED_BATCH_SIZES, RECORDED_SIZES, CudaGraphs, record
from handler.gradients.explain import Autograd, Differentiable, compute_exactly, predict_and_explain
from model.network import DigitNetwork
from tests.tolerance import require_close

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LARGEST = RECORDED_SIZES[-1]
SHARE = 5e-6  # of a row's largest value, between libraries' kernels for batches of different sizes; TF32 would miss it


@pytest.fixture
def gpu_network(network: nn.Module) -> nn.Module:
    compute_exactly()
    return network.to("cuda")


def test_every_recording_is_checked() -> None:
    recordings = [next(size for size in RECORDED_SIZES if size >= checked) for checked in CHECKED_BATCH_SIZES]
    assert recordings == list(RECORDED_SIZES)


@needs_gpu
@pytest.mark.parametrize(("row_count", "explained_count"), [(1, 1), (1, 0), (3, 2), (16, 16), (LARGEST, 5), (LARGEST + 1, 9)])
def test_recording_gives_autograds_numbers(gpu_network: nn.Module, row_count: int, explained_count: int) -> None:
    graphs = record(compile_and_load(gpu_network), gpu_network, DigitNetwork.INPUT_SHAPE)
    assert isinstance(graphs, CudaGraphs)
    reference = Autograd(gpu_network)
    random = torch.Generator().manual_seed(row_count)
    for _ in range(2):  # nothing of one batch is left for the next
        pixels = torch.rand(row_count, *DigitNetwork.INPUT_SHAPE, generator=random).cuda()
        (scores, saved), (expected, expected_saved) = (d.score(pixels, explained_count) for d in (graphs, reference))
        require_close(scores.cpu(), expected.cpu(), SHARE)
        for target in (3, 8) if explained_count else ():  # several targets share their forward
            cotangents = torch.eye(10)[[target] * explained_count].cuda()
            gradients = graphs.pull_back(saved, cotangents)
            require_close(gradients.cpu(), reference.pull_back(expected_saved, cotangents).cpu(), SHARE, row_axes=3)


@needs_gpu
def test_results_outlive_the_next_batch(gpu_network: nn.Module) -> None:
    graphs = record(compile_and_load(gpu_network), gpu_network, DigitNetwork.INPUT_SHAPE)
    pixels = torch.rand(2, *DigitNetwork.INPUT_SHAPE).cuda()
    logits, (explanation, _) = predict_and_explain(graphs, pixels, [(None, 4), ()])
    assert explanation is not None
    kept = logits.copy(), explanation.maps.copy()
    predict_and_explain(graphs, torch.zeros_like(pixels), [(1, 2), (3,)])
    assert (logits == kept[0]).all()
    assert (explanation.maps == kept[1]).all()


class Broken:
    """Passes that cannot be recorded as they are."""

    def __init__(self, passes: Differentiable, fault: str) -> None:
        self.passes, self.fault = passes, fault

    def score(self, pixels: torch.Tensor, explained_count: int) -> tuple[torch.Tensor, Any]:
        scores, saved = self.passes.score(pixels, explained_count)
        if self.fault == "talks with the host" and scores.sum().item() > 1e30:
            scores = scores + 1
        if self.fault == "rows depend on each other":
            scores = scores * len(pixels)
        return scores, saved

    def pull_back(self, saved: Any, cotangents: torch.Tensor) -> torch.Tensor:
        return self.passes.pull_back(saved, cotangents)


@needs_gpu
@pytest.mark.parametrize(("fault", "reason"), [("talks with the host", r"\w+Error: "), ("rows depend on each other", "off by")])
def test_recording_that_fails_or_differs_is_not_used(
    gpu_network: nn.Module, caplog: pytest.LogCaptureFixture, fault: str, reason: str
) -> None:
    passes = Broken(compile_and_load(gpu_network), fault)
    with caplog.at_level(logging.WARNING):
        assert record(passes, gpu_network, DigitNetwork.INPUT_SHAPE) is passes
    assert re.search(f"CUDA graphs: Broken used instead, {reason}", caplog.text)
    assert torch.ones(1, device="cuda").sum().item() == 1  # the GPU works as before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_recorded(network: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    passes = compile_and_load(network)
    with caplog.at_level(logging.WARNING):
        assert record(passes, network, DigitNetwork.INPUT_SHAPE) is passes
    assert "CUDA graphs: CompiledPass used instead, " in caplog.text
