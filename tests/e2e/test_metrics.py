"""Metrics, alerts, dashboard, correlation ids and JSON logs: with a real TorchServe and, if installed, a real Prometheus."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from PIL import Image

from handler.runtime.metrics import INTERVAL_S
from scripts.bench.attacks import encode
from scripts.paths import ROOT, SAMPLE_FILES, SERVE_CONFIG
from scripts.serving.launcher import Ports, Settings, TorchServe
from tests.client import TIMEOUT_S
from tests.servers import wait_for, workers_of

IMAGE = SAMPLE_FILES[36].read_bytes()
CUT_OFF = encode(Image.open(SAMPLE_FILES[36]).resize((112, 112)).crop((0, 0, 112, 80)), "PNG")  # TouchesBorder is its warning
PROMETHEUS_FOLDER = SERVE_CONFIG / "prometheus"
RULES: list[dict[str, Any]] = [
    rule
    for file in ("alerts.yml", "autoscaling.yml")
    for group in yaml.safe_load((PROMETHEUS_FOLDER / file).read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((SERVE_CONFIG / "grafana" / "dashboard.json").read_text())
WAIT_S = 120
NAMELESS = b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n"  # a field to which the frontend itself says 500
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
NEEDS_PROMETHEUS = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus and promtool are not installed (Debian: apt-get install prometheus)",
)
Counts = dict[str, float]  # by name and labels, as /metrics has them, without the host's


def scrape(server: TorchServe) -> Counts:
    """Read /metrics, in Prometheus' text format."""
    reply = requests.get(f"http://127.0.0.1:{server.settings.ports.metrics}/metrics", timeout=TIMEOUT_S)
    reply.raise_for_status()
    counts = {}
    for line in reply.text.splitlines():
        if not line.startswith("#"):
            found = re.fullmatch(r"(\w+)(?:\{(.*),\})? (\S+)", line)
            assert found is not None, line
            labels = re.sub(r',?[Hh]ostname="[^"]*"', "", found[2] or "")
            counts[f"{found[1]}{{{labels}}}"] = float(found[3])
    return counts


def settled(server: TorchServe) -> Counts:
    """Read the counts once they are complete: unchanged for twice the time that a worker keeps them back."""
    deadline = time.monotonic() + WAIT_S
    counts, since = ours(scrape(server)), time.monotonic()
    while time.monotonic() < since + 2 * INTERVAL_S:
        assert time.monotonic() < deadline, "the counts never came to rest"
        time.sleep(0.1)
        if (now := ours(scrape(server))) != counts:
            counts, since = now, time.monotonic()
    return counts


def ours(counts: Counts) -> Counts:
    return {name: value for name, value in counts.items() if name.startswith("saliency_")}


def log_of(server: TorchServe) -> str:
    return "".join(file.read_text() for file in sorted(server.settings.log_dir.glob("*.log")))


def test_what_happened_is_counted_exactly(server: TorchServe) -> None:
    before = settled(server)
    explanations, predictions = f"{server.address}/explanations/digits", f"{server.address}/predictions/digits"
    for _ in range(3):
        assert requests.put(explanations, data=IMAGE, timeout=TIMEOUT_S).status_code == 200
    assert requests.put(predictions, data=IMAGE, timeout=TIMEOUT_S).status_code == 200
    for method, status in (("smoothgrad", 200), ("magic", 400)):
        reply = requests.put(explanations, data=IMAGE, headers={"X-Saliency-Method": method}, timeout=TIMEOUT_S)
        assert reply.status_code == status
    assert requests.put(predictions, data=b"nothing", timeout=TIMEOUT_S).status_code == 400
    after = settled(server)

    changed = {name: value - before[name] for name, value in after.items() if value != before[name]}
    steps = {name: changed.pop(name) for name in list(changed) if name.startswith("saliency_step_seconds_")}
    confidence = changed.pop('saliency_confidence_sum{model_name="digits"}')
    assert 4.5 < confidence <= 5
    for bound in ("0.99", "0.999"):
        changed.pop(f'saliency_confidence_bucket{{model_name="digits",le="{bound}"}}', None)
    requests_of = 'saliency_requests_total{model_name="digits",kind='
    assert changed == {
        requests_of + '"explanation",method="gradient",outcome="ok"}': 3,
        requests_of + '"explanation",method="smoothgrad",outcome="ok"}': 1,
        requests_of + '"explanation",method="unread",outcome="client_error"}': 1,
        requests_of + '"prediction",method="none",outcome="ok"}': 1,
        requests_of + '"prediction",method="unread",outcome="client_error"}': 1,
        'saliency_errors_total{model_name="digits",type="InvalidOption"}': 1,
        'saliency_errors_total{model_name="digits",type="UnreadableImage"}': 1,
        'saliency_pictures_total{model_name="digits",class="7"}': 5,
        'saliency_confidence_bucket{model_name="digits",le="1"}': 5,
        'saliency_confidence_bucket{model_name="digits",le="+Inf"}': 5,
        'saliency_confidence_count{model_name="digits"}': 5,
    }
    for step, batches in (("decode", 7), ("forward", 5), ("backward", 4), ("map", 5), ("encode", 7)):
        labels = f'model_name="digits",step="{step}"'
        assert steps[f"saliency_step_seconds_count{{{labels}}}"] == batches
        assert steps[f'saliency_step_seconds_bucket{{{labels},le="+Inf"}}'] == batches
        assert 0 < steps[f"saliency_step_seconds_sum{{{labels}}}"] < WAIT_S


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (IMAGE, 200, "kind=explanation method=gradient status=200 error=None"),
        (b"nothing", 400, "kind=explanation method=unread status=400 error=UnreadableImage"),
    ],
    ids=["answer", "error"],
)
@pytest.mark.parametrize("header", ["X-Correlation-Id", "x-request-id"])
def test_correlation_id_is_in_the_reply_and_once_in_the_log(
    server: TorchServe, header: str, body: bytes, status: int, said: str
) -> None:
    correlation_id = f"{header}.{status}_A9"
    reply = requests.put(f"{server.address}/explanations/digits", data=body, headers={header: correlation_id}, timeout=TIMEOUT_S)
    assert (reply.status_code, reply.headers["X-Correlation-Id"]) == (status, correlation_id)
    line = f"correlation_id={correlation_id} request_id={reply.headers['X-Request-Id']} {said}\n"
    model_log = server.settings.log_dir / "model_log.log"
    wait_for(lambda: line in model_log.read_text(), "line in the log")
    assert model_log.read_text().count(correlation_id) == 1


@pytest.mark.parametrize(
    "hostile",
    ["a" * 65, "two words", "[METRICS]saliency_worker_starts_total.Count:9", "id\tstatus=200", "id%0aforged", "caf\u00e9"],
)
def test_id_that_could_be_misread_is_neither_answered_nor_logged(server: TorchServe, hostile: str) -> None:
    starts = 'saliency_worker_starts_total{model_name="digits"}'
    before = scrape(server)[starts]
    headers: dict[str, str | bytes] = {
        "X-Correlation-Id": hostile.encode("latin-1"),
        "Authorization": "Bearer seeing-secret",
        "X-Request-Id": b"seen-after",
    }
    reply = requests.put(f"{server.address}/predictions/digits", data=IMAGE, headers=headers, timeout=TIMEOUT_S)
    assert (reply.status_code, reply.headers["X-Correlation-Id"]) == (200, "seen-after")
    wait_for(lambda: f"correlation_id=seen-after request_id={reply.headers['X-Request-Id']}" in log_of(server), "line in the log")
    assert hostile not in log_of(server)
    assert "seeing-secret" not in log_of(server)
    assert scrape(server)[starts] == before


def test_request_without_an_id_has_no_line_and_no_header(server: TorchServe) -> None:
    reply = requests.put(f"{server.address}/predictions/digits", data=IMAGE, timeout=TIMEOUT_S)
    assert "X-Correlation-Id" not in reply.headers
    marker = requests.put(
        f"{server.address}/predictions/digits", data=IMAGE, headers={"X-Request-Id": "after"}, timeout=TIMEOUT_S
    )
    wait_for(lambda: marker.headers["X-Request-Id"] in log_of(server), "line in the log")  # whatever came before is there too
    assert reply.headers["X-Request-Id"] not in log_of(server)


# --- a server with JSON logs, and a Prometheus that scrapes it


@pytest.fixture(scope="module")
def json_server(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    settings = Settings(
        archive=archive,
        ports=Ports.free(),
        device="cpu",
        log_dir=tmp_path_factory.mktemp("json-logs"),
        model_config={"minWorkers": 1, "maxWorkers": 1},
        log_configuration=SERVE_CONFIG / "log4j2-json.xml",
    )
    with TorchServe(settings) as running:
        yield running


@contextlib.contextmanager
def traffic(server: TorchServe) -> Iterator[None]:
    """Send requests of all kinds and outcomes in the background, one after another."""
    routes = [f"{server.address}/{route}/digits" for route in ("explanations", "predictions")]
    ended = threading.Event()

    def send() -> None:
        turn = 0
        while not ended.wait(0.1):
            files = [file.read_bytes() for file in SAMPLE_FILES[turn % 50 :: 10]]
            with contextlib.suppress(requests.RequestException):
                for content in files:
                    requests.put(routes[turn % 2], data=content, timeout=TIMEOUT_S)
                requests.put(routes[0], data=b"nothing", timeout=TIMEOUT_S)
                assert requests.put(routes[1], data=CUT_OFF, timeout=TIMEOUT_S).json()["warnings"]
                assert requests.post(routes[0], data=NAMELESS, headers=FORM, timeout=TIMEOUT_S).status_code == 500
            turn += 1

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def prometheus_of(server: TorchServe, folder: Path) -> Iterator[str]:
    """Run a Prometheus with this project's configuration, on another port and with short intervals. Yields its address."""
    configuration = yaml.safe_load((PROMETHEUS_FOLDER / "prometheus.yml").read_text())
    assert configuration["scrape_configs"][0]["static_configs"] == [{"targets": ["127.0.0.1:8082"]}]
    configuration["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{server.settings.ports.metrics}"]}]
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(PROMETHEUS_FOLDER / name) for name in configuration["rule_files"]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *options], cwd=folder, stdout=log, stderr=log)
    try:
        wait_for(lambda: is_ready(address), "ready Prometheus")
        yield f"http://{address}/api/v1"
    except BaseException:
        print((folder / "log").read_text()[-3000:])
        raise
    finally:
        process.terminate()
        process.wait(timeout=60)


def is_ready(address: str) -> bool:
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(f"http://{address}/-/ready", timeout=TIMEOUT_S).ok
    return False


def ask(prometheus: str, query: str) -> list[float]:
    """Values of an instant query, without NaN."""
    reply = requests.get(f"{prometheus}/query", params={"query": query}, timeout=TIMEOUT_S)
    assert reply.ok, f"{query}: {reply.text}"
    values = [float(one["value"][1]) for one in reply.json()["data"]["result"]]
    return [value for value in values if value == value]  # NaN is not


def measured_by(expression: str) -> list[str]:
    """Split an alert's condition into parts that have a value whether they are met or not."""
    parts = re.split(r"\b(?:and|unless)\b(?: on \([^)]*\))?", expression)
    return [re.sub(r"(==|[<>]) ", r"\1 bool ", part).replace("offset 10m", "").strip() for part in parts]


def queries() -> Iterator[tuple[str, str]]:
    """Every query of dashboard and rules, each with the name of its panel or rule."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "20s").replace("$job", "saliency").replace("$model", "digits")
            assert "$" not in expression
            yield panel["title"], expression
    for rule in RULES:
        for part in [rule["expr"]] if "record" in rule else measured_by(rule["expr"]):
            yield rule.get("record") or rule["alert"], part


def rules_of(prometheus: str) -> list[dict[str, Any]]:
    groups = requests.get(f"{prometheus}/rules", timeout=TIMEOUT_S).json()["data"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def label_values(prometheus: str, query: str) -> list[str]:
    """Ask as Grafana does for a variable `label_values(SERIES, LABEL)`."""
    found = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
    assert found is not None
    series = found[1].replace("$job", "saliency")
    reply = requests.get(f"{prometheus}/label/{found[2]}/values", params={"match[]": series}, timeout=TIMEOUT_S)
    values: list[str] = reply.json()["data"]
    return values


@NEEDS_PROMETHEUS
def test_every_query_of_dashboard_and_alerts_has_an_answer(json_server: TorchServe, tmp_path: Path) -> None:
    asked = list(queries())
    assert len(asked) >= len(RULES) + len(DASHBOARD["panels"])
    with traffic(json_server), prometheus_of(json_server, tmp_path) as prometheus:

        def answered() -> bool:
            return bool(ask(prometheus, "saliency:class:shift1h")) and bool(ask(prometheus, "rate(Requests5XX[20s])"))

        wait_for(answered, "value of the last recording rule")
        deadline = time.monotonic() + WAIT_S
        left = asked
        while left and time.monotonic() < deadline:
            left = [(name, query) for name, query in left if not ask(prometheus, query)]
            time.sleep(0.5)
        assert left == []
        (target,) = requests.get(f"{prometheus}/targets", timeout=TIMEOUT_S).json()["data"]["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
        wait_for(lambda: all(rule["health"] == "ok" for rule in rules_of(prometheus)), "healthy rules")
        assert [rule.get("lastError", "") for rule in rules_of(prometheus)] == [""] * len(RULES)
        variables = [one["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
        assert [label_values(prometheus, query) for query in variables] == [["saliency"], ["digits"]]
        # And Prometheus has what the server says, where nothing changes any more.
        starts = 'saliency_worker_starts_total{model_name="digits"}'
        assert ask(prometheus, starts) == [scrape(json_server)[starts]]
        (ratio,) = ask(prometheus, "saliency:server_errors:ratio5m")
        assert ratio > 0


@NEEDS_PROMETHEUS
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "--lint=all", "--lint-fatal", "alerts.yml"],
        ["check", "rules", "--lint=all", "--lint-fatal", "autoscaling.yml"],
        ["test", "rules", "alerts.test.yml"],
        ["test", "rules", "autoscaling.test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_finds_rules_and_alerts_right(arguments: list[str]) -> None:
    finished = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS_FOLDER, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_every_alert_is_tested_where_it_fires() -> None:
    tested = yaml.safe_load((PROMETHEUS_FOLDER / "alerts.test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tested for case in test.get("alert_rule_test", []) if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in RULES if "alert" in rule}


def test_queries_name_only_what_is_declared() -> None:
    """This holds without a Prometheus too."""
    declared = yaml.safe_load((SERVE_CONFIG / "metrics.yaml").read_text())
    names = {one["name"] for section in declared.values() for kind in section.values() for one in kind}
    names |= {rule["record"] for rule in RULES if "record" in rule}
    for _, query in queries():
        named = set(re.findall(r"\b(?:saliency[_:]|ts_|Requests)[\w:]+", query))
        assert named <= names, query
        assert named or "up{" in query or "CPUUtilization" in query


def test_every_metric_has_a_panel_or_a_rule() -> None:
    declared = yaml.safe_load((SERVE_CONFIG / "metrics.yaml").read_text())
    names = {one["name"] for section in declared.values() for kind in section.values() for one in kind}
    shown = " ".join(query for _, query in queries())
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", shown)] == []


def test_panels_of_the_dashboard_do_not_lie_on_each_other() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [(x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])]
    assert len(set(cells)) == len(cells)
    assert all(at["x"] + at["w"] <= 24 for at in places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_restarted_worker_is_counted_and_every_log_line_is_json(json_server: TorchServe) -> None:
    """A killed worker and a failure of the frontend make all loggers write."""
    before = settled(json_server)
    assert (
        requests.post(f"{json_server.address}/predictions/digits", data=NAMELESS, headers=FORM, timeout=TIMEOUT_S).status_code
        == 500
    )
    requests.put(f"{json_server.address}/predictions/digits", data=IMAGE, headers={"X-Request-Id": "in-json"}, timeout=TIMEOUT_S)
    (worker,) = workers_of(json_server)
    worker.kill()
    psutil.wait_procs([worker], timeout=WAIT_S)
    starts = 'saliency_worker_starts_total{model_name="digits"}'
    wait_for(lambda: scrape(json_server)[starts] == before[starts] + 1, "second start")
    answers = [name for name in before if name.startswith("saliency_requests_total")]
    assert all(scrape(json_server)[name] >= before[name] for name in answers)

    records: dict[str, list[dict[str, str]]] = {}
    for name in ("access_log.log", "model_log.log", "ts_log.log"):
        lines = (json_server.settings.log_dir / name).read_text().splitlines()
        assert lines
        records[name] = [json.loads(line) for line in lines]
        assert all(record.keys() == {"time", "level", "thread", "logger", "message", "exception"} for record in records[name])
    assert any(record["message"].startswith("correlation_id=in-json ") for record in records["model_log.log"])
    assert any('"PUT /predictions" 200' in record["message"] for record in records["access_log.log"])
    # TorchServe itself prints a little on the console, past log4j.
    console = (json_server.settings.log_dir / "console.log").read_text().splitlines()
    failures = [json.loads(line) for line in console if '"org.pytorch.serve.http.HttpRequestHandler"' in line]
    assert any(re.search(r" in .*, line \d+$", failure["message"]) for failure in failures)
    assert sum(not line.startswith('{"time"') for line in console) < 15


def test_json_logs_differ_in_the_form_of_lines_alone() -> None:
    plain, as_json = ((SERVE_CONFIG / name).read_text() for name in ("log4j2.xml", "log4j2-json.xml"))

    def layout_left_out(text: str) -> list[str]:
        text = re.sub(r"(?s)<!--.*?-->|<Properties>.*?</Properties>|<PatternLayout.*?/>", "", text)
        return [line.strip() for line in text.splitlines() if line.strip()]

    assert layout_left_out(plain) == layout_left_out(as_json)


def test_metrics_are_found_from_any_folder(server: TorchServe) -> None:
    """The committed path starts at the project's root; `scripts.serving.launcher` runs TorchServe in a temp folder."""
    properties = (SERVE_CONFIG / "config.properties").read_text()
    assert "\nmetrics_config=serve_config/metrics.yaml\n" in properties
    assert (ROOT / "serve_config" / "metrics.yaml").is_file()
    (worker,) = workers_of(server)
    command = worker.cmdline()
    assert command[command.index("--metrics-config") + 1] == str(ROOT / "serve_config" / "metrics.yaml")


def test_machine_with_a_gpu_and_without_nvgpu_says_what_it_does(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchServe counts GPUs by nvidia-smi; its collector of the machine's figures would then need the package nvgpu."""
    command = tmp_path / "bin" / "nvidia-smi"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\nprintf 'index\\n0\\n'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    workers = {"minWorkers": 1, "maxWorkers": 1}
    settings = Settings(archive=archive, ports=Ports.free(), device="cpu", log_dir=tmp_path / "logs", model_config=workers)
    with TorchServe(settings) as running:
        wait_for(lambda: any(name.startswith("CPUUtilization{") for name in scrape(running)), "figure of the processor")
        assert scrape(running)['saliency_worker_starts_total{model_name="digits"}'] == 1
    log = (settings.log_dir / "ts_log.log").read_text()
    assert "Number of GPUs: 1" in log
    assert "Traceback" not in log
