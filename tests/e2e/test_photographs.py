"""Images as people send them, through a real server: read, and explained in the client's own pixels."""

import base64
import json
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import requests
from numpy.typing import NDArray
from PIL import Image

from handler.images.decode import decode_image
from handler.images.digits import prepare_digit
from model.photograph import SCENES, ink_of, photograph
from scripts.paths import SAMPLE_FILES
from scripts.serving.launcher import TorchServe
from tests.client import TIMEOUT_S
from tests.conftest import label_of
from tests.oracle import Oracle
from tests.tolerance import require_close

FILE = SAMPLE_FILES[25]


def photo_of(kind: str, seed: int = 0) -> bytes:
    with Image.open(FILE) as image:
        return photograph(ink_of(np.asarray(image)), kind, [seed])


def ask(server: TorchServe, content: bytes, **headers: str) -> requests.Response:
    return requests.put(f"{server.address}/explanations/digits", data=content, headers=headers, timeout=TIMEOUT_S)


def map_of(explanation: dict[str, Any]) -> NDArray[np.float32]:
    saliency = explanation["saliency"]
    if explanation["encoding"] == "base64":
        return np.frombuffer(base64.b64decode(saliency), "<f4").reshape(explanation["shape"])
    return np.array(saliency, dtype=np.float32)


@pytest.mark.parametrize("kind", SCENES)
def test_photograph_is_read_and_its_preparation_reported(server: TorchServe, kind: str) -> None:
    content = photo_of(kind)
    reply = ask(server, content)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    assert answer["digit"] == label_of(FILE)
    preparation = answer["preparation"]
    assert preparation["source"] in ("PNG image", "JPEG image")
    assert preparation["inverted"] == (kind not in ("inverted scan", "inverted thumbnail", "blackboard"))
    left, top, right, bottom = preparation["ink_box"]
    height, width = decode_image(content).grey.shape
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize("kind", ["scan", "thumbnail", "phone", "inverted scan"])
@pytest.mark.parametrize("encoding", ["nested", "base64"])
def test_map_in_the_clients_pixels_is_the_chain_rule(server: TorchServe, archive: Any, kind: str, encoding: str) -> None:
    """The map is the canonical one, carried back by the preparation, in the shape of the image as sent."""
    content = photo_of(kind, seed=3)
    grey = decode_image(content).grey
    headers = {"X-Saliency-Encoding": encoding, "X-Saliency-Target": "1,8"}
    if grey.size * 2 > 1_440_000:
        pytest.fail("the image is too large for this test")
    explanation = ask(server, content, **headers, **{"X-Saliency-Space": "image"}).json()["explanation"]
    canonical = ask(server, content, **headers).json()["explanation"]
    assert explanation["space"] == "image"
    assert explanation["shape"] == [2, *grey.shape]
    assert explanation["with_respect_to"] == "grey level in [0, 1] of the image as sent"
    assert "geometry" in explanation["held_fixed"]
    expected = prepare_digit(grey, 28, 28).pull_back(map_of(canonical))
    require_close(map_of(explanation), expected, row_axes=2)


def test_map_of_a_canonical_image_is_the_same_in_both_spaces(server: TorchServe) -> None:
    content = FILE.read_bytes()
    image, canonical = (
        map_of(ask(server, content, **{"X-Saliency-Space": space}).json()["explanation"]) for space in ("image", "canonical")
    )
    require_close(image, canonical, row_axes=2)


def test_prepared_pixels_are_what_the_network_gets(server: TorchServe, archive: Any) -> None:
    """The served logits are the oracle's for the image that `prepare` makes."""
    from scripts.packaging.package import read_archive

    content = photo_of("grey paper", seed=4)
    pixels = prepare_digit(decode_image(content).grey, 28, 28).pixels
    logits, _ = Oracle(read_archive(archive)["weights.safetensors"]).explain(pixels.astype(np.float64))
    require_close(ask(server, content).json()["logits"], logits)


def test_map_of_too_many_pixels_is_refused_with_the_limit(server: TorchServe) -> None:
    content = BytesIO()
    image = Image.new("L", (1600, 1200), 255)
    image.paste(0, (700, 300, 800, 900))
    image.save(content, format="PNG")
    reply = ask(server, content.getvalue(), **{"X-Saliency-Space": "image"})
    assert reply.status_code == 413
    assert "expected maps of at most 1,440,000 numbers" in reply.json()["error"]["message"]
    drawn = ask(server, content.getvalue(), **{"X-Saliency-Space": "image", "Accept": "image/png"})
    assert drawn.status_code == 200
    with Image.open(BytesIO(drawn.content)) as drawing:
        assert drawing.size == (448, 336)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_blank_image_is_422(server: TorchServe, level: int) -> None:
    content = BytesIO()
    Image.new("L", (300, 200), level).save(content, format="PNG")
    reply = ask(server, content.getvalue())
    assert (reply.status_code, reply.json()["error"]["type"]) == (422, "BlankImage")


def test_prepare_none_only_scales(server: TorchServe) -> None:
    content = photo_of("scan")
    answer = ask(server, content, **{"X-Saliency-Prepare": "none"}).json()
    assert len(answer["preparation"]["steps"]) == 1
    assert answer["preparation"]["steps"][0].startswith("scaled from ")


def test_numbers_are_prepared_as_images_are(server: TorchServe) -> None:
    with Image.open(FILE) as image:
        dark = (255 - np.asarray(image)).tolist()
    route = f"{server.address}/predictions/digits"
    as_sent, by_default, prepared = (
        requests.post(route, json={"data": dark, **more}, timeout=TIMEOUT_S).json()
        for more in ({"prepare": "none"}, {}, {"prepare": "auto"})
    )
    assert as_sent["preparation"]["steps"] == []
    assert by_default == prepared
    assert prepared["preparation"]["steps"] == ["inverted"]
    assert prepared["digit"] == label_of(FILE)


def test_drawing_over_the_clients_own_image(server: TorchServe) -> None:
    """Without saliency the photograph shows unchanged."""
    content = photo_of("grey paper", seed=6)
    reply = ask(server, content, Accept="image/png", **{"X-Saliency-Space": "image", "X-Saliency-Size": "400"})
    assert reply.headers["content-type"] == "image/png"
    with Image.open(BytesIO(reply.content)) as drawn, Image.open(BytesIO(content)) as sent:
        assert max(drawn.size) == 400
        assert abs(drawn.width / drawn.height - sent.width / sent.height) < 0.02
        corner = np.asarray(drawn)[5, 5].astype(int)
    assert np.ptp(corner) <= 2  # grey
    assert json.loads(reply.headers["X-Digit"]) == label_of(FILE)
