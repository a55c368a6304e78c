"""Serve a page to draw on, in front of a server of its own or of one that runs.

    python -m scripts.demo

Opens the page in a browser. Ctrl-C ends the page, and the server if it was started here.
"""

import argparse
import contextlib
import ipaddress
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from scripts.command_line import HelpFormatter
from scripts.demo.page import LOOPBACK, PageError, ServedModel, serving_page
from scripts.paths import ARCHIVE, BUILD, MODEL_NAME
from scripts.serving.launcher import Ports, ServeError, Settings, TorchServe

DEFAULT_PORT = 8090  # of the page; a free one where it is taken
MANAGEMENT_URL = f"http://{LOOPBACK}:{Ports().management}"  # TorchServe's own default, and a hardened server's
LOG_DIR = BUILD / "demo-logs"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo",
        description="Serve a page to draw on and open it in a browser, until Ctrl-C.",
        epilog="examples:\n"
        "  %(prog)s\n"
        "  %(prog)s --url http://127.0.0.1:8080\n"
        "  %(prog)s --url https://localhost:8443 --key-file build/keys/key_file.json --ca-file certificate.pem",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="the archive that is served; its stem is the model's name")
    parser.add_argument("--port", type=int, metavar="PORT", help=f"TCP port of the page; default: {DEFAULT_PORT}, or a free one")
    parser.add_argument("--no-browser", action="store_true", help="open no browser")
    running = parser.add_argument_group("a server that runs already", "with --url no server is started")
    running.add_argument("--url", help="address of its inference API")
    running.add_argument("--model", help=f"the served model's name; default: {MODEL_NAME}")
    running.add_argument(
        "--management-url",
        metavar="URL",
        help=f"address of its management API, which describes the model; default: {MANAGEMENT_URL} for a server on this machine",
    )
    running.add_argument(
        "--key-file", type=Path, metavar="FILE", help="token: TorchServe's key_file.json, or a file with a token alone"
    )
    running.add_argument("--ca-file", type=Path, metavar="FILE", help="certificates to trust over https, PEM")
    return parser


def read_served_model(arguments: argparse.Namespace) -> ServedModel:
    """Turn the command line into the running server that it names.

    Raises:
        PageError: an address is none, or a token would leave this machine unencrypted.
    """
    addresses = {"--url": arguments.url, "--management-url": arguments.management_url}
    for option, address in addresses.items():
        _require_address(option, address, has_token=arguments.key_file is not None)
    if arguments.ca_file is not None and not arguments.ca_file.is_file():
        raise PageError(f"there is no file {arguments.ca_file}")
    default_management = MANAGEMENT_URL if _is_loopback(urlsplit(arguments.url).hostname) else None
    management_url = arguments.management_url or default_management
    return ServedModel(
        url=arguments.url.rstrip("/"),
        model=arguments.model or MODEL_NAME,
        management_url=management_url and management_url.rstrip("/"),
        key_file=arguments.key_file,
        ca_file=arguments.ca_file,
    )


def _require_address(option: str, address: str | None, *, has_token: bool) -> None:
    if address is None:
        return
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and parts.username is None
        usable = usable and not parts.query and not parts.fragment
    except ValueError:
        usable = False
    if not usable:
        raise PageError(f"expected an address such as http://127.0.0.1:8080 as {option}, got {address!r}")
    if has_token and parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise PageError(f"expected https as {option} with --key-file, as others could read the token; got {address!r}")


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def choose_port(asked: int | None) -> int:
    """The port that was asked for; else the default one, or a free one where that is taken."""
    if asked is not None:
        return asked
    for port in (DEFAULT_PORT, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, port))
            chosen: int = probe.getsockname()[1]
            return chosen
    raise PageError("this machine has no free port")


def choose_ports() -> Ports:
    """TorchServe's usual ports, or free ones where another server has one of them."""
    usual = Ports()
    try:
        usual.require_free()
    except ServeError:
        return Ports.free()
    return usual


@contextlib.contextmanager
def showing(served: ServedModel, port: int, *, browser: bool) -> Iterator[None]:
    """Serve the page, say where, and open it."""
    with serving_page(served, port) as address:
        print(f"draw at {address} (Ctrl-C ends it)", flush=True)
        if browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        yield


def show_own_server(archive: Path, port: int, interrupted: threading.Event, *, browser: bool) -> int:
    """Start a server, show it while it starts and until a signal. Returns the exit code."""
    settings = Settings(archive=archive, ports=choose_ports(), log_dir=LOG_DIR)
    server = TorchServe(settings, interrupted)
    ready = threading.Event()
    served = ServedModel(server.address, server.model_name, server.management_address, is_starting=lambda: not ready.is_set())
    if not archive.is_file():
        raise ServeError(f"there is no archive {archive}; build it with: make package")
    with showing(served, port, browser=browser):
        print(f"starting TorchServe, logs in {settings.log_dir} ...", file=sys.stderr)
        with server:
            ready.set()
            print(f"the model is ready at {server.address}", file=sys.stderr)
            while not interrupted.wait(1):
                if server.has_ended():
                    print(f"TorchServe ended by itself:\n{server.log_tail()}", file=sys.stderr)
                    return 1
            print("stopping ...", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal. Returns the exit code: 0 after a signal, 1 where nothing could be served."""
    arguments = build_parser().parse_args(argv)
    interrupted = threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, lambda *_: interrupted.set())
    try:
        if arguments.url is None:
            given = [name for name in ("model", "management_url", "key_file", "ca_file") if getattr(arguments, name) is not None]
            if given:
                raise PageError(f"--{given[0].replace('_', '-')} needs --url")
            port = choose_port(arguments.port)
            return show_own_server(arguments.archive, port, interrupted, browser=not arguments.no_browser)
        with showing(read_served_model(arguments), choose_port(arguments.port), browser=not arguments.no_browser):
            interrupted.wait()
    except (PageError, ServeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 0 if interrupted.is_set() else 1
    return 0
