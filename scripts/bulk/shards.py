"""A shard -> its file: read its images, have them explained, write the answers.

The same on one machine and on a cluster.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from scripts.bulk.explainer import Explainer, Item
from scripts.bulk.job import Job, Outcome, Shard, metadata_of
from scripts.bulk.sources import PARQUET, TAR, read_images, shown_name
from scripts.bulk.storage import Storage

ROW_GROUP_BYTES = 64 * 1024 * 1024  # that are held before they are written
BATCHES_SENT = 4  # together, as each message costs half a millisecond on both sides
MESSAGE_BYTES = 32 * 1024 * 1024  # of image files that are sent together, beside the last

OnRows = Callable[[int, int], None]  # is told how many rows are done, and how many of them hold an error


def explain_shard(job: Job, shard: Shard, explainer: Explainer, storage: Storage, batch_size: int, on_rows: OnRows) -> Outcome:
    """Answer all images of a shard into one file, which appears when it is whole.

    Raises:
        BulkError, OSError: the job cannot go on.
    """
    errors: Counter[str] = Counter()
    paths = iter(_paths_of(shard.images))
    with storage.create(shard.file_name) as path, _PartWriter(path, _schema_of(explainer.description.schema)) as writer:
        index = shard.start
        groups = _group(read_images(shard.images, job.column), batch_size * BATCHES_SENT)
        for answers in explainer.explain(groups, batch_size):
            for part in answers:
                own_errors = [error["type"] for error in part.column("error").drop_null().to_pylist()]
                errors.update(own_errors)
                texts, raw = zip(*islice(paths, len(part)), strict=True)
                first = [
                    pa.array(range(index, index + len(part)), pa.int64()),
                    pa.array(texts, pa.string()),
                    pa.array(raw, pa.binary()),
                ]
                writer.write(pa.RecordBatch.from_arrays([*first, *part.columns], schema=writer.schema))
                index += len(part)
                on_rows(len(part), len(own_errors))
        outcome = Outcome(index - shard.start, errors)
        writer.describe(metadata_of(job, shard, outcome))
    return outcome


def _schema_of(answers: pa.Schema) -> pa.Schema:
    """All columns of the output: which image, then its answer."""
    return pa.schema([("index", pa.int64()), ("path", pa.string()), ("path_bytes", pa.binary()), *answers])


def _group(images: Iterator[Item], count: int) -> Iterator[Sequence[Item]]:
    """Put so many images together, and no more bytes than may wait together."""
    group: list[Item] = []
    size = 0
    for image in images:
        group.append(image)
        size += len(image) if isinstance(image, bytes) else 0
        if len(group) == count or size > MESSAGE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _paths_of(images: pa.Table) -> Iterable[tuple[str, bytes | None]]:
    """Name each image in text: a file's path, and behind it a member's name or a row's number.

    Returns:
        the name; and the same in bytes where it is no UTF-8, and the text only shows it.
    """
    for file, kind, member, place in zip(
        *(images[name].to_pylist() for name in ("file", "kind", "member", "place")), strict=True
    ):
        own = {TAR: b"/" + (member or b""), PARQUET: b"#%d" % (place or 0)}.get(kind, b"")
        path = file + own
        text = shown_name(path)
        yield text, None if text.encode() == path else path


class _PartWriter:
    """Writes record batches to a Parquet file, many together as one row group."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        # Saliency maps are noise to a compressor: zstd takes a tenth of their size, and as much time as half of a core's work.
        plain = dict.fromkeys(_leaves(schema, "saliency"), "none")
        packed = {one: "zstd" for field in schema if field.name != "saliency" for one in _leaves(schema, field.name)}
        self._writer = pq.ParquetWriter(
            path, schema, compression={**plain, **packed}, use_dictionary=[*_leaves(schema, "preparation")]
        )
        self._batches: list[pa.RecordBatch] = []
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._flush()
        self._writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        self._batches.append(batch)
        self._size += batch.nbytes
        if self._size > ROW_GROUP_BYTES:
            self._flush()

    def describe(self, metadata: dict[bytes, bytes]) -> None:
        """Add to the file's own description."""
        self._writer.add_key_value_metadata(metadata)

    def _flush(self) -> None:
        if self._batches:
            self._writer.write_table(pa.Table.from_batches(self._batches, self.schema))
            self._batches, self._size = [], 0


def _leaves(schema: pa.Schema, name: str) -> list[str]:
    """Name the columns that a field has in Parquet."""
    if name not in schema.names:
        return []
    kind = schema.field(name).type
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return [name + one for one in _leaves_of(kind)]


def _leaves_of(kind: pa.DataType) -> list[str]:
    if pa.types.is_struct(kind):
        return [f".{field.name}{one}" for field in kind for one in _leaves_of(field.type)]
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return [f".list.element{one}" for one in _leaves_of(kind.value_type)]
    return [""]
