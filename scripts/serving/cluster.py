"""Cluster mode: a server that other machines reach, which leaves its load balancer before it ends.

Stands between development and hardened. Inference and metrics are reachable, management stays on loopback, nothing can be
loaded or fetched. Nobody is asked for a token: the cluster's network says who may reach the server. Hardening brings TLS and
tokens back. Knows nothing of how the server is started: `server.py` does that.
"""

import contextlib
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from scripts.paths import DRAINING_FILE

EVERY_ADDRESS = "0.0.0.0"  # noqa: S104  # what this mode is for
FOLLOW_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Cluster:
    """The settings of a server in a cluster.

    Attributes:
        drain_delay_s: seconds after SIGTERM in which all requests are still taken, for load balancers to notice. Kubernetes takes
            a pod out of its endpoints while the pod gets SIGTERM, and every node has to hear of it.
        drain_timeout_s: seconds after that for the requests in flight: more than the slowest takes (MAX_BATCH_SECONDS in
            handler/limits.py). A pod's terminationGracePeriodSeconds is at least the sum of both and of STOP_TIMEOUT_S.
    """

    drain_delay_s: float = 10.0
    drain_timeout_s: float = 30.0

    def properties(self, metrics_port: int, *, is_hardened: bool) -> Mapping[str, str]:
        """List what differs from config-hardened.properties: keys and their values.

        Args:
            metrics_port: TCP port of the metrics.
            is_hardened: whether tokens stay.
        """
        reachable = {"metrics_address": f"http://{EVERY_ADDRESS}:{metrics_port}"}
        return reachable if is_hardened else reachable | {"disable_token_authorization": "true"}


def mark_draining(log_dir: Path, *, draining: bool) -> None:
    """Write or remove the file that tells the readiness probe (`ready.py --log-dir`) that this server takes its leave."""
    marker = log_dir / DRAINING_FILE
    with contextlib.suppress(OSError):  # a full disk does not keep a server from ending, nor a missing folder from starting
        if draining:
            marker.touch()
        else:
            marker.unlink()


class ConsoleFollower:
    """Copies what TorchServe prints to this program's stderr, which is where a container's logs are read.

    A context manager: inside it lines are copied; on leaving it the rest is.
    """

    def __init__(self, console: Path) -> None:
        self._console = console
        self._start = console.stat().st_size if console.is_file() else 0  # it holds what former starts printed
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="console", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        position, is_last = self._start, False
        while not is_last:
            is_last = self._ended.wait(FOLLOW_POLL_S)
            try:
                with self._console.open("rb") as opened:
                    if opened.seek(0, 2) < position:
                        position = 0  # it was begun again
                    opened.seek(position)
                    printed = opened.read()
            except OSError:  # not there yet
                continue
            position += len(printed)
            sys.stderr.write(printed.decode(errors="replace"))
            sys.stderr.flush()
