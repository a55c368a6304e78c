"""Requests that look cheap, sent to a real server: what they cost, and that they cost a polite client nothing.

Processor time and memory are those of the worker and of its decoder, as the kernel counts them.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil
import pytest
import requests

from scripts.bench.attacks import MAX_PEAK_MIB, Attack, build_attacks, error_type, max_seconds
from scripts.paths import SAMPLE_FILES
from scripts.serving.launcher import TorchServe

TIMEOUT_S = 120
MIB = 2**20
SIZE, LARGE_SIZE = 1_000_000, 24_000_000  # bytes of a body
SEVERAL = 8  # attackers at once
NAMES = list(build_attacks(0))
DIGIT = SAMPLE_FILES[36].read_bytes()  # a seven


@dataclass
class Polite:
    """A client that asks for one small image after the other while something else happens."""

    server: TorchServe
    answers: list[tuple[int, object]] = field(default_factory=list)

    def run(self, stop: threading.Event) -> None:
        with requests.Session() as session:
            while not stop.is_set() or not self.answers:
                reply = session.put(f"{self.server.address}/predictions/digits", data=DIGIT, timeout=TIMEOUT_S)
                self.answers.append((reply.status_code, reply.json().get("digit")))


@dataclass
class Cost:
    """What the worker and its decoder took meanwhile."""

    seconds: float = 0.0
    peak_mib: float = 0.0


def family_of(pid: int) -> list[psutil.Process]:
    worker = psutil.Process(pid)
    return [worker, *worker.children(recursive=True)]


def resident(pid: int) -> int:
    total = 0
    for process in family_of(pid):
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def processor_seconds(pid: int) -> float:
    """Of the worker, its children, and those of its children that have ended."""
    times = [process.cpu_times() for process in family_of(pid)]
    own = times[0]
    return sum(one.user + one.system for one in times) + own.children_user + own.children_system


@contextlib.contextmanager
def measured(pid: int) -> Iterator[Cost]:
    cost, stop = Cost(), threading.Event()
    idle = resident(pid)

    def watch() -> None:
        while not stop.wait(0.01):
            cost.peak_mib = max(cost.peak_mib, (resident(pid) - idle) / MIB)

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = processor_seconds(pid)
    try:
        yield cost
    finally:
        stop.set()
        watcher.join()
        cost.seconds = processor_seconds(pid) - before


@contextlib.contextmanager
def beside_a_polite_client(server: TorchServe) -> Iterator[None]:
    """Fail where the polite client gets anything but the right answer."""
    polite, stop = Polite(server), threading.Event()
    thread = threading.Thread(target=polite.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert set(polite.answers) == {(200, 7)}


def send(server: TorchServe, attack: Attack) -> requests.Response:
    url = server.address + attack.route.format(model="digits")
    return requests.post(url, data=attack.make(), headers=dict(attack.headers), timeout=TIMEOUT_S)


def check_attack(server: TorchServe, worker_pids: Callable[[], list[int]], attack: Attack) -> None:
    (worker,) = workers = worker_pids()
    with measured(worker) as cost:
        reply = send(server, attack)
    assert attack.allows(reply.status_code, error_type(reply.content)), f"{reply.status_code}: {reply.text[:300]}"
    assert cost.seconds < max_seconds(reply.status_code)
    assert cost.peak_mib < MAX_PEAK_MIB
    assert worker_pids() == workers


@pytest.mark.parametrize("name", NAMES)
def test_attack_costs_no_more_than_it_says(server: TorchServe, worker_pids: Callable[[], list[int]], name: str) -> None:
    check_attack(server, worker_pids, build_attacks(SIZE)[name])


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_large_attack_costs_no_more_than_it_says(server: TorchServe, worker_pids: Callable[[], list[int]], name: str) -> None:
    check_attack(server, worker_pids, build_attacks(LARGE_SIZE)[name])


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_polite_client_is_answered_beside_several_attackers(
    server: TorchServe, worker_pids: Callable[[], list[int]], name: str
) -> None:
    attack, workers = build_attacks(SIZE)[name], worker_pids()
    replies: list[requests.Response] = []
    with beside_a_polite_client(server):
        attackers = [threading.Thread(target=lambda: replies.append(send(server, attack))) for _ in range(SEVERAL)]
        for attacker in attackers:
            attacker.start()
        for attacker in attackers:
            attacker.join()
    assert len(replies) == SEVERAL
    assert {reply.status_code for reply in replies} <= {200, 400, 413, 422, 503}
    assert worker_pids() == workers
