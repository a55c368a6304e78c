"""The options of fairness between clients, which `scripts.serving` and `scripts.serving.proxy` both have."""

import argparse
import ipaddress

MAX_REQUESTS_PER_SECOND = 1_000_000_000  # Envoy counts twice as many in 32 bits


def add_share_arguments(parser: argparse._ActionsContainer, default: int | None, otherwise: str = "") -> None:
    """Add --requests-per-second and --trusted-proxy to a command line.

    Args:
        parser: or a group of its options.
        default: of --requests-per-second.
        otherwise: what the help says of the default where it is None.
    """
    parser.add_argument(
        "--requests-per-second",
        type=read_rate,
        default=default,
        metavar="N",
        help=f"most requests from one address, 429 for the excess; 0: any number{otherwise}",
    )
    parser.add_argument(
        "--trusted-proxy",
        type=read_network,
        action="append",
        default=[],
        metavar="CIDR",
        help="network of the load balancers in front, whose X-Forwarded-For names the client's address; may be given again",
    )


def read_rate(text: str) -> int:
    """Read a number of requests a second of the command line."""
    if not (text.isascii() and text.isdecimal() and int(text) <= MAX_REQUESTS_PER_SECOND):
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {MAX_REQUESTS_PER_SECOND}, got {text!r}")
    return int(text)


def read_network(text: str) -> str:
    """Read a network, 10.0.0.0/8, or an address of the command line."""
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a network, such as 10.0.0.0/8, or an address, got {text!r}") from error
