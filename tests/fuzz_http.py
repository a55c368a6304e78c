"""Fuzzing at the level of HTTP: valid requests of every kind, spoiled, sent to a real server beside a probe that must stay right.

    python -m tests.fuzz_http --seconds 600

Starts a server of its own from build/digits.mar. A request may be answered or refused with a status of its own; anything else, a
wrong answer to the probe or another worker ends the run with exit code 1 and leaves the request in build/fuzz-http. The same seed
sends the same requests.
"""

import argparse
import collections
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import requests

from scripts.bench.soak_traffic import KINDS, RARE, Message, read_samples
from scripts.paths import ARCHIVE, SAMPLE_FILES
from scripts.serving.launcher import Ports, Settings, TorchServe
from tests.servers import workers_of

FOLDER = Path("build/fuzz-http")
SEED = 20_261_127
PROBE_EVERY = 20  # requests
TIMEOUT_S = 60
ANSWERED = {200, 400, 404, 405, 406, 413, 415, 422}
OVERLOADED = 503
WORKER_DIED = b"InternalServerException"  # the type of the frontend's 500 for a lost worker

HEADERS = {
    "Accept": ["image/png", "application/x-npy", "*/*;q=0", "text/html", "application/json;q=0.5,*/*"],
    "Content-Type": ["application/json", "text/plain", "image/png", "application/x-npy", "application/x-www-form-urlencoded"],
    "Content-Encoding": ["gzip", "deflate", "identity", "br"],
    "Inference-Header-Content-Length": ["0", "10", "999999999", "-1", "x"],
    "X-Saliency-Target": ["all", "3,5", "[1,2]", "-1", "[" * 500, "9" * 5000],
    "X-Saliency-Method": ["smoothgrad", "integrated_gradients", "loss_gradient", "none"],
    "X-Saliency-Samples": ["1", "500", "0", "1e9"],
    "X-Saliency-Space": ["image", "canonical"],
    "X-Saliency-Size": ["28", "1024", "99999"],
    "X-Saliency-Prepare": ["none", "auto"],
    "X-Correlation-Id": ["a" * 64, "a" * 65, "a b"],
    "describe": ["True"],
    "explain": ["True", "False"],
}
TOKENS = [b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\u0000", b"\\ud800", b"1e999", b"-0", b"NaN", b"null", b"9" * 400]
TOKENS += [b"\0", b"\xff" * 8, b"\xff\xd8\xff", b"\xff\xda", b"II*\0", b"IDAT", b"BYTES", b"\xf0\x9f\x98\x80", b"[" * 40]


class FuzzError(RuntimeError):
    """The server did what it must not; the message says what."""


@dataclass(frozen=True, slots=True)
class Spoiled:
    """A request to send."""

    path: str
    body: bytes
    headers: dict[str, str]


def seeds_of(files: Sequence[Path]) -> list[Message]:
    """Give every good kind of the soak's requests, and its bad ones, with some images."""
    return [kind.make(sample) for sample in read_samples(files) for kind in KINDS if kind.name not in RARE]


def spoil(chance: random.Random, seeds: Sequence[Message]) -> Spoiled:
    """Change a request in a few places: its bytes, its headers, its route."""
    seed = chance.choice(seeds)
    path, body, headers = seed.path, bytearray(seed.body), dict(seed.headers)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(body) + 1)
        match chance.randrange(9):
            case 0:
                body[at : at + 4] = chance.randbytes(chance.randint(1, 4))
            case 1:
                del body[at : at + chance.choice((1, 4, 50, 10_000))]
            case 2:
                part = body[at : at + chance.choice((1, 8, 200))]
                body[at:at] = part * chance.choice((1, 3, 1000))
            case 3:
                del body[at:]
            case 4:
                body[at:at] = chance.choice(TOKENS) * chance.choice((1, 1, 30))
            case 5:
                other = chance.choice(seeds).body
                body[at:] = other[chance.randrange(len(other) + 1) :]
            case 6:
                name = chance.choice(list(HEADERS))
                headers[name] = chance.choice(HEADERS[name])
            case 7:
                headers.pop(chance.choice(list(headers)), None) if headers else None
            case _:
                path = chance.choice(seeds).path
    return Spoiled(path, bytes(body), headers)


def is_form_error(spoiled: Spoiled, status: int, content: bytes) -> bool:
    """Whether a reply is the frontend's own 500 for a form that it cannot take apart: its decoder's exception, whichever it is.

    The front, which others reach, takes forms apart itself, so that none of these comes to the decoder.
    """
    exception = re.search(rb'"type": "(\w+Exception)"', content)
    is_form = "form" in spoiled.headers.get("Content-Type", "")
    return status == 500 and is_form and exception is not None and exception[1] != WORKER_DIED


class Fuzzer:
    """Sends spoiled requests to a server, and looks after it."""

    def __init__(self, server: TorchServe, seed: int) -> None:
        self._server = server
        self._chance = random.Random(seed)
        self._seeds = seeds_of(SAMPLE_FILES[::10])
        self._session = requests.Session()
        self._probe = SAMPLE_FILES[36].read_bytes()
        self._digit = int(SAMPLE_FILES[36].stem.partition("-")[0])
        self._workers = {process.pid for process in workers_of(server)}
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.slowest_s = 0.0

    def run(self, seconds: float) -> None:
        """Fuzz for so long.

        Raises:
            FuzzError: the server did what it must not.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for _ in range(PROBE_EVERY):
                self._send(spoil(self._chance, self._seeds))
            self._check_server()

    def _send(self, spoiled: Spoiled) -> None:
        started = time.monotonic()
        url = self._server.address + spoiled.path.format(model="digits")
        try:
            reply = self._session.post(url, data=spoiled.body, headers=spoiled.headers, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            raise self._failure(spoiled, f"no answer: {type(error).__name__}") from error
        self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        self.outcomes[f"{reply.status_code}"] += 1
        is_expected = reply.status_code in ANSWERED or reply.status_code == OVERLOADED
        if not is_expected and not is_form_error(spoiled, reply.status_code, reply.content):
            raise self._failure(spoiled, f"status {reply.status_code}: {reply.text[:200]}")
        if reply.status_code != 200 or reply.headers.get("Content-Type") == "application/json":
            try:
                content = json.loads(reply.content)
            except ValueError as error:
                raise self._failure(spoiled, f"status {reply.status_code} without JSON") from error
            if "InternalError" in str(content.get("error", "")) or content.get("type") == "InternalError":
                raise self._failure(spoiled, "an InternalError")

    def _check_server(self) -> None:
        reply = self._session.put(f"{self._server.address}/predictions/digits", data=self._probe, timeout=TIMEOUT_S)
        if reply.status_code != 200 or reply.json()["digit"] != self._digit:
            raise FuzzError(f"expected the probe to be a {self._digit}, got status {reply.status_code}: {reply.text[:200]}")
        if {process.pid for process in workers_of(self._server)} != self._workers:
            raise FuzzError("expected the workers that were there at the start, got others")

    def _failure(self, spoiled: Spoiled, what: str) -> FuzzError:
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / "body").write_bytes(spoiled.body)
        (FOLDER / "request.json").write_text(
            json.dumps({"path": spoiled.path, "headers": spoiled.headers, "what": what}, indent=2)
        )
        return FuzzError(f"{what}; the request is in {FOLDER}")

    def report(self) -> str:
        """Count the outcomes."""
        counts = ", ".join(f"{status}: {count:,}" for status, count in sorted(self.outcomes.items()))
        return f"{sum(self.outcomes.values()):,} requests, slowest {self.slowest_s:.2f} s; {counts}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz_http", description="Fuzz a real server over HTTP.", epilog="example: %(prog)s --seconds 60"
    )
    parser.add_argument("--seconds", type=int, default=600, help="default: 600")
    parser.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz for a while. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    with (
        tempfile.TemporaryDirectory() as folder,
        TorchServe(Settings(archive=ARCHIVE, ports=Ports.free(), log_dir=Path(folder))) as server,
    ):
        fuzzer = Fuzzer(server, arguments.seed)
        try:
            fuzzer.run(arguments.seconds)
        except FuzzError as error:
            print(fuzzer.report())
            print(error, file=sys.stderr)
            return 1
        print(fuzzer.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
