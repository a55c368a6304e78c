"""JSON as bytes -> Python's values, once its bytes say that they are few enough.

What a parser would build is counted before it runs: each value takes a comma, a bracket or a quotation mark, and a few bytes can
take a hundred times as much memory and time once they are lists, keys or texts. Knows nothing of images or of what fields mean.
"""

import gc
import json
import re

import numpy as np

from handler.errors import InvalidRequest, MalformedJSON, RequestTooLarge, shown
from handler.limits import MAX_JSON_DEPTH, MAX_JSON_LISTS, MAX_JSON_MEMBERS, MAX_JSON_TEXTS, MAX_JSON_VALUES

UNCOUNTED_BYTES = 65_536  # of a document that may consist of nothing but values: they are built in some milliseconds
TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)  # a JSON text; possessive, so that nothing is tried twice
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
SHOWN_TWICE = 100  # members of an object in which the one that is there twice is looked for, to name it


def parse_json(content: bytes) -> object:
    """Parse a JSON document.

    Raises:
        MalformedJSON: it is not valid, or nested deeper than MAX_JSON_DEPTH.
        RequestTooLarge: it has more values, lists, members or texts than the limits.
        InvalidRequest: an object has a key twice.
    """
    _require_few_values(content)
    _require_shallow(content)
    was_collecting = gc.isenabled()
    gc.disable()  # nothing here can be garbage yet, and to look for it takes longer than to parse a million lists
    try:
        return json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        where = f" at character {error.pos}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        raise MalformedJSON(f"expected a JSON object in UTF-8, got a body that is not valid JSON{where}") from error
    finally:
        if was_collecting:
            gc.enable()


def _require_few_values(content: bytes) -> None:
    """Count what would be built. Characters inside texts count too: no text that means anything here has so many of them."""
    if len(content) <= UNCOUNTED_BYTES:
        return
    list_count, object_count = content.count(b"["), content.count(b"{")
    for what, count, limit in (
        ("values", content.count(b",") + list_count + object_count, MAX_JSON_VALUES),
        ("lists", list_count, MAX_JSON_LISTS),
        ("members of objects", content.count(b":") + object_count, MAX_JSON_MEMBERS),
        ("texts", content.count(b'"') // 2, MAX_JSON_TEXTS),
    ):
        if count > limit:
            raise RequestTooLarge(f"expected JSON of at most {limit:,} {what}, got {count:,}: send many numbers as .npy")


def _require_shallow(content: bytes) -> None:
    """Refuse what is nested too deeply, for the parser and for all that looks at its values."""
    if content.count(b"[") + content.count(b"{") <= MAX_JSON_DEPTH:
        return
    if _depth_of(content) > MAX_JSON_DEPTH and _depth_of(TEXT.sub(b"", content)) > MAX_JSON_DEPTH:  # texts may hold brackets
        raise MalformedJSON(f"expected JSON nested at most {MAX_JSON_DEPTH} levels deep, got more")


def _depth_of(content: bytes) -> int:
    """Count the brackets that are open at most at once."""
    brackets = np.frombuffer(content.translate(None, _NOT_BRACKETS), np.uint8)
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), np.int8(1), np.int8(-1))
    return int(steps.cumsum(dtype=np.int32).max(initial=0))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object of its members, each of which may be there once."""
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1) if len(names) < SHOWN_TWICE else "a key"
        raise InvalidRequest(f"expected each key of a JSON object once, got {shown(twice)} twice")
    return members
