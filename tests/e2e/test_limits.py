"""Every limit of the table in handler/README.md, just below it (answered) and just above (refused as the table says)."""

import base64
import gzip
import json
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from threading import Thread
from typing import Any

import numpy as np
import pytest
import requests
import yaml
from PIL import Image

from handler.errors import InvalidOption
from handler.images.budget import DecodingBudget
from handler.images.decode import decode_image
from handler.images.structure import MAX_COEFFICIENTS
from handler.limits import (
    MAX_BATCH_BODY_BYTES,
    MAX_BATCH_BYTES,
    MAX_BATCH_SECONDS,
    MAX_COMPRESSED_BYTES,
    MAX_DECODE_SECONDS,
    MAX_DECODER_BYTES,
    MAX_DECODER_OPERATIONS,
    MAX_FORM_FIELDS,
    MAX_GRADIENTS,
    MAX_ID_CHARACTERS,
    MAX_IMAGE_MAP_NUMBERS,
    MAX_IMAGE_MAP_NUMBERS_NPY,
    MAX_IMAGES,
    MAX_JPEG_PIXELS,
    MAX_JPEG_SCANS,
    MAX_JSON_VALUES,
    MAX_MAPS,
    MAX_PIXELS,
    MAX_PIXELS_DRAWN,
    MAX_PREPARED_IMAGES,
    MAX_REQUEST_SECONDS,
    MAX_SIDE,
    MAX_SIZE,
    MAX_TAG_BYTES,
)
from handler.render.drawing import Row, Style, draw
from scripts.bench.attacks import deflate, png
from scripts.bench.load import Load, build_call, run_load
from scripts.paths import ROOT, SAMPLE_FILES
from scripts.serving.launcher import TorchServe
from tests.client import BATCH_SIZE, V1_PREDICT, V2_INFER, Arguments, ask, ask_at_once, error_of, explain, npy, predict
from tests.hostile import png_chunk

TIMEOUT_S = 120
FILE = SAMPLE_FILES[36]  # a seven
IMAGE = FILE.read_bytes()
MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_PROGRESSIVE_BYTES = 8_000_000
MAX_WAITING = 1000
PNG_ENDING = 12  # bytes of the chunk that ends a PNG


def digit_of(width: int, height: int, image_format: str = "PNG", **options: Any) -> bytes:
    """A digit in the middle of an image of this size."""
    side = min(width, height) * 3 // 5
    with Image.open(FILE) as opened:
        digit = opened.resize((side, side), Image.Resampling.NEAREST)
    image = Image.new("L", (width, height))
    image.paste(digit, ((width - side) // 2, (height - side) // 2))
    content = BytesIO()
    image.save(content, format=image_format, **options)
    return content.getvalue()


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def instances(*contents: bytes) -> Arguments:
    return {"route": V1_PREDICT, "json": {"instances": [encoded(content) for content in contents]}}


def images(count: int, **headers: str) -> Arguments:
    return explain(
        data=npy(np.zeros((count, 28, 28), "u1")),
        headers={"Accept": "application/x-npy", "X-Saliency-Prepare": "none"} | _named(headers),
    )


def one(content: bytes = IMAGE, **headers: str) -> Arguments:
    return explain(data=content, headers=_named(headers))


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def chunks(beyond: int) -> bytes:
    """A PNG with the largest accepted number of empty chunks, and so many more."""

    def with_chunks(count: int) -> bytes:
        return IMAGE[:-PNG_ENDING] + png_chunk(b"abCd", b"") * count + IMAGE[-PNG_ENDING:]

    def steps_of(count: int) -> int:
        budget = DecodingBudget()
        decode_image(with_chunks(count), budget)
        return MAX_DECODER_OPERATIONS - budget.steps_left

    fixed, each = steps_of(10_000), steps_of(10_001) - steps_of(10_000)
    return with_chunks(10_000 + (MAX_DECODER_OPERATIONS - fixed) // each + beyond)


def progressive(byte_count: int) -> bytes:
    return digit_of(100, 100, "JPEG", progressive=True).ljust(byte_count, b"\0")


def scans(count: int) -> bytes:
    """A progressive JPEG with so many scan markers, some after its end: they are counted before anything is decoded."""
    content = digit_of(100, 100, "JPEG", progressive=True)
    return content + b"\xff\xda" * (count - content.count(b"\xff\xda"))


def tagged(byte_count: int) -> bytes:
    """A TIFF whose description has so many bytes, including the final zero."""
    return digit_of(100, 100, "TIFF", description="a" * (byte_count - 1))


def largest_size() -> int:
    """The largest size at which all classes are drawn in one image."""
    row = Row(np.zeros((28, 28), np.float32), np.zeros((10, 28, 28), np.float32), tuple(range(10)))
    for size in range(MAX_SIZE, 0, -1):
        try:
            draw([row], Style(size=size))
        except InvalidOption:
            continue
        return size
    raise AssertionError("nothing is drawn")


@dataclass(frozen=True)
class Case:
    """A limit of the table.

    Attributes:
        row: how its row starts.
        figure: of the limit, as its row has it.
        below, above: requests that keep it just so, and that are just over it.
        status, kind: of the refusal; no kind where the frontend refuses.
    """

    row: str
    figure: str
    below: Callable[[], Arguments]
    above: Callable[[], Arguments]
    status: int = 413
    kind: str = "RequestTooLarge"


GRADIENTS = "gradients that these maps take"
CASES = {
    "body": Case(
        "body",
        "32 MiB",
        lambda: predict(data=IMAGE.ljust(MAX_BODY_BYTES, b"\0")),
        lambda: predict(data=IMAGE.ljust(MAX_BODY_BYTES + 1, b"\0")),
        kind="",
    ),
    "pixels of one image": Case(
        "pixels of all images",
        f"{MAX_PIXELS:,}",
        lambda: one(digit_of(4000, 4000)),
        lambda: one(digit_of(4001, 4000)),
        kind="ImageTooLarge",
    ),
    "pixels of two images": Case(
        "pixels of all images",
        f"{MAX_PIXELS:,}",
        lambda: instances(digit_of(4000, 2000), digit_of(4000, 2000)),
        lambda: instances(digit_of(4000, 2000), digit_of(4000, 2001)),
        kind="ImageTooLarge",
    ),
    "side": Case(
        "sides of an image",
        f"{MAX_SIDE:,}",
        lambda: one(digit_of(MAX_SIDE, 60), X_Saliency_Prepare="none"),
        lambda: one(digit_of(MAX_SIDE + 1, 60), X_Saliency_Prepare="none"),
        kind="ImageTooLarge",
    ),
    "chunks": Case(
        "chunks, segments and tags",
        f"{MAX_DECODER_OPERATIONS:,}",
        lambda: one(chunks(0)),
        lambda: one(chunks(1)),
        kind="ImageTooLarge",
    ),
    "progressive bytes": Case(
        "progressive JPEG",
        "8 MB",
        lambda: one(progressive(MAX_PROGRESSIVE_BYTES - 50_000)),  # reading them takes a few steps too
        lambda: one(progressive(MAX_PROGRESSIVE_BYTES + 100)),
        kind="ImageTooLarge",
    ),
    "scans": Case(
        "progressive JPEG",
        f"{MAX_JPEG_SCANS} scans",
        lambda: one(scans(MAX_JPEG_SCANS)),
        lambda: one(scans(MAX_JPEG_SCANS + 1)),
        400,
        "UnreadableImage",
    ),
    "pixels of a JPEG": Case(
        "pixels of a JPEG",
        f"{MAX_JPEG_PIXELS:,}",
        lambda: one(digit_of(8000, 8000, "JPEG")),
        lambda: one(digit_of(8000, 8001, "JPEG")),
        kind="ImageTooLarge",
    ),
    "coefficients": Case(
        "numbers that a progressive JPEG holds",
        f"{MAX_COEFFICIENTS:,}",
        lambda: one(digit_of(8000, 8000, "JPEG", progressive=True)),
        lambda: one(colour_jpeg(6000)),  # 108,000,000
        kind="ImageTooLarge",
    ),
    "work": Case(
        "processor time of a request with several images",
        f"{MAX_REQUEST_SECONDS} s",
        lambda: instances(*[digit_of(160, 160)] * 45),
        lambda: instances(*[digit_of(160, 160)] * 54),
    ),
    "values of JSON": Case(
        "values of a JSON document",
        f"{MAX_JSON_VALUES:,}",
        lambda: numbers_as_text(2000, 2048),
        lambda: numbers_as_text(2000, 2050),
    ),
    "compressed body": Case(
        "a compressed body",
        "8 MiB",
        lambda: gzipped(MAX_COMPRESSED_BYTES),
        lambda: gzipped(MAX_COMPRESSED_BYTES + 1),
    ),
    "tag": Case(
        "a TIFF's tag",
        "1 MB",
        lambda: one(tagged(MAX_TAG_BYTES)),
        lambda: one(tagged(MAX_TAG_BYTES + 1)),
        400,
        "UnreadableImage",
    ),
    "images": Case("images of a request", f"{MAX_IMAGES}", lambda: images(MAX_IMAGES), lambda: images(MAX_IMAGES + 1)),
    "images to prepare": Case(
        "of these, images that need preprocessing",
        f"{MAX_PREPARED_IMAGES}",
        lambda: instances(*[digit_of(100, 80)] * MAX_PREPARED_IMAGES),
        lambda: instances(*[digit_of(100, 80)] * (MAX_PREPARED_IMAGES + 1)),
    ),
    "maps": Case(
        "maps of a request",
        f"{MAX_MAPS}",
        lambda: images(MAX_MAPS // 8, X_Saliency_Target="0,1,2,3,4,5,6,7"),
        lambda: images(205, X_Saliency_Target="0,1,2,3,4"),  # 1025
    ),
    "gradients of samples": Case(
        GRADIENTS,
        f"{MAX_GRADIENTS}",
        lambda: images(16, X_Saliency_Method="smoothgrad", X_Saliency_Samples="256"),
        lambda: images(17, X_Saliency_Method="smoothgrad", X_Saliency_Samples="241"),  # 4097
    ),
    "gradients of steps": Case(
        GRADIENTS,
        f"{MAX_GRADIENTS}",
        lambda: images(16, X_Saliency_Method="integrated_gradients", X_Saliency_Steps="255"),  # and one point more
        lambda: images(17, X_Saliency_Method="integrated_gradients", X_Saliency_Steps="240"),
    ),
    "numbers in the space image": Case(
        "numbers of all maps in the space `image`",
        f"{MAX_IMAGE_MAP_NUMBERS:,}",
        lambda: one(digit_of(1200, 1200), X_Saliency_Space="image"),
        lambda: one(digit_of(1200, 1201), X_Saliency_Space="image"),
    ),
    "numbers in an array": Case(
        "numbers of all maps in the space `image`",
        f"as `.npy` {MAX_IMAGE_MAP_NUMBERS_NPY:,}",
        lambda: one(digit_of(1800, 2000), X_Saliency_Space="image", Accept="application/x-npy"),
        lambda: one(digit_of(1800, 2001), X_Saliency_Space="image", Accept="application/x-npy"),
    ),
    "numbers that are drawn": Case(
        "numbers of all maps in the space `image`",
        f"drawn as PNG {MAX_PIXELS:,}",
        lambda: one(digit_of(4000, 2000), X_Saliency_Space="image", X_Saliency_Target="1,7", Accept="image/png"),
        lambda: one(digit_of(4000, 2001), X_Saliency_Space="image", X_Saliency_Target="1,7", Accept="image/png"),
    ),
    "size of a panel": Case(
        "drawing",
        f"{MAX_SIZE} pixels a panel",
        lambda: one(X_Saliency_Size=f"{MAX_SIZE}", Accept="image/png"),
        lambda: one(X_Saliency_Size=f"{MAX_SIZE + 1}", Accept="image/png"),
        400,
        "InvalidOption",
    ),
    "size of a drawing": Case(
        "drawing",
        f"{MAX_PIXELS_DRAWN:,} in all",
        lambda: one(X_Saliency_Size=f"{largest_size()}", X_Saliency_Target="all", Accept="image/png"),
        lambda: one(X_Saliency_Size=f"{largest_size() + 1}", X_Saliency_Target="all", Accept="image/png"),
        400,
        "InvalidOption",
    ),
    "id": Case(
        "the `id` of a request",
        f"{MAX_ID_CHARACTERS} characters",
        lambda: tensor(MAX_ID_CHARACTERS),
        lambda: tensor(MAX_ID_CHARACTERS + 1),
        400,
        "InvalidRequest",
    ),
}


def colour_jpeg(side: int) -> bytes:
    """A progressive JPEG that keeps three numbers for each pixel."""
    content = BytesIO()
    Image.new("RGB", (side, side), (20, 90, 200)).save(content, "JPEG", progressive=True, subsampling=0)
    return content.getvalue()


def numbers_as_text(rows: int, columns: int) -> Arguments:
    """A grey image as numbers, each of which is a value, as is each list."""
    with Image.open(FILE) as image:
        levels = np.asarray(image.resize((columns, rows)))
    return predict(data=json.dumps({"data": levels.tolist()}), headers={"Content-Type": "application/json"})


def gzipped(byte_count: int) -> Arguments:
    return predict(data=gzip.compress(IMAGE).ljust(byte_count, b"\0"), headers={"Content-Encoding": "gzip"})


OTHERS = {  # rows that one request cannot reach; their tests are below
    "processor time and memory in which image files": "test_file_that_takes_too_long_is_stopped_and_costs_nobody_else_anything",
    "fields of a form": "test_form_of_many_fields_is_refused",
    "large bodies of one batch": "test_large_bodies_that_one_batch_cannot_hold_are_refused",
    "replies of one batch": "test_replies_that_one_batch_cannot_hold_are_refused",
    "requests waiting for a worker": "test_requests_that_may_wait_are_answered_and_more_are_refused_at_once",
    "time of one batch": "test_batches_of_the_slowest_requests_are_answered_in_time",
}


def tensor(id_characters: int) -> Arguments:
    body = {"name": "x", "shape": [1], "datatype": "BYTES", "data": [encoded(IMAGE)]}
    return {"route": V2_INFER, "json": {"id": "4" * id_characters, "inputs": [body]}}


def rows_of_the_page() -> list[tuple[str, str, str]]:
    """The table of limits: what, limit, and what is beyond it."""
    section = (ROOT / "handler" / "README.md").read_text().partition("\n## Limits\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| (.+) \| (.+) \| (.+) \|$", section)
    assert rows[0] == ("what", "limit", "beyond it")
    return rows[2:]


def row_of(start: str) -> tuple[str, str, str]:
    (row,) = [row for row in rows_of_the_page() if row[0].startswith(start)]
    return row


def test_every_row_of_the_page_has_a_test() -> None:
    starts = {case.row for case in CASES.values()} | OTHERS.keys()
    assert all(test in globals() for test in OTHERS.values())
    assert {row_of(start) for start in starts} == set(rows_of_the_page())


@pytest.mark.parametrize("name", CASES)
def test_limit_is_accepted_and_more_is_refused(server: TorchServe, worker_pids: Callable[[], list[int]], name: str) -> None:
    case, workers = CASES[name], worker_pids()
    _, limit, beyond = row_of(case.row)
    assert re.search(rf"(?<![\d,]){re.escape(case.figure)}(?![\d,]*\d)", limit)
    assert re.search(rf"\b{case.status}\b.*{case.kind}", beyond)

    answered = ask(server, case.below() | {"timeout": TIMEOUT_S})
    assert answered.status_code == 200, answered.text[:500]
    refused = ask(server, case.above() | {"timeout": TIMEOUT_S})
    assert refused.status_code == case.status, refused.text[:500]
    if case.kind:
        assert error_of(refused)["type"] == case.kind
    assert worker_pids() == workers


def test_file_that_takes_too_long_is_stopped_and_costs_nobody_else_anything(
    server: TorchServe, worker_pids: Callable[[], list[int]]
) -> None:
    """Its data inflate to nothing for as long as a body may be, and then to all of its pixels."""
    workers = worker_pids()
    _, limit, beyond = row_of("processor time and memory in which image files")
    assert (f"{MAX_DECODE_SECONDS} s" in limit, f"{MAX_DECODER_BYTES // 2**20} MiB" in limit) == (True, True)
    assert "413 `ImageTooLarge`" in beyond
    raw = bytes((4000 * 8 + 1) * 4000)
    slow = one(png(4000, 4000, deflate(raw, 32_000_000), depth=16, colour=6)) | {"timeout": TIMEOUT_S}
    for _ in range(2):
        *refused, small = ask_at_once(server, [slow] * 2 + [one() | {"timeout": TIMEOUT_S}])
        assert small.status_code == 200
        kinds = [(reply.status_code, reply.json()["error"]["type"]) for reply in refused]
        assert (413, "ImageTooLarge") in kinds
        assert set(kinds) <= {(413, "ImageTooLarge"), (503, "Overloaded")}
    assert worker_pids() == workers


def test_form_of_many_fields_is_refused(server: TorchServe) -> None:
    assert row_of("fields of a form")[1:] == (f"{MAX_FORM_FIELDS}", "413 `RequestTooLarge`")
    for count, status, kind in (
        (MAX_FORM_FIELDS, 400, "UnknownOption"),
        (MAX_FORM_FIELDS + 1, 413, "RequestTooLarge"),
        (20_000, 413, "RequestTooLarge"),
    ):
        fields = {"data": "x"} | {f"field-{number}": "1" for number in range(count - 1)}
        refused = ask(server, predict(data=fields))  # urlencoded
        assert (refused.status_code, error_of(refused)["type"]) == (status, kind)


def test_large_bodies_that_one_batch_cannot_hold_are_refused(server: TorchServe, worker_pids: Callable[[], list[int]]) -> None:
    workers = worker_pids()
    assert row_of("large bodies of one batch")[1] == f"{MAX_BATCH_BODY_BYTES // 2**20} MiB"
    large = one(IMAGE.ljust(MAX_BODY_BYTES, b"\0")) | {"timeout": TIMEOUT_S}
    for _ in range(10):
        *replies, small = ask_at_once(server, [large] * 4 + [one() | {"timeout": TIMEOUT_S}])
        assert small.status_code == 200
        assert {reply.status_code for reply in replies} <= {200, 503}
        refused = [reply for reply in replies if reply.status_code == 503]
        if refused:
            assert {reply.json()["error"]["type"] for reply in refused} == {"Overloaded"}
            assert all("Retry-After" in reply.headers for reply in refused)
            break
    else:
        pytest.fail("enough large bodies never shared a batch")
    assert worker_pids() == workers


def test_replies_that_one_batch_cannot_hold_are_refused(server: TorchServe, worker_pids: Callable[[], list[int]]) -> None:
    """One large reply is sent. Of many in a batch some are refused, and a small neighbour is answered."""
    workers = worker_pids()
    _, limit, beyond = row_of("replies of one batch")
    assert (limit, "503 `Overloaded`" in beyond, MAX_BATCH_BYTES) == ("32 MiB", True, 32 * 1024 * 1024)
    large = one(digit_of(1200, 1200), X_Saliency_Space="image") | {"timeout": TIMEOUT_S}
    alone = ask(server, large)
    assert alone.status_code == 200
    count = BATCH_SIZE - 1
    assert MAX_BATCH_BYTES / count < len(alone.content) < MAX_BATCH_BYTES
    for _ in range(10):
        *replies, small = ask_at_once(server, [large] * count + [one() | {"timeout": TIMEOUT_S}])
        assert small.status_code == 200
        assert {reply.status_code for reply in replies} <= {200, 503}
        refused = [reply for reply in replies if reply.status_code == 503]
        assert len(refused) < count
        if refused:
            assert {reply.json()["error"]["type"] for reply in refused} == {"Overloaded"}
            break
    else:
        pytest.fail("enough large requests never shared a batch")
    assert worker_pids() == workers


@pytest.mark.parametrize("name", ["model-config.yaml", "model-config-gpu.yaml"])
def test_worker_has_time_for_the_last_request_of_a_batch(name: str) -> None:
    """The last request starts within MAX_BATCH_SECONDS and takes a CPU up to three seconds; a slow machine has ten times that."""
    config = yaml.safe_load((ROOT / "serve_config" / name).read_text())
    assert config["responseTimeout"] >= MAX_BATCH_SECONDS + 40
    assert row_of("time of one batch")[1].startswith(f"{MAX_BATCH_SECONDS} s of work;")


SLOWEST = {
    "gradients": CASES["gradients of samples"].below,
    "pixels": CASES["pixels of one image"].below,
    "images to prepare": CASES["images to prepare"].below,
    "steps of a file": CASES["chunks"].below,
    "progressive bytes": CASES["progressive bytes"].below,
    "maps in the space image": CASES["numbers that are drawn"].below,
    "size of a drawing": CASES["size of a drawing"].below,
}


@pytest.mark.parametrize("name", SLOWEST)
def test_batches_of_the_slowest_requests_are_answered_in_time(
    server: TorchServe, worker_pids: Callable[[], list[int]], name: str
) -> None:
    """TorchServe ends a worker whose batch takes longer than responseTimeout; the whole batch would get no answer."""
    workers = worker_pids()
    slow = SLOWEST[name]() | {"timeout": TIMEOUT_S}
    replies = ask_at_once(server, [slow] * (BATCH_SIZE - 1) + [one() | {"timeout": TIMEOUT_S}])
    assert 200 in {reply.status_code for reply in replies}
    refused = [reply for reply in replies if reply.status_code != 200]  # by a slow machine, which had no time for them
    assert all((reply.status_code, reply.json()["error"]["type"]) == (503, "Overloaded") for reply in refused)
    assert worker_pids() == workers


def test_requests_that_may_wait_are_answered_and_more_are_refused_at_once(
    server: TorchServe, worker_pids: Callable[[], list[int]]
) -> None:
    """The worker is busy with a batch of slow requests meanwhile."""
    workers = worker_pids()
    assert row_of("requests waiting for a worker")[1:] == (f"{MAX_WAITING}", "503 from the frontend")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    call = build_call("predict", server.address, "/predictions/digits", IMAGE, {"Content-Type": "application/octet-stream"})
    slow = SLOWEST["gradients"]() | {"timeout": TIMEOUT_S}

    def statuses_of(count: int) -> list[int]:
        """Send so many requests at once, behind some slow ones."""
        busy = Thread(target=ask_at_once, args=(server, [slow] * (BATCH_SIZE // 2)))
        busy.start()
        load = Load(server.address, [call], count / 10_000, rate=10_000, connections=count, timeout_s=TIMEOUT_S)
        samples = run_load(load)
        busy.join()
        return [int(status) for status in samples.status]

    assert statuses_of(MAX_WAITING - 2 * BATCH_SIZE) == [200] * (MAX_WAITING - 2 * BATCH_SIZE)
    for _ in range(5):
        statuses = statuses_of(MAX_WAITING + 300)
        assert set(statuses) <= {200, 503}
        if 503 in statuses:
            break
    else:
        pytest.fail("the worker was never so busy that a thousand requests waited")
    assert statuses.count(200) >= MAX_WAITING - 2 * BATCH_SIZE
    assert requests.get(f"{server.address}/ping", timeout=TIMEOUT_S).status_code == 200
    assert worker_pids() == workers
