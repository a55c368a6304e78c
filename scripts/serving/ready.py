"""Ask a server whether it gives the right answers: exit code 0 where it does, 1 and one line where it does not.

    python -m scripts.serving.ready --address http://127.0.0.1:8080 --archive build/digits.mar

TorchServe's own /ping says Healthy while no worker answers. This sends the image that the archive carries, asks for a
prediction and an explanation, and compares weights, digit, logits and saliency map with the archive's reference answer
(`scripts/packaging/reference.py`). Standard library alone, so that it starts fast enough for a probe every few seconds.
"""

import argparse
import contextlib
import http.client
import json
import ssl
import sys
import threading
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from scripts.command_line import HelpFormatter
from scripts.paths import ARCHIVE, DRAINING_FILE, REFERENCE_FILE
from scripts.serving.credentials import CredentialsError, authorization, read_token

TOLERANCE = 5e-5  # of the largest logit, and of the map's largest number: devices differ by 1e-6, TF32 and other weights by more
TIMEOUT_S = 5.0
WAIT_POLL_S = 0.5
RAMP = tuple(tuple((x + y) / 56 for x in range(28)) for y in range(28))  # the image that is sent where there is no archive

Rows = Sequence[Sequence[float]]


class NotReady(RuntimeError):
    """The server gives no answer or a wrong one; the message says why, for a person, in one line."""


@dataclass(frozen=True, slots=True)
class ReferenceAnswer:
    """An image and the reference answer to it; without digit, logits and saliency where only the weights are known.

    Attributes:
        weights_sha256: SHA-256 of the network's weights, in hexadecimal.
        pixels: (H, W), intensity in [0, 1].
        digit: the predicted class.
        logits: (K,).
        saliency: (H, W), the gradient of the predicted class's logit.
    """

    weights_sha256: str
    pixels: Rows = RAMP
    digit: int | None = None
    logits: Sequence[float] | None = None
    saliency: Rows | None = None


def read_reference_answer(archive: Path) -> ReferenceAnswer | None:
    """Read an archive's reference answer.

    Returns:
        None where it holds none: another packager made it.
    Raises:
        NotReady: the archive is missing or unreadable.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            if REFERENCE_FILE not in opened.namelist():
                return None
            return ReferenceAnswer(**json.loads(opened.read(REFERENCE_FILE)))
    except (OSError, zipfile.BadZipFile, ValueError, TypeError) as error:
        raise NotReady(f"{archive} is not a readable archive: {error}") from error


def require_right_answers(
    address: str,
    model: str,
    reference: ReferenceAnswer,
    timeout_s: float = TIMEOUT_S,
    headers: Mapping[str, str] = MappingProxyType({}),
    tls: ssl.SSLContext | None = None,
) -> None:
    """Ask for a prediction and an explanation of the reference image, and compare both with the reference answer.

    Args:
        address: of the inference API, such as http://127.0.0.1:8080.
        model: the served model's name.
        reference: the image, and the expected answer to it.
        timeout_s: for both answers together, in seconds.
        headers: sent with both requests.
        tls: says which certificates are trusted over https; None for the system's.
    Raises:
        NotReady: the server gives no answer in time, an error, or a wrong answer.
    """
    failures: list[Exception] = []

    def ask() -> None:
        try:
            with contextlib.closing(_connect(address, timeout_s, tls)) as connection:
                replies = _ask(connection, urlsplit(address).path, model, reference, headers)
            _compare(reference, *replies)
        except Exception as error:  # noqa: BLE001  # raised again by the one who waits
            failures.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # a socket's timeout starts anew with every byte; this wait does not
    asking.start()
    asking.join(timeout_s)
    if asking.is_alive() or any(isinstance(error, TimeoutError) for error in failures):
        raise NotReady(f"no answer from {address} within {timeout_s:g} s")
    for error in failures:
        if isinstance(error, NotReady):
            raise error
        if isinstance(error, (OSError, http.client.HTTPException)):
            raise NotReady(f"no server answers at {address}: {error}") from error
        raise NotReady(f"{address} does not reply as this API does: {type(error).__name__}: {error}") from error


def _connect(address: str, timeout_s: float, tls: ssl.SSLContext | None) -> http.client.HTTPConnection:
    parts = urlsplit(address)
    if parts.scheme == "https":
        return http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=timeout_s, context=tls)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)


def _ask(
    connection: http.client.HTTPConnection, prefix: str, model: str, reference: ReferenceAnswer, headers: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Request a prediction and an explanation; returns both replies."""
    body = json.dumps({"data": reference.pixels, "prepare": "none"})  # noise, which shows no digit to find
    replies = []
    for route in ("predictions", "explanations"):
        connection.request("POST", f"{prefix.rstrip('/')}/{route}/{model}", body, {**headers, "Content-Type": "application/json"})
        reply = connection.getresponse()
        content = reply.read()
        if reply.status != 200:
            raise NotReady(f"{route} answers {reply.status}: {content[:200].decode(errors='replace')}".replace("\n", " "))
        replies.append(json.loads(content))
    return replies[0], replies[1]


def _compare(reference: ReferenceAnswer, prediction: dict[str, Any], explained: dict[str, Any]) -> None:
    """Compare both replies with the reference answer, or with each other where only the weights are known.

    Raises:
        NotReady: they differ.
    """
    explanation = explained["explanation"]
    saliency = [number for row in explanation["saliency"] for number in row]
    expected_digit = prediction["digit"] if reference.digit is None else reference.digit
    expected_logits = prediction["logits"] if reference.logits is None else reference.logits
    for reply in (prediction, explained):
        served = reply["model"]["weights_sha256"]
        if served != reference.weights_sha256:
            raise NotReady(f"other weights are served: expected {reference.weights_sha256}, got {served}")
        if reply["digit"] != expected_digit:
            raise NotReady(f"a wrong answer: expected digit {expected_digit}, got {reply['digit']}")
        _require_close("logits", reply["logits"], expected_logits)
    if explanation["target"] != expected_digit:
        raise NotReady(f"a wrong answer: expected an explanation of class {expected_digit}, got class {explanation['target']}")
    expected_saliency = saliency if reference.saliency is None else [number for row in reference.saliency for number in row]
    _require_close("saliency", saliency, expected_saliency)


def _require_close(name: str, served: Sequence[float], expected: Sequence[float]) -> None:
    if len(served) != len(expected):
        raise NotReady(f"a wrong answer: expected {len(expected)} numbers of {name}, got {len(served)}")
    differences = [abs(one - other) for one, other in zip(served, expected, strict=True)]
    accepted = TOLERANCE * max(abs(number) for number in expected)
    if not all(difference <= accepted for difference in differences):  # NaN is in no order, so it ends here too
        raise NotReady(
            f"a wrong answer: {name} differ from what was expected by {max(differences):.3g}, more than {accepted:.3g}"
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.serving.ready",
        description="Ask a server for a prediction and an explanation, and compare them with the archive's reference answer.",
        epilog="example:\n  %(prog)s --archive build/digits.mar --wait 60",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--address", metavar="URL", default="http://127.0.0.1:8080", help="address of the inference API")
    expected = parser.add_mutually_exclusive_group()
    expected.add_argument("--archive", type=Path, default=ARCHIVE, help="the served archive")
    expected.add_argument("--weights-sha256", metavar="HEX", help="instead of an archive: compare the weights alone")
    parser.add_argument("--model", help="the served model's name; default: the archive's")
    parser.add_argument(
        "--key-file", type=Path, metavar="FILE", help="token: TorchServe's key_file.json, or a file with a token alone"
    )
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="certificates to trust over https, PEM")
    parser.add_argument(
        "--log-dir",
        type=Path,
        metavar="FOLDER",
        help="log folder of a server in cluster mode on this machine: it is not ready once it drains",
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="seconds for both answers together")
    parser.add_argument("--wait", type=float, default=0, metavar="S", help="seconds to ask again for; 0: ask once")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Ask a server. Returns the exit code: 0 where its answers are right, else 1."""
    arguments = build_parser().parse_args(argv)
    try:
        tls = ssl.create_default_context(cafile=arguments.ca_file) if arguments.ca_file else None
    except OSError as error:
        print(f"not ready: cannot read certificates from {arguments.ca_file}: {error}", file=sys.stderr)
        return 1
    deadline = time.monotonic() + arguments.wait
    while True:
        try:
            if arguments.log_dir and (arguments.log_dir / DRAINING_FILE).exists():
                raise NotReady(f"the server drains: {arguments.log_dir / DRAINING_FILE} exists")
            reference = (
                ReferenceAnswer(arguments.weights_sha256)
                if arguments.weights_sha256
                else read_reference_answer(arguments.archive)
            )
            if reference is None:
                raise NotReady(
                    f"{arguments.archive} holds no reference answer; build it with scripts.packaging, or give --weights-sha256"
                )
            headers = authorization(read_token(arguments.key_file) if arguments.key_file else None)
            model = arguments.model or arguments.archive.stem
            require_right_answers(arguments.address, model, reference, arguments.timeout, headers, tls)
        except (NotReady, CredentialsError) as error:
            if time.monotonic() < deadline:
                time.sleep(WAIT_POLL_S)
                continue
            print(f"not ready: {error}", file=sys.stderr)
            return 1
        print(f"ready: {arguments.address} gives right answers, weights {reference.weights_sha256[:12]}")
        return 0


if __name__ == "__main__":
    sys.exit(main())
