"""The command: arguments -> a job, its shards, and who answers them.

python -m scripts.bulk IMAGES... --output DIR
"""

import argparse
import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from handler.protocol.options import OPTIONS, STYLE_OPTIONS, accepted_values, header_of
from handler.protocol.request import ROUTE_HEADER
from scripts.bulk.errors import BulkError
from scripts.bulk.explainer import Explainer
from scripts.bulk.job import Job, Outcome, Shard, begin, has_large_maps, read_job, read_outcome, require_same, split
from scripts.bulk.processes import Archive, run_processes
from scripts.bulk.ray_cluster import Resources, run_on_ray
from scripts.bulk.sources import list_images
from scripts.bulk.storage import LocalStorage, RemoteStorage, open_storage
from scripts.command_line import HelpFormatter
from scripts.paths import ARCHIVE

MAX_SHARD_SIZE = 10_000  # images; with one map each, 32 MB
MIN_SHARD_SIZE = 100  # so that starting and finishing a file is next to nothing beside them
SHARDS_A_PROCESS = 4  # where there are few images, so that processes end at about the same time
OF_A_REPLY = {"encoding", *STYLE_OPTIONS}  # options that say how a reply is written, and nothing of the image
BATCH_SIZES = {"cpu": 64, "cuda": 256}  # images, where the archive's own are fewer: nobody waits for one of them
CLASSES_NAMED = 10  # in --help, of the digits' archive; another has its own
LOG_INTERVAL_S = 10.0  # between two lines of progress, where nobody watches
EXIT_STOPPED = 128  # and the signal's number


class _Signalled(BaseException):
    """A signal that ends this process."""

    def __init__(self, number: int) -> None:
        self.number = number


def build_parser() -> argparse.ArgumentParser:
    """The command line. The options of an image are those of the service's own table."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bulk",
        description="Explain many images without a server, with an archive's own handler, into one Parquet file a shard.\n"
        "The same command goes on with a job that was stopped or killed.",
        epilog="example:\n  %(prog)s model/samples --output build/explained --method smoothgrad --target all",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="image files, folders, glob patterns, tar files (WebDataset), Parquet files, or URLs of these (s3://, gs://)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the Parquet files, or a URL")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, metavar="FILE", help="the archive to explain with")
    parser.add_argument("--column", metavar="NAME", help="of the images in Parquet files; needed where several hold bytes")
    parser.add_argument(
        "--shard-size", type=_read_count, metavar="N", help=f"images a file; default: {MAX_SHARD_SIZE:,}, fewer of few"
    )
    sizes = "64 on a CPU, 256 on a GPU, or the archive's own if it is larger"
    parser.add_argument("--batch-size", type=_read_count, metavar="N", help=f"images answered at once; default: {sizes}")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--processes", type=_read_count, metavar="N", help="default: one a core; with --device cuda one a GPU")
    where.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="CPU, or all GPUs that PyTorch sees")
    where.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: its address, or 'auto' on one of its machines")
    options = parser.add_argument_group(
        "what is asked about each image", "As in a request to the service; see handler/README.md."
    )
    for name, option in OPTIONS.items():
        if name not in OF_A_REPLY:
            accepted = ", ".join(map(str, accepted_values(option.values, CLASSES_NAMED)[: CLASSES_NAMED * 2]))
            default = "true" if name == "explain" else option.default
            options.add_argument(
                f"--{name.replace('_', '-')}",
                dest=f"option_{name}",
                metavar="VALUE",
                help=f"{option.description}: {accepted} (default: {default})".replace("%", "%%"),
            )
    return parser


def _read_count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def options_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Collect the options of an image that were given, as texts by name."""
    given = {name: getattr(arguments, f"option_{name}", None) for name in OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def headers_of(options: Mapping[str, str]) -> dict[str, str]:
    """Make the headers of a request with these options, on the route that explains, unless they say `explain` themselves."""
    return {ROUTE_HEADER: str("explain" not in options)} | {header_of(name): value for name, value in options.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run or go on with a job. Returns the exit code: 1 where it cannot go on; images with an error are part of the output."""
    arguments = build_parser().parse_args(argv)
    try:
        with _signals_raise():
            return run(arguments)
    except BulkError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}; what is done stays, the same command goes on with it", file=sys.stderr)
    except _Signalled as signalled:
        print(f"stopped by {signal.Signals(signalled.number).name}; the same command goes on with the job", file=sys.stderr)
        return EXIT_STOPPED + signalled.number
    return 1


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Have SIGINT and SIGTERM end the work in order: processes are ended, and what is unfinished is removed."""

    def handle(number: int, _frame: FrameType | None) -> None:
        raise _Signalled(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(arguments: argparse.Namespace) -> int:
    """Run or go on with the job that is asked for.

    Raises:
        BulkError, OSError: it cannot begin or go on; the message says why.
    """
    if not arguments.archive.is_file():
        raise BulkError(f"there is no archive {arguments.archive}; build one with: make package")
    storage = open_storage(arguments.output)
    options = options_of(arguments)
    started = time.monotonic()
    read_job(storage)  # a folder that holds other files is left as it is
    with storage.hold() as own_folder:
        begun = read_job(storage)
        images, notes = list_images(
            arguments.images, arguments.column, storage.folder if isinstance(storage, LocalStorage) else str(storage)
        )
        for note in notes:
            print(note, file=sys.stderr)
        if not images.num_rows:
            raise BulkError(f"there are no images in {', '.join(arguments.images)}")
        checksum = unpack(arguments.archive, own_folder / "archive")
        archive = Archive(own_folder / "archive", headers_of(options), own_folder)
        gpus = _choose_devices(arguments)
        with archive.start(0, gpus[0]) as first:
            job = Job(
                archive_sha256=checksum,
                model=first.description.model,
                options=options,
                column=arguments.column,
                shard_size=arguments.shard_size or (begun.shard_size if begun else _shard_size(images.num_rows, len(gpus))),
                image_count=images.num_rows,
            )
            if begun is None:
                begin(storage, job, images)
            else:
                require_same(storage, begun, job, images)
            outcomes = _run_shards(arguments, archive, first, gpus, job, list(split(job, images)), storage)
    _report(storage, outcomes, time.monotonic() - started)
    return 0


def unpack(archive: Path, folder: Path) -> str:
    """Unpack an archive.

    Returns:
        SHA-256 of its file, in hexadecimal.
    Raises:
        BulkError: it is damaged.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
    except (zipfile.BadZipFile, ValueError) as error:
        raise BulkError(f"the archive {archive} cannot be read: {error}") from error
    return hashlib.sha256(archive.read_bytes()).hexdigest()


def _shard_size(image_count: int, process_count: int) -> int:
    """Choose how many images a file has: as many as may be, and yet several files for each process."""
    return min(MAX_SHARD_SIZE, max(MIN_SHARD_SIZE, -(-image_count // (process_count * SHARDS_A_PROCESS))))


def choose_batch_size(device: str, archive_size: int, options: Mapping[str, str]) -> int:
    """Choose how many images are answered at once: more than the archive says, which has a server's clients in mind.

    Args:
        device: "cpu" or "cuda".
        archive_size: the archive's own, images.
        options: of the job. Maps in the pixels of large images take memory: of them, no more than the archive says.
    """
    return archive_size if has_large_maps(options) else max(archive_size, BATCH_SIZES[device])


def _choose_devices(arguments: argparse.Namespace) -> list[int | None]:
    """Name a GPU for each process on this machine, or None for the CPU. A cluster has its own."""
    if arguments.device == "cpu" or arguments.ray is not None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return [None] * (arguments.processes or cores)
    import torch  # here: no other part of this process needs it

    count = torch.cuda.device_count()
    if not count:
        raise BulkError("expected a GPU for --device cuda, and PyTorch sees none")
    return [number % count for number in range(arguments.processes or count)]


def _run_shards(
    arguments: argparse.Namespace,
    archive: Archive,
    first: Explainer,
    gpus: Sequence[int | None],
    job: Job,
    shards: Sequence[Shard],
    storage: LocalStorage | RemoteStorage,
) -> list[Outcome]:
    """Answer the shards that have no file yet. Returns the outcomes of all."""
    there = storage.names()
    done = {shard.number: read_outcome(storage, job, shard) for shard in shards if shard.file_name in there}
    outcomes = [outcome for outcome in done.values() if outcome is not None]
    left = [shard for shard in shards if done.get(shard.number) is None]
    batch_size = arguments.batch_size or choose_batch_size(arguments.device, first.description.batch_size, job.options)
    bar = tqdm(
        total=job.image_count,
        initial=sum(outcome.image_count for outcome in outcomes),
        unit="image",
        dynamic_ncols=True,
        mininterval=1.0 if sys.stderr.isatty() else LOG_INTERVAL_S,
        postfix={"errors": sum(sum(outcome.errors.values()) for outcome in outcomes)},
    )
    error_count = sum(sum(outcome.errors.values()) for outcome in outcomes)
    lock = threading.Lock()

    def note_rows(row_count: int, own_errors: int) -> None:
        nonlocal error_count
        with lock:
            error_count += own_errors
            if own_errors:
                bar.set_postfix(errors=error_count, refresh=False)
            bar.update(row_count)

    with bar:
        if arguments.ray is None:
            return outcomes + run_processes(archive, first, gpus, job, left, storage, batch_size, note_rows)
        first.close()  # it has said what the archive and the options give; the cluster does the rest
        resources = Resources(arguments.ray, arguments.processes, uses_gpus=arguments.device == "cuda")
        return outcomes + run_on_ray(resources, arguments.archive, archive.headers, job, left, storage, batch_size, note_rows)


def _report(storage: LocalStorage | RemoteStorage, outcomes: Sequence[Outcome], elapsed_s: float) -> None:
    """Print what came of the job."""
    errors: Counter[str] = Counter()
    for outcome in outcomes:
        errors.update(outcome.errors)
    image_count = sum(outcome.image_count for outcome in outcomes)
    kinds = f" ({', '.join(f'{name} {count:,}' for name, count in errors.most_common())})" if errors else ""
    print(
        f"{storage}: {image_count:,} images in {len(outcomes):,} files, {image_count - errors.total():,} answered, "
        f"{errors.total():,} errors{kinds}, in {elapsed_s:.1f} s"
    )
