"""Send MNIST's 10,000 test images through a real server, as PNG files over HTTP, and count the right answers.

    python -m scripts.accuracy --data-dir build/data

Starts a server of its own on free ports.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from threading import local

import requests
import torch
from PIL import Image
from tqdm import tqdm

from model.data import load_mnist
from scripts.serve import Ports, ServeError, Settings, TorchServe

CONNECTIONS = 16
ACCEPTED_ACCURACY = 0.993


def count_right_answers(images: torch.Tensor, labels: torch.Tensor, route: str) -> int:
    """Ask for every image over HTTP.

    Args:
        images: uint8 (N, 1, 28, 28).
        labels: int64 (N,).
        route: such as http://127.0.0.1:8080/predictions/digits.
    Raises:
        requests.HTTPError: a request was refused.
    """
    sessions = local()

    def is_right(image: torch.Tensor, label: torch.Tensor) -> bool:
        if not hasattr(sessions, "session"):
            sessions.session = requests.Session()
        content = BytesIO()
        Image.fromarray(image[0].numpy()).save(content, format="PNG")
        reply = sessions.session.post(route, data=content.getvalue(), headers={"Content-Type": "image/png"}, timeout=60)
        reply.raise_for_status()
        return bool(reply.json()["digit"] == int(label))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return sum(tqdm(pool.map(is_right, images, labels), total=len(images), unit="image", disable=None))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.accuracy",
        description="Count right answers on MNIST's test images over HTTP.",
        epilog="example: %(prog)s --data-dir ~/data",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("build/data"), help="torchvision's root folder; downloads where missing"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, ask, count. Returns the exit code: 1 where the accuracy is below 99.3 %."""
    arguments = build_parser().parse_args(argv)
    images, labels = load_mnist(arguments.data_dir, train=False)
    try:
        with TorchServe(Settings(ports=Ports.free(), log_dir=Path("build/logs-accuracy"))) as server:
            right = count_right_answers(images, labels, f"{server.address}/predictions/{server.model_name}")
    except ServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{right:,} of {len(images):,} right: {right / len(images):.2%}")
    return int(right < ACCEPTED_ACCURACY * len(images))


if __name__ == "__main__":
    sys.exit(main())
