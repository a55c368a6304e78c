"""Hostile requests: any bytes -> a TorchServe row, and the outcomes that a row may have."""

import base64
import json
import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

from handler.errors import ClientError
from handler.images.file_decoder import ACCEPTED_FORMATS
from handler.preprocess import preprocess
from handler.protocol.request import parse_request
from scripts.paths import SAMPLE_FILES

CLASS_COUNT, HEIGHT, WIDTH = 10, 28, 28
FORM_COUNT = 5  # of a request, as `row_of` makes it

Row = dict[str, object]


def row_of(content: bytes) -> tuple[Row, dict[str, str]]:
    """Make a TorchServe row of any bytes. The first byte chooses how they arrive."""
    form, body = (content[0] % FORM_COUNT, content[1:]) if content else (0, b"")
    if form == 0:
        return {"body": bytearray(body)}, {}
    if form == 1:
        return {"body": bytearray(body)}, {"Content-Type": "application/json", "explain": "True"}
    if form == 2:
        return {"data": bytearray(body), "target": bytearray(body[:8])}, {"explain": "True"}
    if form == 3:
        return {"body": {"data": base64.b64encode(body).decode(), "prepare": "auto"}}, {"Accept": "image/png", "explain": "True"}
    text = body.decode("latin-1")
    return {"body": bytearray(body)}, {"X-Saliency-Target": text[:20], "Accept": text[20:60], "Content-Type": text[60:90]}


def outcome_of(row: object, headers: dict[str, str]) -> str:
    """Take a request as far as the network.

    Returns:
        "pixels", or the type of the client error.
    Raises:
        AssertionError: the pixels or the error are not what the network or a client may get.
        Exception: anything but a client error is a defect.
    """
    try:
        prepared = preprocess(parse_request(row, headers, CLASS_COUNT), HEIGHT, WIDTH)
    except ClientError as refused:
        return _name_of(refused)
    for image in prepared.images:
        assert image.pixels.shape == (HEIGHT, WIDTH)
        assert image.pixels.dtype == np.float32
        assert image.pixels.min() >= 0  # false for NaN as well
        assert image.pixels.max() <= 1
    return "pixels"


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")


def _name_of(refused: ClientError) -> str:
    assert 400 <= refused.status < 500
    assert refused.message.isascii()
    assert refused.message.isprintable()
    assert len(refused.message) < 2000
    return type(refused).__name__


def _seeds() -> list[bytes]:
    """Well-formed requests of every kind, for fuzzers to spoil."""
    with Image.open(SAMPLE_FILES[0]) as image:
        images = []
        for image_format in ACCEPTED_FORMATS:
            for mode in ("L", "RGB"):
                content = BytesIO()
                image.convert(mode).save(content, format=image_format)
                images.append(content.getvalue())
        levels = np.asarray(image)
    for array in (levels, levels[None] / 255.0, levels[None, None].astype(np.int16)):
        content = BytesIO()
        np.save(content, array)
        images.append(content.getvalue())
    encoded = base64.b64encode(SAMPLE_FILES[0].read_bytes()).decode()
    nested = (levels // 64).tolist()
    tensor = {"name": "image", "shape": [1, 28, 28], "datatype": "UINT8", "data": [nested]}
    documents: list[object] = [
        {"data": encoded, "target": [1, "predicted"], "encoding": "base64"},
        {"data": nested, "prepare": "none"},
        {"instances": [{"data": encoded, "target": "all"}, {"data": nested}], "parameters": {"explain": True}},
        {"data": encoded, "method": "smoothgrad", "samples": 25, "noise": 0.15, "seed": 1, "aggregate": "mean"},
        {"data": encoded, "method": "integrated_gradients", "steps": 50, "baseline": "mean", "space": "canonical"},
        {"id": "1", "inputs": [tensor], "outputs": [{"name": "digit"}]},
        {"inputs": [{"name": "image", "shape": [-1], "datatype": "BYTES", "data": [encoded]}]},
    ]
    bodies = images + [json.dumps(document).encode() for document in documents]
    return [struct.pack("B", form) + body for body in bodies for form in range(FORM_COUNT)]


SEEDS = _seeds()
