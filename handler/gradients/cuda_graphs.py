"""A network and its derivative, recorded as CUDA graphs: one call starts all kernels of a pass, which Python starts one by one.

Knows torch and nothing of HTTP, images or TorchServe.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from handler.gradients.compiled import build_checked
from handler.gradients.explain import Differentiable

# Rows of the recorded batches; one in between is filled up to the next. With more rows the kernels take longer than their start.
RECORDED_SIZES = (1, 2, 4, 8, 16, 32, 64)
CHECKED_BATCH_SIZES = (1, *(size + 1 for size in RECORDED_SIZES[:-1]))  # the smallest batch of each recording
WARM_UP_CALLS = 3  # before a recording: libraries set themselves up in the first calls, which no graph may hold

Outputs = TypeVar("Outputs")


def record(passes: Differentiable, network: nn.Module, input_shape: tuple[int, int, int]) -> Differentiable:
    """Record passes on the GPU that they compute on, and hold the recording against them.

    Args:
        network: theirs, on the current GPU.
        input_shape: C, H, W.
    Returns:
        the recording; where that fails or differs, the passes, with a line in the log.
    """
    return build_checked(
        "CUDA graphs",
        lambda: CudaGraphs(passes, input_shape, next(network.parameters()).device),
        passes,
        network,
        input_shape,
        CHECKED_BATCH_SIZES,
    )


class CudaGraphs:
    """As the `Differentiable` that it has recorded; larger batches than the recorded ones are that one's.

    What it returns is overwritten by the next call, so that nothing of it may be kept on the device; and only the last call of
    `score` can be pulled back. Not for several threads.
    """

    def __init__(self, passes: Differentiable, input_shape: tuple[int, int, int], device: torch.device) -> None:
        """Record.

        Args:
            input_shape: C, H, W.
            device: of the passes; a GPU, and the current one.
        """
        self._passes = passes
        recorder = Recorder()
        self._recordings = [
            _Recording(passes, torch.zeros(size, *input_shape, device=device), recorder) for size in RECORDED_SIZES
        ]

    def score(self, pixels: torch.Tensor, explained_count: int) -> tuple[torch.Tensor, Any]:
        """As `Differentiable`."""
        row_count = len(pixels)
        if row_count > RECORDED_SIZES[-1]:
            return self._passes.score(pixels, explained_count)
        recording = next(one for one in self._recordings if len(one.pixels) >= row_count)
        with torch.inference_mode():
            recording.pixels[:row_count].copy_(pixels)
            recording.score.replay()
            return recording.scores[:row_count], recording

    def pull_back(self, saved: Any, cotangents: torch.Tensor) -> torch.Tensor:  # noqa: ANN401  # each keeps its own
        """As `Differentiable`."""
        if not isinstance(saved, _Recording):
            return self._passes.pull_back(saved, cotangents)
        with torch.inference_mode():
            saved.cotangents[: len(cotangents)].copy_(cotangents)
            saved.pull_back.replay()
            return saved.gradients[: len(cotangents)]


class Recorder:
    """Records calls on the current GPU, whose graphs share the memory for what they need in between.

    So what one of them returned is not to be read after another, recorded later, was replayed; unless that reads it itself.
    """

    def __init__(self) -> None:
        """Record nothing yet."""
        self._memory = torch.cuda.graph_pool_handle()
        self._warm_up_stream = torch.cuda.Stream()  # one for all: cuBLAS keeps 32 MiB for each stream that it has worked on

    def record(self, call: Callable[[], Outputs]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        """Record what a call does. Returns the graph, and what each replay of it overwrites."""
        self._warm_up_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._warm_up_stream):
            for _ in range(WARM_UP_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(self._warm_up_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            outputs = call()
        return graph, outputs


class _Recording:
    """Both halves of a pass for one size of batches, and the tensors that they read and write. Rows are independent."""

    def __init__(self, passes: Differentiable, pixels: torch.Tensor, recorder: Recorder) -> None:
        self.pixels = pixels
        self.score, (self.scores, saved) = recorder.record(lambda: passes.score(pixels, len(pixels)))
        self.cotangents = torch.zeros_like(self.scores)
        self.pull_back, self.gradients = recorder.record(lambda: passes.pull_back(saved, self.cotangents))
