"""A proxy in front of two servers, as on machines without Kubernetes: no client notices what happens to one of them."""

import contextlib
import json
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil
import pytest

from scripts.serving.launcher import Ports, Settings, TorchServe
from scripts.serving.proxy.configuration import Address, Front
from scripts.serving.proxy.process import Envoy
from scripts.serving.ready import read_reference_answer
from tests.client import Sample
from tests.servers import wait_for, workers_of

CLIENTS = 6
TIMEOUT_S = 90  # more than the proxy's own
NORMAL, LONG = 600, 10_000  # requests of one fault


@dataclass(frozen=True)
class Proxied:
    """A proxy, and the two servers behind it."""

    port: int
    servers: tuple[TorchServe, TorchServe]
    envoy: Envoy


@pytest.fixture
def proxied(archive: Path) -> Iterator[Proxied]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        servers = []
        for name in "ab":
            settings = Settings(
                archive=archive,
                ports=Ports.free(),
                device="cpu",
                log_dir=folder / name,
                model_config={"minWorkers": 1, "maxWorkers": 1},
            )
            servers.append(stack.enter_context(TorchServe(settings)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        front = Front(
            listen=Address("127.0.0.1", port),
            model_name="digits",
            upstreams=[Address("127.0.0.1", server.settings.ports.inference) for server in servers],
            reference=read_reference_answer(archive),
            requests_per_second=0,
            admin_socket=folder / "admin.sock",
        )
        envoy = Envoy(front, folder, folder / "envoy.log")
        envoy.start()
        stack.callback(envoy.stop)
        proxied = Proxied(port, (servers[0], servers[1]), envoy)
        yield proxied


def healthy_count(proxied: Proxied) -> int:
    """How many servers the proxy holds for healthy."""
    answer = proxied.envoy._ask("/stats?filter=^cluster.torchserve.membership_healthy$").decode()
    return int(answer.rpartition(":")[2] or 0)


def kill_worker(server: TorchServe) -> None:
    for worker in workers_of(server):
        worker.kill()


def kill_server(server: TorchServe) -> None:
    for process in server.processes():
        with contextlib.suppress(psutil.Error):
            process.kill()


def stop_server(server: TorchServe) -> None:
    for process in server.processes():
        process.send_signal(signal.SIGSTOP)


def continue_server(server: TorchServe) -> None:
    for process in server.processes():
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGCONT)


def ask_all(proxied: Proxied, samples: Sequence[Sample], count: int, fault: Callable[[], None]) -> tuple[list[str], float]:
    """Ask for known images from several clients, and have a fault happen after a quarter of them.

    Returns:
        what was no right answer, and the longest time that an answer took, in seconds.
    """
    done, mistakes, slowest = iter(range(count)), [], 0.0
    lock, at_fault = threading.Lock(), threading.Event()

    def ask_some() -> None:
        nonlocal slowest
        connection = HTTPConnection("127.0.0.1", proxied.port, timeout=TIMEOUT_S)
        with contextlib.closing(connection):
            while True:
                with lock:
                    number = next(done, None)
                if number is None:
                    return
                if number == count // 4:
                    at_fault.set()
                sample, started = samples[number % len(samples)], time.monotonic()
                try:
                    connection.request("POST", "/predictions/digits", sample.png)
                    reply = connection.getresponse()
                    content = reply.read()
                    right = reply.status == 200 and json.loads(content)["digit"] == sample.predicted
                    mistake = "" if right else f"{number}: {reply.status} {content[:300]!r}"
                except (OSError, HTTPException) as error:
                    mistake = f"{number}: {type(error).__name__}: {error}"
                    connection.close()
                with lock:
                    mistakes.extend([mistake] if mistake else [])
                    slowest = max(slowest, time.monotonic() - started)

    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask_some) for _ in range(CLIENTS)]
        at_fault.wait(TIMEOUT_S)
        fault()
        for future in asking:
            future.result()
    return mistakes, slowest


@pytest.mark.parametrize("count", [NORMAL, pytest.param(LONG, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_no_client_notices_a_fault(proxied: Proxied, samples: list[Sample], count: int) -> None:
    one = proxied.servers[0]
    for fault in (kill_worker, stop_server, kill_server):
        wait_for(lambda: healthy_count(proxied) == 2, "two healthy servers")
        try:
            mistakes, slowest = ask_all(proxied, samples, count, partial(fault, one))
        finally:
            continue_server(one)
        print(f"{fault.__name__}: {count} requests, {len(mistakes)} without a right answer, the slowest after {slowest:.1f} s")
        assert mistakes == [], fault.__name__
