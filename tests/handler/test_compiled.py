"""The derived pass: the same numbers as autograd's, for any network, and never used where it is not."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from handler.gradients.compiled import CompiledPass, load_compiled_pass, to_channels_last
from handler.gradients.compiler import compile_pass
from handler.gradients.explain import Autograd, freeze
from model.network import DigitNetwork
from tests.tolerance import FLOAT64_SHARE, require_close

Shape = tuple[int, int, int]


def networks() -> dict[str, tuple[nn.Module, Shape]]:
    """Networks of many forms, with the shape of their input."""
    torch.manual_seed(0)
    return {
        "digits": (DigitNetwork(), DigitNetwork.INPUT_SHAPE),
        "linear": (nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (1, 3, 4)),
        "colours, strides, normalisation": (
            nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
            ),
            (3, 17, 20),
        ),
        "wide kernels and no padding": (
            nn.Sequential(nn.Conv2d(2, 4, 5), nn.Tanh(), nn.Conv2d(4, 4, (1, 3), padding=(0, 1), bias=False), nn.ReLU(),
                nn.MaxPool2d(3, stride=2, padding=1), nn.Flatten(), nn.Linear(4 * 36, 3)),
            (2, 15, 15),
        ),
        "more padding than a kernel reaches": (
            nn.Sequential(nn.Conv2d(1, 2, 1, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(2 * 81, 3)), (1, 5, 5)
        ),
        "relu that two layers read": (Branching(), (1, 6, 6)),
        "scaled by a number": (Scaled(torch.tensor(0.3)), (2, 6, 6)),
        "scaled by channel": (Scaled(torch.tensor([0.3, -2.0])[:, None, None]), (2, 6, 6)),
        "dilated, of few channels": (
            nn.Sequential(nn.Conv2d(3, 4, (2, 3), padding=(2, 1), dilation=(1, 2)), nn.ReLU(), nn.MaxPool2d((2, 1)), nn.Flatten(),
                nn.Linear(4 * 5 * 6, 3)),
            (3, 7, 8),
        ),
        "pool that drops and overlaps": (
            nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU(), nn.MaxPool2d(2, 3, padding=1), nn.Conv2d(4, 4, 2), nn.MaxPool2d(2, 1),
                nn.Flatten(), nn.Linear(4, 3, bias=False)),
            (5, 9, 9),
        ),
    }  # fmt: skip


class Scaled(nn.Module):
    """Divides and multiplies the pixels before its convolutions."""

    scale: torch.Tensor

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.conv1, self.conv2 = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.conv1(x / self.scale))
        logits: torch.Tensor = self.conv2(x * self.scale.flatten()[0]).flatten(1)
        return logits


class Branching(nn.Module):
    """A ReLU that is pooled and also read as it is, so that the pool cannot be moved before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.lin = nn.Linear(3 * 9 + 3 * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x))
        logits: torch.Tensor = self.lin(torch.cat([torch.max_pool2d(x, 2).flatten(1), x.flatten(1)], dim=1))
        return logits


def write_pass(network: nn.Module, shape: Shape, folder: Path) -> Path:
    file = folder / "compiled_pass.py"
    file.write_text(compile_pass(network, shape))
    return file


@pytest.mark.parametrize("name", networks())
def test_derived_pass_gives_autograds_numbers(name: str, tmp_path: Path) -> None:
    """In float64, where nothing differs but the order of operations."""
    network, shape = networks()[name]
    network = freeze(network)
    file = write_pass(network, shape, tmp_path)
    compiled_pass, reference = load_compiled_pass(file, network.double(), shape), Autograd(network)
    assert isinstance(compiled_pass, CompiledPass)
    random = torch.Generator().manual_seed(1)
    for row_count, explained_count in ((1, 1), (5, 5), (6, 2)):
        pixels = torch.rand(row_count, *shape, generator=random, dtype=torch.float64)
        (logits, saved), (expected, expected_saved) = (d.score(pixels, explained_count) for d in (compiled_pass, reference))
        require_close(logits, expected, FLOAT64_SHARE)
        cotangents = torch.randn(explained_count, expected.shape[1], generator=random, dtype=torch.float64)
        gradients = compiled_pass.pull_back(saved, cotangents)
        assert gradients.shape == (explained_count, *shape)
        require_close(gradients, reference.pull_back(expected_saved, cotangents), FLOAT64_SHARE, row_axes=3)


def calls_of(source: str) -> tuple[list[str], list[str]]:
    """The operators of the source's forward and backward that do arithmetic, in their order."""
    layout = {"len", "reshape", "permute", "transpose", "expand", "unfold", "as_strided", "t", "view", "clone"}
    parts = source[source.index("def forward") :].split("def backward")
    found = [
        [name for name in re.findall(r"(\w+)(?:\.default)?\(", part.partition(":\n")[2]) if name not in layout] for part in parts
    ]
    return found[0], found[1]


def test_rules_leave_little_of_the_committed_network() -> None:
    forward, backward = calls_of(compile_pass(DigitNetwork(), DigitNetwork.INPUT_SHAPE))
    pooled = ["max_pool2d_with_indices", "relu"]
    assert forward == ["sub", "constant_pad_nd", "baddbmm", *pooled, "convolution", *pooled, "addmm"]
    unpooled = ["threshold_backward", "max_unpool2d"]
    assert backward == ["mm", *unpooled, "convolution", *unpooled, "bmm", "sum"]


@pytest.mark.parametrize(
    ("network", "shape", "present", "absent"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), (3, 5, 5), {"baddbmm", "bmm"}, {"convolution", "convolution_backward"}),
        (nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten()), (3, 5, 5), {"convolution", "convolution_backward"}, {"baddbmm"}),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()), (4, 5, 5), {"convolution"}, {"baddbmm", "bmm"}),
        (nn.Sequential(nn.Conv2d(5, 4, 3), nn.Flatten()), (5, 5, 5), {"convolution"}, {"baddbmm", "convolution_backward"}),
        (nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), (5, 5, 5), {"max_unpool2d"}, {"max_pool2d_with_indices_backward"}),
        (nn.Sequential(nn.MaxPool2d(3, 2), nn.Flatten()), (5, 5, 5), {"max_pool2d_with_indices_backward"}, {"max_unpool2d"}),
        (nn.Sequential(nn.MaxPool2d(2, dilation=2)), (5, 7, 7), {"max_pool2d_with_indices_backward"}, {"max_unpool2d"}),
    ],
    ids=["few channels", "strided", "groups", "many channels", "pool", "pool that overlaps", "dilated pool"],
)  # fmt: skip
def test_rule_applies_where_it_holds(network: nn.Module, shape: Shape, present: set[str], absent: set[str]) -> None:
    forward, backward = calls_of(compile_pass(network, shape))
    assert present <= {*forward, *backward}
    assert not absent.intersection([*forward, *backward])


def test_scale_goes_into_the_kernel_only_where_it_is_one_number() -> None:
    one, many = (Scaled(torch.full(size, 0.3)) for size in ((), (2, 1, 1)))
    assert "div" not in calls_of(compile_pass(one, (2, 6, 6)))[0]
    assert "div" in calls_of(compile_pass(many, (2, 6, 6)))[0]


@pytest.mark.parametrize("name", networks())
def test_derived_pass_takes_any_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other devices than the CPU channels come first."""
    network, shape = networks()[name]
    network = freeze(network).double()
    monkeypatch.setattr("handler.gradients.compiled.to_channels_last", torch.Tensor.contiguous)
    file = tmp_path / "compiled_pass.py"
    file.write_text(compile_pass(networks()[name][0], shape))
    assert isinstance(load_compiled_pass(file, network, shape), CompiledPass)


def test_tied_maxima_give_the_gradient_to_the_first_as_autograd_does(tmp_path: Path) -> None:
    network = freeze(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3)))
    compiled_pass = load_compiled_pass(write_pass(network, (1, 5, 5), tmp_path), network, (1, 5, 5))
    assert isinstance(compiled_pass, CompiledPass)
    pixels, cotangents = torch.ones(2, 1, 5, 5), torch.randn(2, 3)
    gradients, expected = (d.pull_back(d.score(pixels, 2)[1], cotangents) for d in (compiled_pass, Autograd(network)))
    require_close(gradients, expected, row_axes=3)
    assert gradients[:, :, 1::2].count_nonzero() == gradients[:, :, :, 1::2].count_nonzero() == 0


def test_source_is_the_same_every_time() -> None:
    assert compile_pass(DigitNetwork(), (1, 28, 28)) == compile_pass(DigitNetwork(), (1, 28, 28))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return view_9", "return -view_9", "Autograd used instead, off by"),
        ("return view_9", "return view_9 * float('nan')", "Autograd used instead, off by"),
        ("return view_9", "return view_9[:, :, 1:]", "Autograd used instead, ValueError"),
        ("torch.relu(", "torch.no_such_operator(", "Autograd used instead, AttributeError"),
        ("import torch\n", "import no_such_module\n", "Autograd used instead, ModuleNotFoundError"),
        ("(row_count, 2048)", "(1, 2048)", "Autograd used instead, RuntimeError"),
    ],
    ids=["wrong sign", "NaN", "another shape", "unknown operator", "import", "fixed batch size"],
)
def test_pass_that_is_not_autograds_is_not_used(
    network: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture, old: str, new: str, message: str
) -> None:
    file = write_pass(network, DigitNetwork.INPUT_SHAPE, tmp_path)
    source = file.read_text()
    assert old in source
    file.write_text(source.replace(old, new))
    with caplog.at_level(logging.WARNING):
        assert isinstance(load_compiled_pass(file, network, DigitNetwork.INPUT_SHAPE), Autograd)
    assert message in caplog.text


@pytest.mark.parametrize("bias", [0.0, -3.0], ids=["all logits are 0", "all gradients are 0"])
def test_rows_of_zeros_are_compared_too(tmp_path: Path, caplog: pytest.LogCaptureFixture, bias: float) -> None:
    linear = nn.Linear(12, 5)
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, bias)
    network = freeze(nn.Sequential(nn.Flatten(), linear))
    file = write_pass(network, (1, 3, 4), tmp_path)
    assert isinstance(load_compiled_pass(file, network, (1, 3, 4)), CompiledPass)
    source = file.read_text()
    file.write_text(re.sub(r"return (\w+)\n$", r"return \1 + 1e-30\n", source))
    assert file.read_text() != source
    with caplog.at_level(logging.WARNING):
        assert isinstance(load_compiled_pass(file, network, (1, 3, 4)), Autograd)
    assert "Autograd used instead, off by inf of the largest value" in caplog.text


def test_missing_pass_is_not_used(network: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(load_compiled_pass(tmp_path / "none.py", network, DigitNetwork.INPUT_SHAPE), Autograd)
    assert "none.py: Autograd used instead, " in caplog.text


def test_results_can_be_changed(network: nn.Module, tmp_path: Path) -> None:
    """They are ordinary arrays, not bound to inference mode."""
    compiled_pass = load_compiled_pass(write_pass(network, DigitNetwork.INPUT_SHAPE, tmp_path), network, DigitNetwork.INPUT_SHAPE)
    pixels = torch.rand(2, 1, 28, 28)
    _, saved = compiled_pass.score(pixels, 2)
    first = compiled_pass.pull_back(saved, torch.eye(10)[:2]).clone()
    compiled_pass.pull_back(saved, torch.eye(10)[2:4])
    torch.testing.assert_close(compiled_pass.pull_back(saved, torch.eye(10)[:2]), first, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_changes_the_layout_alone(channels: int) -> None:
    tensor = torch.rand(2, channels, 4, 5)
    moved = to_channels_last(tensor)
    assert torch.equal(moved, tensor)
    assert moved.stride() == (20 * channels, 1, 5 * channels, channels)
    assert to_channels_last(tensor[0]) is not None


def test_loading_imports_no_compiler(unpack: Callable[[], Path]) -> None:
    """Neither the pass nor its check against autograd may bring in what only tracing needs: tens of megabytes a worker."""
    program = """
import sys
from pathlib import Path
from handler.runtime.archive import load_network
from handler.gradients.compiled import CompiledPass, load_compiled_pass
from handler.gradients.explain import freeze
network = freeze(load_network(Path("network.py"), Path("weights.safetensors")))
compiled_pass = load_compiled_pass(Path("compiled_pass.py"), network, (1, 28, 28))
assert isinstance(compiled_pass, CompiledPass)
print([name for name in ("sympy", "torch._dynamo", "torchvision") if name in sys.modules])
"""
    model_dir = unpack()
    environment = {**os.environ, "PYTHONPATH": str(model_dir)}
    finished = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=model_dir, env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout == "[]\n"
