"""What schemathesis needs to know of this API to make requests that reach the network: pictures.

    SCHEMATHESIS_HOOKS=tests.api_hooks schemathesis run serve_config/openapi.yaml ...
"""

import base64

import schemathesis
from hypothesis import strategies as st

from tests.conftest import DIGIT_FILES

ACCEPTS = ("*/*", "application/json", "application/x-npy", "image/png", "text/csv")
FILES = [*(file.read_bytes() for file in DIGIT_FILES[::5]), DIGIT_FILES[0].with_name("7-0.npy").read_bytes()]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A picture file with its end cut off or some bytes overwritten."""
    content = bytearray(draw(st.sampled_from(FILES)))
    place = draw(st.integers(1, len(content) - 1))
    return bytes(content[:place] if draw(st.booleans()) else content[:place] + draw(st.binary(max_size=8)) + content[place + 8 :])


PICTURES = st.sampled_from(FILES) | damaged() | st.binary(max_size=200)

for media_type in ("image/*", "application/octet-stream", "application/x-npy"):
    schemathesis.openapi.media_type(media_type, PICTURES)
schemathesis.openapi.format("picture", PICTURES.map(lambda content: base64.b64encode(content).decode()))


@schemathesis.hook
def map_headers(context: schemathesis.HookContext, headers: dict[str, str] | None) -> dict[str, str]:
    """Ask for every kind of reply: a description cannot hold `Accept`, so schemathesis never varies it."""
    headers = dict(headers or {})
    headers["Accept"] = ACCEPTS[sum(map(len, map(str, headers.values()))) % len(ACCEPTS)]
    return headers
