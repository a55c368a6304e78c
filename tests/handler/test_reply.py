"""Replies whose parts do not fit together, and the limits that keep a reply small enough to be sent."""

import json

import numpy as np
import pytest

from handler.errors import WrongShape
from handler.gradients.explain import Explanation
from handler.gradients.methods import (
    GRADIENT,
    Aggregate,
    Baseline,
    GradientXInput,
    IntegratedGradients,
    Method,
    SmoothGrad,
    softmax,
)
from handler.images.preparation import leave_unchanged
from handler.limits import MAX_BATCH_BYTES, MAX_ID_CHARACTERS, MAX_IMAGES, MAX_MAPS
from handler.protocol.kserve import Infer
from handler.protocol.options import Options
from handler.protocol.reply import Reply, Result, fit_batch, render_results
from handler.protocol.request import ReplyFormat
from scripts.paths import SERVE_CONFIG

MODEL = {"name": "digits", "version": "1.0", "weights_sha256": "0" * 64}


def result(height: int, value: float = 0, method: Method = GRADIENT) -> Result:
    maps = np.full((1, height, 28), value, np.float32)
    deltas = np.array([-1.2345678901234567e-10]) if method.has_convergence_delta else None
    image = leave_unchanged(maps[0], "PNG image")
    logits = np.arange(10, dtype=np.float32)
    return Result(Options(explain=True, method=method), image, logits, softmax(logits), Explanation((3,), maps, maps, deltas))


@pytest.mark.parametrize(
    ("reply_format", "infer"), [(ReplyFormat.NPY, None), (ReplyFormat.JSON, Infer(None, ()))], ids=["npy", "tensors"]
)
def test_maps_of_different_shapes_make_no_array(reply_format: ReplyFormat, infer: Infer | None) -> None:
    with pytest.raises(WrongShape, match=r"expected maps of one shape for one array, got \[\(28, 28\), \(40, 28\)\]"):
        render_results([result(40), result(28)], reply_format, MODEL, listed=True, infer=infer)


def test_maps_of_different_shapes_may_stand_in_a_list() -> None:
    reply = render_results([result(40), result(28)], ReplyFormat.JSON, MODEL, listed=True, infer=None)
    assert reply.status == 200


LONGEST = SmoothGrad(samples=500, noise=0.12345678901234568, seed=2**32 - 1, aggregate=Aggregate.VARIANCE)


@pytest.mark.parametrize("method", [GRADIENT, LONGEST, IntegratedGradients(300, Baseline.ZERO)], ids=lambda method: method.name)
@pytest.mark.parametrize("infer", [None, Infer("\U0001f600" * MAX_ID_CHARACTERS, ())], ids=["v1", "v2"])
def test_largest_reply_is_one_that_torchserve_sends(infer: Infer | None, method: Method) -> None:
    """A reply over max_response_size would kill the worker, and its batch with it."""
    (limit,) = [
        line.partition("=")[2]
        for line in (SERVE_CONFIG / "config.properties").read_text().splitlines()
        if line.startswith("max_response_size=")
    ]
    assert MAX_MAPS >= MAX_IMAGES
    longest_float = float(np.float32(-1.1754944e-38))
    one = render_results([result(28, longest_float, method)], ReplyFormat.JSON, MODEL, listed=True, infer=infer)
    assert len(one.body) * MAX_MAPS < min(int(limit), MAX_BATCH_BYTES)


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ([GradientXInput()] * 101, "gradient_x_input"),
        ([GradientXInput(), GRADIENT] * 50, ";".join(["gradient_x_input", "gradient"] * 50)),
        ([GradientXInput(), GRADIENT] * 51, None),
    ],
    ids=["all alike", "a hundred different", "more"],
)
def test_binary_reply_names_its_methods(methods: list[Method], expected: str | None) -> None:
    reply = render_results([result(28, method=method) for method in methods], ReplyFormat.NPY, MODEL, listed=True, infer=None)
    assert reply.headers.get("X-Saliency-Method") == expected
    assert all(len(value) < 4096 for value in reply.headers.values())


@pytest.mark.parametrize(("count", "has_header"), [(100, True), (101, False)])
def test_binary_reply_lists_up_to_a_hundred_gaps(count: int, has_header: bool) -> None:
    results = [result(28), *[result(28, method=IntegratedGradients())] * count]
    reply = render_results(results, ReplyFormat.NPY, MODEL, listed=True, infer=None)
    found = reply.headers.get("X-Saliency-Completeness-Gap")
    assert found == (";-1.2345678901234568e-10" * count if has_header else None)
    assert all(len(value) < 4096 for value in reply.headers.values())


@pytest.mark.parametrize(
    ("sizes", "refused"),
    [
        ([], []),
        ([1000], []),
        ([400, 300, 300], []),
        ([400, 300, 301], [0]),
        ([10, 900, 20, 800, 30], [1]),
        ([10, 900, 20, 800, 700], [1, 3]),
    ],
    ids=str,
)
def test_batch_too_large_to_be_sent_refuses_its_largest_replies(sizes: list[int], refused: list[int]) -> None:
    factor = 1000  # an error has a few hundred bytes itself
    replies = [Reply(200, "application/x-npy", bytes(size * factor)) for size in sizes]
    fitted = fit_batch(replies, max_bytes=1000 * factor + 500)
    assert [index for index, reply in enumerate(fitted) if reply.status == 503] == refused
    assert all(fitted[index] == replies[index] for index in range(len(sizes)) if index not in refused)
    for index in refused:
        error = json.loads(fitted[index].body)["error"]
        assert (error["code"], error["type"]) == (503, "Overloaded")
        assert f"{sizes[index] * factor:,} bytes" in error["message"]


def test_reply_that_is_too_large_by_itself_is_a_413() -> None:
    small = Reply(200, "application/x-npy", b"1")
    fitted, neighbour = fit_batch([Reply(200, "application/x-npy", bytes(2000)), small], max_bytes=1000)
    assert neighbour == small
    assert fitted.status == 413
    assert "expected a reply of at most 1,000 bytes, got a request whose reply has 2,000" in fitted.body.decode()
