"""A job: what it answers and how, fixed at its first start; and its shards, each of which becomes one file.

The folder `_job` of the output holds the job: `images.arrow` lists all images in their order, `job.json` says the rest. A shard
is done if its file is there. Knows nothing of processes.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from handler.protocol.options import Space
from scripts.bulk.errors import BulkError
from scripts.bulk.sources import shown_name
from scripts.bulk.storage import JOB_FOLDER, Storage

JOB_FILE = f"{JOB_FOLDER}/job.json"
IMAGES_FILE = f"{JOB_FOLDER}/images.arrow"
METADATA_KEY = b"saliency_serve"  # of a Parquet file: JSON, the job and what came of the shard
NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Job:
    """What all shards have in common. Any change makes it another job.

    Attributes:
        archive_sha256: of the archive's file.
        model: name, version and weights_sha256.
        options: as they were given, by name.
        column: of images in Parquet files, where one is named.
        shard_size: images.
        image_count: of all shards.
    """

    archive_sha256: str
    model: Mapping[str, str]
    options: Mapping[str, str]
    column: str | None
    shard_size: int
    image_count: int

    @property
    def shard_count(self) -> int:
        """How many files the output has in the end."""
        return -(-self.image_count // self.shard_size)


@dataclass(frozen=True, slots=True)
class Shard:
    """Some images that follow each other.

    Attributes:
        number: from 0.
        start: index of its first image in the job.
        images: a part of the table of all images.
    """

    number: int
    start: int
    images: pa.Table

    @property
    def file_name(self) -> str:
        """Name of its output."""
        return f"part-{self.number:05d}.parquet"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a shard: how many images, and how many errors of each type."""

    image_count: int
    errors: Mapping[str, int]


def has_large_maps(options: Mapping[str, str]) -> bool:
    """Tell whether maps are as large as their images, so that few of them may wait together."""
    return options.get("space") == Space.IMAGE


def read_job(storage: Storage) -> Job | None:
    """Read the job that a place holds, if any.

    Raises:
        BulkError: the place holds other files.
    """
    try:
        content = storage.read(JOB_FILE)
    except (FileNotFoundError, NotADirectoryError):
        others = sorted(storage.names() - {JOB_FOLDER})
        if others:
            raise BulkError(
                f"expected an empty output folder, or one with a job that was begun, got {storage} with "
                f"{', '.join(others[:NAMES_SHOWN])}"
            ) from None
        return None
    try:
        return Job(**json.loads(content))
    except (TypeError, ValueError) as error:
        raise BulkError(
            f"{storage} holds a job that is damaged, or of another version of scripts.bulk; choose another --output"
        ) from error


def begin(storage: Storage, job: Job, images: pa.Table) -> None:
    """Write a job, its file last, so that a job that is there is whole."""
    packed = pa.ipc.IpcWriteOptions(compression="zstd")
    with storage.create(IMAGES_FILE) as path, pa.ipc.new_file(str(path), images.schema, options=packed) as writer:
        writer.write_table(images)
    with storage.create(JOB_FILE) as path:
        path.write_text(json.dumps(asdict(job), indent=2) + "\n")


def require_same(storage: Storage, begun: Job, job: Job, images: pa.Table) -> None:
    """Check that a job that was begun is the one that is asked for now.

    Raises:
        BulkError: it is another; the message says where they differ.
    """
    for name, before in asdict(begun).items():
        now = asdict(job)[name]
        if name != "image_count" and before != now:
            raise BulkError(
                f"{storage} holds a job with another {name.replace('_', ' ')}: expected {_shown(before)}, got {_shown(now)}. "
                "Give the same again to go on with it, or choose another --output"
            )
    listed = pa.ipc.open_file(pa.py_buffer(storage.read(IMAGES_FILE))).read_all()
    if not listed.equals(images.combine_chunks()) and not _same_rows(listed, images):
        before, now = _names(listed), _names(images)
        changes = [*(f"{name} is new" for name in now - before), *(f"{name} is gone" for name in before - now)]
        what = "; ".join(sorted(changes)[:NAMES_SHOWN]) or "their order or the contents of a container"
        more = f"; and {len(changes) - NAMES_SHOWN:,} more" if len(changes) > NAMES_SHOWN else ""
        raise BulkError(
            f"{storage} holds a job for other images ({what}{more}). Name the same again to go on with it, or choose another "
            "--output"
        )


def _same_rows(one: pa.Table, other: pa.Table) -> bool:
    return bool(one.num_rows == other.num_rows and one.to_pylist() == other.to_pylist())


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items()) or "none"
    return str(value)


def _names(images: pa.Table) -> set[str]:
    return {shown_name(file) for file in images["file"].unique().to_pylist()}


def split(job: Job, images: pa.Table) -> Iterator[Shard]:
    """Split the images into shards."""
    for number in range(job.shard_count):
        start = number * job.shard_size
        yield Shard(number, start, images.slice(start, job.shard_size))


def read_outcome(storage: Storage, job: Job, shard: Shard) -> Outcome | None:
    """Read what came of a shard from its file's end; None where the file is damaged or another job's."""
    try:
        with storage.open(shard.file_name) as opened:
            metadata = pq.read_metadata(opened)
        content: dict[str, Any] = json.loads(metadata.metadata[METADATA_KEY])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    if metadata.num_rows != shard.images.num_rows or content["job"] != asdict(job) or content["shard"] != shard.number:
        return None
    return Outcome(metadata.num_rows, content["errors"])


def metadata_of(job: Job, shard: Shard, outcome: Outcome) -> dict[bytes, bytes]:
    """Make a Parquet file's own description."""
    content = {"job": asdict(job), "shard": shard.number, "errors": dict(outcome.errors)}
    return {METADATA_KEY: json.dumps(content).encode()}
