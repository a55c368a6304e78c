"""Faults, on purpose, in a real server under load.

Clients ask for known pictures all the while. Each of their requests must end in a right answer or in a clear error: a status with
JSON, or a connection that breaks. None may be wrong, and none may stay without an end. Every test prints its counts and how long
it took until right answers came again: `pytest tests/e2e/test_faults.py -s`.
"""

import base64
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pytest
import requests

from scripts.serve import SERVE_CONFIG, WORKER_PROGRAM, Ports, Settings, TorchServe
from tests.e2e.conftest import TIMEOUT_S, Sample

CLIENTS = 6
BATCH_SIZE = 4
QUEUE_SIZE = 20
RESPONSE_TIMEOUT_S = 6  # long enough for a slow machine, as right workers must keep to it too
SILENCE_S = 120  # a client that waited for so long would be one that was forgotten
RECOVERY_S = 120
TOLERANCE = 5e-4

RIGHT, REFUSED, BROKEN, SILENT, WRONG = "right", "error reply", "connection broken", "no end", "WRONG"


@dataclass
class Load:
    """Clients that send known pictures over and over, each waiting for its answer. A context manager.

    Attributes:
        address: of the inference API.
        samples: pictures and what is right of them.
        ends: of each request: seconds on the monotonic clock, one of RIGHT ... WRONG, and details of what was not right.
        sent: requests so far.
    """

    address: str
    samples: Sequence[Sample]
    ends: list[tuple[float, str, str]] = field(default_factory=list)
    sent: int = 0
    _stopped: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._run_client, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        self.wait_for_right(2 * CLIENTS)
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def wait_for_right(self, count: int, since: float = 0.0) -> float:
        """Wait for so many right answers that came after an instant; the seconds from it to the first."""
        deadline = time.monotonic() + RECOVERY_S
        while len(found := [end for end, outcome, _ in list(self.ends) if outcome == RIGHT and end > since]) < count:
            assert time.monotonic() < deadline, f"no right answers: {self.ends[-5:]}"
            time.sleep(0.02)
        return found[0] - since

    def report(self, fault: str, since: float, **measured: float) -> Counter[str]:
        """Print and check the counts of all clients, which must have ended. Returns them."""
        counts = Counter(outcome for _, outcome, _ in self.ends)
        right_s = [since, *(end for end, outcome, _ in self.ends if outcome == RIGHT and end > since)]
        measured = {"longest_without_right_s": max(np.diff(right_s), default=0.0), **measured}
        numbers = ", ".join(f"{name} {value:.1f}" for name, value in measured.items())
        print(f"\n{fault}: sent {self.sent}, {dict(counts)}; {numbers}")
        kinds = Counter(details for _, outcome, details in self.ends if outcome != RIGHT)
        print("\n".join(f"  {count} x {details}" for details, count in kinds.most_common(8)))
        assert counts[WRONG] == counts[SILENT] == 0, kinds
        assert sum(counts.values()) == self.sent, "a request was lost"
        assert counts[RIGHT] > 0
        return counts

    def _run_client(self, number: int) -> None:
        with requests.Session() as session:
            turn = number
            while not self._stopped.is_set():
                with self._lock:
                    self.sent += 1
                outcome, details = ask(session, self.address, self.samples[turn % len(self.samples)], explain=turn % 3 > 0)
                self.ends.append((time.monotonic(), outcome, details))
                turn += CLIENTS + 1
                if outcome != RIGHT:
                    time.sleep(0.05)  # a client with manners


def ask(session: requests.Session, address: str, sample: Sample, *, explain: bool = True) -> tuple[str, str]:
    """Send one picture: what came of it, and details where it was not right."""
    route = "explanations" if explain else "predictions"
    try:
        headers = {"X-Saliency-Encoding": "base64"}
        reply = session.post(f"{address}/{route}/digits", data=sample.png, headers=headers, timeout=SILENCE_S)
        content = reply.json()
    except requests.Timeout as error:
        return SILENT, repr(error)
    except requests.ConnectionError as error:
        return BROKEN, re.sub(r"0x\w+|port=\d+", "", str(error))
    except ValueError:
        return WRONG, f"{reply.status_code} without JSON: {reply.text[:200]}"
    if not reply.ok:
        return REFUSED, f"{reply.status_code} {content}"
    wrong = wrong_in(content, sample, explain=explain)
    return (WRONG, wrong) if wrong else (RIGHT, "")


def wrong_in(content: dict[str, Any], sample: Sample, *, explain: bool) -> str:
    if content["digit"] != sample.predicted:
        return f"digit {content['digit']}"
    if not np.allclose(content["logits"], sample.logits, atol=TOLERANCE):
        return "logits"
    if explain:
        saliency = np.frombuffer(base64.b64decode(content["explanation"]["saliency"]), "<f4").reshape(28, 28)
        if not np.allclose(saliency, sample.jacobian[sample.predicted], atol=TOLERANCE):
            return "saliency"
    elif "explanation" in content:
        return "an explanation that was not asked for"
    return ""


def workers_of(server: TorchServe) -> list[psutil.Process]:
    return [process for process in server.processes() if WORKER_PROGRAM in " ".join(process.cmdline())]


def wait_for_workers(server: TorchServe, other_than: set[int]) -> None:
    """Wait until as many workers as before are ready, none of them one of these."""
    deadline = time.monotonic() + RECOVERY_S
    while True:
        described = requests.get(f"{server.management_address}/models/digits", timeout=TIMEOUT_S).json()[0]["workers"]
        ready = {worker["pid"] for worker in described if worker["status"] == "READY"}
        if len(ready) == server.worker_count and not ready & other_than:
            return
        assert time.monotonic() < deadline, described
        time.sleep(0.2)


@pytest.fixture(scope="module")
def two_workers(archive: Path, device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """Two workers, so that one can be hurt; short time limits and a short queue."""
    folder = tmp_path_factory.mktemp("faults")
    configuration = (SERVE_CONFIG / "config.properties").read_text()
    (folder / "config.properties").write_text(re.sub(r"job_queue_size=\d+", f"job_queue_size={QUEUE_SIZE}", configuration))
    settings = Settings(
        archive=archive,
        ports=Ports.free(),
        device=device,
        log_dir=folder / "logs",
        configuration=folder / "config.properties",
        model_config={
            **{"minWorkers": 2, "maxWorkers": 2, "batchSize": BATCH_SIZE, "maxBatchDelay": 5},
            "responseTimeout": RESPONSE_TIMEOUT_S,
        },
    )
    with TorchServe(settings) as server:
        yield server


def test_killed_worker_costs_its_own_batch_alone(two_workers: TorchServe, samples: list[Sample]) -> None:
    with Load(two_workers.address, samples) as load:
        victim = workers_of(two_workers)[0]
        victim.suspend()
        time.sleep(0.5)  # now a batch lies in it, unanswered
        started = time.monotonic()
        victim.kill()
        load.wait_for_right(1, since=started)
        wait_for_workers(two_workers, other_than={victim.pid})
        restored_s = time.monotonic() - started
        load.wait_for_right(2 * CLIENTS, since=time.monotonic())
    counts = load.report("worker killed in mid-batch", started, both_workers_again_s=restored_s)
    assert 1 <= counts[REFUSED] <= BATCH_SIZE
    assert counts[BROKEN] == 0


def test_frozen_worker_is_replaced_after_the_response_timeout(two_workers: TorchServe, samples: list[Sample]) -> None:
    with Load(two_workers.address, samples) as load:
        victim = workers_of(two_workers)[0]
        started = time.monotonic()
        victim.suspend()
        wait_for_workers(two_workers, other_than={victim.pid})
        restored_s = time.monotonic() - started
        load.wait_for_right(2 * CLIENTS, since=time.monotonic())
    assert not psutil.pid_exists(victim.pid) or victim.status() == psutil.STATUS_ZOMBIE
    counts = load.report("worker frozen", started, both_workers_again_s=restored_s)
    assert 1 <= counts[REFUSED] <= BATCH_SIZE
    assert counts[BROKEN] == 0
    assert restored_s >= RESPONSE_TIMEOUT_S


def test_overfull_queue_refuses_what_is_too_much_at_once_and_answers_the_rest(
    two_workers: TorchServe, samples: list[Sample]
) -> None:
    workers = workers_of(two_workers)
    load = Load(two_workers.address, samples)
    load.sent = QUEUE_SIZE + 2 * BATCH_SIZE + 12

    def send(number: int) -> None:
        with requests.Session() as session:
            outcome = ask(session, load.address, samples[number % len(samples)])
        load.ends.append((time.monotonic(), *outcome))

    with ThreadPoolExecutor(load.sent) as pool:
        for worker in workers:
            worker.suspend()
        list(pool.map(send, range(0)))
        sending = [pool.submit(send, number) for number in range(load.sent)]
        time.sleep(RESPONSE_TIMEOUT_S / 3)
        refused_while_full = len(load.ends)
        started = time.monotonic()
        for worker in workers:
            worker.resume()
        for sent in sending:
            sent.result()
    counts = load.report("queue overfull", started)
    assert counts[REFUSED] == refused_while_full > 0  # at once, while nothing worked
    assert counts[RIGHT] >= QUEUE_SIZE
    assert all(details.startswith("503 ") for _, outcome, details in load.ends if outcome == REFUSED)
