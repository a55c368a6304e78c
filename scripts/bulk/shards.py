"""A shard -> its file: read its images, have them explained, write the answers.

The same on one machine and on a cluster.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scripts.bulk.explainer import Explainer, Item
from scripts.bulk.job import Job, Outcome, Shard, has_large_maps, metadata_of
from scripts.bulk.sources import PARQUET, TAR, read_images, shown_name
from scripts.bulk.storage import Storage

ROW_GROUP_BYTES = 64 * 1024 * 1024  # that are held before they are written
BATCHES_SENT = 4  # together, as each message costs half a millisecond on both sides
MESSAGE_BYTES = 32 * 1024 * 1024  # of image files that are sent together, beside the last
WRITE_BATCH_VALUES = 64 * 1024  # that Parquet encodes at once: its own 1,024 are little more than one map's
NAMES_SCHEMA = pa.schema([("index", pa.int64()), ("path", pa.string()), ("path_bytes", pa.binary())])

OnRows = Callable[[int, int], None]  # is told how many rows are done, and how many of them hold an error


def explain_shard(job: Job, shard: Shard, explainer: Explainer, storage: Storage, batch_size: int, on_rows: OnRows) -> Outcome:
    """Answer all images of a shard into one file, which appears when it is whole.

    Raises:
        BulkError, OSError: the job cannot go on.
    """
    errors: Counter[str] = Counter()
    names = _names_of(shard)
    with storage.create(shard.file_name) as path, _PartWriter(path, _schema_of(explainer.description.schema)) as writer:
        done = 0
        batch_count = 1 if has_large_maps(job.options) else BATCHES_SENT
        groups = _group(read_images(shard.images, job.column), batch_size * batch_count)
        for answers in explainer.explain(groups, batch_size):
            for part in answers:
                own_errors = [error["type"] for error in part.column("error").drop_null().to_pylist()]
                errors.update(own_errors)
                own_names = names.slice(done, len(part))
                writer.write(pa.RecordBatch.from_arrays([*own_names.columns, *part.columns], schema=writer.schema))
                done += len(part)
                on_rows(len(part), len(own_errors))
        outcome = Outcome(done, errors)
        writer.describe(metadata_of(job, shard, outcome))
    return outcome


def _schema_of(answers: pa.Schema) -> pa.Schema:
    """All columns of the output: which image, then its answer."""
    return pa.schema([*NAMES_SCHEMA, *answers])


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


def _names_of(shard: Shard) -> pa.RecordBatch:
    """Name each image: its index, and its path in text, which is a file's, and behind it a member's name or a row's number.

    Returns:
        columns of NAMES_SCHEMA. The path is given in bytes too where it is no UTF-8, and the text only shows it.
    """
    images = shard.images
    kinds = images["kind"].cast(pa.string())
    members = pc.binary_join_element_wise(b"/", pc.fill_null(images["member"], b""), b"")
    rows = pc.binary_join_element_wise("#", pc.fill_null(images["place"], 0).cast(pa.string()), "").cast(pa.binary())
    own = pc.if_else(pc.equal(kinds, TAR), members, pc.if_else(pc.equal(kinds, PARQUET), rows, b""))
    paths = pc.binary_join_element_wise(images["file"], own, b"").combine_chunks()
    try:
        texts, not_text = paths.cast(pa.string()), pa.nulls(len(paths), pa.binary())
    except pa.ArrowInvalid:  # some are no UTF-8
        content = paths.to_pylist()
        shown = [shown_name(path) for path in content]
        texts = pa.array(shown, pa.string())
        same = zip(shown, content, strict=True)
        not_text = pa.array([None if text.encode() == path else path for text, path in same], pa.binary())
    indices = pa.array(np.arange(shard.start, shard.start + len(paths)), pa.int64())
    return pa.RecordBatch.from_arrays([indices, texts, not_text], schema=NAMES_SCHEMA)


class _PartWriter:
    """Writes record batches to a Parquet file, many together as one row group."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        # Saliency maps are noise to a compressor: zstd takes a tenth of their size, and as much time as half of a core's work.
        plain = dict.fromkeys(_leaves(schema, "saliency"), "none")
        packed = {one: "zstd" for field in schema if field.name != "saliency" for one in _leaves(schema, field.name)}
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression={**plain, **packed},
            use_dictionary=_leaves(schema, "preparation"),
            write_statistics=[*packed],
            write_batch_size=WRITE_BATCH_VALUES,
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
