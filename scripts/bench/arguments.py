"""Command-line arguments as text -> values; for argparse's `type`.

Each function raises argparse.ArgumentTypeError, whose message says what was expected.
"""

import argparse
import math
from collections.abc import Callable, Collection
from urllib.parse import urlsplit


def read_positive(text: str) -> float:
    """Read a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def read_seconds(text: str) -> float:
    """Read a finite number, 0 or above."""
    return 0.0 if text.strip() == "0" else read_positive(text)


def read_rates(text: str) -> list[float]:
    """Read "100,200.5"."""
    return [read_positive(part) for part in text.split(",")]


def read_count(text: str) -> int:
    """Read a whole number, 1 or above."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def read_counts(text: str) -> list[int]:
    """Read "1,16"."""
    return [read_count(part) for part in text.split(",")]


def names_reader(known: Collection[str]) -> Callable[[str], list[str]]:
    """Make a function that reads some of these names, such as "mosec,noop", each once."""

    def read_names(text: str) -> list[str]:
        names = list(dict.fromkeys(part.strip() for part in text.split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {', '.join(unknown)!r}")
        return names

    return read_names


def read_address(text: str) -> str:
    """Read the address of a server."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or parts.path.strip("/"):
        raise argparse.ArgumentTypeError("expected http://HOST:PORT or https://HOST:PORT, without a path or a user")
    return text.rstrip("/")
