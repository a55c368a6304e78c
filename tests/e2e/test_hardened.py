"""A hardened server as an operator starts it: with least privileges, and a certificate made here."""

import base64
import contextlib
import csv
import http.client
import io
import itertools
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
import requests
import yaml

from scripts.bench import load_test
from scripts.packaging.package import checksum_file_of, read_archive, write_archive
from scripts.paths import ROOT, SAMPLE_FILES
from scripts.serving import explain
from scripts.serving.credentials import authorization, read_token
from scripts.serving.launcher import Ports
from tests.client import TIMEOUT_S
from tests.servers import wait_for
from tests.tls import make_certificate

START_TIMEOUT_S = 240
HOST = "127.0.0.2"  # not the address that all else is bound to, and reachable from this machine alone
NOBODY = 65534
PNG = SAMPLE_FILES[0].read_bytes()
PREDICT = "/predictions/digits"
GRPC = "/org.pytorch.serve.grpc"
# As another user; and, where the interpreter lies in a folder that this user may not enter, with the right to read everything.
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
UNPRIVILEGED = [
    [*AS_NOBODY, "--inh-caps=-all", "--bounding-set=-all"],
    [*AS_NOBODY, *(f"--{kind}=-all,+dac_read_search" for kind in ("inh-caps", "ambient-caps", "bounding-set"))],
]


@dataclass(frozen=True)
class Hardened:
    """A hardened server, with all that its operator knows."""

    folder: Path  # all that it writes is in here
    ports: Ports
    certificate: Path
    process: subprocess.Popen[bytes]
    as_nobody: bool

    @property
    def address(self) -> str:
        return f"https://{HOST}:{self.ports.inference}"

    @property
    def management(self) -> str:
        return f"http://127.0.0.1:{self.ports.management}"

    @property
    def key_file(self) -> Path:
        return self.folder / "keys" / "key_file.json"

    def header(self, role: str = "inference") -> dict[str, str]:
        return authorization(read_token(self.key_file, role))

    def processes(self) -> list[psutil.Process]:
        """The launcher, the JVM with its guard, the worker, the front with its guard."""
        starter = psutil.Process(self.process.pid)
        return [starter, *starter.children(recursive=True)]

    def ask(self, path: str = PREDICT, **options: object) -> requests.Response:
        options = {"data": PNG, "headers": self.header(), "verify": str(self.certificate), "timeout": TIMEOUT_S} | options
        return requests.put(self.address + path, **options)  # type: ignore[arg-type]

    def manage(self, method: str, path: str, role: str = "management") -> requests.Response:
        return requests.request(method, self.management + path, headers=self.header(role), timeout=TIMEOUT_S)


def find_unprivileged() -> list[str]:
    """Find the prefix that runs this interpreter without privileges; [] if it has none already, or cannot be run so."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return []
    for prefix in UNPRIVILEGED:
        start_again = (
            "import subprocess, sys, ts, scripts.serving.launcher; subprocess.run([sys.executable, '-c', ''], check=True)"
        )
        command = [*prefix, sys.executable, "-c", start_again]
        if subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0:
            return prefix
    return []


@pytest.fixture(scope="module")
def hardened(archive: Path) -> Iterator[Hardened]:
    prefix = find_unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))  # short: Unix sockets lie in it
    ports = Ports.free()
    certificate, private_key = make_certificate(folder, f"IP:{HOST},DNS:localhost", "rsa")
    (folder / "tmp").mkdir()
    entries = read_archive(archive)
    config = yaml.safe_load(entries["model-config.yaml"])
    config["handler"]["log_batches"] = True  # all that the worker can say
    entries["model-config.yaml"] = yaml.safe_dump(config).encode()
    sha256 = write_archive(folder / "digits.mar", entries)
    checksum_file_of(folder / "digits.mar").write_text(f"{sha256}  digits.mar\n")
    if prefix:
        for path in (folder, *folder.iterdir()):
            os.chown(path, NOBODY, NOBODY)
    options = [f"--{name.replace('_', '-')}-port={getattr(ports, name)}" for name in Ports.__dataclass_fields__]
    options += [f"--archive={folder / 'digits.mar'}", f"--certificate={certificate}", f"--private-key={private_key}"]
    options += [f"--key-dir={folder / 'keys'}", f"--log-dir={folder / 'logs'}", f"--inference-host={HOST}", "--hardened"]
    options += ["--workers=1", "--device=cpu", *([] if prefix else ["--allow-privileged-user"])]
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    printed = folder / "printed"
    with printed.open("wb") as output:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "scripts.serving", *options],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Hardened(folder, ports, certificate, process, as_nobody=bool(prefix))
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "workers ready" not in printed.read_text():
            assert process.poll() is None, printed.read_text()
            assert time.monotonic() < deadline, printed.read_text()
            time.sleep(0.2)
        yield server
        process.terminate()
        assert process.wait(timeout=60) == 0
        assert not server.key_file.exists()
        assert list((folder / "tmp").iterdir()) == []
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=60)
        shutil.rmtree(folder)


# --- who is answered


@pytest.mark.parametrize(
    "path", [PREDICT, "/explanations/digits", "/ping", "/v1/models/digits:predict", "/v2/models/digits/infer"]
)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer AAAAAAAA"}, {"Authorization": "Basic YTpi"}], ids=str)
def test_nobody_without_the_token_is_answered(hardened: Hardened, path: str, headers: dict[str, str]) -> None:
    reply = hardened.ask(path, headers=headers)
    assert (reply.status_code, reply.json()["type"]) == (400, "InvalidKeyException")


def test_the_token_opens_inference_and_nothing_else(hardened: Hardened) -> None:
    assert hardened.ask().json()["digit"] == 0
    assert hardened.ask("/explanations/digits").json()["explanation"]["target"] == 0
    assert hardened.manage("GET", "/models/digits").status_code == 200
    assert hardened.ask(headers=hardened.header("management")).status_code == 400
    assert hardened.manage("GET", "/models/digits", "inference").status_code == 400
    assert hardened.manage("GET", "/token?type=inference", "management").status_code == 400
    assert requests.get(f"{hardened.management}/models", timeout=TIMEOUT_S).status_code == 400


def test_grpc_asks_for_the_token_too(hardened: Hardened) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{hardened.ports.grpc_inference}") as channel:
        ping = channel.unary_unary(f"{GRPC}.inference.InferenceAPIsService/Ping")
        with pytest.raises(grpc.RpcError) as raised:
            ping(b"", timeout=TIMEOUT_S)
        assert raised.value.code() == grpc.StatusCode.PERMISSION_DENIED
        token = read_token(hardened.key_file)
        assert b"Healthy" in ping(b"", metadata=[("authorization", f"Bearer {token}")], timeout=TIMEOUT_S)


def test_clients_use_key_file_and_certificate(
    hardened: Hardened, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its plots take seconds
    command = [str(SAMPLE_FILES[0]), "--url", hardened.address, "--output", str(tmp_path / "a.png")]
    trust = ["--ca-file", str(hardened.certificate)]
    key = ["--key-file", str(hardened.key_file)]
    assert explain.main([*command, *trust, *key]) == 0
    assert "digit 0" in capsys.readouterr().out
    assert explain.main([*command, *trust]) == 1
    assert "Token Authorization failed" in capsys.readouterr().err
    assert explain.main([*command, *key]) == 1
    assert "certificate verify failed" in capsys.readouterr().err
    load = ["--url", hardened.address, "--connections", "1", "--duration", "0.5", "--warm-up", "0", "--timeout", str(TIMEOUT_S)]
    assert load_test.main([*load, *trust, *key, "--output", str(tmp_path / "load")]) == 0


def test_an_api_key_renews_the_tokens(hardened: Hardened) -> None:
    before = hardened.header()
    assert hardened.manage("GET", "/token?type=inference", "API").status_code == 200
    assert hardened.header() != before
    assert hardened.ask().status_code == 200
    assert hardened.ask(headers=before).status_code == 400
    assert hardened.key_file.stat().st_mode & 0o777 == 0o600


# --- TLS


def test_plain_http_is_refused(hardened: Hardened) -> None:
    reply = requests.get(f"http://{HOST}:{hardened.ports.inference}/ping", headers=hardened.header(), timeout=TIMEOUT_S)
    assert reply.status_code == 403
    assert "only accepts HTTPS" in reply.text


def test_tls_is_version_1_3_with_the_operators_certificate(hardened: Hardened) -> None:
    context = ssl.create_default_context(cafile=hardened.certificate)
    with (
        socket.create_connection((HOST, hardened.ports.inference), TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        assert secured.version() == "TLSv1.3"
        assert secured.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(hardened.certificate.read_text())
    with pytest.raises(requests.exceptions.SSLError):
        hardened.ask(verify=True)


# --- what is reachable


def test_only_inference_listens_where_others_can_reach(hardened: Hardened) -> None:
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for process in hardened.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    ports = hardened.ports
    internal = (ports.management, ports.metrics, ports.grpc_inference, ports.grpc_management)
    assert listening == {(HOST, ports.inference), *(("127.0.0.1", port) for port in internal)}


def test_management_metrics_and_grpc_do_not_answer_on_other_addresses(hardened: Hardened) -> None:
    own = {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    }
    ports = hardened.ports
    for address, port in itertools.product(
        [HOST, *own], (ports.management, ports.metrics, ports.grpc_inference, ports.grpc_management)
    ):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port), TIMEOUT_S)
    socket.create_connection((HOST, ports.inference), TIMEOUT_S).close()


# --- what can be loaded


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/evil.mar", "file:///tmp/evil.mar", "digits.mar"])
def test_no_model_can_be_registered_or_removed(hardened: Hardened, url: str) -> None:
    assert hardened.manage("POST", f"/models?url={url}").status_code == 405
    assert hardened.manage("DELETE", "/models/digits").status_code == 405
    with grpc.insecure_channel(f"127.0.0.1:{hardened.ports.grpc_management}") as channel:
        register = channel.unary_unary(f"{GRPC}.management.ManagementAPIsService/RegisterModel")
        with pytest.raises(grpc.RpcError, match="Model API disabled"):
            register(b"", metadata=[("authorization", hardened.header("management")["Authorization"])], timeout=TIMEOUT_S)


def test_no_workflow_is_fetched(hardened: Hardened) -> None:
    """TorchServe lets workflows be registered whatever enable_model_api says; only allowed_urls stops them."""
    (hardened.folder / "evil.war").write_bytes(PNG)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(1)
        for url in (f"http://127.0.0.1:{elsewhere.getsockname()[1]}/evil.war", f"file://{hardened.folder}/evil.war"):
            reply = hardened.manage("POST", f"/workflows?url={url}")
            assert reply.status_code == 404
            assert "does not match any allowed URL(s)" in reply.json()["message"]
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert [path.name for path in hardened.folder.glob("tmp/serve-*/store/*")] == ["digits.mar"]


# --- what it may do


def test_no_process_has_more_rights_than_to_serve(hardened: Hardened) -> None:
    processes = hardened.processes()
    assert len(processes) in (6, 7)  # the worker starts a decoder once a costly image comes
    if not hardened.as_nobody:
        pytest.skip("no other user can run this interpreter")
    for process in processes:
        assert set(process.uids()) == set(process.gids()) == {NOBODY}
        status = dict(
            csv.reader(io.StringIO(Path(f"/proc/{process.pid}/status").read_text()), delimiter=":", quoting=csv.QUOTE_NONE)
        )
        assert int(status["CapEff"], 16) in (0, 1 << 2)  # CAP_DAC_READ_SEARCH, where the interpreter lies in a closed folder


def test_what_it_writes_is_its_own(hardened: Hardened) -> None:
    folder = hardened.folder
    assert hardened.key_file.stat().st_mode & 0o777 == 0o600
    (temporary,) = (folder / "tmp").glob("serve-*")
    for closed in (folder / "keys", folder / "logs", temporary):
        assert closed.stat().st_mode & 0o777 == 0o700
    assert any(path.is_socket() for path in temporary.rglob("*"))  # the worker's, which asks for no token
    jvm = next(process for process in hardened.processes() if "org.pytorch.serve.ModelServer" in process.cmdline())
    assert f"-Djava.io.tmpdir={temporary / 'tmp'}" in jvm.cmdline()
    limits = Path(f"/proc/{jvm.pid}/limits").read_text()
    assert re.search(r"(?m)^Max core file size +0 +0 ", limits)


def test_tokens_are_in_their_file_alone(hardened: Hardened) -> None:
    tokens = [read_token(hardened.key_file, role) for role in ("inference", "management", "API")]
    hardened.ask()
    for process in hardened.processes():
        shown = " ".join([*process.cmdline(), *process.environ().values()])
        assert not [token for token in tokens if token in shown]
    assert find_in_files(hardened.folder, tokens) == {(token, hardened.key_file) for token in tokens}


# --- what is logged


class Secrets:
    """Marks that must not appear in any file, each with the role in which it was sent."""

    def __init__(self) -> None:
        self.sent_as: dict[str, str] = {}

    def __call__(self, sent_as: str) -> str:
        mark = f"MK{len(self.sent_as):03d}{sent_as.upper().replace(' ', '')}KM"
        self.sent_as[mark] = sent_as
        return mark


def find_in_files(folder: Path, marks: list[str]) -> set[tuple[str, Path]]:
    """Find marks in files: as they are, as hex, or as base64, in any letter case."""
    forms = {
        form.lower(): mark
        for mark in marks
        for form in (mark.encode(), mark.encode().hex().encode(), base64.b64encode(mark.encode())[: len(mark) // 3 * 4])
    }
    found = set()
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a worker's temp file
            if path.is_file():
                content = path.read_bytes().lower()
                found |= {(mark, path) for form, mark in forms.items() if form in content}
    return found


def send(address: tuple[str, int], head: str, body: bytes = b"", tls: ssl.SSLContext | None = None) -> bytes:
    """Send a request as it is, however malformed. Returns the first line of the reply, b"" if there was none."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(address, TIMEOUT_S))
        if tls is not None:
            connection = stack.enter_context(tls.wrap_socket(connection, server_hostname="localhost"))
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.sendall(head.encode("latin-1") + body)
            connection.settimeout(3)
            return connection.recv(4096).partition(b"\r\n")[0]
    return b""


def send_secrets(hardened: Hardened, secret: Secrets) -> list[bytes]:
    """Send marks in every place of good and bad requests to all ports. Returns the first lines of inference's replies."""
    tls = ssl.create_default_context(cafile=hardened.certificate)
    inference = (HOST, hardened.ports.inference)
    boundary = {"Content-Type": "multipart/form-data; boundary=BB"}
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    in_json = {"Content-Type": "application/json"}
    replies = []

    def head(method: str, path: str, headers: dict[str, str], length: int, version: str = "HTTP/1.1") -> str:
        headers = {
            "Host": "localhost",
            "Content-Length": str(length),
            "X-Private": secret("header"),
            "Cookie": secret("cookie"),
        } | headers
        return f"{method} {path} {version}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"

    def ask(path: str, headers: dict[str, str] | None = None, body: bytes = PNG, method: str = "POST", **version: str) -> None:
        headers = hardened.header() | (headers or {})
        replies.append(send(inference, head(method, path, headers, len(body), **version), body, tls))

    def part(disposition: str, content: bytes = PNG) -> bytes:
        return f"--BB\r\nContent-Disposition: form-data{disposition}\r\n\r\n".encode() + content + b"\r\n"

    def listed(**fields: object) -> bytes:
        return json.dumps({"data": base64.b64encode(PNG).decode()} | fields).encode()

    # Who asks, for what.
    ask(PREDICT)
    ask(PREDICT, {"Authorization": f"Bearer {secret('token')}"})
    ask(PREDICT, {"Authorization": f"Basic {secret('password')}"})
    for path in (
        "/{}",
        "/predictions/{}",
        "/predictions/digits/{}",
        "/predictions/digits/1.0/{}",
        "/v1/models/{}:predict",
        "/v1/{}",
    ):
        ask(path.format(secret("path")))
    for path in ("/v2/models/{}/infer", "/{}/predict", "/wfpredict/{}", "/models/{}/invoke", "/invocations?model_name={}"):
        ask(path.format(secret("path")))
    for query in ("?token={}", "?a=%zz{}", "/%zz{}", "?{}" + "a" * 8000):
        ask(PREDICT + query.format(secret("query")))
    ask(PREDICT, method=secret("method"))
    ask(f"org.pytorch.serve.grpc.inference{secret('grpc')}", method="gRPC")
    ask(PREDICT, version=f"{secret('protocol')}/1.1")
    ask(PREDICT, version=secret("protocol"))
    # Headers.
    for name in ("Content-Length", "Expect", "Content-Type", "Accept", "X-Saliency-Target", "Transfer-Encoding"):
        ask(PREDICT, {name: secret(name)})
    ask(PREDICT, {f"X-Saliency-{secret('header name')}": "1"})
    ask(PREDICT, {"X-Long": secret("long header") + "a" * 20_000})
    ask(PREDICT, {f"X\x00{secret('control character')}": "1", "no colon here": f"1\r\n{secret('no colon')}"})
    ask(PREDICT, {"Transfer-Encoding": "chunked"}, f"{secret('chunk')}\r\n".encode())
    # Bodies.
    ask(PREDICT, in_json, f'{{"data": "{secret("unfinished")}'.encode())
    ask(PREDICT, in_json, b"\xff\xfe" + secret("no text").encode())
    ask(PREDICT, in_json, listed(**{secret("field"): secret("value")}))
    ask(PREDICT, in_json, listed(target=secret("option")))
    ask(PREDICT, in_json, listed(data=secret("base64") + "!!"))
    ask(PREDICT, in_json, listed(data=base64.b64encode(secret("image").encode()).decode()))
    ask("/v1/models/digits:explain", in_json, json.dumps({"instances": [{"data": secret("instance")}]}).encode())
    ask("/v2/models/digits/infer", in_json, json.dumps({"id": secret("id"), "inputs": [{"name": secret("name")}]}).encode())
    ask(PREDICT, {"Content-Type": "text/plain"}, b"\xff" + secret("text").encode())
    ask(PREDICT, {}, PNG + secret("after the image").encode())
    ask(PREDICT, form, f"a={secret('form')}%zz".encode())
    ask(PREDICT, form, f"{secret('form')}={secret('form')}".encode())
    ask(PREDICT, form, PNG + secret("form").encode())
    ask(PREDICT, boundary, part(f'; name="data"; filename="{secret("file name")}.png"') + b"--BB--\r\n")
    ask(PREDICT, boundary, part(f'; name="{secret("part")}"', secret("content of a part").encode()) + b"--BB--\r\n")
    ask(PREDICT, boundary, part(f'; filename="{secret("file name")}"') + b"--BB--\r\n")
    ask(PREDICT, boundary, part(f'; name="data{secret("unfinished")}')[:-9])
    for name in ("Content-Type: text/plain; charset=", "Content-Transfer-Encoding: ", "Content-Length: "):
        ask(PREDICT, boundary, part(f'; name="data"; filename="x"\r\n{name}{secret("header of a part")}') + b"--BB--\r\n")
    ask(PREDICT, {"Content-Type": "multipart/form-data"}, secret("no boundary").encode())
    ask(PREDICT, {"Content-Type": f"multipart/form-data; boundary=BB; charset={secret('charset')}"}, part('; name="data"'))
    # Not TLS, to its port.
    send(inference, head("PUT", f"{PREDICT}?{secret('plain query')}", hardened.header(), len(PNG)), PNG)
    send(inference, "\x16\x03\x01\x02\x00" + secret("no handshake") * 20)
    # The other ports.
    management = ("127.0.0.1", hardened.ports.management)
    for method, path in [
        *(("GET", "/models/{}"), ("PUT", "/models/{}?min_worker=1"), ("PUT", "/models/digits/{}/set-default")),
        *(("POST", "/models?url=http://127.0.0.1:9/{}.mar"), ("DELETE", "/models/{}"), ("GET", "/models/digits/{}")),
        *(("POST", "/workflows?url=http://127.0.0.1:9/{}.war"), ("POST", "/workflows?url={}.war"), ("GET", "/workflows/{}")),
        *(("DELETE", "/workflows/{}"), ("GET", "/token?type={}"), ("GET", "/{}")),
    ]:
        role = "API" if path.startswith("/token") else "management"
        send(management, head(method, path.format(secret("management")), hardened.header(role), 0))
    send(management, head("GET", "/models", {"Authorization": f"Bearer {secret('token')}"}, 0))
    send(("127.0.0.1", hardened.ports.metrics), head("GET", f"/metrics?name[]={secret('metric')}", {}, 0))
    grpc_inference = ("127.0.0.1", hardened.ports.grpc_inference)
    send(grpc_inference, head("GET", f"/{secret('grpc')}", {}, 0))
    send(grpc_inference, secret("grpc") * 20)
    with grpc.insecure_channel(f"127.0.0.1:{hardened.ports.grpc_inference}") as channel:
        model = secret("grpc model").encode()
        for token in (secret("grpc token"), read_token(hardened.key_file)):
            metadata = [("authorization", f"Bearer {token}"), ("x-private", secret("grpc metadata"))]
            for method in (f"{GRPC}.inference.InferenceAPIsService/Predictions", f"{GRPC}.{secret('grpc method')}/Predictions"):
                with pytest.raises(grpc.RpcError):
                    channel.unary_unary(method)(b"\x0a" + bytes([len(model)]) + model, metadata=metadata, timeout=TIMEOUT_S)
    return replies


def test_nothing_that_a_client_sends_is_in_any_file(hardened: Hardened, wait_for_log: Callable[[], None]) -> None:
    secret = Secrets()
    statuses = [reply.split()[1].decode() if reply else "none" for reply in send_secrets(hardened, secret)]
    assert {"200", "400", "403", "404", "406", "417"} <= set(statuses), statuses  # the requests got as far as they should
    assert "500" not in statuses  # nothing reached TorchServe's frontend that it cannot read
    assert statuses[0] == "200"
    wait_for_log()
    found = find_in_files(hardened.folder, list(secret.sent_as))
    assert {(secret.sent_as[mark], path.name) for mark, path in found} == set()
    assert len(secret.sent_as) > 150


@pytest.fixture
def wait_for_log(hardened: Hardened) -> Callable[[], None]:
    """Wait until frontend and worker have logged a new request, and with it all earlier ones."""

    def line_count() -> tuple[int, int]:
        access = (hardened.folder / "logs" / "access_log.log").read_text().count('"PUT /explanations')
        return access, (hardened.folder / "logs" / "model_log.log").read_text().count("Backend received inference")

    def wait() -> None:
        before = line_count()
        assert hardened.ask("/explanations/digits").status_code == 200
        wait_for(lambda: all(now > then for now, then in zip(line_count(), before, strict=True)), "line in both logs")

    return wait


def test_the_search_finds_what_a_file_shows(tmp_path: Path) -> None:
    """A search that finds nothing would make the test above pass always."""
    secret = Secrets()
    marks = [secret(name) for name in ("plain", "hex", "base64", "kept")]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log").write_text(f"x{marks[0].lower()} {marks[1].encode().hex().upper()}")
    (tmp_path / "temp").write_bytes(base64.b64encode(marks[2].encode()))
    assert {mark for mark, _ in find_in_files(tmp_path, marks)} == set(marks[:3])


def test_a_request_is_logged_by_what_it_asked_for(hardened: Hardened, wait_for_log: Callable[[], None]) -> None:
    assert hardened.ask(f"{PREDICT}?secret").status_code == 200
    wait_for_log()
    last = (hardened.folder / "logs" / "access_log.log").read_text().splitlines()[-2:]
    assert [line.partition('"')[2].rpartition(" ")[0] for line in last] == ['PUT /predictions" 200', 'PUT /explanations" 200']
    assert all(" - 127.0.0.1 " in line for line in last)  # all come from the proxy
