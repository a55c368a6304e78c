"""What is counted, and in which form TorchServe's frontend gets it."""

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from ts.context import Context
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.service import Service

from handler.errors import InternalError, UnreadableImage
from handler.gradients.explain import Autograd, predict_and_explain
from handler.gradients.methods import softmax
from handler.protocol.reply import Reply, render_error
from handler.runtime import metrics
from handler.runtime.metrics import (
    CONFIDENCE_BOUNDS,
    COUNTERS,
    STEP_BOUNDS_S,
    STEPS,
    Answer,
    Batch,
    Kind,
    Meter,
    Outcome,
    Series,
    Step,
    TimedPasses,
    add_up,
    all_series,
    answer_of,
)
from handler.saliency_handler import SaliencyHandler
from scripts.paths import ROOT, SAMPLE_FILES
from tests.conftest import manifest_of
from tests.worker import MIXED, answer

METRICS_FILE = ROOT / "serve_config" / "metrics.yaml"
WAIT_S = 60
# org.pytorch.serve.metrics.Metric and org.pytorch.serve.wlm.WorkerLifeCycle, TorchServe 0.12
FRONTEND_LINE = re.compile(
    r"^\[METRICS]\s*([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)(\|#type:([^|,]+))?\|#hostname:([^,]+),([^,]+)(,(.*))?$"
)


def read_line(line: str) -> tuple[str, list[tuple[str, str]], float]:
    """A metric's name, labels and value, as the frontend reads them."""
    found = FRONTEND_LINE.match(line)
    assert found is not None, line
    assert found[6] == "COUNTER"
    labels = [(name, value) for name, value in (pair.split(":") for pair in found[4].split(","))]
    return found[1], labels, float(found[3])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_torchserve_is_told_of_the_same_counters() -> None:
    declared = yaml.safe_load(METRICS_FILE.read_text())["model_metrics"]
    assert declared.keys() == {"counter"}
    assert {one["name"]: tuple(one["dimensions"]) for one in declared["counter"]} == {
        name: ("model_name", *labels) for name, labels in COUNTERS.items()
    }


def test_labels_have_few_values_all_known_beforehand() -> None:
    series = list(all_series(10))
    assert len(series) == len(set(series)) < 200
    assert {name for name, _ in series} == COUNTERS.keys()
    for name, values in series:
        assert len(values) == len(COUNTERS[name])
        assert all(re.fullmatch(r"[A-Za-z0-9_.+]+", value) for value in values)  # no sign of the frontend's own format


def test_classes_and_confidence_are_counted_as_one_would_by_hand() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (500, 10)).astype(np.float32)
    counts = add_up([Batch(logits=[logits[:3], logits[3:100]]), Batch(logits=[logits[100:]])])
    confidences = [softmax(row).max() for row in logits]
    for digit, count in Counter(row.argmax() for row in logits).items():
        assert counts["saliency_pictures_total", (str(digit),)] == count
    for bound in CONFIDENCE_BOUNDS:
        held = sum(confidence <= bound for confidence in confidences)
        assert counts["saliency_confidence_bucket", (f"{bound:g}",)] == held
    assert counts["saliency_confidence_bucket", ("1",)] == counts["saliency_confidence_bucket", ("+Inf",)] == 500
    assert counts["saliency_confidence_count", ()] == 500
    assert counts["saliency_confidence_sum", ()] == pytest.approx(sum(confidences))


def test_a_step_is_counted_in_every_bucket_that_holds_its_time() -> None:
    times = (0.0001, 0.0004, 0.3, 7.0, 0.0)  # at a bound, between two, above the last but one, above all, not taken
    counts = add_up([Batch(seconds={**dict.fromkeys(STEPS, 0.0), Step.FORWARD: seconds}) for seconds in times])
    held = [counts["saliency_step_seconds_bucket", ("forward", f"{bound:g}")] for bound in STEP_BOUNDS_S]
    assert held == [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3]
    assert counts["saliency_step_seconds_bucket", ("forward", "+Inf")] == 4
    assert counts["saliency_step_seconds_count", ("forward",)] == 4
    assert counts["saliency_step_seconds_sum", ("forward",)] == pytest.approx(7.3005)
    assert counts["saliency_step_seconds_count", ("backward",)] == 0


@pytest.mark.parametrize(
    ("reply", "explain_route", "expected"),
    [
        (Reply(200, "", b""), False, Answer(Kind.DESCRIPTION, "none", Outcome.OK, None)),
        (
            render_error(UnreadableImage("")),
            True,
            Answer(Kind.EXPLANATION, "unread", Outcome.CLIENT_ERROR, "UnreadableImage"),
        ),
        (render_error(InternalError("")), False, Answer(Kind.PREDICTION, "unread", Outcome.SERVER_ERROR, "InternalError")),
    ],
    ids=["description", "refused", "defect"],
)
def test_request_that_was_not_read_is_counted_by_its_route(reply: Reply, explain_route: bool, expected: Answer) -> None:
    assert answer_of(None, reply, explain_route=explain_route) == expected


def test_worker_tells_the_frontend_what_it_did_with_a_mixed_batch(
    unpack: Callable[[], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By TorchServe's own code, and read as its frontend reads it."""
    monkeypatch.setattr(metrics, "INTERVAL_S", 0.05)
    cache = MetricsCacheYamlImpl(str(METRICS_FILE))
    cache.initialize_cache()
    caplog.set_level(logging.INFO, logger="ts.metrics.caching_metric")
    model_dir = unpack()
    handler = SaliencyHandler()
    handler.initialize(Context("digits", str(model_dir), manifest_of(model_dir), 8, None, "0.12.0", metrics=cache))
    lines = [read_line(record.message) for record in caplog.records if record.name == "ts.metrics.caching_metric"]
    assert [(name, tuple(value for _, value in labels[1:])) for name, labels, _ in lines] == list(all_series(10))
    assert all(labels[0] == ("model_name", "digits") for _, labels, _ in lines)
    assert {name: value for name, _, value in lines if value} == {"saliency_worker_starts_total": 1}

    caplog.clear()
    statuses = [status for status, _, _ in answer(handler, MIXED, tmp_path / "unpacked")]
    wait_until(lambda: "saliency_step_seconds_count.Count:1|#model_name:digits,step:encode" in caplog.text)
    counted: Counter[tuple[str, ...]] = Counter()
    for record in caplog.records:
        if record.name == "ts.metrics.caching_metric":
            name, labels, value = read_line(record.message)
            counted[name, *(label for _, label in labels[1:])] += value  # type: ignore[assignment]
    assert {key[1:]: value for key, value in counted.items() if key[0] == "saliency_requests_total"} == {
        ("prediction", "none", "ok"): 1,
        ("explanation", "gradient", "ok"): 5,
        ("explanation", "unread", "client_error"): 2,
        ("prediction", "unread", "client_error"): 1,  # a client's own `describe`
    }
    assert sum(status == 200 for status in statuses) == 6
    assert {key[1]: value for key, value in counted.items() if key[0] == "saliency_errors_total"} == {
        "UnreadableImage": 1,
        "InvalidOption": 1,
        "EmptyRequest": 1,
    }
    assert sum(value for key, value in counted.items() if key[0] == "saliency_pictures_total") == 6
    assert all(counted["saliency_step_seconds_count", step] == 1 for step in STEPS)


def test_without_a_declaration_nothing_is_counted_and_all_is_served(
    unpack: Callable[[], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.yaml").write_text("model_metrics: {gauge: [{name: HandlerTime, unit: ms, dimensions: [Level]}]}")
    cache = MetricsCacheYamlImpl(str(tmp_path / "metrics.yaml"))
    cache.initialize_cache()
    model_dir = unpack()
    handler = SaliencyHandler()
    handler.initialize(Context("digits", str(model_dir), manifest_of(model_dir), 8, None, "0.12.0", metrics=cache))
    assert "nothing is counted; set metrics_config to a file that declares it" in caplog.text
    assert answer(handler, MIXED[:1], model_dir)[0][0] == 200
    assert "[METRICS]" not in caplog.text


@pytest.mark.parametrize("declared", [False, True], ids=["left out", "declared"])
def test_worker_writes_torchserves_own_metric_only_where_it_is_declared(
    declared: bool, unpack: Callable[[], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By TorchServe's own code, which writes it after each batch."""
    declaration = yaml.safe_load(METRICS_FILE.read_text())
    if declared:
        prediction_time = {"name": "PredictionTime", "unit": "ms", "dimensions": ["ModelName", "Level"]}
        declaration["model_metrics"].setdefault("gauge", []).append(prediction_time)
    (tmp_path / "metrics.yaml").write_text(yaml.safe_dump(declaration))
    cache = MetricsCacheYamlImpl(str(tmp_path / "metrics.yaml"))
    cache.initialize_cache()
    handler, model_dir = SaliencyHandler(), unpack()
    service = Service("digits", str(model_dir), manifest_of(model_dir), handler.handle, None, 8, metrics_cache=cache)
    service.set_cl_socket(None)
    cache.model_name = "digits"
    handler.initialize(service.context)
    caplog.set_level(logging.INFO, logger="ts.metrics.caching_metric")
    parameter = {"name": "body", "contentType": "image/png", "value": bytearray(SAMPLE_FILES[0].read_bytes())}
    reply = service.predict([{"requestId": b"an-id", "headers": [], "parameters": [parameter]}])
    assert b'"digit":' in reply
    assert ("[METRICS]PredictionTime.Milliseconds:" in caplog.text) == declared


def test_counts_come_through_after_a_failure_to_emit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(metrics, "INTERVAL_S", 0.01)
    emitted: list[tuple[Series, float]] = []
    failures = iter([OSError("client's words")])

    def emit(series: Series, value: float) -> None:
        if value and series[0] == "saliency_requests_total":
            for failure in failures:
                raise failure
        emitted.append((series, value))

    meter = Meter(10, emit)
    meter.finish([Answer(Kind.PREDICTION, "none", Outcome.OK, None)])
    wait_until(lambda: "OSError while counting 1 batches" in caplog.text)
    assert "client's words" not in caplog.text
    meter.start()
    meter.finish([Answer(Kind.PREDICTION, "none", Outcome.OK, None)] * 3)
    wait_until(lambda: (("saliency_requests_total", ("prediction", "none", "ok")), 3) in emitted)


def test_nothing_is_lost_between_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "INTERVAL_S", 0.001)
    total: Counter[Series] = Counter()

    def emit(series: Series, value: float) -> None:
        total[series] += value  # type: ignore[assignment]

    meter = Meter(10, emit)
    for _ in range(500):
        meter.start()
        meter.see(np.zeros((2, 10), np.float32))
        meter.lap(Step.FORWARD)
        meter.finish([Answer(Kind.PREDICTION, "none", Outcome.OK, None)])
    wait_until(lambda: total["saliency_step_seconds_count", ("forward",)] == 500)
    assert total["saliency_requests_total", ("prediction", "none", "ok")] == 500
    assert total["saliency_pictures_total", ("0",)] == 1000
    assert total["saliency_confidence_bucket", ("0.5",)] == 1000


def test_idle_worker_does_not_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    waking = threading.Event()
    monkeypatch.setattr("handler.runtime.metrics.time.sleep", lambda _: waking.set())
    meter = Meter(10, lambda *_: None)
    assert not waking.wait(0.3)
    meter.finish([])
    assert waking.wait(WAIT_S)


def test_timing_changes_no_answer_and_tells_forward_from_backward(network: nn.Module, digit_batch: torch.Tensor) -> None:
    pixels = digit_batch[:4]
    seen: dict[bool, dict[str, float]] = {}
    for explained in (True, False):
        targets: list[Any] = [(None, 3), (), (7,), ()] if explained else [()] * 4
        meter = Meter(10, None)
        meter.start()
        started = time.perf_counter()
        timed = TimedPasses(Autograd(network), meter, pixels.device)
        logits, explanations = predict_and_explain(timed, pixels, targets)
        elapsed = time.perf_counter() - started
        plain_logits, plain = predict_and_explain(Autograd(network), pixels, targets)
        np.testing.assert_array_equal(logits, plain_logits)
        for one, other in zip(explanations, plain, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                np.testing.assert_array_equal(one.maps, other.maps)
        seen[explained] = meter._batch.seconds
        assert 0 < seen[explained][Step.FORWARD] < elapsed
    assert seen[True][Step.BACKWARD] > 0
    assert seen[False][Step.BACKWARD] == 0
