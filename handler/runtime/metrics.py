"""What a worker does -> counts, for Prometheus.

TorchServe's frontend keeps the counts of all workers, over their restarts, and serves them at /metrics, which is what people
scrape: no other port, process or package is needed. A worker tells it by one line of its standard output for each change, which
costs either side some ten microseconds. So a worker only notes here what it did, and a thread adds that up once a second and
writes one line for each count that changed; where there is nothing new it sleeps.

A histogram of the frontend's own would need a line for each observation, and its buckets start at 5 ms, where a step takes tenths
of that. The buckets here are counters with the label `le`, which PromQL's `histogram_quantile` reads as it reads any other.

Every label has few values, all known beforehand: none comes from a client. Knows nothing of TorchServe.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from handler.errors import ServiceError
from handler.gradients.explain import Differentiable
from handler.gradients.methods import METHODS, softmax
from handler.images.preparation import WARNING_TYPES
from handler.preprocess import PreparedRequest
from handler.protocol.reply import Reply

INTERVAL_S = 1.0  # between what happened and its counts, at most
MAX_NOTED_BATCHES = 100_000  # that wait to be added up; more than a worker does in INTERVAL_S
STEP_BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
CONFIDENCE_BOUNDS = (0.5, 0.9, 0.99, 0.999, 1.0)

COUNTERS = {  # name -> labels; serve_config/metrics.yaml declares them to TorchServe, with `model_name` before these
    "saliency_worker_starts_total": (),
    "saliency_requests_total": ("kind", "method", "outcome"),
    "saliency_errors_total": ("type",),
    "saliency_pictures_total": ("class",),
    "saliency_warnings_total": ("type",),
    "saliency_confidence_bucket": ("le",),
    "saliency_confidence_sum": (),
    "saliency_confidence_count": (),
    "saliency_step_seconds_bucket": ("step", "le"),
    "saliency_step_seconds_sum": ("step",),
    "saliency_step_seconds_count": ("step",),
}

Series = tuple[str, tuple[str, ...]]  # a counter's name, and the values of its labels
Emit = Callable[[Series, float], None]  # adds a value to a count that others see

logger = logging.getLogger(__name__)


# Labels are plain text: the hash of an enum's member is Python's own work, and each label is a key some times a batch.
class Kind:
    """What a request asks for; where it cannot be read, what its route is for."""

    PREDICTION = "prediction"
    EXPLANATION = "explanation"
    DESCRIPTION = "description"  # of the service


class Outcome:
    """What became of a request."""

    OK = "ok"
    CLIENT_ERROR = "client_error"
    SERVER_ERROR = "server_error"


class Step:
    """What a worker's time goes into. All together are a batch's time in the handler."""

    DECODE = "decode"  # requests and their images are read and prepared
    FORWARD = "forward"
    BACKWARD = "backward"
    MAP = "map"  # gradients become maps; pixels go to the device and back
    ENCODE = "encode"  # replies are written


NO_METHOD = "none"  # nothing is explained
SEVERAL_METHODS = "several"
UNREAD_METHOD = "unread"  # the request is refused
OUTCOMES = (Outcome.OK, Outcome.CLIENT_ERROR, Outcome.SERVER_ERROR)
STEPS = (Step.DECODE, Step.FORWARD, Step.BACKWARD, Step.MAP, Step.ENCODE)


class Answer(NamedTuple):
    """What is counted of one request. `error` is the type of the error that it got, `warnings` are the types of its warnings."""

    kind: str
    method: str
    outcome: str
    error: str | None
    warnings: tuple[str, ...] = ()


def answer_of(asked: PreparedRequest | None, reply: Reply, *, explain_route: bool) -> Answer:
    """Say what is counted of one request.

    Args:
        asked: what it asked for, where it could be read.
        reply: what it got.
        explain_route: whether it came in by a route that explains.
    """
    if asked is not None:
        methods = {options.method.name for options in asked.options if options.explain}
        kind = Kind.EXPLANATION if methods else Kind.PREDICTION
        method = SEVERAL_METHODS if len(methods) > 1 else methods.pop() if methods else NO_METHOD
    elif reply.error is None:
        kind, method = Kind.DESCRIPTION, NO_METHOD
    else:
        kind, method = (Kind.EXPLANATION if explain_route else Kind.PREDICTION), UNREAD_METHOD
    outcome = Outcome.OK if reply.status < 400 else Outcome.CLIENT_ERROR if reply.status < 500 else Outcome.SERVER_ERROR
    return Answer(kind, method, outcome, reply.error, reply.warnings)


@dataclass(slots=True)
class Batch:
    """What is noted of one batch.

    Attributes:
        seconds: that each step took; 0 of one that was not taken.
        logits: (N, K), of the parts that were computed together.
        answers: one a request.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    logits: list[NDArray[np.floating]] = field(default_factory=list)
    answers: Sequence[Answer] = ()


class Meter:
    """Notes what a worker does, and has it added up and emitted by a thread of its own, which ends with the process."""

    def __init__(self, class_count: int, emit: Emit | None) -> None:
        """Emit zeros for all counts, such that none seems to begin with its first change; without `emit` nothing is kept."""
        self._series = list(all_series(class_count))
        self._emit = emit
        self._batch = Batch()
        self._since = 0.0
        self._noted: deque[Batch] = deque(maxlen=MAX_NOTED_BATCHES)  # appending and taking need no lock
        self._has_news = threading.Event()
        if emit is not None:
            for series in self._series:
                emit(series, int(series[0] == "saliency_worker_starts_total"))
            threading.Thread(target=self._emit_forever, args=(emit,), name="metrics", daemon=True).start()

    def start(self) -> None:
        """Start with a batch."""
        self._batch = Batch()
        self._since = time.perf_counter()

    def lap(self, step: str) -> None:
        """Note that the time since the start, or the last lap, went into a step."""
        now = time.perf_counter()
        self._batch.seconds[step] += now - self._since
        self._since = now

    def see(self, logits: NDArray[np.floating]) -> None:
        """Note what the network says of some images: (N, K)."""
        self._batch.logits.append(logits)

    def finish(self, answers: Sequence[Answer]) -> None:
        """End the batch."""
        if self._emit is not None:
            self._batch.answers = answers
            self._noted.append(self._batch)
            if not self._has_news.is_set():
                self._has_news.set()

    def _emit_forever(self, emit: Emit) -> None:
        while self._has_news.wait():
            time.sleep(INTERVAL_S)
            self._has_news.clear()
            batches = [self._noted.popleft() for _ in range(len(self._noted))]
            try:
                counts = add_up(batches)
                for series in self._series:
                    if counts[series]:
                        emit(series, counts[series])
            except Exception as error:  # noqa: BLE001  # what is counted next must not be lost too
                logger.error("%s while counting %d batches", type(error).__name__, len(batches))


class TimedPasses:
    """A network and its derivative, whose time a meter gets.

    A GPU's work is waited for before its end is noted. That costs nothing: what follows in `saliency` waits for it anyway.
    """

    def __init__(self, passes: Differentiable, meter: Meter, device: torch.device) -> None:
        self._passes = passes
        self._meter = meter
        self._device = device

    def score(self, pixels: torch.Tensor, explained_count: int) -> tuple[torch.Tensor, Any]:
        """As `Differentiable`."""
        self._meter.lap(Step.MAP)
        scored = self._passes.score(pixels, explained_count)
        self._note(Step.FORWARD)
        return scored

    def pull_back(self, saved: Any, cotangents: torch.Tensor) -> torch.Tensor:  # noqa: ANN401  # each keeps its own
        """As `Differentiable`."""
        self._meter.lap(Step.MAP)
        gradients = self._passes.pull_back(saved, cotangents)
        self._note(Step.BACKWARD)
        return gradients

    def _note(self, step: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._meter.lap(step)


def all_series(class_count: int) -> Iterator[Series]:
    """Name every count there can be. Of a histogram's buckets the widest comes first: each holds all that narrower ones hold."""
    yield "saliency_worker_starts_total", ()
    methods = {
        Kind.PREDICTION: (NO_METHOD, UNREAD_METHOD),
        Kind.EXPLANATION: (*METHODS, SEVERAL_METHODS, UNREAD_METHOD),
        Kind.DESCRIPTION: (NO_METHOD,),
    }
    for kind, kind_methods in methods.items():
        for method in kind_methods:
            for outcome in OUTCOMES:
                if method != UNREAD_METHOD or outcome != Outcome.OK:
                    yield "saliency_requests_total", (kind, method, outcome)
    for error_type in sorted(_names_of_errors(ServiceError)):
        yield "saliency_errors_total", (error_type,)
    for index in range(class_count):
        yield "saliency_pictures_total", (str(index),)
    for warning in WARNING_TYPES:
        yield "saliency_warnings_total", (warning,)
    yield from _series_of("saliency_confidence", (), CONFIDENCE_BOUNDS)
    for step in STEPS:
        yield from _series_of("saliency_step_seconds", (step,), STEP_BOUNDS_S)


def add_up(batches: Iterable[Batch]) -> Counter[Series]:
    """Count what happened in some batches. Sums of a histogram are floats, all else are integers."""
    counts: Counter[Series] = Counter()
    answers: Counter[Answer] = Counter()
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    logits: list[NDArray[np.floating]] = []
    for batch in batches:
        logits += batch.logits
        for step, duration in batch.seconds.items():
            if duration:
                seconds[step].append(duration)
        answers.update(batch.answers)
    for answer, count in answers.items():
        counts["saliency_requests_total", (answer.kind, answer.method, answer.outcome)] += count
        if answer.error is not None:
            counts["saliency_errors_total", (answer.error,)] += count
        for warning in answer.warnings:
            counts["saliency_warnings_total", (warning,)] += count
    for step, durations in seconds.items():
        _add_histogram(counts, "saliency_step_seconds", (step,), STEP_BOUNDS_S, np.array(durations))
    if logits:
        scores = np.concatenate(logits)  # (N, K)
        for index, count in enumerate(np.bincount(scores.argmax(axis=1)).tolist()):
            counts["saliency_pictures_total", (str(index),)] += count
        _add_histogram(counts, "saliency_confidence", (), CONFIDENCE_BOUNDS, softmax(scores).max(axis=1))
    return counts


def _names_of_errors(family: type[ServiceError]) -> Iterator[str]:
    children = family.__subclasses__()
    if not children:
        yield family.__name__
    for child in children:
        yield from _names_of_errors(child)


def _series_of(name: str, labels: tuple[str, ...], bounds: Sequence[float]) -> Iterator[Series]:
    for bound in reversed(_texts_of(bounds)):
        yield f"{name}_bucket", (*labels, bound)
    yield f"{name}_sum", labels
    yield f"{name}_count", labels


def _add_histogram(
    counts: Counter[Series], name: str, labels: tuple[str, ...], bounds: Sequence[float], values: NDArray[np.floating]
) -> None:
    """Count values into buckets, each of which holds all values up to its bound."""
    places = np.searchsorted(bounds, values)  # of the first bound that is not less
    held = np.bincount(places, minlength=len(bounds) + 1).cumsum().tolist()
    for bound, count in zip(_texts_of(bounds), held, strict=True):
        counts[f"{name}_bucket", (*labels, bound)] += count
    counts[f"{name}_sum", labels] += values.sum()
    counts[f"{name}_count", labels] += len(values)


def _texts_of(bounds: Sequence[float]) -> list[str]:
    return [*(f"{bound:g}" for bound in bounds), "+Inf"]
