"""Names of files and folders that several scripts use. Imports nothing of the project."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL_NAME = "digits"  # as it is served; also the archive's stem

ENTRY_MODULE = ROOT / "handler" / "saliency_handler.py"
MODEL_FILE = ROOT / "model" / "network.py"
WEIGHTS_FILE = ROOT / "model" / "weights.safetensors"
SAMPLE_FILES = sorted((ROOT / "model" / "samples").glob("*.png"))  # 28x28 digits, named DIGIT-VARIANT.png
SAMPLE_IMAGE = ROOT / "model" / "samples" / "7-0.png"
SERVE_CONFIG = ROOT / "serve_config"
MODEL_CONFIG = SERVE_CONFIG / "model-config.yaml"

BUILD = ROOT / "build"
ARCHIVE = BUILD / f"{MODEL_NAME}.mar"
REFERENCE_FILE = "reference.json"  # in an archive: an image and the right answer to it
