"""Build the archive that TorchServe serves.

    python -m scripts.packaging

The same tree gives the same bytes on every run and machine: entries are sorted, uncompressed, and carry no dates. A smoke test
then loads the archive in a fresh process that sees nothing of the repo (`smoke_test.py`). The archive's SHA-256 goes into a file
beside it, and `scripts.serving` compares both before it serves.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging import generate_model_archive

from handler.gradients.compiled import COMPILED_PASS_FILE
from handler.gradients.compiler import compile_pass
from handler.gradients.explain import freeze
from handler.runtime.archive import CLASS_NAMES_FILE, load_network
from handler.runtime.calibration import CALIBRATION_FILE, read_calibration
from scripts.command_line import HelpFormatter
from scripts.packaging.archive_file import checksum_file_of, read_archive, write_archive
from scripts.packaging.check import require_servable
from scripts.packaging.reference import make_reference_answer
from scripts.paths import ARCHIVE, ENTRY_MODULE, MODEL_CONFIG, MODEL_FILE, REFERENCE_FILE, WEIGHTS_FILE

__all__ = [
    "MODEL_VERSION",
    "build_archive",
    "build_parser",
    "checksum_file_of",
    "main",
    "read_archive",
    "smoke_test",
    "write_archive",
]

MANIFEST = "MAR-INF/MANIFEST.json"
MODEL_VERSION = "1.0"


def build_archive(
    output: Path, *, model_file: Path, weights_file: Path, model_config: Path, class_names_file: Path | None = None
) -> str:
    """Build an archive with torch-model-archiver, then write it again without dates.

    Where a calibration.json stands beside the weights (`scripts/research/calibrate.py` writes it), the archive carries it.

    Args:
        output: where the archive goes; its stem is the model's name.
        model_file: Python file that defines the network.
        weights_file: its weights, safetensors.
        model_config: TorchServe's model-config.yaml.
        class_names_file: TorchServe's index_to_name.json; without it the classes are called by their indices.
    Returns:
        SHA-256 of the archive, in hexadecimal.
    Raises:
        ArchiveError: the network cannot be served, or the weights are not its own.
        ValueError: the network has no compiled pass, no image has a reference answer, or the calibration is of other weights.
        OSError: a file cannot be read or written.
    """
    network = freeze(load_network(model_file, weights_file))
    input_shape = require_servable(network)
    weights_sha256 = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    calibration = read_calibration_of(weights_file, weights_sha256)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _private_temp_folder() as folder:
        package_parent = folder / "staged"  # the archiver copies a folder's children into the archive's root
        package = ENTRY_MODULE.parent
        ignored = shutil.ignore_patterns("__pycache__", "*.md", ENTRY_MODULE.name)
        shutil.copytree(package, package_parent / package.name, ignore=ignored)
        (folder / "made").mkdir()
        generate_model_archive(
            ModelArchiverConfig(
                model_name=output.stem,
                version=MODEL_VERSION,
                handler=str(ENTRY_MODULE),
                model_file=str(model_file),
                serialized_file=str(weights_file),
                config_file=str(shutil.copy(model_config, folder / MODEL_CONFIG.name)),
                extra_files=str(package_parent),
                export_path=str(folder / "made"),
            )
        )
        entries = read_archive(folder / "made" / f"{output.stem}.mar")
    manifest = json.loads(entries[MANIFEST])
    del manifest["createdOn"]
    entries[MANIFEST] = json.dumps(manifest, indent=2).encode()
    entries[COMPILED_PASS_FILE] = compile_pass(network, input_shape).encode()
    if calibration is not None:
        entries[CALIBRATION_FILE] = calibration
    if class_names_file is not None:
        entries[CLASS_NAMES_FILE] = class_names_file.read_bytes()
    entries[REFERENCE_FILE] = make_reference_answer(network, weights_sha256)
    return write_archive(output, entries)


def read_calibration_of(weights_file: Path, weights_sha256: str) -> bytes | None:
    """Read the calibration that stands beside some weights; None where there is none.

    Raises:
        ValueError: it is damaged, or was fitted to other weights: it would make wrong probabilities of these.
    """
    file = weights_file.with_name(CALIBRATION_FILE)
    if not file.is_file():
        return None
    read_calibration(file.parent)
    content = file.read_bytes()
    fitted = json.loads(content).get("weights_sha256")
    if fitted != weights_sha256:
        raise ValueError(
            f"expected {file} to be fitted to the weights with SHA-256 {weights_sha256}, got one of {fitted}: fit it again "
            "(python -m scripts.research.calibrate), or move it away"
        )
    return content


def smoke_test(archive: Path) -> dict[str, Any]:
    """Unpack an archive and load it as a TorchServe worker would, in a fresh process that sees nothing of the repo.

    Returns:
        the report of that process: see `smoke_test.py`.
    Raises:
        RuntimeError: the archive does not load, or does not give its reference answer.
    """
    with _private_temp_folder() as folder:
        unpacked = folder / "unpacked"
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(unpacked)
        probe = shutil.copy(Path(__file__).with_name("smoke_test.py"), folder)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        finished = subprocess.run(
            [sys.executable, "-P", probe, unpacked],  # -P: neither the current folder nor the script's is searched for modules
            cwd=folder,
            env={**environment, "PYTHONPATH": str(unpacked), "PYTHONDONTWRITEBYTECODE": "1"},  # as TorchServe sets it
            capture_output=True,
            text=True,
            check=False,
        )
    if finished.returncode != 0:
        raise RuntimeError(f"the smoke test of {archive} failed:\n{finished.stdout}{finished.stderr}")
    report: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return report


@contextlib.contextmanager
def _private_temp_folder() -> Iterator[Path]:
    """Make a temp folder of our own the default one for a while: the archiver deletes `<temp>/<model name>` before it works."""
    previous = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="package-") as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder).resolve()
        finally:
            tempfile.tempdir = previous


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.packaging",
        description="Build an archive, smoke-test it, and write its SHA-256 into a file beside it.",
        epilog="example:\n  %(prog)s --model-config serve_config/model-config-gpu.yaml --output build/gpu/digits.mar",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=ARCHIVE, metavar="FILE", help="archive to write; its stem is the model's name"
    )
    parser.add_argument(
        "--model-file", type=Path, default=MODEL_FILE, metavar="FILE", help="Python file that defines the network"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FILE, metavar="FILE", help="the network's weights, safetensors")
    parser.add_argument("--model-config", type=Path, default=MODEL_CONFIG, metavar="FILE", help="TorchServe's model-config.yaml")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="names of the classes: TorchServe's index_to_name.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Build and smoke-test. Returns the exit code: 1 where there is no archive that gives its reference answer."""
    arguments = build_parser().parse_args(argv)
    try:
        checksum = build_archive(
            arguments.output,
            model_file=arguments.model_file,
            weights_file=arguments.weights,
            model_config=arguments.model_config,
            class_names_file=arguments.class_names,
        )
        report = smoke_test(arguments.output)
    except (RuntimeError, ValueError, OSError) as error:  # an ArchiveError is a RuntimeError
        print(f"error: {error}", file=sys.stderr)
        return 1
    checksum_file_of(arguments.output).write_text(f"{checksum}  {arguments.output.name}\n")
    print(f"{checksum}  {arguments.output}")
    print(f"smoke test passed: {json.dumps(report)}", file=sys.stderr)
    return 0
