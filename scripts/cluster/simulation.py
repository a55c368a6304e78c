"""Arrivals and service times -> what clients see while an autoscaler adds and removes pods.

A model of what the manifests do, event by event: pods with workers that take all that waits, up to a batch; a queue that refuses
what is too much; Prometheus, whose value is old; and the algorithm of a HorizontalPodAutoscaler. Knows nothing of Kubernetes,
HTTP or files.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SYNC_S = 15.0  # a HorizontalPodAutoscaler's period
SCRAPE_S = 10.0  # PodMonitor's interval
RULE_S = 15.0  # evaluation of serve_config/prometheus/autoscaling.yml
WINDOW_S = 60.0  # of its rate
TOLERANCE = 0.1  # an autoscaler's: closer to the target than this is near enough
DOWN_WINDOW_S = 300.0  # stabilizationWindowSeconds of scaleDown
DOWN_SHARE, DOWN_PERIOD_S = 0.1, 60.0  # its policy
UP_PODS = 4  # policies of scaleUp: as many pods as there are, or this many, in 15 s


@dataclass(frozen=True, slots=True)
class Cluster:
    """What serves, and what scales it.

    Attributes:
        workers: of one pod.
        batch_size: most requests that a worker takes at once.
        queue_size: requests that may wait in one pod; the next one is refused.
        start_s: seconds from the wish for a pod to its first request.
        least: fewest pods.
        most: most pods.
        target: requests in flight of one pod that the autoscaler aims at; None for a fixed number of pods, `least`.
        is_least_loaded: whether a request goes to the pod with fewer requests of two chosen by lot, as Envoy sends it, rather
            than to any, as a Service does.
    """

    workers: int = 2
    batch_size: int = 32
    queue_size: int = 1000
    start_s: float = 30.0
    least: int = 2
    most: int = 20
    target: float | None = 16.0
    is_least_loaded: bool = False


@dataclass(slots=True)
class Pod:
    """One pod: what waits, what works, and what Prometheus has read of it."""

    ready_s: float
    idle: int
    waiting: deque[float] = field(default_factory=deque)
    in_flight: int = 0
    latency_sum_s: float = 0.0
    scraped: deque[tuple[float, float]] = field(default_factory=deque)  # time, latency_sum_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation gives.

    Attributes:
        arrivals_s: (N,), when each answered request came.
        latencies_s: (N,), how long it took.
        refused_s: (M,), when each refused request came.
        pods: (time, number of pods) at each change, from 0 s on; pods that start are counted.
        end_s: length of the simulation.
    """

    arrivals_s: NDArray[np.float64]
    latencies_s: NDArray[np.float64]
    refused_s: NDArray[np.float64]
    pods: Sequence[tuple[float, int]]
    end_s: float

    @property
    def pod_seconds(self) -> float:
        """The sum of all pods' times."""
        ends = [time for time, _ in self.pods[1:]] + [self.end_s]
        return sum(count * (end - start) for (start, count), end in zip(self.pods, ends, strict=True))


def trapezoid(seconds: NDArray[np.float64], start_s: float, ramp_s: float, plateau_s: float) -> NDArray[np.float64]:
    """Rise from 0 to 1 within a ramp, stay, fall as fast; 0 elsewhere."""
    ends = np.array([start_s, start_s + ramp_s, start_s + ramp_s + plateau_s, start_s + 2 * ramp_s + plateau_s])
    return np.interp(seconds, ends, [0.0, 1.0, 1.0, 0.0])


def draw_arrivals(rates: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw the times of a Poisson process.

    Args:
        rates: (T,), requests a second in each second.
    Returns:
        (N,), sorted, in seconds.
    """
    counts = generator.poisson(rates)
    seconds = np.repeat(np.arange(len(rates), dtype=np.float64), counts)
    arrivals: NDArray[np.float64] = np.sort(seconds + generator.random(len(seconds)))
    return arrivals


def desired_pods(value: float | None, current: int, cluster: Cluster) -> int:
    """Decide as a HorizontalPodAutoscaler does, before its windows and policies: AverageValue of an external metric."""
    if value is None or cluster.target is None:
        return current
    if abs(value / (cluster.target * current) - 1) <= TOLERANCE:
        return current
    return min(max(math.ceil(value / cluster.target), cluster.least), cluster.most)


class Simulation:
    """One run: `simulate` makes it and runs it to its end."""

    def __init__(self, cluster: Cluster, service_s: NDArray[np.float64], generator: np.random.Generator) -> None:
        self.cluster = cluster
        self.generator = generator
        self.service_s = service_s
        self.pods = [Pod(0.0, cluster.workers) for _ in range(cluster.least)]
        self.changes = [(0.0, cluster.least)]
        self.finishing: list[tuple[float, int, Pod, list[float]]] = []  # a heap: end of a batch, its number, pod, arrivals
        self.batch_count = 0
        self.arrivals: list[float] = []
        self.latencies: list[float] = []
        self.refused: list[float] = []
        self.recorded: float | None = None  # the rule's last value
        self.wishes: deque[tuple[float, int]] = deque()  # of the last five minutes
        self.removals: deque[tuple[float, int]] = deque()  # of the last minute
        self.draws: Iterator[float] = iter(())
        self.lots: Iterator[float] = iter(())

    def run(self, arrivals_s: NDArray[np.float64], end_s: float) -> Outcome:
        """Let all requests come; then let all be answered."""
        ticks = self._ticks(end_s)
        next_tick = next(ticks, None)
        for arrival in arrivals_s.tolist():
            while next_tick is not None and next_tick[0] <= arrival:
                self._finish_until(next_tick[0])
                self._tick(*next_tick)
                next_tick = next(ticks, None)
            self._finish_until(arrival)
            self._arrive(arrival)
        self._finish_until(math.inf)
        return Outcome(np.array(self.arrivals), np.array(self.latencies), np.array(self.refused), self.changes, end_s)

    @staticmethod
    def _ticks(end_s: float) -> Iterator[tuple[float, str]]:
        scrapes = [(SCRAPE_S * i, "scrape") for i in range(1, int(end_s / SCRAPE_S) + 1)]
        rules = [(RULE_S * i + 4, "rule") for i in range(1, int(end_s / RULE_S) + 1)]  # they do not keep step with each other
        syncs = [(SYNC_S * i + 11, "sync") for i in range(1, int(end_s / SYNC_S) + 1)]
        return iter(sorted(scrapes + rules + syncs))

    def _tick(self, now: float, kind: str) -> None:
        if kind == "scrape":
            for pod in self.pods:
                if pod.ready_s <= now:
                    pod.scraped.append((now, pod.latency_sum_s))
                    while pod.scraped[0][0] < now - 2 * WINDOW_S:
                        pod.scraped.popleft()
        elif kind == "rule":
            self.recorded = self._requests_in_flight(now)
        else:
            self._scale(now)

    def _requests_in_flight(self, now: float) -> float | None:
        """Compute the rule's value: the sum of the pods' rates, each from the samples that the window holds."""
        rates = []
        for pod in self.pods:
            inside = [sample for sample in pod.scraped if sample[0] > now - WINDOW_S]
            if len(inside) >= 2:
                rates.append((inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0]))
        return sum(rates) if rates else None

    def _scale(self, now: float) -> None:
        current = len(self.pods)
        wish = desired_pods(self.recorded, current, self.cluster)
        self.wishes.append((now, wish))
        while self.wishes[0][0] < now - DOWN_WINDOW_S:
            self.wishes.popleft()
        while self.removals and self.removals[0][0] <= now - DOWN_PERIOD_S:
            self.removals.popleft()
        if wish > current:
            wish = min(wish, current + max(current, UP_PODS))
            self.pods += [Pod(now + self.cluster.start_s, self.cluster.workers) for _ in range(wish - current)]
        else:
            wish = min(current, max(count for _, count in self.wishes))
            before = current + sum(count for _, count in self.removals)
            wish = max(wish, min(current, int(before * (1 - DOWN_SHARE))))
            if wish < current:
                self.removals.append((now, current - wish))
                del self.pods[wish:]  # the youngest; what they have is still answered, as they drain
        if wish != current:
            self.changes.append((now, wish))

    def _arrive(self, now: float) -> None:
        ready = [pod for pod in self.pods if pod.ready_s <= now]
        pod = ready[int(self._lot() * len(ready))]
        if self.cluster.is_least_loaded:
            other = ready[int(self._lot() * len(ready))]
            pod = other if other.in_flight < pod.in_flight else pod
        if len(pod.waiting) >= self.cluster.queue_size:
            self.refused.append(now)
            return
        pod.waiting.append(now)
        pod.in_flight += 1
        if pod.idle:
            self._start_batch(pod, now)

    def _start_batch(self, pod: Pod, now: float) -> None:
        batch = [pod.waiting.popleft() for _ in range(min(len(pod.waiting), self.cluster.batch_size))]
        pod.idle -= 1
        self.batch_count += 1
        heapq.heappush(self.finishing, (now + sum(self._draw() for _ in batch), self.batch_count, pod, batch))

    def _finish_until(self, now: float) -> None:
        while self.finishing and self.finishing[0][0] <= now:
            end, _, pod, batch = heapq.heappop(self.finishing)
            pod.idle += 1
            pod.in_flight -= len(batch)
            for arrival in batch:
                self.arrivals.append(arrival)
                self.latencies.append(end - arrival)
                pod.latency_sum_s += end - arrival
            if pod.waiting:
                self._start_batch(pod, end)

    def _draw(self) -> float:
        """Draw a service time from those that were measured."""
        for drawn in self.draws:
            return drawn
        self.draws = iter(self.generator.choice(self.service_s, 10_000).tolist())
        return next(self.draws)

    def _lot(self) -> float:
        for drawn in self.lots:
            return drawn
        self.lots = iter(self.generator.random(10_000).tolist())
        return next(self.lots)


def simulate(cluster: Cluster, service_s: NDArray[np.float64], rates: NDArray[np.float64], seed: int = 0) -> Outcome:
    """Simulate a cluster under a load.

    Args:
        cluster: what serves, and what scales it.
        service_s: (K,), measured times of one request in a worker, in seconds; each request draws one.
        rates: (T,), requests a second in each second.
        seed: of all that is left to chance.
    """
    generator = np.random.default_rng(seed)
    arrivals = draw_arrivals(rates, generator)
    return Simulation(cluster, service_s, generator).run(arrivals, float(len(rates)))
