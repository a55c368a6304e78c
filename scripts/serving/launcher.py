"""Serve an archive with TorchServe, in the foreground, until Ctrl-C.

    python -m scripts.serving

The command line, and the names that other scripts take from this package: settings (`settings.py`), configuration
(`configuration.py`), Java (`java.py`) and the running server (`server.py`). With `--hardened` it serves for others: TLS, tokens,
a checked archive, least privileges (see .github/SECURITY.md). With `--cluster` it serves behind a load balancer.
"""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from scripts.command_line import HelpFormatter
from scripts.paths import BUILD, CONFIGURATION, HARDENED_CONFIGURATION, SAMPLE_IMAGE
from scripts.serving.cluster import EVERY_ADDRESS, Cluster, ConsoleFollower, mark_draining
from scripts.serving.configuration import find_property, read_model_config, write_property
from scripts.serving.hardened import Hardening
from scripts.serving.java import find_java_home
from scripts.serving.proxy.arguments import add_share_arguments
from scripts.serving.proxy.configuration import REQUESTS_PER_SECOND
from scripts.serving.server import READY_TIMEOUT_S, TorchServe
from scripts.serving.settings import CONSOLE_FILE, MAX_PORT, Ports, ServeError, Settings, option_of

__all__ = [
    "READY_TIMEOUT_S",
    "Ports",
    "ServeError",
    "Settings",
    "TorchServe",
    "build_parser",
    "find_java_home",
    "find_property",
    "main",
    "read_model_config",
    "read_settings",
    "write_property",
]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.serving",
        description="Serve an archive with TorchServe in the foreground, until Ctrl-C.",
        epilog="examples:\n"
        "  %(prog)s --workers 4\n"
        "  %(prog)s --hardened --certificate certificate.pem --private-key private-key.pem --inference-host 0.0.0.0",
        formatter_class=HelpFormatter,
    )
    defaults = Settings()
    as_configured = "; default: as in model-config.yaml"
    parser.add_argument("--archive", type=Path, default=defaults.archive, help="the archive; its stem is the model's name")
    for name in Ports.__dataclass_fields__:
        what = name.replace("_", " ").replace("grpc", "gRPC")
        option = option_of(name)
        parser.add_argument(option, type=_port, default=getattr(defaults.ports, name), metavar="PORT", help=f"TCP port of {what}")
    parser.add_argument("--workers", type=int, metavar="N", help=f"worker processes{as_configured}")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default=defaults.device, help="auto: a GPU if there is one")
    parser.add_argument("--batch-size", type=int, metavar="N", help=f"most requests that share one forward pass{as_configured}")
    parser.add_argument(
        "--max-batch-delay", type=int, metavar="MS", help=f"longest wait of a request for others, in ms{as_configured}"
    )
    parser.add_argument(
        "--log-config",
        type=Path,
        metavar="FILE",
        default=defaults.log_configuration,
        help="log4j's configuration; serve_config/log4j2-json.xml writes JSON",
    )
    parser.add_argument(
        "--log-dir",
        type=Path,
        metavar="FOLDER",
        help="folder for logs, which are appended to, of this server alone; default: build/logs/PORT, the port of inference",
    )
    parser.add_argument(
        "--archive-sha256",
        metavar="HEX",
        help="the archive's expected SHA-256, or a file with it, as sha256sum writes them; default: the file ARCHIVE.sha256",
    )
    hardened = parser.add_argument_group("a server that others can reach", "needs --hardened, --certificate and --private-key")
    hardened.add_argument("--hardened", action="store_true", help="TLS, tokens, a checked archive, least privileges")
    hardened.add_argument(
        "--certificate", type=Path, metavar="PEM", help="the server's certificate; intermediate certificates may follow in it"
    )
    hardened.add_argument("--private-key", type=Path, metavar="PEM", help="the certificate's key, not encrypted")
    hardened.add_argument(
        "--inference-host",
        metavar="IPV4",
        help="where requests are taken; everything else stays on loopback; default: 127.0.0.1, with --cluster 0.0.0.0",
    )
    hardened.add_argument("--key-dir", type=Path, metavar="FOLDER", help="folder for the server's tokens; default: build/keys")
    hardened.add_argument(
        "--allow-privileged-user", action="store_true", help="serve even as root, or as a user who can change the code"
    )
    cluster = parser.add_argument_group("a server in a cluster")
    cluster.add_argument(
        "--cluster",
        action="store_true",
        help="inference and metrics at all addresses, management on loopback, no tokens unless --hardened; logs on stderr too; "
        "SIGTERM drains",
    )
    cluster.add_argument(
        "--drain-delay",
        type=float,
        metavar="S",
        help=f"seconds after SIGTERM in which requests are still taken; default: {Cluster().drain_delay_s:g}",
    )
    shares = parser.add_argument_group("fairness between clients", "needs --hardened or --cluster")
    otherwise = f"; default: {REQUESTS_PER_SECOND}, but any number with --cluster and no --trusted-proxy"
    add_share_arguments(shares, None, otherwise)
    return parser


def _port(text: str) -> int:
    """Read a TCP port of the command line."""
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= MAX_PORT):
        raise argparse.ArgumentTypeError(f"expected a port from 1 to {MAX_PORT}, got {text!r}")
    return int(text)


def read_hardening(arguments: argparse.Namespace) -> Hardening | None:
    """Turn the command line into the settings of a hardened server; None where it asks for none.

    Raises:
        ServeError: some of them are missing, or --hardened is.
    """
    given = {
        name: getattr(arguments, name)
        for name in ("certificate", "private_key", "inference_host", "key_dir", "allow_privileged_user")
        if getattr(arguments, name)
    }
    if not arguments.hardened:
        if given:
            raise ServeError(f"--{next(iter(given)).replace('_', '-')} needs --hardened")
        return None
    if not {"certificate", "private_key"} <= given.keys():
        raise ServeError("--hardened needs --certificate and --private-key")
    host = given.get("inference_host", "")
    if ":" in host or "/" in host:
        raise ServeError(f"expected an IPv4 address or a name without a port as --inference-host, got {host!r}")
    if arguments.cluster:
        given.setdefault("inference_host", EVERY_ADDRESS)
    return Hardening(**given)


def read_cluster(arguments: argparse.Namespace) -> Cluster | None:
    """Turn the command line into the settings of a server in a cluster; None where it asks for none.

    Raises:
        ServeError: --cluster is missing.
    """
    given = {} if arguments.drain_delay is None else {"drain_delay_s": arguments.drain_delay}
    if not arguments.cluster and given:
        raise ServeError("--drain-delay needs --cluster")
    return Cluster(**given) if arguments.cluster else None


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Turn the command line into settings.

    Raises:
        ServeError: it has only some of the options that a hardened server needs, or one that needs another.
    """
    hardening, cluster = read_hardening(arguments), read_cluster(arguments)
    shares = {"--requests-per-second": arguments.requests_per_second is not None, "--trusted-proxy": arguments.trusted_proxy}
    for option, is_given in shares.items():
        if is_given and hardening is None and cluster is None:
            raise ServeError(f"{option} needs --hardened or --cluster")
    model_config = {
        "minWorkers": arguments.workers,
        "maxWorkers": arguments.workers,
        "batchSize": arguments.batch_size,
        "maxBatchDelay": arguments.max_batch_delay,
    }
    return Settings(
        archive=arguments.archive,
        ports=Ports(**{name: getattr(arguments, f"{name}_port") for name in Ports.__dataclass_fields__}),
        device=arguments.device,
        log_dir=arguments.log_dir or BUILD / "logs" / str(arguments.inference_port),
        log_configuration=arguments.log_config,
        model_config={key: value for key, value in model_config.items() if value is not None},
        configuration=CONFIGURATION if hardening is None and cluster is None else HARDENED_CONFIGURATION,
        archive_sha256=arguments.archive_sha256,
        hardening=hardening,
        cluster=cluster,
        requests_per_second=arguments.requests_per_second,
        trusted_proxies=arguments.trusted_proxy,
    )


def suggest_commands(server: TorchServe) -> str:
    """Write commands that ask the server. They name the files of tokens and certificates, and hold no secret."""
    image = shlex.quote(os.path.relpath(SAMPLE_IMAGE))
    hardening = server.settings.hardening
    if hardening is None:
        return (
            f"  curl -T {image} {server.address}/predictions/{server.model_name}\n"
            f"  curl -F data=@{image} -F target=7 {server.address}/explanations/{server.model_name}"
        )
    files = f"--key-file {shlex.quote(str(hardening.key_file))} --ca-file {shlex.quote(str(hardening.certificate))}"
    return (
        f"  python -m scripts.serving.explain {image} {files} --url {server.address}\n\n"
        "Put the certificate's host name into --url, and the certificate that signed it into --ca-file."
    )


def _console_of(settings: Settings) -> contextlib.AbstractContextManager[object]:
    """Show what TorchServe prints, in cluster mode; else only its file has it."""
    if settings.cluster is None:
        return contextlib.nullcontext()
    return ConsoleFollower(settings.log_dir / CONSOLE_FILE)


def drain(settings: Settings, cluster: Cluster) -> None:
    """Tell the readiness probe that this server takes its leave, and go on serving until load balancers have noticed."""
    say(f"draining: requests are taken for {cluster.drain_delay_s:g} s more ...", sys.stderr)
    mark_draining(settings.log_dir, draining=True)
    time.sleep(cluster.drain_delay_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal. Returns the exit code: 0 after a signal, 1 where the server did not start or ended by itself."""
    arguments = build_parser().parse_args(argv)
    interrupted = threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, lambda *_: interrupted.set())
    try:
        settings = read_settings(arguments)
        if settings.cluster is not None:
            mark_draining(settings.log_dir, draining=False)  # what a killed predecessor left
        say(f"starting TorchServe, logs in {settings.log_dir} ...", sys.stderr)
        with _console_of(settings), TorchServe(settings, interrupted) as server:
            say(f"{server.worker_count} workers ready at {server.address} (Ctrl-C ends them). Try:\n")
            say(f"{suggest_commands(server)}\n")
            while not interrupted.wait(1):
                if server.has_ended():
                    say(f"error: TorchServe ended by itself:\n{server.log_tail()}", sys.stderr)
                    return 1
                reason = server.find_reason_to_replace()
                if reason:
                    say(f"replacing TorchServe: {reason} ...", sys.stderr)
                    server.replace(reason)
                    say("TorchServe is replaced", sys.stderr)
            if settings.cluster is not None:
                drain(settings, settings.cluster)
            say("stopping ...", sys.stderr)
    except ServeError as error:
        say(f"error: {error}", sys.stderr)
        return 0 if interrupted.is_set() else 1
    return 0


def say(text: str, stream: TextIO | None = None) -> None:
    """Print for the one who started the server. Nobody may be there any more, or the terminal may not know the letters."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "ascii"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:  # a pipe that nobody reads, a full disk
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
