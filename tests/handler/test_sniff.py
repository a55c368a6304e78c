"""What an error says of bytes that are no image names their cause."""

import base64
import gzip
import pickle
from io import BytesIO

import numpy as np
import pytest

from handler.errors import UnreadableImage
from handler.images.decode import decode_image
from handler.images.sniff import describe_bytes
from scripts.paths import SAMPLE_IMAGE

PNG = SAMPLE_IMAGE.read_bytes()


def npz() -> bytes:
    content = BytesIO()
    np.savez(content, digit=np.zeros((28, 28)))
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(base64.b64encode(PNG), "base64", id="base64"),
        pytest.param(base64.encodebytes(PNG), "base64", id="base64 in lines"),
        pytest.param(base64.urlsafe_b64encode(PNG), "base64", id="base64 for URLs"),
        pytest.param(b"data:image/png;base64," + base64.b64encode(PNG), "a data URL", id="data URL"),
        pytest.param(b'{"data": [[0]]}', "JSON", id="JSON"),
        pytest.param(b'\xef\xbb\xbf  {"data": [[0]]}', "JSON", id="JSON with a byte order mark"),
        pytest.param(b'--x\r\nContent-Disposition: form-data; name="data"\r\n\r\n' + PNG, "lost its boundary", id="multipart"),
        pytest.param(gzip.compress(PNG), "gzip", id="gzip"),
        pytest.param(b"0,0,255\n0,255,0\n", "numbers as text", id="CSV"),
        pytest.param(b"0.0 1.0\n1e-3 -2", "numbers as text", id="numbers with spaces"),
        pytest.param(bytes(range(256)) * 3 + bytes(16), "bare pixels", id="784 bytes"),
        pytest.param(np.linspace(0, 1, 784, dtype="f4").tobytes(), "bare pixels", id="784 floats"),
        pytest.param(b"\0\0\x08\x03\0\0\0\x01\0\0\0\x1c\0\0\0\x1c" + bytes(784), "an idx file of images", id="idx images"),
        pytest.param(b"\0\0\x08\x01\0\0\0\x01\x07", "an idx file of labels", id="idx labels"),
        pytest.param(npz(), "a zip archive", id="npz"),
        *(pytest.param(pickle.dumps([1], protocol), "a Python pickle", id=f"pickle {protocol}") for protocol in (2, 3, 4, 5)),
        pytest.param(b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC", id="HEIC"),
        pytest.param(b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF", id="AVIF"),
        pytest.param(b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG", id="SVG with a declaration"),
        pytest.param(b"<svg/>", "an SVG", id="SVG"),
        pytest.param(b"%PDF-1.7\n", "a PDF", id="PDF"),
        pytest.param(b"<!DOCTYPE html><html>", "an HTML page", id="HTML"),
        pytest.param(b"P5 28 28 255 " + bytes(784), "a PBM, PGM or PPM", id="PGM"),
        pytest.param(b"hello", "something else", id="text"),
    ],
)
def test_cause_is_named(content: bytes, words: str) -> None:
    assert words in describe_bytes(content)
    with pytest.raises(
        UnreadableImage, match=rf"^expected an image file \(.*\), got {len(content):,} bytes of .*{words}"
    ) as caught:
        decode_image(content)
    assert caught.value.message.isascii()


def test_any_bytes_are_described() -> None:
    random = np.random.default_rng(0)
    for size in (*range(40), 784, 5000):
        assert describe_bytes(random.bytes(size))
