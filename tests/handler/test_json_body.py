"""JSON is counted before it is built; what is refused was never built."""

import json
import tracemalloc
from collections.abc import Callable

import pytest

from handler.errors import MalformedJSON, RequestTooLarge, shown
from handler.limits import MAX_JSON_DEPTH, MAX_JSON_LISTS, MAX_JSON_MEMBERS, MAX_JSON_TEXTS, MAX_JSON_VALUES
from handler.protocol.json_body import parse_json


def listed(value: bytes, count: int) -> bytes:
    """An object whose only member is a list of so many values."""
    return b'{"data":[' + b",".join([value]) + (b"," + value) * (count - 1) + b"]}"


def with_members(count: int) -> bytes:
    return b"{" + b",".join(b'"%x":1' % number for number in range(count)) + b"}"


# What is counted, by a document that has the most of it, and the same with a little more.
CASES: dict[str, tuple[str, Callable[[int], bytes], int]] = {
    "values": ("values", lambda count: listed(b"1", count), MAX_JSON_VALUES - 10),
    "lists": ("lists", lambda count: listed(b"[]", count), MAX_JSON_LISTS - 1),
    "lists in lists": ("lists", lambda count: listed(b"[[]]", count // 2), MAX_JSON_LISTS - 1),
    "members": ("members", with_members, MAX_JSON_MEMBERS - 1),
    "objects": ("members", lambda count: listed(b"{}", count), MAX_JSON_MEMBERS - 3),
    "texts": ("texts", lambda count: listed(b'""', count), MAX_JSON_TEXTS - 1),
}


@pytest.mark.parametrize("name", CASES)
def test_document_of_too_many_values_is_refused_before_it_is_built(name: str) -> None:
    what, document, count = CASES[name]
    assert isinstance(parse_json(document(count)), dict)
    larger = document(count + 20)
    tracemalloc.start()
    try:
        with pytest.raises(RequestTooLarge, match=rf"^expected JSON of at most [\d,]+ {what}"):
            parse_json(larger)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("opening", [b"[", b'{"a":'], ids=["lists", "objects"])
def test_depth_is_bounded(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"

    def nested(depth: int) -> bytes:
        return opening * depth + b"1" + closing * depth

    assert parse_json(nested(MAX_JSON_DEPTH)) == json.loads(nested(MAX_JSON_DEPTH))
    for depth in (MAX_JSON_DEPTH + 1, 987, 990, 20_000):
        with pytest.raises(MalformedJSON, match=f"nested at most {MAX_JSON_DEPTH} levels deep"):
            parse_json(nested(depth))


@pytest.mark.parametrize("text", ["[" * 100, '\\"[{' * 50, "{" * 40 + "\\\\", "]" * 5 + "[" * 60], ids=range(4))
def test_brackets_in_texts_are_no_depth(text: str) -> None:
    document = json.dumps({"id": text, text: [1]}).encode()
    assert parse_json(document) == json.loads(document)


def test_shape_of_many_images_is_within_the_limits() -> None:
    """As Keras clients send them: each number in a list of its own."""
    document = json.dumps({"data": [[[[7]] * 28] * 28] * 1024}).encode()
    parsed = parse_json(document)
    assert isinstance(parsed, dict)
    assert len(parsed["data"]) == 1024


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, "a", None, True, 2.5], "[1, 'a', None, True, 2.5]"),
        ({"a": [1], "b": {}}, "{'a': [1], 'b': {}}"),
        ("\u00e4" * 3, "'\\xe4\\xe4\\xe4'"),
        (b"\xff", "b'\\xff'"),
        ([], "[]"),
    ],
    ids=str,
)
def test_value_is_shown_as_ascii_shows_it(value: object, text: str) -> None:
    assert shown(value) == text == ascii(value)


def test_no_more_of_a_value_is_looked_at_than_is_shown() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    long = [1] * 5_000_000
    tracemalloc.start()
    try:
        for value in (deep, {"a": deep}, long, {"a": long}, "a" * 10, {str(number): 1 for number in range(1000)}):
            assert len(shown(value)) <= 60
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    while deep:  # else its end would be as deep
        deep = deep.pop()  # type: ignore[assignment]
