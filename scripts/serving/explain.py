"""Ask a running server for digits and their saliency maps; draw both.

    python -m scripts.serving.explain model/samples/7-0.png --target 7

A hardened server needs its token (`--key-file`) and https (`--ca-file`). Prints one line for each image, and writes a PNG that
shows each image, as the network saw it, beside its saliency maps.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests

from handler.errors import InvalidOption
from handler.gradients.methods import METHODS
from handler.images.decode import decode_image
from handler.images.digits import prepare_digit
from handler.render.drawing import Layout, Row, Style, draw
from scripts.command_line import HelpFormatter
from scripts.paths import BUILD, MODEL_NAME
from scripts.serving.credentials import CredentialsError, authorization, read_token

TIMEOUT_S = 60
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Access:
    """The token and the certificates that a client of a hardened server needs; in development it needs neither.

    Attributes:
        token: sent as Authorization: Bearer ...
        ca_file: certificates to trust, PEM, instead of the system's.
    """

    token: str | None = field(default=None, repr=False)
    ca_file: Path | None = None


class ExplainError(RuntimeError):
    """The server gave no answer; the message says why, for a person."""


def request_explanation(
    image: Path, access: Access = Access(), /, *, url: str, model: str, target: str, **options: str
) -> dict[str, Any]:
    """Send one image to the explanations route.

    Args:
        image: an image file.
        access: the token and the certificates, where the server asks for them.
        url: address of the inference API, such as http://127.0.0.1:8080.
        model: the served model's name.
        target: as the API takes it: a class, "predicted", classes with commas, or "all".
        options: further options of the API.
    Returns:
        the reply, as the API reference describes it.
    Raises:
        ExplainError: no server answers, it refuses the request, or the image file cannot be read.
    """
    try:
        with image.open("rb") as opened, requests.Session() as session:
            session.trust_env = urlsplit(url).hostname not in THIS_MACHINE  # no proxy of the environment reaches this machine
            form = {"target": target, **options}
            reply = session.post(
                f"{url}/explanations/{model}",
                files={"data": opened},
                data=form,
                headers=authorization(access.token),
                verify=True if access.ca_file is None else str(access.ca_file),
                timeout=TIMEOUT_S,
            )
    except OSError as error:  # requests' errors are OSErrors, and so is a missing file
        missing_server = isinstance(error, requests.ConnectionError) and not isinstance(error, requests.exceptions.SSLError)
        raise ExplainError(f"no server answers at {url}; start one with: make serve" if missing_server else str(error)) from error
    if not reply.ok:
        raise ExplainError(f"{image}: {reply.status_code}: {_error_message(reply)}")
    content: dict[str, Any] = reply.json()
    return content


def _error_message(reply: requests.Response) -> str:
    try:
        error = reply.json()
        return str(error["error"]["message"] if "error" in error else error["message"])  # ours, or TorchServe's own
    except (ValueError, KeyError, TypeError):
        return reply.reason


def draw_explanations(images: Sequence[Path], replies: Sequence[dict[str, Any]], output: Path, *, size: int) -> None:
    """Draw each image as the network saw it, beside its saliency maps and their colour bar, as one row of a PNG.

    Args:
        images: image files.
        replies: one for each image, see `request_explanation`.
        output: the PNG; its folder is made.
        size: longer side of one panel, in pixels.
    Raises:
        InvalidOption: the drawing would be too large.
    """
    rows = []
    for image, reply in zip(images, replies, strict=True):
        explanation = reply["explanation"]
        classes = np.atleast_1d(explanation["target"]).tolist()
        saliency = np.array(explanation["saliency"], dtype=np.float32)
        maps = saliency.reshape(len(classes), *saliency.shape[-2:])  # (T, H, W)
        pixels = prepare_digit(decode_image(image.read_bytes()).grey, *maps.shape[1:]).pixels
        rows.append(Row(pixels, maps, tuple(classes)))
    drawing = draw(rows, Style(size=size, layout=Layout.SIDE_BY_SIDE))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(drawing)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.serving.explain",
        description="Ask a running server which digits these are, and which pixels say so; draw both.",
        epilog="example:\n  %(prog)s model/samples/4-1.png --target 4,9 --output build/four-or-nine.png",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="image files")
    parser.add_argument("--target", default="predicted", help="classes to explain: 'predicted', 'all', or numbers with commas")
    parser.add_argument("--method", default="gradient", choices=list(METHODS), help="attribution method, with its defaults")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="address of the inference API")
    parser.add_argument("--model", default=MODEL_NAME, help="the served model's name")
    parser.add_argument(
        "--key-file", type=Path, metavar="FILE", help="token: TorchServe's key_file.json, or a file with a token alone"
    )
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="certificates to trust over https, PEM")
    parser.add_argument("--size", type=int, default=224, help="longer side of one panel, in pixels")
    parser.add_argument("--output", type=Path, default=BUILD / "explanation.png", help="PNG to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, print, draw. Returns the exit code: 1 where an image got no answer."""
    arguments = build_parser().parse_args(argv)
    url = arguments.url.rstrip("/")
    replies = []
    try:
        access = Access(read_token(arguments.key_file) if arguments.key_file else None, arguments.ca_file)
        for image in arguments.images:
            reply = request_explanation(
                image, access, url=url, model=arguments.model, target=arguments.target, method=arguments.method
            )
            model = reply["model"]
            served = f"{url} ({model['name']} {model['version']}, weights {model['weights_sha256'][:12]})"
            print(f"{image}: digit {reply['digit']}, probability {reply['probability']:.4f}, served by {served}")
            for warning in reply.get("warnings", ()):
                print(f"{image}: warning: {warning['type']}: {warning['message']}")
            replies.append(reply)
        draw_explanations(arguments.images, replies, arguments.output, size=arguments.size)
    except (ExplainError, CredentialsError, InvalidOption) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
