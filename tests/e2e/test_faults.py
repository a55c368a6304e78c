"""Faults injected into a real server under load.

Clients send known images all the time. Each request must end in the right answer or in a clear error: a status with JSON, or a
broken connection. A wrong answer or a request that never ends is a failure. Every test prints its counts and the time to
recovery: `pytest tests/e2e/test_faults.py -s`.
"""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pytest
import requests

from scripts.packaging.package import read_archive
from scripts.paths import SERVE_CONFIG
from scripts.serving.launcher import Ports, ServeError, Settings, TorchServe
from tests.client import TIMEOUT_S, Sample
from tests.servers import RECOVERY_S, processes_with, read_until, serving, wait_for, wait_for_workers, workers_of
from tests.tolerance import FLOAT32_SHARE, relative_difference

CLIENTS = 6
BAD_CLIENTS = 6
BATCH_SIZE = 4
QUEUE_SIZE = 20
RESPONSE_TIMEOUT_S = 6  # long enough for a slow machine, as right workers must keep to it too
SILENCE_S = 120  # a client that waited for so long would be one that was forgotten

RIGHT, REFUSED, BROKEN, SILENT, WRONG = "right", "error reply", "connection broken", "no end", "WRONG"


@dataclass
class Load:
    """Clients that send known images in a loop, each waiting for its answer. A context manager.

    Attributes:
        address: of the inference API.
        samples: images and what is right of them.
        ends: of each request: seconds on the monotonic clock, one of RIGHT ... WRONG, and details of what was not right.
        sent: requests so far.
    """

    address: str
    samples: Sequence[Sample]
    ends: list[tuple[float, str, str]] = field(default_factory=list)
    sent: int = 0
    _asked: dict[int, int] = field(default_factory=dict)  # by client: how many requests had ended when it sent its last one
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
        """Wait for so many right answers after an instant. Returns the seconds from it to the first."""
        deadline = time.monotonic() + RECOVERY_S
        while len(found := [end for end, outcome, _ in list(self.ends) if outcome == RIGHT and end > since]) < count:
            assert time.monotonic() < deadline, f"no right answers: {self.ends[-5:]}"
            time.sleep(0.02)
        return found[0] - since

    def wait_for_held_up(self) -> None:
        """Wait until a request has no answer while many later ones have theirs."""
        wait_for(lambda: any(len(self.ends) - ended > 8 * CLIENTS for ended in list(self._asked.values())), "request held up")

    def report(self, fault: str, since: float, **measured: float) -> Counter[str]:
        """Print, check and return the counts of all clients, which must have ended."""
        counts = Counter(outcome for _, outcome, _ in self.ends)
        right_s = [since, *(end for end, outcome, _ in self.ends if outcome == RIGHT and end > since)]
        measured = {"longest_without_right_s": max(np.diff(right_s), default=0.0), **measured}
        numbers = ", ".join(f"{name} {value:.2f}" for name, value in measured.items())
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
                self._asked[number] = len(self.ends)
                outcome, details = ask(session, self.address, self.samples[turn % len(self.samples)], explain=turn % 3 > 0)
                self.ends.append((time.monotonic(), outcome, details))
                turn += CLIENTS + 1
                if outcome != RIGHT:
                    time.sleep(0.05)  # a client with manners


def ask(session: requests.Session, address: str, sample: Sample, *, explain: bool = True) -> tuple[str, str]:
    """Send one image. Returns the outcome, and details if it was not right."""
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
    if not relative_difference(content["logits"], sample.logits) <= FLOAT32_SHARE:
        return "logits"
    if explain:
        saliency = np.frombuffer(base64.b64decode(content["explanation"]["saliency"]), "<f4").reshape(28, 28)
        if not relative_difference(saliency, sample.jacobian[sample.predicted], row_axes=2) <= FLOAT32_SHARE:
            return "saliency"
    elif "explanation" in content:
        return "an explanation that was not asked for"
    return ""


@pytest.fixture(scope="module")
def two_workers(archive: Path, device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """A server with two workers, so that one can fail, with short time limits and a short queue."""
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
        load.wait_for_held_up()  # now a batch lies in it, unanswered
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
    too_many = 12
    load.sent = QUEUE_SIZE + 2 * BATCH_SIZE + too_many

    def send(number: int) -> None:
        with requests.Session() as session:
            outcome = ask(session, load.address, samples[number % len(samples)])
        load.ends.append((time.monotonic(), *outcome))

    with ThreadPoolExecutor(load.sent) as pool:
        for worker in workers:
            worker.suspend()
        sending = [pool.submit(send, number) for number in range(load.sent)]
        wait_for(lambda: len(load.ends) >= too_many, f"{too_many} refusals")
        started = time.monotonic()
        for worker in workers:
            worker.resume()
        for sent in sending:
            sent.result()
    counts = load.report("queue overfull", started)
    assert counts[REFUSED] >= too_many
    assert counts[RIGHT] >= QUEUE_SIZE
    assert all(details.startswith("503 ") for _, outcome, details in load.ends if outcome == REFUSED)


# --- clients


def http_request(body: bytes, headers: str = "") -> bytes:
    head = f"POST /explanations/digits HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextlib.contextmanager
def connected(server: TorchServe) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.settings.ports.inference), timeout=TIMEOUT_S) as client:
        yield client


def vanish_in_the_body(server: TorchServe, sample: Sample, _hold: Callable[[], None]) -> None:
    with connected(server) as client:
        client.sendall(http_request(sample.png)[:-50])


def vanish_before_the_answer(server: TorchServe, sample: Sample, _hold: Callable[[], None]) -> None:
    with connected(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends a reset
        client.sendall(http_request(sample.png))


def never_send(server: TorchServe, sample: Sample, hold: Callable[[], None]) -> None:
    with connected(server) as client:
        client.sendall(http_request(sample.png)[:20])
        hold()


def send_slowly(server: TorchServe, sample: Sample, _hold: Callable[[], None]) -> None:
    """Take two seconds to send one small request; it is answered all the same."""
    request = http_request(sample.png, "Connection: close\r\nX-Saliency-Encoding: base64\r\n")
    step = len(request) // 40 + 1
    with connected(server) as client:
        for start in range(0, len(request), step):
            client.sendall(request[start : start + step])
            time.sleep(0.05)
        reply = http.client.HTTPResponse(client)
        reply.begin()
        assert wrong_in(json.loads(reply.read()), sample, explain=True) == ""


def never_read(server: TorchServe, sample: Sample, hold: Callable[[], None]) -> None:
    """Read one byte of a reply of 2.4 MB, which is more than the sockets' buffers hold."""
    content = io.BytesIO()
    np.save(content, np.stack([sample.levels] * 768))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(TIMEOUT_S)
        client.connect(("127.0.0.1", server.settings.ports.inference))
        client.sendall(http_request(content.getvalue(), "Accept: application/x-npy\r\n"))
        assert client.recv(1) == b"H"
        hold()


@pytest.mark.parametrize(
    "misbehave", [vanish_in_the_body, vanish_before_the_answer, never_send, send_slowly, never_read], ids=lambda f: f.__name__
)
def test_bad_client_costs_no_other_client_anything(
    two_workers: TorchServe, samples: list[Sample], misbehave: Callable[[TorchServe, Sample, Callable[[], None]], None]
) -> None:
    """Clients that hold a connection open do so until the others have many answers."""
    before = {worker.pid for worker in workers_of(two_workers)}
    with Load(two_workers.address, samples) as load, ThreadPoolExecutor(BAD_CLIENTS) as pool:
        started = time.monotonic()

        def hold() -> None:
            load.wait_for_right(50 * CLIENTS, since=time.monotonic())

        for bad in [pool.submit(misbehave, two_workers, samples[number % len(samples)], hold) for number in range(BAD_CLIENTS)]:
            bad.result()
        load.wait_for_right(2 * CLIENTS, since=time.monotonic())
    counts = load.report(f"{BAD_CLIENTS} clients that {misbehave.__name__.replace('_', ' ')}", started)
    assert counts.keys() == {RIGHT}
    assert {worker.pid for worker in workers_of(two_workers)} == before


# --- the disk


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 1 MB for logs."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system; the other case needs none")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill_up(file: Path) -> None:
    with file.open("wb", buffering=0) as opened, contextlib.suppress(OSError):
        while opened.write(bytes(4096)):
            pass
    assert shutil.disk_usage(file.parent).free == 0


def test_full_disk_under_the_logs_costs_logs_alone(archive: Path, device: str, tmp_path: Path, samples: list[Sample]) -> None:
    with small_disk(tmp_path / "logs") as log_dir:
        settings = Settings(archive=archive, ports=Ports.free(), device=device, log_dir=log_dir)
        with TorchServe(settings) as server, Load(server.address, samples) as load:
            filler = log_dir / "filler"
            started = time.monotonic()
            fill_up(filler)
            load.wait_for_right(300, since=time.monotonic())
            access_log = log_dir / "access_log.log"
            lines = access_log.read_text().count("\n")
            victim = workers_of(server)[0]
            victim.kill()  # its traceback and its successor's first lines have no room either
            wait_for_workers(server, other_than={victim.pid})
            load.wait_for_right(2 * CLIENTS, since=time.monotonic())
            filler.unlink()
            wait_for(lambda: access_log.read_text().count("\n") > lines, "more lines in the log")
    counts = load.report("disk full", started)
    assert counts[REFUSED] <= 32


def test_server_whose_every_log_line_fails_answers(archive: Path, device: str, tmp_path: Path, samples: list[Sample]) -> None:
    """On /dev/full each write ends with "No space left on device", as on a full disk; no root is needed."""
    text, count = re.subn(r'fileName="[^"]*"', 'fileName="/dev/full"', (SERVE_CONFIG / "log4j2.xml").read_text())
    assert count == 3
    (tmp_path / "log4j2.xml").write_text(text)
    settings = Settings(
        archive=archive,
        ports=Ports.free(),
        device=device,
        log_dir=tmp_path / "logs",
        log_configuration=tmp_path / "log4j2.xml",
        model_config={"minWorkers": 1, "maxWorkers": 1},
    )
    with TorchServe(settings) as server, Load(server.address, samples) as load:
        started = time.monotonic()
        load.wait_for_right(300, since=started)
    console = (tmp_path / "logs" / "console.log").read_text()
    counts = load.report("logs on /dev/full", started)
    assert counts.keys() == {RIGHT}
    assert "No space left on device" in console


# --- starting


def flip_a_bit(archive: Path, broken: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[content.index(b"conv1.weight") + 2000] ^= 1  # in the weights: the zip's own checksum no longer holds
    broken.write_bytes(content)


def cut_off(archive: Path, broken: Path) -> None:
    broken.write_bytes(archive.read_bytes()[:-1000])


def change_weights(archive: Path, broken: Path) -> None:
    """Keep the zip valid and the old list of checksums."""
    entries = read_archive(archive)
    weights = bytearray(entries["weights.safetensors"])
    weights[-2] ^= 1
    write_raw(broken, entries | {"weights.safetensors": bytes(weights)})


def leave_out_a_file(archive: Path, broken: Path) -> None:
    write_raw(broken, {name: content for name, content in read_archive(archive).items() if name != "handler/images/decode.py"})


def leave_out_the_sums(archive: Path, broken: Path) -> None:
    write_raw(broken, {name: content for name, content in read_archive(archive).items() if name != "SHA256SUMS"})


def write_raw(broken: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(broken, "w") as opened:
        for name, content in entries.items():
            opened.writestr(name, content)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (flip_a_bit, "Bad CRC-32 for file 'weights.safetensors'"),
        (cut_off, "File is not a zip file"),
        (change_weights, "weights.safetensors is damaged: its SHA-256 is"),
        (leave_out_a_file, "handler/images/decode.py is missing from the archive"),
        (leave_out_the_sums, "the archive has no SHA256SUMS"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_archive_is_refused_before_anything_starts(
    archive: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], reason: str
) -> None:
    spoil(archive, tmp_path / "digits.mar")
    server = TorchServe(Settings(archive=tmp_path / "digits.mar", ports=Ports.free(), log_dir=tmp_path / "logs"))
    with pytest.raises(ServeError, match=rf"the archive .*digits\.mar cannot be served: {re.escape(reason)}"), server:
        pytest.fail("it started")
    assert server.processes() == []
    assert not (tmp_path / "logs").exists()


def test_second_start_on_the_same_ports_is_refused_and_costs_the_first_nothing(
    two_workers: TorchServe, samples: list[Sample], archive: Path
) -> None:
    settings = two_workers.settings
    log = settings.log_dir / "console.log"
    with Load(two_workers.address, samples) as load:
        started = time.monotonic()
        with serving(settings.ports, settings.log_dir, f"--archive={archive}") as second:
            assert second.stdout is not None
            printed = second.stdout.read()
            assert second.wait(timeout=RECOVERY_S) == 1
        refused_s = time.monotonic() - started
        load.wait_for_right(2 * CLIENTS, since=time.monotonic())
    assert f"error: port {settings.ports.inference} is taken; choose another with --inference-port" in printed
    counts = load.report("started twice", started, second_start_refused_s=refused_s)
    assert counts.keys() == {RIGHT}
    assert log.stat().st_size > 0  # the first one's logs are still there


# --- ending


def wait_for_queue(management_address: str, count: int) -> None:
    """Wait until so many requests wait for a worker."""

    def pending() -> int:
        described = requests.get(f"{management_address}/models/digits", timeout=TIMEOUT_S).json()[0]
        return int(described["jobQueueStatus"]["pendingRequests"])

    wait_for(lambda: pending() == count, f"{count} requests in the queue")


def test_requests_in_flight_are_answered_before_the_end(
    archive: Path, tmp_path: Path, temp_dir: Path, samples: list[Sample]
) -> None:
    """Two requests are in the workers, the others wait. TorchServe alone would drop them all."""
    pixels = np.stack([sample.levels for sample in samples] * 20)  # (340, 28, 28)
    maps = np.stack([sample.jacobian[sample.predicted] for sample in samples] * 20)
    content = io.BytesIO()
    np.save(content, pixels)
    ports = Ports.free()
    load = Load(f"http://127.0.0.1:{ports.inference}", samples, sent=10)

    def send(_: int) -> None:
        try:
            headers = {"Accept": "application/x-npy"}
            reply = requests.post(
                f"{load.address}/explanations/digits", data=content.getvalue(), headers=headers, timeout=SILENCE_S
            )
            right = reply.ok and relative_difference(np.load(io.BytesIO(reply.content)), maps, row_axes=2) <= FLOAT32_SHARE
            end = (RIGHT, "") if right else (WRONG if reply.ok else REFUSED, reply.text[:200])
        except requests.Timeout as error:
            end = (SILENT, repr(error))
        except requests.RequestException as error:
            end = (BROKEN, type(error).__name__)
        load.ends.append((time.monotonic(), *end))

    options = [f"--archive={archive}", "--workers=2", "--batch-size=1"]
    with serving(ports, tmp_path / "logs", *options, environment={**os.environ, "TMPDIR": str(temp_dir)}) as process:
        read_until(process, r"curl .*/explanations/")
        workers = [child for child in processes_with(str(temp_dir)) if "model_service_worker" in " ".join(child.cmdline())]
        assert len(workers) == 2
        with ThreadPoolExecutor(load.sent) as pool:
            for worker in workers:
                worker.suspend()  # until all requests are there
            sending = [pool.submit(send, number) for number in range(load.sent)]
            wait_for_queue(f"http://127.0.0.1:{ports.management}", load.sent - len(workers))
            for worker in workers:
                worker.resume()
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            unanswered = load.sent - len(load.ends)
            for sent in sending:
                sent.result()
        assert process.wait(timeout=RECOVERY_S) == 0
        ended_s = time.monotonic() - started
    counts = load.report("SIGTERM with requests in flight", started, in_flight=unanswered, all_ended_s=ended_s)
    assert unanswered > 2  # more than run at once
    assert counts.keys() == {RIGHT}
    assert processes_with(str(temp_dir)) == []
    assert list(temp_dir.iterdir()) == []
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{load.address}/ping", timeout=TIMEOUT_S)
