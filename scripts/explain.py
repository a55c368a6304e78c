"""Ask a running server for digits and their reasons; write a picture of both.

    python -m scripts.explain tests/digits/7-0.png --target 7

Prints one line a picture, and writes a PNG with each picture as the network saw it beside its saliency maps.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import requests
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from handler.canonical import prepare
from handler.decode import decode_image
from scripts.package import MODEL_NAME

COLOUR_MAP = "RdBu_r"  # diverging, and told apart by colour-blind people too: blue below zero, red above
CELL_INCHES = 2.6
TIMEOUT_S = 60


class ExplainError(RuntimeError):
    """There is no answer; the message says why, for a person."""


def request_explanation(picture: Path, *, url: str, model: str, target: str) -> dict[str, Any]:
    """Send one picture to the explanations route.

    Args:
        picture: an image file.
        url: address of the inference API, such as http://127.0.0.1:8080.
        model: the served model's name.
        target: as the API takes it: a class, "predicted", classes with commas, or "all".
    Returns:
        the reply, as the README's API section describes it.
    Raises:
        ExplainError: no server there, or it refused the request.
    """
    try:
        with picture.open("rb") as opened:
            reply = requests.post(
                f"{url}/explanations/{model}", files={"data": opened}, data={"target": target}, timeout=TIMEOUT_S
            )
    except OSError as error:  # requests' errors are OSErrors, and so is a missing file
        missing_server = isinstance(error, requests.ConnectionError)
        raise ExplainError(f"no server answers at {url}; start one with: make serve" if missing_server else str(error)) from error
    if not reply.ok:
        raise ExplainError(f"{picture}: {reply.status_code}: {_error_message(reply)}")
    content: dict[str, Any] = reply.json()
    return content


def _error_message(reply: requests.Response) -> str:
    try:
        error = reply.json()
        return str(error["error"]["message"] if "error" in error else error["message"])  # ours, or TorchServe's own
    except (ValueError, KeyError, TypeError):
        return reply.reason


def draw_explanations(pictures: Sequence[Path], replies: Sequence[dict[str, Any]], output: Path) -> None:
    """Draw each picture as the network saw it, beside its maps, one row a picture, into a PNG.

    The colours of a map are symmetric around zero, with limits of its own: compare shapes between maps, and numbers by the bar.
    """
    columns = 1 + max(len(_maps(reply)) for reply in replies)
    figure = Figure(figsize=(CELL_INCHES * columns * 1.25, CELL_INCHES * len(pictures)), layout="constrained")
    all_axes = figure.subplots(len(pictures), columns, squeeze=False)
    for axes in all_axes.flat:
        axes.set_axis_off()
    for row, (picture, reply) in enumerate(zip(pictures, replies, strict=True)):
        maps = _maps(reply)
        left = all_axes[row, 0]
        left.imshow(prepare(decode_image(picture.read_bytes()).grey, *maps[0][1].shape).pixels, cmap="gray", vmin=0, vmax=1)
        left.set_title(f"read as {reply['digit']} (p = {reply['probability']:.4f})", fontsize=10)
        for axes, (target, saliency) in zip(all_axes[row, 1:], maps, strict=False):
            limit = float(np.abs(saliency).max()) or 1.0  # a flat map is drawn as zero
            image: AxesImage = axes.imshow(saliency, cmap=COLOUR_MAP, vmin=-limit, vmax=limit)
            axes.set_title(f"score of {target}: red raises, blue lowers", fontsize=10)
            figure.colorbar(image, ax=axes, shrink=0.85).set_label("logit per unit of intensity", fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"savefig.dpi": 110}):
        figure.savefig(output, metadata={"Software": None})  # the same picture gives the same bytes


def _maps(reply: dict[str, Any]) -> list[tuple[int, NDArray[np.float32]]]:
    """Each explained class with its map (H, W)."""
    explanation = reply["explanation"]
    targets = np.atleast_1d(explanation["target"]).tolist()
    saliency = np.array(explanation["saliency"], dtype=np.float32)
    return list(zip(targets, saliency.reshape(len(targets), *saliency.shape[-2:]), strict=True))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.explain",
        description="Ask a running server which digits these are and why; write a picture of both.",
        epilog="example: %(prog)s tests/digits/4-1.png --target 4,9 --output build/four-or-nine.png",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("pictures", metavar="PICTURE", type=Path, nargs="+", help="image files")
    parser.add_argument("--target", default="predicted", help="a class, 'predicted', several with commas, or 'all'")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the inference API")
    parser.add_argument("--model", default=MODEL_NAME, help="the served model's name")
    parser.add_argument("--output", type=Path, default=Path("build/explanation.png"), help="the PNG")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, print, draw. Returns the exit code: 1 where a picture got no answer."""
    arguments = build_parser().parse_args(argv)
    url = arguments.url.rstrip("/")
    replies = []
    try:
        for picture in arguments.pictures:
            reply = request_explanation(picture, url=url, model=arguments.model, target=arguments.target)
            model = reply["model"]
            served = f"{url} ({model['name']} {model['version']}, weights {model['weights_sha256'][:12]})"
            print(f"{picture}: digit {reply['digit']}, probability {reply['probability']:.4f}, served by {served}")
            replies.append(reply)
    except ExplainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    draw_explanations(arguments.pictures, replies, arguments.output)
    print(f"wrote {arguments.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
