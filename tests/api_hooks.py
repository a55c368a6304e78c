"""Hooks for schemathesis: strategies that make images, and deserializers for replies other than JSON."""

import base64
from io import BytesIO
from typing import Any

import numpy as np
import schemathesis
from hypothesis import strategies as st
from PIL import Image

from scripts.paths import SAMPLE_FILES

ACCEPTS = ("*/*", "application/json", "application/x-npy", "image/png", "text/csv")
FILES = [*(file.read_bytes() for file in SAMPLE_FILES[::5]), SAMPLE_FILES[0].with_name("7-0.npy").read_bytes()]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Cut off an image file's end, or overwrite some of its bytes."""
    content = draw(st.sampled_from(FILES))
    place = draw(st.integers(1, len(content) - 1))
    patch = draw(st.binary(max_size=8))
    return content[:place] + patch + (content[place + len(patch) :] if draw(st.booleans()) else b"")


IMAGES = st.sampled_from(FILES) | damaged() | st.binary(max_size=200)

for media_type in ("image/*", "application/octet-stream", "application/x-npy"):
    schemathesis.openapi.media_type(media_type, IMAGES)
schemathesis.openapi.format("image", IMAGES.map(lambda content: base64.b64encode(content).decode()))


@schemathesis.hook
def map_headers(context: schemathesis.HookContext, headers: dict[str, str] | None) -> dict[str, str]:
    """Ask for every kind of reply: OpenAPI has no place for `Accept`, so schemathesis never varies it."""
    given = dict(headers or {})
    return given | {"Accept": ACCEPTS[sum(len(str(value)) for value in given.values()) % len(ACCEPTS)]}


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> bool:
    """Leave out forms with a field without a name: TorchServe's frontend answers 500 before the handler sees them."""
    return not (case.media_type == "multipart/form-data" and isinstance(case.body, dict) and "" in case.body)


@schemathesis.deserializer("application/x-npy")
def read_npy(context: object, response: schemathesis.Response) -> str:
    """Load an .npy reply; raise ValueError if it is not one. The schema describes the raw bytes."""
    assert np.load(BytesIO(response.content), allow_pickle=False).dtype == np.float32
    return response.content.decode("latin-1")


@schemathesis.deserializer("image/png")
def read_png(context: object, response: schemathesis.Response) -> str:
    """Decode a PNG reply; raise an OSError if it is not one. The schema describes the raw bytes."""
    with Image.open(BytesIO(response.content), formats=["PNG"]) as image:
        image.load()
    return response.content.decode("latin-1")
