"""Maps in `space: "image"` predict what the whole service answers when the image is changed a little and sent again."""

import base64
import json
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from handler.images.decode import decode_image
from handler.saliency_handler import SaliencyHandler
from model.photograph import SCENES, ink_of, photograph
from scripts.paths import SAMPLE_FILES
from tests.worker import answer

PHOTOGRAPH_COUNT = 30
FIRST_SEED = 5000  # the preparation's constants were chosen on photographs of other seeds
MOST_PIXELS = 1_000_000  # larger photographs are halved, so that a map fits into a reply
STEP = 5  # grey levels of 255: 0.02
PATCH_SHARE = 0.1  # side of a patch, of the digit's size
PATCHES = {"ink": 4, "near": 3, "far": 1}  # so many of each, brightened and darkened


def png(levels: NDArray[Any]) -> bytes:
    content = BytesIO()
    Image.fromarray(levels.astype(np.uint8)).save(content, format="PNG")
    return content.getvalue()


def ask(handler: SaliencyHandler, model_dir: Path, files: list[bytes], **headers: str) -> list[dict[str, Any]]:
    batch = [({"body": bytearray(file)}, {"explain": "False", **headers}) for file in files]
    replies = answer(handler, batch, model_dir)
    assert {status for status, _, _ in replies} == {200}
    return [json.loads(body) for _, _, body in replies]


def decisions(reply: dict[str, Any]) -> dict[str, Any]:
    """What was decided by looking at the whole image: geometry, threshold, stretch, and which other ink was left out."""
    return {"preparation": reply["preparation"], "warnings": reply.get("warnings")}


def patches(levels: NDArray[Any], reply: dict[str, Any], random: np.random.Generator) -> list[tuple[str, NDArray[Any]]]:
    """Copies of an image with one patch brightened or darkened, on the ink, near it and far from it."""
    left, top, right, bottom = reply["preparation"]["ink_box"]
    size = max(right - left, bottom - top)
    side = max(1, round(PATCH_SHARE * size))
    sign = -1 if reply["preparation"]["inverted"] else 1
    ink = np.zeros(levels.shape, dtype=bool)
    box = np.s_[top:bottom, left:right]
    ink[box] = sign * (levels - np.median(levels))[box] / 255 > reply["preparation"]["threshold"]
    distance = ndimage.distance_transform_edt(~ink)
    places = {"ink": ink, "near": (distance > 1) & (distance < 0.15 * size), "far": distance > 0.3 * size}
    changed = []
    for name, count in PATCHES.items():
        ys, xs = np.nonzero(places[name])
        for index in random.choice(len(ys), count) if len(ys) else ():
            y, x = max(0, ys[index] - side // 2), max(0, xs[index] - side // 2)
            for step in (STEP, -STEP):
                copy = levels.copy()
                copy[y : y + side, x : x + side] = np.clip(copy[y : y + side, x : x + side] + step, 0, 255)
                changed.append((name, copy))
    return changed


def test_map_predicts_what_a_changed_photograph_is_answered(handler: SaliencyHandler, tmp_path: Path) -> None:
    """Where preprocessing decides the same, the score moves as the map says; far from the digit it does not move."""
    predicted, measured, far = [], [], []
    for number, scene in zip(range(FIRST_SEED, FIRST_SEED + PHOTOGRAPH_COUNT), cycle(SCENES)):
        with Image.open(SAMPLE_FILES[7 * number % len(SAMPLE_FILES)]) as image:
            file = photograph(ink_of(np.asarray(image)), scene, [number])
        levels = np.rint(decode_image(file).grey * 255).astype(int)
        while levels.size > MOST_PIXELS:
            levels = levels[::2, ::2]
        options = {"X-Saliency-Space": "image", "X-Saliency-Encoding": "base64", "explain": "True"}
        (reply,) = ask(handler, tmp_path / "unpacked", [png(levels)], **options)
        explanation = reply["explanation"]
        target = explanation["target"]
        saliency = np.frombuffer(base64.b64decode(explanation["saliency"]), "<f4").reshape(levels.shape)
        changed = patches(levels, reply, np.random.default_rng(number))
        for (name, copy), other in zip(
            changed, ask(handler, tmp_path / "unpacked", [png(copy) for _, copy in changed]), strict=True
        ):
            if decisions(other) == decisions(reply):
                predicted.append(float((saliency * (copy - levels)).sum() / 255))
                measured.append(other["logits"][target] - reply["logits"][target])
                if name == "far":
                    far.append(abs(measured[-1]))
    expected, changes = np.array(predicted), np.array(measured)
    assert len(expected) > PHOTOGRAPH_COUNT * sum(PATCHES.values())  # of twice as many: most decisions stay
    moved = np.abs(expected) > 0.005
    assert moved.sum() > PHOTOGRAPH_COUNT
    assert 0.8 < np.median(changes[moved] / expected[moved]) < 1.25
    assert np.corrcoef(expected, changes)[0, 1] >= 0.9
    assert np.mean(far) < 0.001
