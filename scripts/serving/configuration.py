"""Settings -> the files that TorchServe starts from: config.properties, and a model store with one archive."""

import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import yaml

from handler.runtime.checksums import verify_files
from scripts.packaging.archive_file import read_archive, write_archive
from scripts.paths import FRONTEND_METRICS, GPU_MODEL_CONFIG, MODEL_CONFIG, ROOT
from scripts.serving.settings import LOOPBACK, Settings

# In a server's temporary folder, which only its own user enters:
INFERENCE_SOCKET = "inference.sock"  # where the front connects to; a link, see `waiting_room.py`
TORCHSERVE_SOCKET = "torchserve.sock"  # where it usually leads to


def configure(settings: Settings, folder: Path) -> str:
    """Write the text of config.properties for one server, without the JVM's arguments.

    Args:
        settings: name the file that the text starts from; its addresses are replaced.
        folder: gets links to the files that the text names. TorchServe reads backslashes, dollar signs and letters beyond Latin-1
            in a value as something else, and the folder's own name has none.
    """
    ports = settings.ports
    changes = {
        "inference_address": f"http://{LOOPBACK}:{ports.inference}",
        "management_address": f"http://{LOOPBACK}:{ports.management}",
        "metrics_address": f"http://{LOOPBACK}:{ports.metrics}",
        "grpc_inference_port": str(ports.grpc_inference),
        "grpc_management_port": str(ports.grpc_management),
    }
    if settings.is_fronted:
        changes["inference_address"] = f"unix:{folder / TORCHSERVE_SOCKET}"
    if settings.cluster is not None:
        changes |= settings.cluster.properties(ports.metrics, is_hardened=settings.hardening is not None)
    properties = settings.configuration.read_text()
    metrics_config = find_property(properties, "metrics_config")
    if metrics_config is not None:  # its path starts in the project's root, and TorchServe does not run there
        changes["metrics_config"] = str(link(folder / "metrics.yaml", ROOT / metrics_config))
    if find_property(properties, "system_metrics_cmd") is not None:  # it is cut at spaces, so it names a link
        changes["system_metrics_cmd"] = f"{link(folder / FRONTEND_METRICS.name, FRONTEND_METRICS)} --gpu 0"
    for name, value in changes.items():
        properties = write_property(properties, name, value)
    return properties


def link(here: Path, target: Path) -> Path:
    """Make a file or folder known under another name; returns that name."""
    here.symlink_to(target.resolve())
    return here


def find_property(properties: str, name: str) -> str | None:
    """Find the value of a key in the text of config.properties; None where it has none."""
    found = re.search(rf"(?m)^{re.escape(name)}=(.*)$", properties)
    return found[1].strip() if found else None


def write_property(properties: str, name: str, value: str) -> str:
    """Replace the line of a key in the text of config.properties, or add it."""
    kept = [line for line in properties.splitlines() if not line.startswith(f"{name}=")]
    return "\n".join([*kept, f"{name}={value}", ""])


def stock_model_store(store: Path, settings: Settings, archive: bytes, unpacked: Path) -> int:
    """Write the archive into a model store, with the model-config.yaml of its device and the settings' changes to it.

    Args:
        store: an existing folder.
        settings: name the archive, the device and the changes.
        archive: the archive's bytes.
        unpacked: a folder for its files.
    Returns:
        the number of workers that its configuration asks for.
    Raises:
        ArchiveError: the archive's files are not those that it lists. A worker would not notice: it gets a new list.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        opened.extractall(unpacked)
    verify_files(unpacked)
    entries = read_archive(io.BytesIO(archive))
    config = yaml.safe_load(entries[MODEL_CONFIG.name]) | {"deviceType": "cpu"}
    if is_on_gpu(settings.device):
        framing = config.get("handler", {}).get("framing")  # the network's, whatever it runs on
        config = read_model_config("gpu")
        config["handler"]["framing"] = framing
    config |= settings.model_config
    entries[MODEL_CONFIG.name] = yaml.safe_dump(config).encode()
    write_archive(store / f"{settings.archive.stem}.mar", entries)
    return int(config["minWorkers"])


def is_on_gpu(device: str) -> bool:
    """Decide whether a device, as `Settings` names it, is a GPU on this machine."""
    if device != "auto":
        return device == "gpu"
    # In a process of its own: torch would stay in the launcher's memory for good, with 500 MB.
    code = "import torch; print(torch.cuda.is_available())"
    finished = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    return finished.stdout.strip() == "True"


def read_model_config(device: str) -> dict[str, Any]:
    """Read the committed model-config.yaml of a device, as `Settings` names it."""
    config: dict[str, Any] = yaml.safe_load((GPU_MODEL_CONFIG if is_on_gpu(device) else MODEL_CONFIG).read_text())
    return config
