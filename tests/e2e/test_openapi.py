"""The API's description against a real TorchServe: its examples, and requests that schemathesis generates from it."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from scripts.paths import ROOT
from scripts.serving.launcher import TorchServe
from tests.client import ERRORS, TIMEOUT_S, Arguments, Sample, ask, explain
from tests.openapi import DOCUMENT, DOCUMENT_FILE, ExampleRequest, example_requests, validate_reply

SOMETIMES = ("X-Saliency-Completeness-Gap", "X-Correlation-Id", "X-Saliency-Warnings")  # reply headers
EXAMPLES = list(example_requests())
MAX_EXAMPLES = 50  # for each route; at 60 schemathesis 4.32.5 makes a form that it then cannot check itself
RUN_TIMEOUT_S = 300


@pytest.fixture(autouse=True)
def same_workers(worker_pids: Callable[[], list[int]]) -> Iterator[None]:
    """Check that no request of this module restarts a worker."""
    before = worker_pids()
    yield
    assert worker_pids() == before


@pytest.mark.parametrize("example", [example for _, example in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_example_request_is_answered_as_described(server: TorchServe, example: ExampleRequest) -> None:
    reply = ask(server, {"route": example.path} | example.arguments())
    assert reply.status_code == 200, reply.text
    validate_reply(example.path, "post", reply)


@pytest.mark.parametrize("accept", ["application/json", "application/x-npy", "image/png"])
@pytest.mark.parametrize("path", [path for path in DOCUMENT["paths"] if path.endswith("explain") or "/explanations" in path])
def test_every_reply_format_is_as_described(server: TorchServe, path: str, accept: str) -> None:
    (example, *_) = [found for _, found in EXAMPLES if found.path == path and found.media_type == "application/json"]
    content = {key: value for key, value in dict(example.content).items() if key != "outputs"}  # type: ignore[arg-type]
    reply = ask(server, {"route": path, "json": content, "headers": {"Accept": accept}})
    assert (reply.status_code, reply.headers["Content-Type"]) == (200, accept)
    validate_reply(path, "post", reply)
    described = DOCUMENT["components"]["responses"]["Answer"]["headers"]
    assert all((name in reply.headers) == (accept != "application/json") for name in described if name not in SOMETIMES)


@pytest.mark.parametrize(("make", "status", "kind"), ERRORS)
def test_error_is_as_described(
    server: TorchServe, samples: list[Sample], make: Callable[[Sample], Arguments], status: int, kind: str
) -> None:
    reply = ask(server, make(samples[0]))
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, kind)
    validate_reply("/explanations/digits", "post", reply)


def test_refusal_of_a_large_body_is_as_described(server: TorchServe) -> None:
    reply = ask(server, explain(data=bytes(34_000_000), headers={"Content-Type": "image/png"}))
    assert (reply.status_code, reply.content) == (413, b"")
    assert "without content" in DOCUMENT["components"]["responses"]["TooLarge"]["description"]


def test_refusal_of_a_form_by_the_frontend_is_as_described(server: TorchServe) -> None:
    """The one kind of request that tests/api_hooks.py leaves out, as TorchServe answers it with 500."""
    form = b'--x\r\nContent-Disposition: form-data; name=""\r\n\r\n1\r\n--x--\r\n'
    reply = ask(server, explain(data=form, headers={"Content-Type": "multipart/form-data; boundary=x"}))
    assert reply.status_code == 500
    described = DOCUMENT["components"]["responses"]["Defect"]["content"]["application/json"]["examples"]
    assert reply.json() == described["form with a field without a name"]["value"]
    validate_reply("/explanations/digits", "post", reply)


@pytest.mark.parametrize("path", ["/ping", "/models/digits"])
def test_service_s_own_routes_are_as_described(server: TorchServe, path: str) -> None:
    address: dict[str, Any] = {"/ping": server.address, "/models/digits": server.management_address}
    reply = requests.get(f"{address[path]}{path}?customized=true", timeout=TIMEOUT_S)
    assert reply.status_code == 200
    validate_reply(path, "get", reply)


@pytest.mark.long
def test_requests_of_all_kinds_are_answered_as_described(server: TorchServe) -> None:
    """Good and bad requests, the same on every run; schemathesis.toml says how they are made and what is checked."""
    command = [Path(sys.executable).with_name("schemathesis"), "run", DOCUMENT_FILE, "--url", server.address]
    command += ["--phases", "examples,fuzzing", "--max-examples", MAX_EXAMPLES, "--no-color"]
    run = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr
    counts = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert counts is not None, run.stdout
    assert int(counts[1]) == int(counts[2]) > 4 * MAX_EXAMPLES, "too few requests were made"
