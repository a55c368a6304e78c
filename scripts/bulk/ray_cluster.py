"""Shards -> their files, by a Ray cluster. Ray starts actors and brings them shards; an actor does what elsewhere a thread does.

An actor or a node that is lost costs what it had of its shard; another takes the shard. Files appear whole, so that nothing is
there twice.
"""

import socket
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bulk.errors import BulkError
from scripts.bulk.explainer import Explainer
from scripts.bulk.job import Job, Outcome, Shard
from scripts.bulk.shards import OnRows, explain_shard
from scripts.bulk.storage import Storage
from scripts.paths import ROOT

MAX_LOSSES = 5  # of the actor that had one shard, until the shard is taken for the reason
CONNECT_TIMEOUT_S = 10
POLL_S = 1.0  # between two looks at how large the cluster is
WAIT_FOR_NODES_S = 300  # for a first or another machine


@dataclass(frozen=True, slots=True)
class Resources:
    """What of a cluster is used.

    Attributes:
        address: as `ray.init` takes it.
        process_count: actors at most; None for as many as the cluster has CPUs, or GPUs.
        uses_gpus: whether each actor gets a GPU of its own.
    """

    address: str
    process_count: int | None
    uses_gpus: bool


class ShardActor:
    """Answers shards on one machine of the cluster."""

    def __init__(self, archive: bytes, headers: Mapping[str, str], *, gpu: int | None) -> None:
        """Unpack the archive there, and start a process for it."""
        from scripts.bulk.command import unpack

        self._folder = tempfile.TemporaryDirectory(prefix="bulk-")
        folder = Path(self._folder.name)
        (folder / "archive.mar").write_bytes(archive)
        unpack(folder / "archive.mar", folder / "archive")
        self._explainer = Explainer(folder / "archive", headers, folder / "process.log", gpu)

    def start(self) -> None:
        """Do nothing; the answer says that the actor has started."""

    def explain(self, job: Job, shard: Shard, storage: Storage, batch_size: int) -> Outcome:
        """Answer one shard into its file."""
        return explain_shard(job, shard, self._explainer, storage, batch_size, lambda _rows, _errors: None)


def run_on_ray(
    resources: Resources,
    archive: Path,
    headers: Mapping[str, str],
    job: Job,
    shards: Sequence[Shard],
    storage: Storage,
    batch_size: int,
    on_rows: OnRows,
) -> list[Outcome]:
    """Answer shards on a cluster, whose machines all reach the images and the output by the same names.

    Raises:
        BulkError: Ray is not installed, no cluster answers, no machine is left, or a shard loses one actor after the other.
        OSError: an actor cannot write.
    """
    try:
        import ray
    except ImportError as error:
        raise BulkError("--ray needs Ray, which is not installed: .venv/bin/python -m pip install ray") from error
    _require_listener(resources.address)
    try:
        ray.init(
            address=resources.address,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"py_modules": [str(ROOT / "handler"), str(ROOT / "scripts")]},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BulkError(f"no Ray cluster answers at {resources.address!r}: {error}") from error
    try:
        return Cluster(ray, resources, ray.put(archive.read_bytes()), headers).run(job, shards, storage, batch_size, on_rows)
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Check that something listens where a cluster is said to be; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise BulkError(f"no Ray cluster answers at {address!r}: {error.strerror or error}") from error


class Cluster:
    """Keeps as many actors as the cluster has room for, and each of them busy with one shard."""

    def __init__(self, ray: Any, resources: Resources, archive: Any, headers: Mapping[str, str]) -> None:  # noqa: ANN401
        self._ray = ray
        self._resources = resources
        self._arguments = (archive, headers)
        need = {"num_gpus": 1, "num_cpus": 1} if resources.uses_gpus else {"num_cpus": 1}
        self._actor_class = ray.remote(**need, max_restarts=0)(ShardActor)
        self._starting: dict[Any, Any] = {}  # actors, by the reference of what says that they have started
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Shard]] = {}  # by the reference of what an actor computes

    def run(self, job: Job, shards: Sequence[Shard], storage: Storage, batch_size: int, on_rows: OnRows) -> list[Outcome]:
        """Answer shards; see `run_on_ray`."""
        waiting = deque(shards)
        losses: Counter[int | None] = Counter()  # by the shard's number; None for an actor that did not start
        outcomes: list[Outcome] = []
        last_sign_of_life = time.monotonic()
        while waiting or self._busy:
            self._start_actors(len(waiting) + len(self._busy))
            while self._idle and waiting:
                free, first = self._idle.pop(), waiting.popleft()
                self._busy[free.explain.remote(job, first, storage, batch_size)] = free, first
            done, _ = self._ray.wait([*self._busy, *self._starting], timeout=POLL_S) if self._busy or self._starting else ([], [])
            for reference in done:
                shard: Shard | None = None
                if reference in self._busy:
                    actor, shard = self._busy.pop(reference)
                else:
                    actor = self._starting.pop(reference)
                try:
                    outcome: Outcome | None = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError as error:  # raised there
                    raise error.cause from error
                except self._ray.exceptions.RayError as error:  # the actor or its node is gone
                    self._end_idle()  # some may be gone too
                    number = None if shard is None else shard.number
                    losses[number] += 1
                    if losses[number] == MAX_LOSSES:
                        what = "no actor starts" if shard is None else f"{shard.file_name} lost its actor"
                        raise BulkError(f"{what}, {MAX_LOSSES} times: {error}") from error
                    if shard is not None:
                        waiting.appendleft(shard)
                else:
                    last_sign_of_life = time.monotonic()
                    self._idle.append(actor)
                    if outcome is not None:
                        outcomes.append(outcome)
                        on_rows(outcome.image_count, sum(outcome.errors.values()))
            if not self._busy and time.monotonic() - last_sign_of_life > WAIT_FOR_NODES_S:
                raise BulkError(f"the cluster has had no room for {WAIT_FOR_NODES_S} s; what is done stays")
            if not self._busy and not self._starting and not self._idle:
                time.sleep(POLL_S)
        return outcomes

    def _end_idle(self) -> None:
        """End the actors that have no shard, so that others have their room. Ray would wait until nothing here refers to them."""
        for actor in self._idle:
            self._ray.kill(actor)
        self._idle.clear()

    def _start_actors(self, shard_count: int) -> None:
        """Start actors where the cluster may have room. Shards go to those that have started."""
        kind = "GPU" if self._resources.uses_gpus else "CPU"
        room = min(int(self._ray.cluster_resources().get(kind, 0)), self._resources.process_count or sys.maxsize, shard_count)
        for _ in range(room - len(self._starting) - len(self._idle) - len(self._busy)):
            actor = self._actor_class.remote(*self._arguments, gpu=0 if self._resources.uses_gpus else None)
            self._starting[actor.start.remote()] = actor
