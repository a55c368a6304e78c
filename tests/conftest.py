"""Fixtures of all tests: the test digits, the committed network, the archive of this tree."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits
from torch import nn

from handler.gradients.compiler import compile_and_load
from handler.gradients.explain import Autograd, Differentiable
from scripts.network import load_committed_network
from scripts.packaging.package import build_archive
from scripts.paths import MODEL_CONFIG, MODEL_FILE, SAMPLE_FILES, WEIGHTS_FILE
from tests.kinks import dithered_digits

# Tests run beside each other and beside servers: more threads than one would only wait for each other.
torch.set_num_threads(1)
threadpool_limits(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the end-to-end tests' server run its workers on a GPU."""
    parser.addoption(
        "--device", choices=("auto", "cpu", "gpu"), default="cpu", help="of the end-to-end tests' workers; default: cpu"
    )


def label_of(file: Path) -> int:
    """The digit that a test image shows: files are named DIGIT-VARIANT.png."""
    return int(file.stem.partition("-")[0])


@pytest.fixture(scope="session")
def network() -> nn.Module:
    """The committed network, frozen."""
    return load_committed_network()


@pytest.fixture(scope="session", params=["autograd", "compiled pass"])
def differentiable(request: pytest.FixtureRequest, network: nn.Module) -> Differentiable:
    """The committed network with its derivative: by autograd, and by the compiled pass that a worker uses."""
    if request.param == "autograd":
        return Autograd(network)
    return compile_and_load(network)


@pytest.fixture(scope="session")
def digit_pixels() -> NDArray[np.float32]:
    """All test digits: (50, 28, 28), intensity in [0, 1], in the order of SAMPLE_FILES."""
    return np.stack([np.asarray(Image.open(file)) for file in SAMPLE_FILES]).astype(np.float32) / np.float32(255)


@pytest.fixture(scope="session")
def digit_batch(digit_pixels: NDArray[np.float32]) -> torch.Tensor:
    """All test digits as input of the network: (50, 1, 28, 28)."""
    return torch.from_numpy(digit_pixels)[:, None]


@pytest.fixture(scope="session")
def dithered_batch() -> torch.Tensor:
    """The same with a little noise, away from every kink of the network: (50, 1, 28, 28)."""
    return torch.from_numpy(dithered_digits().astype(np.float32) / np.float32(255))[:, None]


def write_mnist(data_dir: Path, name: str, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    """Write one of MNIST's two sets, in its own format: `name` is "train" or "t10k", images are (N, 28, 28)."""
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    sizes = np.array([0x803, *images.shape], dtype=">i4").tobytes()
    (raw / f"{name}-images-idx3-ubyte").write_bytes(sizes + images.tobytes())
    (raw / f"{name}-labels-idx1-ubyte").write_bytes(np.array([0x801, len(labels)], dtype=">i4").tobytes() + labels.tobytes())


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of this tree."""
    output = tmp_path_factory.mktemp("archive") / "digits.mar"
    build_archive(
        output,
        model_file=MODEL_FILE,
        weights_file=WEIGHTS_FILE,
        model_config=MODEL_CONFIG,
    )
    return output


@pytest.fixture
def unpack(archive: Path, tmp_path: Path) -> Callable[[], Path]:
    """Unpack the archive into a fresh folder that the test may spoil."""

    def unpacked() -> Path:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(tmp_path / "unpacked")
        return tmp_path / "unpacked"

    return unpacked


def manifest_of(model_dir: Path) -> dict[str, dict[str, str]]:
    """The manifest of an unpacked archive."""
    manifest: dict[str, dict[str, str]] = json.loads((model_dir / "MAR-INF" / "MANIFEST.json").read_text())
    return manifest
