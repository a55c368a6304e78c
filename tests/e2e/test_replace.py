"""TorchServe under a watching launcher: its frontend's leak, shown and survived; hung or without workers, it is replaced."""

import contextlib
import hashlib
import http.client
import itertools
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from scripts.paths import HARDENED_CONFIGURATION, SAMPLE_FILES
from scripts.serving.cluster import Cluster
from scripts.serving.configuration import TORCHSERVE_SOCKET, find_property, write_property
from scripts.serving.credentials import authorization, read_token
from scripts.serving.hardened import Hardening
from scripts.serving.launcher import Ports, ServeError, Settings, TorchServe
from scripts.serving.server import MAX_REPLACEMENTS
from scripts.serving.watch import Limits, jvm_bound
from tests.client import TIMEOUT_S
from tests.conftest import label_of
from tests.servers import read_until, serving, wait_for, workers_of
from tests.tls import make_certificate

CLIENTS = 4
PART_BYTES = 1_000_000
BAD_FORMS = [  # each ends in the frontend's own 500, which forgets the body
    b"--b\r\nContent-Disposition: form-data\r\n\r\n" + bytes(PART_BYTES) + b"\r\n--b--\r\n",
    b"--b\r\nContent-Disposition: form-data; name=data\r\nContent-Type: text/plain; charset=none\r\n\r\n"
    + bytes(PART_BYTES)
    + b"\r\n--b--\r\n",
]
HEADERS = {"Content-Type": "multipart/form-data; boundary=b"}


class GoodClients:
    """Clients that ask for known digits until the end, and count how each request ended."""

    def __init__(self, address: str) -> None:
        self.ends: Counter[str] = Counter()
        self._address = address
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> "GoodClients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, count: int = 20) -> None:
        before = self.ends["right"]
        wait_for(lambda: self.ends["right"] >= before + count, "right answers")

    def _ask(self, first: int) -> None:
        with requests.Session() as session:
            for number in itertools.count(first):
                if self._ended.is_set():
                    return
                file = SAMPLE_FILES[number % len(SAMPLE_FILES)]
                try:
                    reply = session.put(f"{self._address}/explanations/digits", data=file.read_bytes(), timeout=TIMEOUT_S)
                    if reply.status_code != 200:
                        self.ends[f"{reply.status_code} {reply.text[:200]}"] += 1
                    else:
                        self.ends["right" if reply.json()["digit"] == label_of(file) else "wrong"] += 1
                except requests.RequestException as error:
                    self.ends[repr(error)] += 1
                time.sleep(0.01)


class Direct(http.client.HTTPConnection):
    """HTTP on TorchServe's own socket, past the front, which lets no malformed form through."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))


def send_bad_form(connection: http.client.HTTPConnection, number: int) -> int:
    connection.request("POST", "/predictions/digits", BAD_FORMS[number % len(BAD_FORMS)], HEADERS)
    reply = connection.getresponse()
    reply.read()
    return reply.status


def jvm_of(server: TorchServe) -> psutil.Process:
    return next(process for process in server.processes() if "org.pytorch.serve.ModelServer" in process.cmdline())


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE  # nobody may have asked for it yet


def wait_for_reason(server: TorchServe) -> str:
    found: list[str] = []

    def look() -> str:
        found.append(server.find_reason_to_replace())
        return found[-1]

    wait_for(look, "reason to replace it")
    return found[-1]


@pytest.fixture(scope="module")
def watched(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """A server behind its front, whose JVM pools its buffers, as TorchServe's does as shipped: so it leaks."""
    folder = tmp_path_factory.mktemp("watched")
    committed = HARDENED_CONFIGURATION.read_text()
    arguments = (find_property(committed, "vmargs") or "").replace("-Dio.netty.allocator.type=unpooled", "")
    (folder / "config.properties").write_text(write_property(committed, "vmargs", arguments))
    settings = Settings(
        archive=archive,
        ports=Ports.free(),
        device="cpu",
        log_dir=folder / "logs",
        configuration=folder / "config.properties",
        model_config={"minWorkers": 1, "maxWorkers": 1},
        cluster=Cluster(),
        limits=Limits(jvm_bytes=600_000_000, missing_s=3, silent_s=3, poll_s=0.2),
    )
    with TorchServe(settings) as server:
        yield server


def test_leak_is_real_and_its_replacement_costs_nobody_an_answer(watched: TorchServe) -> None:
    leaking = jvm_of(watched)
    before = leaking.memory_info().rss
    with GoodClients(watched.address) as clients:
        clients.wait_for_more()
        sent = 0
        while not (reason := watched.find_reason_to_replace()):
            with contextlib.closing(Direct(watched.folder / TORCHSERVE_SOCKET)) as connection:
                assert send_bad_form(connection, sent) == 500
            sent += 1
            assert sent < 3000
        assert leaking.memory_info().rss - before > 0.5 * sent * PART_BYTES  # most of what was sent is still there
        assert re.fullmatch(r"the JVM takes 6\d\d MB of memory, more than 600", reason)
        watched.replace(reason)
        clients.wait_for_more()
    assert clients.ends.keys() == {"right"}, clients.ends
    assert has_ended(leaking)
    assert watched.find_reason_to_replace() == ""
    log = (watched.settings.log_dir / "console.log").read_text()
    assert f"[launcher] replacing TorchServe: {reason}\n" in log
    assert re.search(r"\[launcher\] TorchServe is replaced, in \d+\.\d s; [1-4] requests waited meanwhile\n", log)
    address = f"http://127.0.0.1:{watched.settings.ports.metrics}/metrics"
    wait_for(lambda: "saliency_server_replacements{" in requests.get(address, timeout=TIMEOUT_S).text, "figures of the frontend")
    figures = dict(
        re.findall(
            r'(?m)^(saliency_(?:frontend|server)\w+){Level="Host",.*} (\S+)$', requests.get(address, timeout=TIMEOUT_S).text
        )
    )
    assert float(figures["saliency_server_replacements"]) >= 1
    assert float(figures["saliency_frontend_limit_bytes"]) == 600_000_000
    assert 200e6 < float(figures["saliency_frontend_resident_bytes"]) < 600e6


def test_hung_jvm_is_replaced(watched: TorchServe) -> None:
    jvm = jvm_of(watched)
    jvm.suspend()
    reason = wait_for_reason(watched)
    assert re.fullmatch(r"TorchServe has not answered for \d+ s", reason)
    watched.replace(reason)
    assert has_ended(jvm)
    with GoodClients(watched.address) as clients:
        clients.wait_for_more()
    assert clients.ends.keys() == {"right"}, clients.ends


def test_workers_that_do_not_come_back_are_a_reason(watched: TorchServe) -> None:
    ended = threading.Event()

    def keep_killing() -> None:
        while not ended.wait(0.1):
            for worker in workers_of(watched):
                with contextlib.suppress(psutil.Error):
                    worker.kill()

    killing = threading.Thread(target=keep_killing)
    killing.start()
    try:
        reason = wait_for_reason(watched)
    finally:
        ended.set()
        killing.join()
    assert re.fullmatch(r"only 0 of 1 workers have been ready for \d+ s", reason)
    watched.replace(reason)
    with GoodClients(watched.address) as clients:
        clients.wait_for_more()


def test_too_many_replacements_are_the_end(watched: TorchServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "_replaced", [time.monotonic()] * MAX_REPLACEMENTS)
    with pytest.raises(ServeError, match="had to be replaced 4 times in 10 minutes, now as a test"):
        watched.replace("a test")
    with GoodClients(watched.address) as clients:  # nothing has been ended yet
        clients.wait_for_more()


def test_tokens_of_a_hardened_server_outlive_a_replacement(archive: Path, tmp_path: Path) -> None:
    """TorchServe makes new ones; the front takes the earlier ones, until someone makes a new one through the token API."""
    certificate, private_key = make_certificate(tmp_path, "IP:127.0.0.1", "rsa")
    hardening = Hardening(certificate, private_key, key_dir=tmp_path / "keys", allow_privileged_user=True)
    settings = Settings(
        archive=archive,
        archive_sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        ports=Ports.free(),
        device="cpu",
        log_dir=tmp_path / "logs",
        configuration=HARDENED_CONFIGURATION,
        model_config={"minWorkers": 1, "maxWorkers": 1},
        hardening=hardening,
    )

    def ask(token: str) -> int:
        body, headers = SAMPLE_FILES[0].read_bytes(), authorization(token)
        url = f"{server.address}/predictions/digits"
        return requests.put(url, data=body, headers=headers, verify=str(certificate), timeout=TIMEOUT_S).status_code

    with TorchServe(settings) as server, ThreadPoolExecutor(1) as pool:
        token = read_token(hardening.key_file)
        assert ask(token) == 200
        ended = threading.Event()
        asking = pool.submit(lambda: [ask(token) for _ in iter(ended.is_set, True)])
        server.replace("a test")
        assert server.find_reason_to_replace() == ""
        new = read_token(hardening.key_file)
        assert new != token
        ended.set()
        assert set(asking.result()) == {200}  # with the earlier token, before, meanwhile and after
        assert (ask(token), ask(new), ask("AAAAAAAA"), ask(token[:-1])) == (200, 200, 400, 400)
        assert hardening.former_tokens.stat().st_mode & 0o777 == 0o600
        renewed = requests.get(
            f"{server.management_address}/token?type=inference",
            headers=authorization(read_token(hardening.key_file, "API")),
            timeout=TIMEOUT_S,
        )
        assert renewed.status_code == 200
        assert server.find_reason_to_replace() == ""
        assert (ask(token), ask(new), ask(read_token(hardening.key_file))) == (400, 400, 200)
    assert list((tmp_path / "keys").iterdir()) == []


@pytest.mark.long
def test_ten_thousand_bad_forms_leave_nothing(archive: Path, tmp_path: Path) -> None:
    """As committed, without a front. Good clients beside them lose no answer, and nothing has to be replaced."""
    settings = Settings(archive=archive, ports=Ports.free(), device="cpu", log_dir=tmp_path / "logs")
    bound = jvm_bound(find_property(settings.configuration.read_text(), "vmargs") or "")
    ends: Counter[int] = Counter()

    def attack(server: TorchServe) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.settings.ports.inference, timeout=TIMEOUT_S)
        with contextlib.closing(connection):
            for number in range(2500):
                ends[send_bad_form(connection, number)] += 1

    with TorchServe(settings) as server, GoodClients(server.address) as clients:
        clients.wait_for_more()
        attackers = [threading.Thread(target=attack, args=(server,)) for _ in range(4)]
        for attacker in attackers:
            attacker.start()
        most = 0
        while any(attacker.is_alive() for attacker in attackers):
            assert server.find_reason_to_replace() == ""
            most = max(most, jvm_of(server).memory_info().rss)
            time.sleep(0.2)
        clients.wait_for_more()
        large = SAMPLE_FILES[0].read_bytes() + bytes(PART_BYTES)
        assert requests.put(f"{server.address}/predictions/digits", data=large, timeout=TIMEOUT_S).status_code == 200
    assert ends == {500: 10_000}
    assert clients.ends.keys() == {"right"}, clients.ends
    assert most < bound
    print(
        f"10,000 bad forms of 1 MB: the JVM took {most / 1e6:.0f} MB at most; {clients.ends['right']} right answers beside them"
    )


@pytest.mark.long
def test_launcher_replaces_a_hung_jvm_by_itself(archive: Path, tmp_path: Path) -> None:
    """`python -m scripts.serving`, with the committed limits: a minute passes before silence is a reason."""
    ports = Ports.free()
    with serving(ports, tmp_path / "logs", f"--archive={archive}", "--workers=1") as process:
        read_until(process, r"curl .*/explanations/")
        (jvm,) = [one for one in psutil.Process(process.pid).children(recursive=True) if "-ncs" in one.cmdline()]
        jvm.suspend()
        printed = read_until(process, r"TorchServe is replaced")
        assert re.search(r"(?m)^replacing TorchServe: TorchServe has not answered for \d+ s \.\.\.$", printed)
        with GoodClients(f"http://127.0.0.1:{ports.inference}") as clients:
            clients.wait_for_more()
        assert clients.ends.keys() == {"right"}, clients.ends
        process.terminate()
        assert process.wait(timeout=60) == 0
