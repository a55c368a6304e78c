"""One record a request -> rates, latencies and errors.

Knows nothing of how the requests were sent.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)

RECORD = np.dtype(
    [
        ("scheduled_s", "f8"),  # when the request was scheduled
        ("due_s", "f8"),  # when it could be sent: scheduled, and a connection was free; NaN where it never was
        ("sent_s", "f8"),  # when sending began; NaN where it never did
        ("done_s", "f8"),  # when the reply was complete, or the request given up
        ("call", "i4"),  # index of the call
        ("status", "i2"),  # of the reply, 0 where there was none
        ("failure", "i1"),  # a Failure
    ]
)


class Failure(IntEnum):
    """The reason for which a request has no good reply, beside its status."""

    NONE = 0
    REFUSED = 1
    UNREACHABLE = 2
    TLS = 3
    RESET = 4
    CLOSED = 5  # by the server, before the reply was complete
    TIMEOUT = 6
    GARBAGE = 7  # no HTTP/1.1
    WRONG_FORM = 8  # HTTP, but the content is not what was asked for; only the caller can tell

    @property
    def label(self) -> str:
        """As reports show it."""
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True, slots=True)
class FirstReply:
    """The first good reply to a call in the window, whole. `row` is its index among the records."""

    row: int
    head: bytes
    body: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """The measurements of a run. Times are seconds since the end of the warm-up; those of the warm-up are negative.

    Every property counts only the window: requests scheduled from 0 to `duration_s`, or, for `served_rate`, answered in it.

    Attributes:
        names: of the calls, by their index.
        records: (N,) of RECORD, in the order in which requests ended, with those of the warm-up.
        duration_s: of the window.
        offered_rate: requests scheduled a second; None in a closed loop.
        connections: the most that were open at once.
        cpu_share: the processor time of this process in the window, over its wall time.
        first_replies: by index of the call.
    """

    names: tuple[str, ...]
    records: NDArray[np.void]
    duration_s: float
    offered_rate: float | None
    connections: int
    cpu_share: float
    first_replies: Mapping[int, FirstReply]

    @property
    def scheduled_s(self) -> NDArray[np.float64]:
        """Instants at which requests were scheduled: (N,), those of the warm-up included."""
        return self._column("scheduled_s")

    @property
    def sent_s(self) -> NDArray[np.float64]:
        """Instants at which sending began: (N,), NaN where it never did."""
        return self._column("sent_s")

    @property
    def done_s(self) -> NDArray[np.float64]:
        """Instants at which replies were complete or given up: (N,)."""
        return self._column("done_s")

    @property
    def call(self) -> NDArray[np.int32]:
        """Index of the call of each request: (N,)."""
        return self._column("call")

    @property
    def status(self) -> NDArray[np.int16]:
        """Status of each reply: (N,), 0 where there was none."""
        return self._column("status")

    @property
    def failure(self) -> NDArray[np.int8]:
        """The `Failure` of each request: (N,)."""
        return self._column("failure")

    @property
    def good(self) -> NDArray[np.bool_]:
        """Requests that have a reply with a 2xx status and no failure: (N,)."""
        return np.asarray((self.status >= 200) & (self.status < 300) & (self.failure == Failure.NONE))

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Requests that were scheduled in the window: (N,)."""
        return np.asarray((self.scheduled_s >= 0) & (self.scheduled_s < self.duration_s))

    @property
    def timed(self) -> NDArray[np.bool_]:
        """Requests that have a latency: (N,), the good ones, and timeouts with the time waited.

        A timeout's latency is at least the time waited; other failures say nothing of how long an answer takes.
        """
        return np.asarray(self.counted & (self.good | (self.failure == Failure.TIMEOUT)))

    @property
    def request_count(self) -> int:
        """Number of requests that were scheduled in the window."""
        return int(self.counted.sum())

    @property
    def served_rate(self) -> float:
        """Good replies a second that arrived in the window."""
        in_window = (self.done_s >= 0) & (self.done_s < self.duration_s)
        return float((in_window & self.good).sum() / self.duration_s)

    @property
    def error_counts(self) -> dict[str, int]:
        """Numbers of failed requests of the window, by kind: a `Failure`, or the status as "HTTP 503"."""
        bad = self.counted & ~self.good
        kinds = zip(self.failure[bad].tolist(), self.status[bad].tolist(), strict=True)
        return dict(sorted(Counter(Failure(failure).label if failure else f"HTTP {status}" for failure, status in kinds).items()))

    def latencies_ms(self, name: str | None = None) -> NDArray[np.float64]:
        """Latencies from schedule to complete reply: (M,) of the `timed` requests.

        Args:
            name: only of calls of this name.
        """
        chosen = self.timed
        if name is not None:
            chosen = chosen & np.array([own == name for own in self.names])[self.call]
        return np.asarray((self.done_s - self.scheduled_s)[chosen] * 1e3)

    def latency_quantiles_ms(self, quantiles: Sequence[float] = QUANTILES, name: str | None = None) -> NDArray[np.float64]:
        """Quantiles of `latencies_ms`: (len(quantiles),), NaN where there are none."""
        return quantiles_of(self.latencies_ms(name), quantiles)

    def lag_quantiles_ms(self, quantiles: Sequence[float] = QUANTILES) -> NDArray[np.float64]:
        """Quantiles of the generator's own lag: by how much it sent late, after a request was due."""
        lags_ms = (self.sent_s - self._column("due_s"))[self.counted] * 1e3
        return quantiles_of(lags_ms[~np.isnan(lags_ms)], quantiles)

    def mark_wrong_forms(self, has_right_form: Callable[[str, bytes], bool]) -> None:
        """Inspect the first good reply to each call; where its form is wrong, its record becomes a failure.

        Args:
            has_right_form: whether a reply's body is what calls of this name ask for.
        """
        for call, reply in self.first_replies.items():
            if not has_right_form(self.names[call], reply.body):
                self.failure[reply.row] = Failure.WRONG_FORM

    def _column(self, name: str) -> NDArray[Any]:
        return np.asarray(self.records[name])


def quantiles_of(values: NDArray[np.float64], quantiles: Sequence[float]) -> NDArray[np.float64]:
    """Quantiles of (N,) values: (len(quantiles),), NaN where there are none."""
    return np.quantile(values, quantiles) if len(values) else np.full(len(quantiles), np.nan)


@dataclass(frozen=True, slots=True)
class Figures:
    """The few figures that one measurement of many comes down to.

    Attributes:
        connections: the most that were open at once; in a closed loop, those that were kept busy.
        requests: how many were sent.
        rate: good replies a second.
        p50_ms, p99_ms: latency; None where no request had a good reply.
        error_counts: requests without a good reply, by kind.
        generator_cpu_share: of one core that the load generator itself took; near 1 it, and not the server, is the limit.
    """

    connections: int
    requests: int
    rate: float
    p50_ms: float | None
    p99_ms: float | None
    error_counts: dict[str, int]
    generator_cpu_share: float

    @classmethod
    def of(cls, samples: Samples) -> "Figures":
        """Reduce a run's samples."""
        p50_ms, p99_ms = (None if math.isnan(value) else value for value in samples.latency_quantiles_ms((0.5, 0.99)).tolist())
        return cls(
            *(samples.connections, samples.request_count, samples.served_rate, p50_ms, p99_ms),
            *(samples.error_counts, samples.cpu_share),
        )

    @property
    def is_good(self) -> bool:
        """Whether there were requests, and all had good replies."""
        return self.requests > 0 and not self.error_counts
