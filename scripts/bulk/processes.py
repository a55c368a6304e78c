"""Shards -> their files, by several processes on this machine. Each has a thread here, which reads, waits and writes."""

import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from scripts.bulk.errors import Stopped
from scripts.bulk.explainer import Explainer
from scripts.bulk.job import Job, Outcome, Shard
from scripts.bulk.shards import OnRows, explain_shard
from scripts.bulk.storage import Storage


@dataclass(frozen=True, slots=True)
class Archive:
    """What a process that explains is started with.

    Attributes:
        model_dir: the unpacked archive.
        headers: of a request, with its options.
        log_dir: a folder for the processes' logs.
    """

    model_dir: Path
    headers: Mapping[str, str]
    log_dir: Path

    def start(self, number: int, gpu: int | None) -> Explainer:
        """Start one of the processes, on a GPU or on the CPU.

        Raises:
            BulkError: the archive cannot be loaded, or does not take the options.
        """
        return Explainer(self.model_dir, self.headers, self.log_dir / f"process-{number}.log", gpu)


def run_processes(
    archive: Archive,
    first: Explainer,
    gpus: Sequence[int | None],
    job: Job,
    shards: Sequence[Shard],
    storage: Storage,
    batch_size: int,
    on_rows: OnRows,
) -> list[Outcome]:
    """Answer shards.

    Args:
        archive: for all processes but the first.
        first: the first one, which runs already.
        gpus: for each process the index of its GPU, or None for the CPU.
        batch_size: images that are answered at once.
    Raises:
        BulkError, OSError: the job cannot go on; files that are there stay.
    """
    waiting: queue.SimpleQueue[Shard] = queue.SimpleQueue()
    for shard in shards:
        waiting.put(shard)
    started = [first]
    stopped = False

    def run_process(number: int) -> list[Outcome]:
        outcomes = []
        explainer = first if number == 0 else archive.start(number, gpus[number])
        started.append(explainer)
        with explainer:
            while not stopped:
                try:
                    shard = waiting.get_nowait()
                except queue.Empty:
                    break
                outcomes.append(explain_shard(job, shard, explainer, storage, batch_size, on_rows))
        return outcomes

    count = min(len(gpus), len(shards))
    with ThreadPoolExecutor(max(count, 1)) as pool:
        running = [pool.submit(run_process, number) for number in range(count)]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:  # the first error, or Ctrl-C, ends them all
            stopped = True
            if not all(future.done() and future.exception() is None for future in running):
                for explainer in started:
                    explainer.stop()
    return [outcome for future in sorted(running, key=_was_stopped) for outcome in future.result()]


def _was_stopped(future: Future[list[Outcome]]) -> bool:
    """Whether a thread ended because of another's error, which is the one to tell of."""
    return isinstance(future.exception(), Stopped)
