"""Those who ask for little are answered whoever shares their batch; those who ask for much, as far as there is time."""

import base64
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handler.errors import Overloaded, RequestTooLarge
from handler.fair_share import FairShare, by_size, may_be_costly
from handler.limits import MAX_COSTLY_SECONDS, ORDINARY_SECONDS, RETRY_AFTER_SECONDS
from handler.preprocess import estimate_seconds, preprocess
from handler.protocol.request import parse_request
from handler.saliency_handler import SaliencyHandler
from scripts.bench.attacks import encode
from scripts.paths import SAMPLE_FILES
from tests.worker import IMAGE, answer, context_for

Row = tuple[dict[str, Any], dict[str, Any]]


def enlarged(side: int, **options: object) -> bytes:
    """A digit as a progressive JPEG."""
    with Image.open(SAMPLE_FILES[36]) as image:
        return encode(image.resize((side, side), Image.Resampling.BICUBIC), "JPEG", progressive=True, **options)


def instances(image: bytes, count: int, **more: object) -> Row:
    body = {"instances": [base64.b64encode(image).decode()] * count, **more}
    return {"body": bytearray(json.dumps(body).encode())}, {"explain": "True"}


PLAIN: Row = ({"body": bytearray(IMAGE)}, {"explain": "True"})


def seconds_of(row: Row) -> float:
    return estimate_seconds(parse_request(*row, 10), 28, 28)


def test_ordinary_requests_always_begin() -> None:
    share = FairShare()
    share.admit(100)
    for _ in range(100):
        share.admit(ORDINARY_SECONDS)
    with pytest.raises(Overloaded) as refused:
        share.admit(ORDINARY_SECONDS * 1.01)
    assert refused.value.headers == {"Retry-After": f"{RETRY_AFTER_SECONDS}"}


def test_costly_requests_begin_as_far_as_there_is_time() -> None:
    share, each = FairShare(), MAX_COSTLY_SECONDS / 4
    for _ in range(4):
        share.admit(each)
    assert share.is_spent
    with pytest.raises(Overloaded):
        share.admit(each)


def test_time_that_reading_took_counts_where_it_was_long() -> None:
    share = FairShare()
    share.count(ORDINARY_SECONDS)
    assert not share.is_spent
    share.count(MAX_COSTLY_SECONDS)
    assert share.is_spent


def test_requests_are_ordered_by_size() -> None:
    rows = [{"body": bytearray(30)}, {"data": bytearray(3), "target": bytearray(2)}, {}, {"body": "text of twenty bytes"}]
    assert by_size(rows) == [2, 1, 3, 0]
    assert [may_be_costly(row, {}) for row in ({"body": bytearray(2_000_000)}, {"body": b""})] == [True, False]
    assert may_be_costly({"body": b""}, {"Content-Encoding": "gzip"})


def test_estimates_grow_with_what_is_asked_for() -> None:
    npy = BytesIO()
    np.save(npy, np.zeros((1000, 28, 28), np.uint8))
    costs = [
        seconds_of(PLAIN),
        seconds_of(instances(IMAGE, 64)),
        seconds_of(instances(enlarged(100), 20)),
        seconds_of(instances(enlarged(300), 20)),
        seconds_of(instances(enlarged(300), 20, method="smoothgrad", samples=200)),
    ]
    assert costs == sorted(costs)
    assert costs[1] < ORDINARY_SECONDS < costs[3]
    assert seconds_of(({"body": bytearray(npy.getvalue())}, {})) < ORDINARY_SECONDS * 2
    grid = {"data": [[0.5] * 1000] * 1000}
    assert ORDINARY_SECONDS < seconds_of(({"body": grid}, {})) < 1


def test_estimate_decodes_nothing_and_survives_any_bytes() -> None:
    for body in (b"no image", b"\x89PNG", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"GIF89a", b"BM", b"RIFF0000WEBP"):
        assert seconds_of(({"body": bytearray(body)}, {})) < ORDINARY_SECONDS


def test_request_of_too_much_work_is_refused_before_it_begins() -> None:
    row = instances(enlarged(400), 60)
    with pytest.raises(
        RequestTooLarge, match=r"at most 2\.4 s of processor time, got one that takes about [\d.]+ s: send its 60"
    ):
        preprocess(parse_request(*row, 10), 28, 28)


def test_request_without_memory_is_told_to_come_again(
    unpack: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = SaliencyHandler()
    handler.initialize(context_for(unpack()))

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("handler.preprocess.prepare_digit", fail)
    bad, good = answer(handler, [PLAIN, ({}, {"describe": "True", "explain": "False"})], tmp_path / "unpacked")
    assert (bad[0], json.loads(bad[2])["error"]["type"]) == (503, "Overloaded")
    assert bad[1]["Retry-After"] == f"{RETRY_AFTER_SECONDS}"
    assert good[0] == 400


@pytest.mark.parametrize("place", [0, 4], ids=str)
def test_small_requests_are_answered_beside_many_costly_ones(unpack: Callable[[], Path], tmp_path: Path, place: int) -> None:
    """One of the costly ones is answered too; the others are told to come again."""
    handler = SaliencyHandler()
    handler.initialize(context_for(unpack()))
    costly = instances(enlarged(200), 30, method="smoothgrad", samples=20)
    batch = [costly] * 4
    batch.insert(place, PLAIN)
    replies = answer(handler, batch, tmp_path / "unpacked")
    assert replies[place][0] == 200
    statuses = [status for status, _, _ in replies[:place] + replies[place + 1 :]]
    assert statuses.count(200) == 1
    assert statuses.count(503) == 3
    for status, headers, body in replies:
        if status == 503:
            assert headers["Retry-After"] == f"{RETRY_AFTER_SECONDS}"
            assert json.loads(body)["error"]["type"] == "Overloaded"
