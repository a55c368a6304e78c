"""Odd starts of `python -m scripts.serving`: each works, or ends soon with one sentence that says what to do."""

import contextlib
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from scripts.packaging.package import checksum_file_of
from scripts.paths import ROOT, SAMPLE_FILES
from scripts.serving.cluster import Cluster
from scripts.serving.server import TorchServe
from scripts.serving.settings import Ports, ServeError, Settings, option_of
from tests.client import TIMEOUT_S
from tests.servers import processes_with, read_until, serving, wait_for
from tests.tls import make_certificate

REFUSED_S = 60  # far more than a refusal takes, on a busy machine
GONE_S = 10  # from the launcher's sudden end to the end of all that it started


def options_of(ports: Ports) -> list[str]:
    return [f"{option_of(name)}={getattr(ports, name)}" for name in Ports.__dataclass_fields__]


def refusal(
    *options: str, environment: dict[str, str] | None = None, prefix: Sequence[str] = (), before: Callable[[], None] | None = None
) -> str:
    """Start a server that must not start; returns its one sentence."""
    finished = subprocess.run(
        [*prefix, sys.executable, "-m", "scripts.serving", "--device=cpu", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=REFUSED_S,
        preexec_fn=before,
    )
    assert finished.returncode in (1, 2), finished.stderr
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
    *others, sentence = finished.stderr.strip().splitlines()
    assert all(line.startswith(("starting TorchServe", "usage:", " ")) for line in others), finished.stderr
    assert "error: " in sentence
    return sentence.partition("error: ")[2]


@pytest.fixture
def ports() -> Ports:
    return Ports.free()


@pytest.fixture
def archive_copy(archive: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(archive, tmp_path / "digits.mar"))


# --- what cannot work


@pytest.mark.parametrize("port", ["99999", "0", "-1", "eight", "8080.5", "٨٠"])
def test_no_port_is_named(port: str) -> None:
    assert refusal(f"--inference-port={port}") == f"argument --inference-port: expected a port from 1 to 65535, got {port!r}"


def test_port_given_twice_is_named(archive: Path, ports: Ports) -> None:
    options = [*options_of(ports), f"--metrics-port={ports.inference}", f"--archive={archive}"]
    assert refusal(*options) == f"port {ports.inference} is given twice; choose another with --metrics-port or --inference-port"


def test_port_that_takes_privileges_is_named(archive: Path, ports: Ports, tmp_path: Path) -> None:
    if Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text().strip() in ("0", "80"):
        pytest.skip("every user may listen on every port here")
    prefix = []
    if os.geteuid() == 0:
        prefix = ["setpriv", "--inh-caps=-net_bind_service", "--bounding-set=-net_bind_service", "--"]
        if shutil.which("setpriv") is None:
            pytest.skip("root may listen on every port, and setpriv is missing")
    sentence = refusal(*options_of(ports), "--inference-port=80", f"--archive={archive}", prefix=prefix)
    assert sentence == "this user may not listen on port 80; choose one above 1023 with --inference-port"


def test_port_in_use_is_named(archive: Path, ports: Ports) -> None:
    with socket.create_server(("127.0.0.1", ports.grpc_inference)):
        sentence = refusal(*options_of(ports), f"--archive={archive}")
    assert sentence.startswith(f"port {ports.grpc_inference} is taken; choose another with --grpc-inference-port")


@pytest.mark.parametrize("kind", ["missing", "a folder", "truncated", "empty", "no archive", "odd name"])
def test_archive_that_cannot_be_served_is_named(archive: Path, ports: Ports, tmp_path: Path, kind: str) -> None:
    bad = tmp_path / ("dïgits 2.mar" if kind == "odd name" else "digits.mar")
    content = archive.read_bytes()
    if kind == "a folder":
        bad.mkdir()
    elif kind != "missing":
        bad.write_bytes({"truncated": content[:-1000], "empty": b"", "no archive": b"x" * 1000}.get(kind, content))
    sentence = refusal(*options_of(ports), f"--archive={bad}", f"--log-dir={tmp_path / 'logs'}")
    expected = {
        "missing": r"there is no archive \S+; build it with: python -m scripts\.packaging",
        "a folder": r"there is no archive \S+; build it with: python -m scripts\.packaging",
        "odd name": r"the archive's name is the model's, .* expected letters, digits and \._- alone, got .*; rename it",
    }.get(kind, r"the archive \S+ cannot be served: File is not a zip file")
    assert re.fullmatch(expected, sentence), sentence


def test_archive_of_another_build_is_named(archive_copy: Path, ports: Ports) -> None:
    checksum_file_of(archive_copy).write_text(f"{'0' * 64}  digits.mar\n")
    sentence = refusal(*options_of(ports), f"--archive={archive_copy}")
    assert re.fullmatch(r"\S+digits\.mar is not what was built: expected SHA-256 '0+' .*, got [0-9a-f]{64}", sentence)


@pytest.mark.parametrize("folder", ["/proc/keys", "/dev/null/keys", "/dev/null"])
def test_folder_of_tokens_that_cannot_be_written_is_named(archive_copy: Path, ports: Ports, tmp_path: Path, folder: str) -> None:
    certificate, private_key = make_certificate(tmp_path, "IP:127.0.0.1", "rsa")
    sha256 = subprocess.run(["sha256sum", archive_copy], capture_output=True, text=True, check=True).stdout.split()[0]
    options = [f"--archive={archive_copy}", f"--archive-sha256={sha256}", f"--key-dir={folder}", "--allow-privileged-user"]
    options += ["--hardened", f"--certificate={certificate}", f"--private-key={private_key}"]
    sentence = refusal(*options_of(ports), *options)
    assert re.fullmatch(rf"cannot write tokens into {folder} \(.+\); choose another folder with --key-dir", sentence)


@pytest.mark.parametrize("folder", ["/proc/logs", "/dev/null/logs"])
def test_folder_of_logs_that_cannot_be_written_is_named(archive: Path, ports: Ports, folder: str) -> None:
    sentence = refusal(*options_of(ports), f"--archive={archive}", f"--log-dir={folder}")
    assert re.fullmatch(rf"cannot write logs into {folder} \(.+\); choose another folder with --log-dir", sentence)


def test_missing_log_configuration_is_named(archive: Path, ports: Ports) -> None:
    sentence = refusal(*options_of(ports), f"--archive={archive}", "--log-config=/nonexistent.xml")
    assert sentence == "there is no file /nonexistent.xml, given as --log-config"


@pytest.mark.parametrize(
    ("limit", "value", "advice"),
    [
        (resource.RLIMIT_NOFILE, 64, "only 64 files may be open, and a server takes 1024; allow more with: ulimit -n 65536"),
        (resource.RLIMIT_AS, 2 << 30, "the limit of address space is too small for a server (2147483648); remove it with: "),
        (resource.RLIMIT_FSIZE, 10 << 20, "the limit of file size is too small for a server (10485760); remove it with: "),
    ],
    ids=["open files", "address space", "file size"],
)
def test_small_limit_is_named(archive: Path, ports: Ports, limit: int, value: int, advice: str) -> None:
    def lower() -> None:
        resource.setrlimit(limit, (value, value))

    assert refusal(*options_of(ports), f"--archive={archive}", before=lower).startswith(advice)


def test_more_workers_than_memory_are_named(archive: Path, ports: Ports, tmp_path: Path) -> None:
    sentence = refusal(*options_of(ports), f"--archive={archive}", f"--log-dir={tmp_path}", "--workers=10000000")
    assert re.fullmatch(
        r"the container or machine allows \d+ MB of memory, and a server with 10000000 workers takes \d+ MB: allow more, "
        r"or start fewer workers with --workers",
        sentence,
    )


# --- what works

ODD_NAME = "Größe $HOME büro, 图"


@pytest.fixture
def odd_checkout(tmp_path: Path, archive: Path) -> Path:
    """The project in a folder whose name has a space, a dollar sign, a comma, and letters of three alphabets."""
    folder = tmp_path / ODD_NAME
    folder.mkdir()
    for name in ("handler", "model", "scripts", "serve_config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    (folder / "build").mkdir()
    shutil.copy(archive, folder / "build" / "digits.mar")
    (folder / "venv").symlink_to(sys.prefix)
    return folder


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[Path]:
    """A small file system without room, where this user can make one; else a folder that does not exist."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        yield folder / "missing"
        return
    try:
        with contextlib.suppress(OSError):
            (folder / "filler").write_bytes(bytes(65_536))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def ask(address: str) -> int:
    reply = requests.put(f"{address}/predictions/digits", data=SAMPLE_FILES[0].read_bytes(), timeout=TIMEOUT_S)
    assert reply.status_code == 200, reply.text
    digit: int = reply.json()["digit"]
    return digit


def address_in(printed: str) -> str:
    found = re.search(r"workers ready at (http://127\.0\.0\.1:\d+)", printed)
    assert found is not None, printed
    return found[1]


def test_everything_around_it_is_odd(odd_checkout: Path, ports: Ports, tmp_path: Path) -> None:
    """A path with spaces and letters of all kinds, the C locale, no home, no room in TMPDIR, a proxy, a low limit of open files,
    and variables that would lead Java, Python and TorchServe elsewhere."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH")}
    with full_disk(tmp_path / "full disk") as temp_dir:
        environment = kept | {
            **{"LC_ALL": "C", "LANG": "xx_XX", "TMPDIR": str(temp_dir), "COLUMNS": "40", "PYTHONIOENCODING": "ascii"},
            **{"JAVA_HOME": "/nonexistent", "JAVA_TOOL_OPTIONS": "-Xmx1m", "_JAVA_OPTIONS": "-Dx", "CLASSPATH": "/nonexistent"},
            **dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9"),
            **{"TS_CONFIG_FILE": "/nonexistent", "TS_OPEN_INFERENCE_PROTOCOL": "oip", "TS_MODEL_SERVER_HOME": "/nonexistent"},
            **{"PYTHONWARNINGS": "error", "PYTHONSTARTUP": "/nonexistent"},
            **{"LOG_LOCATION": "/nonexistent", "METRICS_LOCATION": "/nonexistent", "BASH_ENV": "/nonexistent"},
        }
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        options = [*options_of(ports), "--device=cpu", "--workers=1"]
        process = subprocess.Popen(
            [str(odd_checkout / "venv" / "bin" / "python"), "-m", "scripts.serving", *options],
            cwd=odd_checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)),
        )
        try:
            printed = read_until(process, r"curl .*/explanations/")
            assert ask(address_in(printed)) == 0
            (command,) = re.findall(r"(?m)^  (curl -T .*)$", printed)
            shown = subprocess.run(
                [*shlex.split(command), "-sS", "--noproxy", "*"], cwd=odd_checkout, capture_output=True, text=True, check=True
            )
            assert '"digit":7' in shown.stdout
            metrics = requests.get(f"http://127.0.0.1:{ports.metrics}/metrics", timeout=TIMEOUT_S).text
            assert "saliency_worker_starts_total{" in metrics
            logs = odd_checkout / "build" / "logs" / str(ports.inference)
            assert {"access_log.log", "console.log", "model_log.log", "ts_log.log"} <= {path.name for path in logs.iterdir()}
            assert '"PUT /predictions" 200' in (logs / "access_log.log").read_text()
        finally:
            process.terminate()
            assert process.wait(timeout=60) == 0
            assert process.stdout is not None
            process.stdout.close()


def test_killed_launcher_takes_everything_with_it_and_can_be_started_again(archive: Path, ports: Ports, tmp_path: Path) -> None:
    """TMPDIR has 110 characters, and there is no home that can be written. The second start appends to the first one's logs."""
    temp_dir = tmp_path / ("t" * max(1, 109 - len(str(tmp_path))))
    temp_dir.mkdir()
    environment = os.environ | {"TMPDIR": str(temp_dir), "HOME": "/proc", "MARK": str(tmp_path)}
    log = tmp_path / "logs" / "console.log"
    for number in range(2):
        with serving(ports, log.parent, f"--archive={archive}", "--workers=2", environment=environment) as process:
            read_until(process, r"curl .*/explanations/")
            started = processes_with(str(tmp_path))
            commands = " ".join(" ".join(one.cmdline()) for one in started)
            assert commands.count("model_service_worker.py") == 2
            found = re.search(r"-Djava\.io\.tmpdir=(\S+)/tmp\b", commands)
            assert found is not None
            assert Path(found[1]).is_dir()
            assert len(found[1]) < 60
            workers = [one for one in started if "model_service_worker" in " ".join(one.cmdline())]
            workers[0].suspend()  # it does not end by itself
            process.kill()
            process.wait()
            wait_for(lambda: processes_with(str(tmp_path)) == [], "end of all processes", GONE_S)
            assert not Path(found[1]).exists()
        assert log.read_text().count("Model server started.") == number + 1


def test_two_starts_at_once_on_the_same_ports(archive: Path, ports: Ports, tmp_path: Path) -> None:
    """One of them serves, the other one says why it does not."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(serving(ports, tmp_path / f"logs {number}", f"--archive={archive}", "--workers=1"))
            for number in range(2)
        ]
        wait_for(lambda: any(process.poll() is not None for process in processes), "end of one of them")
        (ended,) = [process for process in processes if process.poll() is not None]
        (other,) = [process for process in processes if process is not ended]
        assert ended.stdout is not None
        said = ended.stdout.read()
        assert ended.returncode == 1
        assert re.search(r"^error: port \d+ (is|was) taken", said, re.MULTILINE), said  # the end of the log may follow
        assert ask(address_in(read_until(other, r"curl .*/explanations/"))) == 0


@pytest.mark.parametrize("shared", ["all", "inference"])
@pytest.mark.parametrize("cluster", [None, Cluster(drain_delay_s=0)], ids=["development", "cluster"])
def test_start_on_ports_taken_since_they_were_looked_at(
    archive: Path, ports: Ports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str, cluster: Cluster | None
) -> None:
    """Another server answers there, with all its workers: this one must neither call itself ready nor share the port."""
    config = {"minWorkers": 1, "maxWorkers": 1}
    first, second = (
        Settings(archive=archive, ports=ports, device="cpu", log_dir=tmp_path / name, model_config=config, cluster=cluster)
        for name in ("first", "second")
    )
    if shared == "inference":
        second = replace(second, ports=replace(Ports.free(), inference=ports.inference))
    with TorchServe(first):
        monkeypatch.setattr(Ports, "require_free", lambda *_: None)  # what a start at the same moment sees
        with (
            pytest.raises(ServeError, match=r"^port \d+ was taken by another program while the server started"),
            TorchServe(second),
        ):
            pass
        assert ask(f"http://127.0.0.1:{ports.inference}") == 0


def test_two_servers_share_nothing(archive: Path, tmp_path: Path) -> None:
    """From one checkout, with the default folder of logs: each has its own. The end of one leaves the other whole."""
    both = [Ports.free(), Ports.free()]
    folders = [ROOT / "build" / "logs" / str(ports.inference) for ports in both]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        processes = []
        for ports in both:
            command = [sys.executable, "-m", "scripts.serving", *options_of(ports), f"--archive={archive}", "--workers=1"]
            process = subprocess.Popen(
                [*command, "--device=cpu"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            stack.callback(_end, process)
            processes.append(process)
        for process in processes:
            read_until(process, r"curl .*/explanations/")
        assert all((folder / "console.log").stat().st_size > 0 for folder in folders)
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(timeout=60) == 0
        assert (folders[0] / "console.log").stat().st_size > 0  # kept
        assert ask(f"http://127.0.0.1:{both[1].inference}") == 0
        sentence = refusal(*options_of(both[0]), f"--archive={archive}", f"--log-dir={folders[1]}")
        assert sentence.startswith(
            f"another running server writes its logs into {folders[1]}; choose another folder with --log-dir"
        )


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait(timeout=60)
    assert process.stdout is not None
    process.stdout.close()


def test_output_that_nobody_reads_ends_nothing(archive: Path, ports: Ports, tmp_path: Path) -> None:
    """`python -m scripts.serving | head -1`, and a terminal that is gone."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "scripts.serving", *options_of(ports), f"--archive={archive}", "--workers=1", "--device=cpu"]
    process = subprocess.Popen(
        [*command, f"--log-dir={tmp_path / 'logs'}"], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing
    )
    os.close(writing)
    os.close(reading)
    try:
        address = f"http://127.0.0.1:{ports.inference}"

        def answers() -> bool:
            with contextlib.suppress(requests.ConnectionError):
                return ask(address) == 0
            return False

        wait_for(answers, "answer")
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
