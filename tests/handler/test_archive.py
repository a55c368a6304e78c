"""An archive that is not whole is not served."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from handler.runtime.archive import ArchiveError, input_shape_of, load_network, mean_pixel_of, read_class_names, verify_files
from model.network import MNIST_MEAN
from scripts.paths import MODEL_FILE, WEIGHTS_FILE


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(WEIGHTS_FILE)


def load_with(weights: dict[str, torch.Tensor], folder: Path) -> None:
    safetensors.torch.save_file(weights, folder / "changed.safetensors")
    load_network(MODEL_FILE, folder / "changed.safetensors")


def test_committed_weights_are_loaded(weights: dict[str, torch.Tensor]) -> None:
    network = load_network(MODEL_FILE, WEIGHTS_FILE)
    assert network.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        pytest.param("lin.bias", None, r"lin.bias: expected float32 \(10,\), found none", id="missing"),
        pytest.param("lin.scale", torch.zeros(3), r"lin.scale: expected none, found float32 \(3,\)", id="left over"),
        pytest.param("lin.bias", torch.zeros(11), r"lin.bias: expected float32 \(10,\), found float32 \(11,\)", id="shape"),
        pytest.param("lin.bias", torch.zeros(10).half(), r"found float16 \(10,\)", id="type"),
        pytest.param("lin.bias", torch.full((10,), torch.nan), "hold NaN or infinity in lin.bias", id="NaN"),
    ],
)
def test_weights_that_are_not_the_networks_are_refused(
    weights: dict[str, torch.Tensor], tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    del_or_set = {key: value for key, value in weights.items() if key != name}
    with pytest.raises(ArchiveError, match=message):
        load_with(del_or_set if tensor is None else del_or_set | {name: tensor}, tmp_path)


def test_pickled_weights_are_not_read(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ArchiveError, match="missing or unreadable"):
        load_network(MODEL_FILE, tmp_path / "weights.safetensors")


def test_missing_weights_are_not_replaced_by_random_ones(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"the weights none\.safetensors are missing"):
        load_network(MODEL_FILE, tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "the model file other.py is missing"),
        ("", "expected exactly one network in other.py, got 0"),
        ("from torch import nn\nclass A(nn.Module): ...\nclass B(nn.Module): ...", "exactly one network in other.py, got 2"),
        ("from torch import nn\nclass A(nn.Module): ...", "does not say its INPUT_SHAPE"),
    ],
    ids=["missing", "none", "two", "without a shape"],
)
def test_model_file_without_its_one_network_is_refused(tmp_path: Path, source: str | None, message: str) -> None:
    if source is not None:
        (tmp_path / "other.py").write_text(source)
    with pytest.raises(ArchiveError, match=message):
        load_network(tmp_path / "other.py", WEIGHTS_FILE)


def test_whole_archive_is_verified(unpack: Callable[[], Path]) -> None:
    sums = verify_files(unpack())
    assert {
        "weights.safetensors",
        "network.py",
        "saliency_handler.py",
        "model-config.yaml",
        "handler/gradients/explain.py",
    } < sums.keys()


@pytest.mark.parametrize("name", ["weights.safetensors", "network.py", "handler/images/decode.py", "MAR-INF/MANIFEST.json"])
def test_damaged_file_is_found(unpack: Callable[[], Path], name: str) -> None:
    model_dir = unpack()
    content = bytearray((model_dir / name).read_bytes())
    content[-3] ^= 1
    (model_dir / name).write_bytes(content)
    with pytest.raises(ArchiveError, match=f"{name} is damaged: its SHA-256 is"):
        verify_files(model_dir)


@pytest.mark.parametrize("name", ["weights.safetensors", "SHA256SUMS"])
def test_missing_file_is_found(unpack: Callable[[], Path], name: str) -> None:
    model_dir = unpack()
    (model_dir / name).unlink()
    with pytest.raises(ArchiveError, match=name):
        verify_files(model_dir)


@pytest.mark.parametrize(
    ("mean", "shape"),
    [
        (torch.tensor(0.25), (1, 1, 1)),
        (torch.full((3,), 0.25), (3, 1, 1)),
        (torch.full((1, 3, 1, 1), 0.25), (3, 1, 1)),
        (torch.full((2,), 0.25), None),
        (None, None),
    ],
    ids=["one number", "one a channel", "as it is broadcast", "another number of channels", "none"],
)
def test_mean_pixel_is_read_where_a_network_says_it(mean: torch.Tensor | None, shape: tuple[int, ...] | None) -> None:
    network = nn.Flatten()
    if mean is not None:
        network.register_buffer("mean", mean)
    pixel = mean_pixel_of(network, channels=3)
    assert (None if pixel is None else pixel.shape) == shape
    assert pixel is None or (pixel == 0.25).all()


def test_committed_network_says_its_mean_pixel(network: nn.Module) -> None:
    pixel = mean_pixel_of(network, channels=1)
    assert pixel is not None
    assert pixel.item() == pytest.approx(MNIST_MEAN)


def test_network_of_several_channels_is_refused() -> None:
    network = nn.Module()
    network.INPUT_SHAPE = (3, 28, 28)  # type: ignore[assignment]
    with pytest.raises(ArchiveError, match=r"expected a network of one input channel, got INPUT_SHAPE \(3, 28, 28\)"):
        input_shape_of(network)
    network.INPUT_SHAPE = (1, 5, 7)  # type: ignore[assignment]
    assert input_shape_of(network) == (1, 5, 7)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ["0", "1", "2"]),
        ('{"0": "cat", "1": ["n1", "dog"], "2": "owl"}', ["cat", "dog", "owl"]),
        ('{"1": "dog"}', ["0", "dog", "2"]),
    ],
    ids=["no file", "TorchServe's two forms", "some missing"],
)
def test_classes_have_the_archive_s_names_or_their_indices(tmp_path: Path, content: str | None, expected: list[str]) -> None:
    if content is not None:
        (tmp_path / "index_to_name.json").write_text(content)
    assert read_class_names(tmp_path, 3) == expected


@pytest.mark.parametrize("content", ["[1, 2]", "{", ""])
def test_file_of_class_names_that_is_none_stops_the_load(tmp_path: Path, content: str) -> None:
    (tmp_path / "index_to_name.json").write_text(content)
    with pytest.raises(ArchiveError, match="expected a JSON object of class names"):
        read_class_names(tmp_path, 3)
