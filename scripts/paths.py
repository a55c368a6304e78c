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
CONFIGURATION = SERVE_CONFIG / "config.properties"  # TorchServe's, in development
HARDENED_CONFIGURATION = SERVE_CONFIG / "config-hardened.properties"
LOG_CONFIGURATION = SERVE_CONFIG / "log4j2.xml"
FRONTEND_METRICS = ROOT / "scripts" / "serving" / "frontend_metrics.py"  # TorchServe runs it
JAVA_LOGGING = SERVE_CONFIG / "logging.properties"
MODEL_CONFIG = SERVE_CONFIG / "model-config.yaml"
GPU_MODEL_CONFIG = SERVE_CONFIG / "model-config-gpu.yaml"

BUILD = ROOT / "build"
DATA_DIR = BUILD / "data"  # torchvision's root folder, with MNIST
ARCHIVE = BUILD / f"{MODEL_NAME}.mar"
REFERENCE_FILE = "reference.json"  # in an archive: an image and the reference answer to it
DRAINING_FILE = "draining"  # in the folder of the logs: a server in cluster mode takes its leave
