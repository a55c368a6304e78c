"""The files of an unpacked archive -> a checked network.

`checksums.py` checks the files themselves. Knows nothing of TorchServe.
"""

import inspect
import json
from pathlib import Path
from typing import cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

from handler.gradients.compiled import import_file
from handler.runtime.checksums import SUMS_FILE, ArchiveError, verify_files

__all__ = [
    "SUMS_FILE",
    "ArchiveError",
    "build_network",
    "input_shape_of",
    "load_network",
    "load_weights",
    "mean_pixel_of",
    "read_class_names",
    "verify_files",
]

CLASS_NAMES_FILE = "index_to_name.json"  # as TorchServe's own handlers call it


def build_network(model_file: Path) -> nn.Module:
    """Build the one network that a Python file defines, on the CPU, with random weights.

    Raises:
        ArchiveError: the file does not define exactly one network that says its INPUT_SHAPE (channels, height, width) and its
            CLASS_COUNT.
    """
    if not model_file.is_file():
        raise ArchiveError(f"the model file {model_file.name} is missing from the archive")
    module = import_file(model_file)
    classes = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, nn.Module) and member.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ArchiveError(f"expected exactly one network in {model_file.name}, got {len(classes)}")
    for attribute in ("INPUT_SHAPE", "CLASS_COUNT"):
        if not hasattr(classes[0], attribute):
            raise ArchiveError(f"the network in {model_file.name} does not say its {attribute}")
    network: nn.Module = classes[0]()
    return network


def load_network(model_file: Path, weights_file: Path) -> nn.Module:
    """Build a network and load its weights.

    Raises:
        ArchiveError: as `build_network` and `load_weights`.
    """
    network = build_network(model_file)
    load_weights(network, weights_file)
    return network


def input_shape_of(network: nn.Module) -> tuple[int, int, int]:
    """The channels, height and width that a network says it takes.

    Raises:
        ArchiveError: it takes more than one channel, such as colour: a digit's grey levels are one.
    """
    shape = cast(tuple[int, int, int], network.INPUT_SHAPE)
    if shape[0] != 1:
        raise ArchiveError(f"expected a network of one input channel, got INPUT_SHAPE {shape}")
    return shape


def read_class_names(model_dir: Path, class_count: int) -> list[str]:
    """Read the names of the classes, as TorchServe's own handlers do; where the archive has none, they are the indices.

    Raises:
        ArchiveError: the file of names is no JSON object.
    """
    file = model_dir / CLASS_NAMES_FILE
    try:
        names = json.loads(file.read_text()) if file.is_file() else {}
        own = [names.get(str(index), str(index)) for index in range(class_count)]
    except (ValueError, AttributeError) as error:
        raise ArchiveError(f"expected a JSON object of class names in {CLASS_NAMES_FILE}, got something else") from error
    return [
        str(name[-1]) if isinstance(name, list) and name else str(name) for name in own
    ]  # ImageNet's has ["n01440764", "tench"]


def mean_pixel_of(network: nn.Module, channels: int) -> NDArray[np.floating] | None:
    """The mean of the pixels that a network was trained on, where it says it.

    It says so by a tensor `mean` of one number, or of one for each channel.

    Returns:
        (1, 1, 1) or (C, 1, 1); None where there is none.
    """
    mean = getattr(network, "mean", None)
    if not isinstance(mean, torch.Tensor) or mean.numel() not in (1, channels):
        return None
    values: NDArray[np.floating] = mean.detach().cpu().numpy().reshape(-1, 1, 1)
    return values


def load_weights(network: nn.Module, weights_file: Path) -> None:
    """Load safetensors weights (which hold no pickle) into a network, after checking that they are its own.

    Raises:
        ArchiveError: they are missing, unreadable, not finite, or have other names, shapes or types than the network's.
    """
    try:
        weights = safetensors.torch.load_file(weights_file)
    except (OSError, safetensors.SafetensorError) as error:
        raise ArchiveError(f"the weights {weights_file.name} are missing or unreadable: {error}") from error
    expected = {name: _describe(tensor) for name, tensor in network.state_dict().items()}
    found = {name: _describe(tensor) for name, tensor in weights.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        details = "; ".join(f"{name}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}" for name in wrong)
        raise ArchiveError(f"the weights {weights_file.name} are not the network's: {details}")
    not_finite = [name for name, tensor in weights.items() if not torch.all(torch.isfinite(tensor))]
    if not_finite:
        raise ArchiveError(f"the weights {weights_file.name} hold NaN or infinity in {', '.join(not_finite)}")
    network.load_state_dict(weights)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")
