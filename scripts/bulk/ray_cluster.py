"""Shards -> their files, by a Ray cluster. Ray starts actors and brings them shards; an actor does what elsewhere a thread does.

An actor or a node that is lost costs what it had of its shard; another takes the shard. Files appear whole, so that nothing is
there twice.
"""

import socket
import tempfile
import time
from collections import deque
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
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Shard]] = {}  # by the reference of what an actor computes

    def run(self, job: Job, shards: Sequence[Shard], storage: Storage, batch_size: int, on_rows: OnRows) -> list[Outcome]:
        """Answer shards; see `run_on_ray`."""
        waiting = deque(shards)
        idle = self._idle
        losses: dict[int, int] = {}
        outcomes: list[Outcome] = []
        last_progress = time.monotonic()
        while waiting or self._busy:
            room = min(self._room(), len(waiting) + len(self._busy)) - len(self._busy) - len(idle)
            idle += [
                self._actor_class.remote(*self._arguments, gpu=0 if self._resources.uses_gpus else None) for _ in range(room)
            ]
            while idle and waiting:
                actor, shard = idle.pop(), waiting.popleft()
                self._busy[actor.explain.remote(job, shard, storage, batch_size)] = actor, shard
            done, _ = self._ray.wait(list(self._busy), timeout=POLL_S) if self._busy else ([], [])
            for reference in done:
                actor, shard = self._busy.pop(reference)
                try:
                    outcome = self._ray.get(reference)
                except self._ray.exceptions.RayActorError as error:  # the actor or its node is gone
                    losses[shard.number] = losses.get(shard.number, 0) + 1
                    if losses[shard.number] == MAX_LOSSES:
                        raise BulkError(f"{shard.file_name} lost {MAX_LOSSES} actors, one after the other: {error}") from error
                    waiting.appendleft(shard)
                except self._ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                else:
                    outcomes.append(outcome)
                    idle.append(actor)
                    on_rows(outcome.image_count, sum(outcome.errors.values()))
                    last_progress = time.monotonic()
            if not self._room() and time.monotonic() - last_progress > WAIT_FOR_NODES_S:
                raise BulkError(f"the cluster has had no machine for {WAIT_FOR_NODES_S} s; what is done stays")
            if not self._busy:
                time.sleep(POLL_S)
        return outcomes

    def _room(self) -> int:
        """How many actors the cluster can hold now."""
        count = int(self._ray.cluster_resources().get("GPU" if self._resources.uses_gpus else "CPU", 0))
        return count if self._resources.process_count is None else min(count, self._resources.process_count)
