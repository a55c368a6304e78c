"""Cluster mode on a real server: what is reachable, what a stop loses, what the probe says. In a container: test_image.py."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from scripts.paths import ROOT, SAMPLE_FILES
from scripts.serving.launcher import Ports
from tests.client import TIMEOUT_S
from tests.conftest import label_of
from tests.servers import read_until, serving, wait_for

FILE = SAMPLE_FILES[0]
CLIENTS = 6
SLOW = {"method": "smoothgrad", "samples": "200"}


def explain(address: str, session: requests.Session | None = None, **options: str) -> int:
    """Ask for an explanation; returns the digit, or an error's status, negative."""
    reply = (session or requests).post(
        f"{address}/explanations/digits", files={"data": FILE.read_bytes()}, data=options, timeout=2 * TIMEOUT_S
    )
    return int(reply.json()["digit"]) if reply.status_code == 200 else -reply.status_code


def probe(address: str, archive: Path, log_dir: Path) -> tuple[int, str]:
    """Ask as the pod's readiness probe does."""
    finished = subprocess.run(
        [sys.executable, "-m", "scripts.serving.ready", "--address", address, "--archive", archive, "--log-dir", log_dir],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return finished.returncode, finished.stderr


def test_stopped_server_leaves_its_balancer_and_answers_all(archive: Path, tmp_path: Path) -> None:
    ports, log_dir = Ports.free(), tmp_path / "logs"
    address = f"http://127.0.0.1:{ports.inference}"
    elsewhere = f"http://127.0.0.2:{ports.inference}"  # the machine's own too, and not 127.0.0.1
    options = (f"--archive={archive}", "--workers=1", "--cluster", "--drain-delay=6")
    with serving(ports, log_dir, *options) as process:
        read_until(process, "curl .*/explanations/")
        printed: list[str] = []
        assert process.stdout is not None
        threading.Thread(target=lambda: printed.extend(process.stdout or ()), daemon=True).start()

        # What is reachable: inference and metrics, and nothing else.
        assert explain(elsewhere) == label_of(FILE)
        assert "ts_inference_requests_total" in requests.get(f"http://127.0.0.2:{ports.metrics}/metrics", timeout=TIMEOUT_S).text
        for port in (ports.management, ports.grpc_inference, ports.grpc_management):
            with pytest.raises(requests.ConnectionError):
                requests.get(f"http://127.0.0.2:{port}/models", timeout=TIMEOUT_S)
        assert probe(address, archive, log_dir) == (0, "")

        # Clients that never pause, each on a connection that it keeps, and slow requests in flight.
        ended = threading.Event()
        answers: list[int] = []

        def ask_on() -> None:
            with requests.Session() as session:
                while not ended.is_set():
                    answers.append(explain(address, session))

        with ThreadPoolExecutor(2 * CLIENTS) as pool:
            asking = [pool.submit(ask_on) for _ in range(CLIENTS)]
            slow = [pool.submit(explain, address, None, **SLOW) for _ in range(CLIENTS)]
            time.sleep(0.5)
            process.terminate()
            wait_for(lambda: any("draining" in line for line in printed), "word of draining")
            code, said = probe(address, archive, log_dir)
            assert code == 1
            assert "not ready: the server drains" in said
            before = len(answers)
            wait_for(lambda: len(answers) >= before + CLIENTS, "answers while it drains")
            ended.set()  # the balancer has noticed
            for future in asking:
                future.result()
            late = [pool.submit(explain, address, None, **SLOW) for _ in range(CLIENTS)]
            assert [future.result() for future in (*slow, *late)] == [label_of(FILE)] * (2 * CLIENTS)
        assert set(answers) == {label_of(FILE)}
        assert process.wait(timeout=60) == 0
