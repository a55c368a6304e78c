"""How rules read a container: quantities, the server's settings, probes."""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from scripts.cluster.manifests import Pods
from scripts.serving import launcher
from scripts.serving.settings import Settings

QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")  # of Kubernetes' API conventions
UNITS = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}  # powers of ten

Problems = Iterator[str]


def quantity_of(text: object) -> Decimal | None:
    """Read a quantity, such as 500m, 2 or 3Gi; None where it is none."""
    found = QUANTITY.fullmatch(str(text)) if isinstance(text, (str, int, float)) and not isinstance(text, bool) else None
    if found is None:
        return None
    number, unit = Decimal(found[1]), found[2]
    if unit is None:
        return number
    if unit.endswith("i"):
        return number * Decimal(1024) ** ("KMGTPE".index(unit[0]) + 1)
    return number * Decimal(f"1e{UNITS[unit]}" if unit in UNITS else f"1{unit}")


def settings_of(args: Sequence[str]) -> tuple[Settings | None, str]:
    """Read a container's args as the image's entry point does; returns the settings, or None and what is wrong."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            parsed = launcher.build_parser().parse_args(["--cluster", "--log-dir=/tmp/logs", *args])
            return launcher.read_settings(parsed), ""
        except SystemExit:
            return None, said.getvalue().strip().splitlines()[-1]
        except launcher.ServeError as error:
            return None, str(error)


def servers_in(pods: Pods) -> Iterator[tuple[Mapping[str, Any], Settings]]:
    """Find the containers whose args the server takes, and what these set."""
    for container in pods.spec.get("containers", ()):
        settings, _ = settings_of(container.get("args", ()))
        if settings is not None:
            yield container, settings


def probes_of(pods: Pods) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Find the probes of the containers that stay: the container's name, the probe's, and the probe."""
    for container in pods.spec.get("containers", ()):
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            if name in container:
                yield container["name"], name, container[name]
