"""Send MNIST's test images to a real server over HTTP, as they are and as photographs, and count the right answers.

    python -m scripts.research.accuracy --data-dir build/data

Starts a server of its own on free ports. The photographs are made by model/photograph.py.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from threading import local

import numpy as np
import requests
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from model.data import load_mnist
from model.photograph import SCENES, ink_of, photograph
from scripts.command_line import HelpFormatter
from scripts.paths import BUILD, DATA_DIR
from scripts.serving.launcher import Ports, ServeError, Settings, TorchServe

CONNECTIONS = 16
ACCEPTED_ACCURACY = 0.993
HUGE_SHARE = 0.1  # of the photographs of the kind "huge", which take seconds to make


def count_right_answers(files: Iterable[bytes], labels: Sequence[int], route: str, *, name: str = "") -> int:
    """Ask for every image over HTTP. A refusal (4xx) counts as a wrong answer.

    Args:
        files: image files.
        labels: the digits that they show, 0-9.
        route: a URL, such as http://127.0.0.1:8080/predictions/digits.
        name: shown beside the progress bar.
    Raises:
        requests.HTTPError: the server failed (5xx).
    """
    sessions = local()

    def is_right(content: bytes, label: int) -> bool:
        if not hasattr(sessions, "session"):
            sessions.session = requests.Session()
        reply = sessions.session.post(route, data=content, headers={"Content-Type": "application/octet-stream"}, timeout=60)
        if 400 <= reply.status_code < 500:
            return False
        reply.raise_for_status()
        return bool(reply.json()["digit"] == label)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        answers = pool.map(is_right, files, labels)
        return sum(tqdm(answers, total=len(labels), desc=name, unit="image", disable=None))


def png_of(levels: NDArray[np.uint8]) -> bytes:
    """Write a grey image (H, W) as a PNG file."""
    content = BytesIO()
    Image.fromarray(levels).save(content, format="PNG")
    return content.getvalue()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.research.accuracy",
        description="Count right answers on MNIST's test images over HTTP.",
        epilog="example:\n  %(prog)s --data-dir ~/data --photographs 100",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="torchvision's root folder; downloads where missing")
    parser.add_argument(
        "--photographs", type=int, default=500, metavar="N", help="of each kind, and a tenth of it of the huge ones; 0 for none"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, ask, count. Returns the exit code: 1 where the accuracy on MNIST is below 99.3 %."""
    arguments = build_parser().parse_args(argv)
    images, labels = (tensor.numpy() for tensor in load_mnist(arguments.data_dir, train=False))
    try:
        with TorchServe(Settings(ports=Ports.free(), log_dir=BUILD / "logs-accuracy")) as server:
            route = f"{server.address}/predictions/{server.model_name}"
            right = count_right_answers((png_of(image[0]) for image in images), labels.tolist(), route, name="MNIST")
            print(f"| MNIST's test images | {right / len(images):.2%} | {len(images):,} |", flush=True)
            for kind in SCENES if arguments.photographs else ():
                count = max(1, round(arguments.photographs * (HUGE_SHARE if kind == "huge" else 1)))
                files = (photograph(ink_of(image[0]), kind, [number]) for number, image in enumerate(images[:count]))
                right_of_kind = count_right_answers(files, labels[:count].tolist(), route, name=kind)
                print(f"| {kind} | {right_of_kind / count:.1%} | {count} |", flush=True)
    except ServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(right < ACCEPTED_ACCURACY * len(images))


if __name__ == "__main__":
    sys.exit(main())
