"""Any request ends in canonical pixels or in a client error of its own."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile import SEEDS, outcome_of, row_of

MANY = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
FIELDS = """data image body target explain encoding method space prepare instances inputs parameters
shape datatype name id outputs b64 size colormap layout polarity clip_percentile"""
NAMES = st.sampled_from(FIELDS.split())
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["BYTES", "FP32", "all"])
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)
HEADERS = st.dictionaries(
    st.sampled_from(["Accept", "Content-Type", "X-Saliency-Target", "X-Saliency-Explain", "x-saliency-", "explain", "describe"])
    | st.text(max_size=10),
    st.text(max_size=20),
    max_size=4,
)


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A well-formed request with some bytes overwritten, cut out, put in twice, or cut off."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(1, len(content)))
        how = draw(st.sampled_from(["overwrite", "remove", "repeat", "truncate"]))
        if how == "overwrite":
            patch = draw(st.binary(min_size=1, max_size=4))
            content[place : place + len(patch)] = patch
        elif how == "remove":
            del content[place : place + draw(st.integers(1, 50))]
        elif how == "repeat":
            content[place:place] = content[place : place + draw(st.integers(1, 50))]
        else:
            del content[max(1, place) :]
    return bytes(content)


@pytest.mark.parametrize("seed", SEEDS[::5], ids=range(len(SEEDS[::5])))
def test_seeds_are_good_requests(seed: bytes) -> None:
    """Fuzzing that starts from errors would find little."""
    assert outcome_of(*row_of(seed)) == "pixels"


@MANY
@given(spoiled())
def test_spoiled_request_ends_in_pixels_or_a_client_error(content: bytes) -> None:
    outcome_of(*row_of(content))


@MANY
@given(st.binary(max_size=300), HEADERS)
def test_any_bytes_with_any_headers_end_in_pixels_or_a_client_error(body: bytes, headers: dict[str, str]) -> None:
    outcome_of({"body": bytearray(body)}, headers)


@MANY
@given(JSON_VALUES, HEADERS)
def test_any_json_ends_in_pixels_or_a_client_error(document: object, headers: dict[str, str]) -> None:
    outcome_of({"body": document}, headers)
    outcome_of({"body": bytearray(json.dumps(document).encode())}, headers)


@MANY
@given(
    st.dictionaries(
        NAMES | st.text(max_size=5), st.binary(max_size=30).map(bytearray) | st.text(max_size=30) | JSON_VALUES, max_size=5
    )
)
def test_any_form_ends_in_pixels_or_a_client_error(form: dict[str, object]) -> None:
    outcome_of(form, {"explain": "True"})
