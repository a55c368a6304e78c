"""Measure `scripts.bulk` beside the loop that a person would write around the same core.

    python -m scripts.bench.benchmark_bulk

The loop reads files in batches and has the archive's handler answer them, in as many processes, and keeps nothing. Bulk does that
and checks, sends, writes and flushes Parquet files. The loop runs with the archive's own batches, and again with bulk's larger
ones. Rounds take turns, starts are left out, and medians count. With `--ray-nodes` the same for Ray on a simulated cluster, whose
nodes have one CPU each. Where other programs share the machine, processor time says more than rates do.
"""

import argparse
import contextlib
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from scripts.bench.arguments import read_count
from scripts.bench.machine import command_of, describe_machine, join_facts
from scripts.bulk.command import choose_batch_size, headers_of, unpack
from scripts.bulk.explainer_process import load_handler
from scripts.bulk.job import Job, Shard, split
from scripts.bulk.processes import Archive
from scripts.bulk.ray_cluster import Cluster, Resources
from scripts.bulk.shards import explain_shard
from scripts.bulk.sources import list_images
from scripts.bulk.storage import JOB_FOLDER, LocalStorage
from scripts.command_line import HelpFormatter
from scripts.paths import ARCHIVE, ROOT, SAMPLE_FILES

LOOP, LARGER_LOOP, BULK, RAY = "loop", "loop with bulk's batches", "bulk", "Ray"
PACKAGES = ("torch", "torchserve", "numpy", "pillow", "pyarrow", "ray")

Run = Callable[[], None]  # answers all images once


def loop_forever(
    model_dir: Path, files: Sequence[Path], headers: dict[str, str], batch_size: int, connection: Connection
) -> None:
    """Answer all files each time that a message comes, in a process of its own."""
    sys.path.insert(0, str(model_dir))  # as TorchServe does
    handler, _ = load_handler(model_dir, None)
    while True:
        connection.send(None)
        if not connection.recv():
            return
        for start in range(0, len(files), batch_size):
            rows = [{"data": file.read_bytes()} for file in files[start : start + batch_size]]
            handler.results_of(rows, [headers] * len(rows))


@contextmanager
def loop_runner(
    model_dir: Path, files: Sequence[Path], headers: dict[str, str], batch_size: int, process_count: int
) -> Iterator[Run]:
    """Start the processes of the loop, each with its share of the files."""
    context = multiprocessing.get_context("spawn")
    ends = []
    for number in range(process_count):
        here, there = context.Pipe()
        arguments = (model_dir, files[number::process_count], headers, batch_size, there)
        context.Process(target=loop_forever, args=arguments, daemon=True).start()
        ends.append(here)
    for end in ends:
        end.recv()

    def run() -> None:
        for end in ends:
            end.send(True)
        for end in ends:
            end.recv()

    yield run
    for end in ends:
        end.send(False)


@contextmanager
def bulk_runner(
    archive: Archive, job: Job, shards: Sequence[Shard], storage: LocalStorage, batch_size: int, process_count: int
) -> Iterator[Run]:
    """Start the processes of bulk."""
    with ExitStack() as stack:
        explainers = [stack.enter_context(archive.start(number, None)) for number in range(process_count)]

        def run() -> None:
            waiting = iter(shards)

            def work(number: int) -> None:
                for shard in waiting:
                    explain_shard(job, shard, explainers[number], storage, batch_size, lambda _rows, _errors: None)

            with ThreadPoolExecutor(process_count) as pool:
                list(pool.map(work, range(process_count)))

        yield run


@contextmanager
def ray_runner(
    archive_file: Path,
    headers: Mapping[str, str],
    job: Job,
    shards: Sequence[Shard],
    storage: LocalStorage,
    batch_size: int,
    node_count: int,
) -> Iterator[Run]:
    """Start a cluster of nodes of one CPU, and an actor on each."""
    import ray
    from ray.cluster_utils import Cluster as SimulatedCluster

    nodes = SimulatedCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(node_count):
        nodes.add_node(num_cpus=1)
    ray.init(nodes.address, log_to_driver=False, runtime_env={"py_modules": [str(ROOT / "handler"), str(ROOT / "scripts")]})
    try:
        cluster = Cluster(ray, Resources(nodes.address, node_count, uses_gpus=False), ray.put(archive_file.read_bytes()), headers)

        def run() -> None:
            cluster.run(job, shards, storage, batch_size, lambda _rows, _errors: None)

        yield run
    finally:
        ray.shutdown()
        nodes.shutdown()


def make_images(folder: Path, count: int) -> list[Path]:
    """Copy the test digits into a folder until there are so many."""
    files = [folder / f"{index:07d}.png" for index in range(count)]
    for index, file in enumerate(files):
        shutil.copyfile(SAMPLE_FILES[index % len(SAMPLE_FILES)], file)
    return files


@dataclass(slots=True)
class Samples:
    """What the rounds of one program took."""

    images_per_s: list[float] = field(default_factory=list)
    cpu_ms_per_image: list[float] = field(default_factory=list)


def measure(runs: Mapping[str, Run], image_count: int, round_count: int) -> dict[str, Samples]:
    """Let all take turns, after one round that does not count."""
    samples = {name: Samples() for name in runs}
    for number in range(round_count + 1):
        for name, run in runs.items():
            started, cpu_s = time.perf_counter(), _cpu_seconds()
            run()
            rate = image_count / (time.perf_counter() - started)
            cpu_ms = (_cpu_seconds() - cpu_s) * 1000 / image_count
            if number:
                samples[name].images_per_s.append(rate)
                samples[name].cpu_ms_per_image.append(cpu_ms)
                print(f"round {number}: {name} {rate:,.0f} images/s, {cpu_ms:.3f} ms of a CPU for each", file=sys.stderr)
    return samples


def _cpu_seconds() -> float:
    """Processor time that this process and all that it started have had so far."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.benchmark_bulk",
        description="Measure scripts.bulk beside a plain loop around the same core; one run, rounds in turns, medians.",
        epilog="example:\n  %(prog)s --images 20000 --ray-nodes 3 --processes 3",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--archive", type=Path, default=ARCHIVE, metavar="FILE", help="archive to explain with")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="images to explain, instead of copies of the test digits")
    parser.add_argument("--images", type=read_count, default=20_000, help="copies of the test digits")
    parser.add_argument("--shard-size", type=read_count, default=10_000, help="images a file")
    parser.add_argument("--processes", type=read_count, default=2, help="of the loop and of bulk each")
    parser.add_argument("--ray-nodes", type=read_count, metavar="N", help="measure Ray too, on a simulated cluster of N nodes")
    parser.add_argument("--rounds", type=read_count, default=5, help="of which the medians count")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print JSON. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    print(join_facts(describe_machine(PACKAGES)), file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="benchmark-bulk-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "images").mkdir()
        files = sorted(arguments.folder.iterdir()) if arguments.folder else make_images(folder / "images", arguments.images)
        checksum = unpack(arguments.archive, folder / "archive")
        headers = headers_of({})
        images, _ = list_images([str(file) for file in files])
        archive = Archive(folder / "archive", headers, folder)
        with archive.start(0, None) as first:
            model, archive_batch_size = first.description.model, first.description.batch_size
        batch_size = choose_batch_size("cpu", archive_batch_size, {})
        job = Job(checksum, model, {}, None, arguments.shard_size, len(files))
        shards = list(split(job, images))
        storage = LocalStorage(folder / "out")
        (storage.folder / JOB_FOLDER).mkdir(parents=True)
        runs: dict[str, Run] = {
            LOOP: stack.enter_context(loop_runner(folder / "archive", files, headers, archive_batch_size, arguments.processes)),
            LARGER_LOOP: stack.enter_context(loop_runner(folder / "archive", files, headers, batch_size, arguments.processes)),
            BULK: stack.enter_context(bulk_runner(archive, job, shards, storage, batch_size, arguments.processes)),
        }
        if arguments.ray_nodes:
            runs[RAY] = stack.enter_context(
                ray_runner(arguments.archive, headers, job, shards, storage, batch_size, arguments.ray_nodes)
            )
        samples = measure(runs, len(files), arguments.rounds)
    rates = {name: own.images_per_s for name, own in samples.items()}
    rate = {name: median(own) for name, own in rates.items()}
    cpu_ms = {name: median(own.cpu_ms_per_image) for name, own in samples.items()}
    report: dict[str, Any] = {
        "command": command_of("benchmark_bulk", argv),
        "machine": describe_machine(PACKAGES),
        "images": len(files),
        "images_per_s": {name: {"median": round(rate[name]), "all": list(map(round, own))} for name, own in rates.items()},
        "cpu_ms_per_image": {name: round(own, 4) for name, own in cpu_ms.items()},
        "of_the_loop": {name: round(own / rate[LOOP], 3) for name, own in rate.items() if name != LOOP},
        "of_the_loop_by_cpu": {name: round(cpu_ms[LOOP] / own, 3) for name, own in cpu_ms.items() if name != LOOP},
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
