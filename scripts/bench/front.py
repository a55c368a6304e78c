"""Measure what the proxy in front costs: time and memory, beside the same TorchServe without it.

    python -m scripts.bench.front --rounds 3 --seconds 3

One TorchServe serves all; each proxy stands before it by itself. They take turns, so that a slow minute of the machine hits all.
A figure is the median of its rounds, and what counts are the ratios to the first line.
"""

import argparse
import contextlib
import json
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from tqdm import tqdm

from scripts.bench.arguments import read_count, read_positive
from scripts.bench.digit_requests import build_calls
from scripts.bench.digits import read_files
from scripts.bench.load import Call, build_call
from scripts.bench.rounds import LONE_CONNECTION, Spread, closed_load, measure
from scripts.command_line import HelpFormatter
from scripts.paths import ARCHIVE
from scripts.serving.launcher import Ports, ServeError, Settings, TorchServe
from scripts.serving.proxy.configuration import Address, Front
from scripts.serving.proxy.process import Envoy

CONNECTIONS = (LONE_CONNECTION, 16)
TOKEN = "measured-token"  # noqa: S105  # of this measurement alone
DIRECT = "TorchServe alone"


@dataclass(frozen=True, slots=True)
class Way:
    """A way to the server: its name, its address, and how to speak TLS to it."""

    name: str
    address: str
    tls: ssl.SSLContext | None = None
    envoy: Envoy | None = None


@contextlib.contextmanager
def open_ways(archive: Path, folder: Path) -> Iterator[list[Way]]:
    """Start a server, and the proxies in front of it."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(TorchServe(Settings(archive=archive, ports=Ports.free(), log_dir=folder / "logs")))
        certificate, private_key = folder / "certificate.pem", folder / "private-key.pem"
        make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
        command = [*make.split(), "-keyout", str(private_key), "-out", str(certificate)]
        subprocess.run(command, check=True, capture_output=True)
        (folder / "token").write_text(TOKEN)
        plain = Front(
            listen=Address("127.0.0.1", 1),
            model_name=server.model_name,
            upstreams=[Address("127.0.0.1", server.settings.ports.inference)],
            requests_per_second=0,
        )
        secured = replace(plain, certificate=certificate, private_key=private_key, key_file=folder / "token")
        ways = [Way(DIRECT, server.address)]
        for number, (name, front) in enumerate((("proxy", plain), ("proxy with TLS and token", secured))):
            port = _free_port()
            own = folder / str(number)
            own.mkdir()
            envoy = Envoy(replace(front, listen=Address("127.0.0.1", port), admin_socket=own / "s"), own, own / "log")
            envoy.start()
            stack.callback(envoy.stop)
            if front.certificate is None:
                ways.append(Way(name, f"http://127.0.0.1:{port}", None, envoy))
            else:
                ways.append(Way(name, f"https://localhost:{port}", ssl.create_default_context(cafile=certificate), envoy))
        yield ways


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def build_kinds(way: Way) -> dict[str, list[Call]]:
    """The requests that are measured: small images as they are, and in forms, which the proxy takes apart."""
    images = read_files()
    calls = build_calls("explain", way.address, images, token=TOKEN)
    head = b'--B\r\nContent-Disposition: form-data; name="data"; filename="a.png"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=B", "Authorization": f"Bearer {TOKEN}"}
    path = f"/explanations/{ARCHIVE.stem}"
    forms = [build_call("explain", way.address, path, head + image + b"\r\n--B--\r\n", headers) for image in images]
    return {"raw body": calls, "multipart form": forms}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.front",
        description="Measure what the proxy in front of TorchServe costs.",
        epilog="example:\n  %(prog)s --rounds 5 --seconds 5",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="the archive to serve")
    parser.add_argument("--rounds", type=read_count, default=3, metavar="N", help="measurements of each figure")
    parser.add_argument("--seconds", type=read_positive, default=3, metavar="S", help="of one measurement")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    rates: dict[tuple[str, int, str], list[float]] = {}
    medians_ms: dict[tuple[str, int, str], list[float]] = {}
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            open_ways(arguments.archive, Path(folder)) as ways,
            tqdm(total=arguments.rounds * 2 * len(CONNECTIONS) * len(ways), disable=None) as progress,
        ):
            for _ in range(arguments.rounds):
                for connections in CONNECTIONS:
                    for way in ways:
                        for kind, calls in build_kinds(way).items():
                            load = closed_load(way.address, calls, connections, arguments.seconds)
                            figures = measure(replace(load, tls=way.tls))
                            if figures.error_counts or figures.p50_ms is None:
                                raise ServeError(f"{way.name}: expected right replies alone, got {figures.error_counts}")
                            rates.setdefault((kind, connections, way.name), []).append(figures.rate)
                            medians_ms.setdefault((kind, connections, way.name), []).append(figures.p50_ms)
                            progress.update()
            memory_mb = {way.name: psutil.Process(way.envoy.pid).memory_info().rss / 1e6 for way in ways if way.envoy}
    except ServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("| request | connections | way | requests/s | ratio | p50, ms | ratio | proxy's memory, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (kind, connections, name), values in rates.items():
        rate, milliseconds = Spread.of(values), Spread.of(medians_ms[kind, connections, name])
        direct = (kind, connections, DIRECT)
        ratio = rate.median / Spread.of(rates[direct]).median
        slower = milliseconds.median / Spread.of(medians_ms[direct]).median
        memory = f"{memory_mb[name]:.0f}" if name in memory_mb else ""
        print(
            f"| {kind} | {connections} | {name} | {rate:.0f} | {ratio:.2f} | {milliseconds:.2f} | {slower:.2f} | {memory} |",
            flush=True,
        )
    print(json.dumps({"rounds": arguments.rounds, "seconds": arguments.seconds}), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
