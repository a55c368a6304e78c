"""Write the configuration of an Envoy in front of several servers, or run it.

    python -m scripts.serving.proxy --upstream 10.0.0.1:8080 --upstream 10.0.0.2:8080 --run

The servers serve one archive, by which their health is checked: each is asked for the archive's reference image every two
seconds, and gets requests only while its digit and its weights are right. Start them with `python -m scripts.serving --cluster`
in a network that clients do not reach, and give this proxy TLS and a token where clients are strangers.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from scripts.command_line import HelpFormatter
from scripts.paths import ARCHIVE
from scripts.serving.proxy.arguments import add_share_arguments
from scripts.serving.proxy.configuration import REQUESTS_PER_SECOND, Address, Front, is_ipv4, write_configuration
from scripts.serving.proxy.process import command
from scripts.serving.ready import NotReady, read_reference_answer


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.serving.proxy",
        description="Write the configuration of an Envoy in front of several servers, or run it.",
        epilog="examples:\n"
        "  %(prog)s --upstream 10.0.0.1:8080 --upstream 10.0.0.2:8080 --run\n"
        "  %(prog)s --upstream 10.0.0.1:8080 --certificate certificate.pem --private-key private-key.pem --key-file token \\\n"
        "    --output build/envoy.yaml && envoy -c build/envoy.yaml",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--upstream", type=_address, action="append", required=True, metavar="HOST:PORT", help="a server's inference address"
    )
    parser.add_argument(
        "--grpc-upstream",
        type=_address,
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a server's gRPC address, with --cluster the same as of inference; for each --upstream one, in the same order; "
        "default: no gRPC",
    )
    parser.add_argument("--listen", type=_address, default=Address("127.0.0.1", 8000), metavar="IPV4:PORT", help="own address")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="the archive that all serve; its stem is the model's name")
    parser.add_argument("--certificate", type=Path, metavar="PEM", help="for TLS; intermediate certificates may follow in it")
    parser.add_argument("--private-key", type=Path, metavar="PEM", help="the certificate's key, not encrypted")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="the token that clients must send, in one line")
    parser.add_argument("--upstream-ca", type=Path, metavar="PEM", help="reach the servers by TLS, and know them by these")
    add_share_arguments(parser, REQUESTS_PER_SECOND)
    parser.add_argument("--access-log", type=Path, metavar="FILE", help="who was refused or got an error; default: none")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--output", type=Path, metavar="FILE", help="write the configuration; default: print it")
    action.add_argument("--check", type=Path, metavar="FILE", help="exit code 1 if this file is another configuration")
    action.add_argument("--run", action="store_true", help="run Envoy in the foreground")
    return parser


def _address(text: str) -> Address:
    try:
        return Address.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_front(arguments: argparse.Namespace) -> Front:
    """Turn the command line into the settings of a proxy.

    Raises:
        ValueError: they do not fit together, or the archive cannot be read.
    """
    if (arguments.certificate is None) != (arguments.private_key is None):
        raise ValueError("--certificate and --private-key need each other")
    if arguments.listen.port is not None and not is_ipv4(arguments.listen.host):
        raise ValueError(f"expected an IPv4 address as --listen, got {arguments.listen.host!r}")
    if arguments.grpc_upstream and len(arguments.grpc_upstream) != len(arguments.upstream):
        raise ValueError(
            f"expected a --grpc-upstream for each --upstream, got {len(arguments.grpc_upstream)} for {len(arguments.upstream)}"
        )
    try:
        reference = read_reference_answer(arguments.archive)
    except NotReady as error:
        raise ValueError(str(error)) from error
    if reference is None:
        raise ValueError(f"{arguments.archive} holds no reference answer; build it with scripts.packaging")
    return Front(
        listen=arguments.listen,
        model_name=arguments.archive.stem,
        upstreams=arguments.upstream,
        grpc_upstreams=arguments.grpc_upstream,
        certificate=arguments.certificate,
        private_key=arguments.private_key,
        key_file=arguments.key_file,
        upstream_ca=arguments.upstream_ca,
        reference=reference,
        requests_per_second=arguments.requests_per_second,
        trusted_proxies=arguments.trusted_proxy,
        access_log=arguments.access_log,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write, check or run. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        written = write_configuration(read_front(arguments))
        if arguments.check is not None:
            if arguments.check.read_text() != written:
                raise ValueError(f"{arguments.check} is not what these settings give; write it again with --output")
            return 0
        if arguments.output is not None:
            arguments.output.write_text(written)
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.run:
        run(written, arguments.listen)
    print(written, end="")
    return 0


def run(configuration: str, listen: Address) -> NoReturn:
    """Become Envoy, with a configuration."""
    descriptor, name = tempfile.mkstemp(prefix="envoy-", suffix=".yaml")
    os.write(descriptor, configuration.encode())
    os.close(descriptor)
    print(f"Envoy takes requests at {listen.host}:{listen.port} (Ctrl-C ends it)", file=sys.stderr)
    envoy = command(Path(name), concurrency=os.cpu_count() or 1)
    os.execv(envoy[0], envoy)  # noqa: S606  # a program and its arguments, no shell


if __name__ == "__main__":
    sys.exit(main())
