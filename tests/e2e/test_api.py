"""The HTTP API through a real TorchServe: every form of request, every error in a batch of good requests, a storm of all.

Answers are compared with an independent computation from the archive's weights (tests/oracle.py).
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import requests
from numpy.typing import NDArray

from scripts.paths import SAMPLE_FILES
from scripts.research.accuracy import count_right_answers
from scripts.serving.launcher import TorchServe
from tests.client import (
    BATCH_SIZE,
    ERRORS,
    TIMEOUT_S,
    Arguments,
    Sample,
    ask,
    ask_at_once,
    base64_of,
    check_error,
    check_explanation,
    check_prediction,
    explain,
    predict,
)
from tests.conftest import label_of
from tests.tolerance import require_close


def check_npy(reply: requests.Response, sample: Sample, target: int | list[int]) -> None:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/x-npy"
    array: NDArray[np.float32] = np.load(BytesIO(reply.content))
    assert array.dtype == np.float32
    require_close(array, sample.jacobian[target], row_axes=2)
    assert reply.headers["X-Digit"] == str(sample.predicted)
    assert reply.headers["X-Saliency-Target"] == ",".join(str(k) for k in np.atleast_1d(target))
    assert float(reply.headers["X-Saliency-Max"]) == array.max()


# --- forms of requests


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda s: predict(data=s.png), id="raw body"),
        pytest.param(lambda s: predict(data=s.png, method="PUT"), id="raw body, PUT"),
        pytest.param(lambda s: predict(data=s.png, headers={"Content-Type": "image/png"}), id="raw body with a type"),
        pytest.param(lambda s: predict(data=s.png, headers={"Content-Type": "text/plain"}), id="raw body with a wrong type"),
        pytest.param(lambda s: predict(json={"data": base64_of(s)}), id="JSON base64"),
        pytest.param(lambda s: predict(json={"image": base64_of(s)}), id="JSON image"),
        pytest.param(lambda s: predict(json={"data": s.levels.tolist()}), id="JSON integers"),
        pytest.param(lambda s: predict(json={"data": (s.levels / 255).tolist()}), id="JSON floats"),
        pytest.param(
            lambda s: predict(
                data=json.dumps({"data": base64_of(s)}), headers={"Content-Type": "application/json; charset=utf-8"}
            ),
            id="JSON with a charset",
        ),
        pytest.param(lambda s: predict(files={"data": s.png}), id="form field data"),
        pytest.param(lambda s: predict(files={"image": ("digit.png", s.png, "image/png")}), id="form field image with a type"),
        pytest.param(lambda s: predict(files={"body": s.png}), id="form field body"),
        pytest.param(lambda s: predict(data=s.png, headers={"describe": "True"}), id="a client's describe header"),
        pytest.param(lambda s: predict(data=s.png, headers={"explain": "True"}), id="a client's explain header"),
        pytest.param(
            lambda s: predict(json={"data": base64_of(s), "explain": False, "target": 3}), id="a target and no explanation"
        ),
    ],
)
def test_predictions_answer_without_an_explanation(
    server: TorchServe, samples: list[Sample], make: Callable[[Sample], Arguments]
) -> None:
    assert "explanation" not in check_prediction(ask(server, make(samples[0])), samples[0])


@pytest.mark.parametrize(
    ("make", "target"),
    [
        pytest.param(lambda s: explain(data=s.png), None, id="route"),
        pytest.param(lambda s: explain(files={"data": s.png}), None, id="route with a form"),
        pytest.param(lambda s: predict(data=s.png, headers={"X-Saliency-Explain": "true"}), None, id="header"),
        pytest.param(lambda s: predict(files={"data": s.png}, data={"explain": "true"}), None, id="form field"),
        pytest.param(lambda s: predict(json={"data": base64_of(s), "explain": True}), None, id="JSON field"),
        pytest.param(lambda s: explain(json={"data": base64_of(s), "target": 0}), 0, id="TorchServe's sample request"),
        pytest.param(lambda s: explain(data=s.png, headers={"x-saliency-target": "9"}), 9, id="target as header"),
        pytest.param(lambda s: explain(files={"data": s.png}, data={"target": "4"}), 4, id="target as form field"),
        pytest.param(lambda s: explain(json={"data": s.levels.tolist(), "target": [8, 1]}), [8, 1], id="list of targets"),
        pytest.param(lambda s: explain(data=s.png, headers={"X-SALIENCY-TARGET": "8,1"}), [8, 1], id="list as header"),
        pytest.param(lambda s: explain(data=s.png, headers={"X-Saliency-Target": "all"}), list(range(10)), id="all"),
        pytest.param(lambda s: explain(json={"data": base64_of(s), "encoding": "base64"}), None, id="base64 floats"),
        pytest.param(
            lambda s: explain(files={"data": s.png}, data={"encoding": "base64", "target": "all"}),
            list(range(10)),
            id="all as base64",
        ),
        pytest.param(lambda s: explain(data=s.png, headers={"Accept": "text/html, */*;q=0.8"}), None, id="a browser's Accept"),
    ],
)
def test_explanations_are_the_exact_gradients(
    server: TorchServe, samples: list[Sample], make: Callable[[Sample], Arguments], target: int | list[int] | None
) -> None:
    for sample in samples[:3]:
        check_explanation(ask(server, make(sample)), sample, target)


@pytest.mark.parametrize("target", [3, [5], list(range(10))], ids=str)
def test_npy_reply_holds_the_map(server: TorchServe, samples: list[Sample], target: int | list[int]) -> None:
    fields = {"data": samples[1].levels.tolist(), "target": target}
    check_npy(ask(server, explain(json=fields, headers={"Accept": "application/x-npy"})), samples[1], target)


def test_the_projects_own_digits_are_read_rightly(server: TorchServe) -> None:
    labels = [label_of(file) for file in SAMPLE_FILES]
    files = [file.read_bytes() for file in SAMPLE_FILES]
    assert count_right_answers(files, labels, f"{server.address}/predictions/digits") == len(SAMPLE_FILES)


def test_explanation_of_a_blank_image_is_finite(server: TorchServe) -> None:
    reply = ask(server, explain(json={"data": [[0] * 28] * 28, "target": "all", "prepare": "none"})).json()
    assert np.isfinite(reply["explanation"]["saliency"]).all()


# --- errors


@pytest.mark.parametrize(("make", "status", "kind"), ERRORS)
def test_error_costs_its_neighbours_nothing(
    server: TorchServe,
    samples: list[Sample],
    batch_count: Callable[[], int],
    worker_pids: Callable[[], list[int]],
    make: Callable[[Sample], Arguments],
    status: int,
    kind: str,
) -> None:
    """Send one bad request and seven good ones at once until they share a batch; every round has the right answers."""
    workers = worker_pids()
    good = samples[: BATCH_SIZE - 1]
    for _ in range(10):
        batches_before = batch_count()
        batch = [make(samples[0])] + [
            explain(data=sample.png, headers={"X-Saliency-Target": str(target)}) if target % 2 else predict(data=sample.png)
            for target, sample in enumerate(good)
        ]
        bad_reply, *good_replies = ask_at_once(server, batch)
        check_error(bad_reply, status, kind)
        for target, (sample, reply) in enumerate(zip(good, good_replies, strict=True)):
            if target % 2:
                check_explanation(reply, sample, target)
            else:
                check_prediction(reply, sample)
        if batch_count() == batches_before + 1:
            break
    else:
        pytest.fail("the eight requests never shared one batch")
    assert worker_pids() == workers


def test_registering_a_model_over_http_is_off(server: TorchServe) -> None:
    reply = requests.post(f"{server.management_address}/models?url=https://example.invalid/x.mar", timeout=TIMEOUT_S)
    assert reply.status_code == 405


# --- everything at once


def test_storm_of_mixed_requests_gives_every_client_its_own_answer(
    server: TorchServe, samples: list[Sample], batch_count: Callable[[], int], worker_pids: Callable[[], list[int]]
) -> None:
    random = np.random.default_rng(7)
    request_count = 600
    errors: list[Any] = [error.values for error in ERRORS]

    def plan(_: int) -> tuple[Arguments, Callable[[requests.Response], object]]:
        sample = samples[random.integers(len(samples))]
        target = int(random.integers(10))
        pair = [target, int(random.integers(10))]
        make, status, kind = errors[random.integers(len(errors))]
        plans: list[tuple[Arguments, Callable[[requests.Response], object]]] = [
            (predict(data=sample.png), lambda reply: check_prediction(reply, sample)),
            (predict(json={"data": sample.levels.tolist()}), lambda reply: check_prediction(reply, sample)),
            (explain(data=sample.png), lambda reply: check_explanation(reply, sample)),
            (
                explain(files={"data": sample.png}, data={"target": target}),
                lambda reply: check_explanation(reply, sample, target),
            ),
            (
                explain(json={"data": base64_of(sample), "target": pair, "encoding": "base64"}),
                lambda reply: check_explanation(reply, sample, pair),
            ),
            (
                explain(data=sample.png, headers={"Accept": "application/x-npy", "X-Saliency-Target": str(target)}),
                lambda reply: check_npy(reply, sample, target),
            ),
            (
                predict(data=sample.png, headers={"X-Saliency-Explain": "true", "X-Saliency-Target": "all"}),
                lambda reply: check_explanation(reply, sample, list(range(10))),
            ),
            (make(sample), lambda reply: check_error(reply, status, kind)),
        ]
        return plans[random.integers(len(plans))]

    planned = [plan(number) for number in range(request_count)]
    workers, batches_before = worker_pids(), batch_count()
    with ThreadPoolExecutor(4 * BATCH_SIZE) as pool:
        replies = list(pool.map(lambda arguments: ask(server, arguments), [arguments for arguments, _ in planned]))
    batches = batch_count() - batches_before
    for reply, (_, check) in zip(replies, planned, strict=True):
        check(reply)
    assert batches < request_count / 3, f"{request_count} requests came in {batches} batches: too few shared one"
    assert worker_pids() == workers
