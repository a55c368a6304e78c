"""Requests to the digits service by kind, and whether a reply has the form that its kind asks for."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import orjson
from PIL import Image

from scripts.bench.load import Call, build_call
from scripts.paths import MODEL_NAME
from scripts.serving.credentials import authorization

BINARY = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of request: its route, such as "predictions", and its headers."""

    route: str
    headers: Mapping[str, str]


KINDS = {
    "predict": Kind("predictions", {}),
    "explain": Kind("explanations", {}),
    "explain-base64": Kind("explanations", {"X-Saliency-Encoding": "base64"}),
    "explain-npy": Kind("explanations", {"Accept": "application/x-npy"}),
    "explain-png": Kind("explanations", {"Accept": "image/png"}),
}


def build_calls(
    name: str, address: str, images: Sequence[bytes], *, model: str = MODEL_NAME, token: str | None = None
) -> list[Call]:
    """Write one request an image.

    Args:
        name: a key of KINDS, and of the calls.
        images: image files, sent as they are.
        token: for a server that asks for one.
    Raises:
        ValueError: the token or the model's name has a character that HTTP does not allow.
    """
    kind = KINDS[name]
    headers = {**BINARY, **kind.headers, **authorization(token)}
    return [build_call(name, address, f"/{kind.route}/{model}", image, headers) for image in images]


def is_right_form(name: str, body: bytes) -> bool:
    """Whether a reply's body is what this kind of call asks for: JSON with a digit, and a map where one was asked for."""
    try:
        if name == "explain-npy":
            return bool(np.isfinite(np.load(io.BytesIO(body), allow_pickle=False)).all())
        if name == "explain-png":
            with Image.open(io.BytesIO(body), formats=["PNG"]) as image:
                image.load()
            return True
        content = orjson.loads(body)
        if name == "predict":
            return isinstance(content["digit"], int)
        saliency = content["explanation"]["saliency"]
        if name == "explain-base64":
            saliency = np.frombuffer(base64.b64decode(saliency, validate=True), "<f4")
        return isinstance(content["digit"], int) and np.asarray(saliency, np.float32).size == math.prod(
            content["explanation"]["shape"]
        )
    except (ValueError, KeyError, TypeError, EOFError, OSError, SyntaxError):  # numpy: EOFError; Pillow: the last two
        return False
