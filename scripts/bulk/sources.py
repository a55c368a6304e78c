"""What a person names on the command line -> a table of images, and a part of that table -> the images' bytes.

A source is an image file, a folder, a glob pattern, a tar shard as WebDataset has them, a Parquet file with a column of images,
or any of these at a URL that fsspec opens (`s3://...`, `gs://...`). What names and files hold is not trusted: what cannot be read
is a problem in the place of an image. Knows nothing of the service.
"""

import errno
import glob
import os
import re
import stat
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from handler.limits import MAX_BODY_BYTES
from scripts.bulk.errors import BulkError, ImageProblem

IMAGES_SCHEMA = pa.schema(
    [
        ("file", pa.binary()),  # absolute path, or URL; bytes, as names of files are
        ("kind", pa.dictionary(pa.int8(), pa.string())),
        ("member", pa.binary()),  # name in a tar, or in a Parquet file where it gives one
        ("place", pa.int64()),  # of a member's bytes in its tar; or a row's number
        ("size", pa.int64()),  # bytes of a tar's member
        ("problem", pa.string()),  # why a folder or container cannot be read, for one row that says so
    ]
)
FILE, TAR, PARQUET, PROBLEM = "file", "tar", "parquet", "problem"

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".npy"}
COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2|txz)$")
URL = re.compile(r"[a-z][a-z0-9+.-]*://")
BLOCK_BYTES = 512  # of a tar
MAX_MEMBER_BYTES = 2**50  # of a tar; a header may say anything
PIECE_BYTES = 1024 * 1024  # of a Parquet file that are read at once
ROWS_READ = 32  # of a Parquet file at once
TRIES = 3  # to read from a URL; the pause before each doubles
PAUSE_S = 1.0
# Errors of reading that lie with the file. Any other, such as too many open files, would befall the next one: it ends the job.
FAULTS_OF_A_FILE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
    *(errno.EIO, errno.EINVAL, errno.ENODEV, errno.EOVERFLOW, errno.ESTALE),
}


# --- listing


@dataclass(slots=True)
class _List:
    """The images found so far, by column, and what a person should know of how they were found."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in IMAGES_SCHEMA.names})
    notes: list[str] = field(default_factory=list)
    column: str | None = None  # of Parquet files, where one is named
    files: set[bytes] = field(default_factory=set)
    folders: set[tuple[int, int]] = field(default_factory=set)  # that were read, by device and number
    output: tuple[int, int] | None = None  # a folder that is left out
    output_url: str | None = None  # likewise, ending in a slash
    twice_count: int = 0
    linked_count: int = 0
    field_count: int = 0  # members of tars beside images

    def add(
        self, file: bytes, kind: str, members: Iterable[tuple[bytes | None, int | None, int | None]] = ((None, None, None),)
    ) -> None:
        for member, place, size in members:
            self.append(file, kind, member, place, size, None)

    def append(self, *values: object) -> None:
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)

    def is_output(self, folder: Path) -> bool:
        """Whether it is the output folder, or lies below."""
        real = folder.resolve()
        return self.output is not None and any(_identity_of(one.stat()) == self.output for one in (real, *real.parents))

    def add_problem(self, file: bytes, problem: str) -> None:
        self.append(file, PROBLEM, None, None, None, problem)


def list_images(
    arguments: Sequence[str], column: str | None = None, output: Path | str | None = None
) -> tuple[pa.Table, list[str]]:
    """List all images that are named, in the order of the arguments, and by name in each folder.

    Args:
        arguments: paths, glob patterns and URLs.
        column: of the images in Parquet files; None to find it.
        output: a folder, or the URL of one, that is left out, wherever it lies.
    Returns:
        a table of IMAGES_SCHEMA; and sentences for a person.
    Raises:
        BulkError: an argument names nothing, a Parquet file has no such column, or a URL cannot be opened.
    """
    found = _List(column=column)
    if isinstance(output, Path):
        found.output = _identity_of(output.stat())
    elif output is not None:
        found.output_url = _url_of(*_open_url(output)).rstrip("/") + "/"
    for argument in arguments:
        before = len(found.columns["file"]) + found.twice_count
        (_list_url if URL.match(argument) else _list_local)(argument, found)
        if len(found.columns["file"]) + found.twice_count == before:
            found.notes.append(f"{argument} holds no images")
    if found.twice_count:
        found.notes.append(f"named more than once, and counted once: {found.twice_count:,} of the files")
    if found.linked_count:
        found.notes.append(f"links to folders that are read anyway, and not followed: {found.linked_count:,}")
    if found.field_count:
        found.notes.append(f"members of tar files beside an image of the same sample, and left out: {found.field_count:,}")
    return pa.table(found.columns, schema=IMAGES_SCHEMA), found.notes


def _list_local(argument: str, found: _List) -> None:
    path = _absolute(argument)
    if os.path.lexists(path):
        paths = [path]
    elif glob.has_magic(argument):
        matches = {_absolute(match) for match in _matches(os.path.join(os.curdir, argument))}  # noqa: PTH118
        if not matches:
            raise BulkError(f"nothing matches {argument!r}")
        in_output = {folder: found.is_output(folder) for folder in {match.parent for match in matches}}
        paths = sorted(match for match in matches if not in_output[match.parent])
        if len(paths) < len(matches):
            found.notes.append(f"what {argument} matches in the output folder is left out")
    else:
        raise BulkError(f"there is no {argument!r}")
    for one in paths:
        if one.is_dir():
            _list_folder(one, found)
        else:
            _list_file(os.fsencode(one), found)


def _matches(pattern: str) -> Iterator[str]:
    """Find what matches a pattern. Each folder that `**` stands for is met once: links may lead in circles."""
    top, stars, rest = f"{pattern}/".partition("/**/")
    if not stars:
        yield from glob.iglob(pattern)  # noqa: PTH207  # Path.glob takes no absolute patterns
        return
    met = set()
    for start in glob.iglob(top or "/"):  # noqa: PTH207
        for folder, subfolders, _ in os.walk(start, followlinks=True):
            identity = _identity_of(os.stat(folder))  # noqa: PTH116
            is_new = identity not in met
            met.add(identity)
            subfolders[:] = sorted(one for one in subfolders if is_new and not one.startswith("."))
            if is_new:
                yield from _matches(os.path.join(glob.escape(folder), rest.rstrip("/"))) if rest else [folder]  # noqa: PTH118


def _absolute(path: str) -> Path:
    """Make a path absolute, links as they are."""
    return Path(os.path.normpath(Path.cwd() / path))


def _list_folder(top: Path, found: _List) -> None:
    """List all files below a folder. A folder that is met again, by whatever links, is not read again."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            identity = _identity_of(folder.stat())
            if identity == found.output:
                found.notes.append(f"the output folder {folder} is left out")
                continue
            if identity in found.folders:
                found.linked_count += 1
                continue
            found.folders.add(identity)
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            found.add_problem(os.fsencode(folder), f"expected a folder that can be read: {error.strerror}")
            continue
        subfolders = []
        for entry in ordered:
            try:
                is_folder = entry.is_dir()
            except OSError:  # such as a link to itself: reading it says so
                is_folder = False
            if is_folder:
                subfolders.append(Path(entry.path))
            else:
                _list_file(os.fsencode(entry.path), found)
        waiting += reversed(subfolders)


def _identity_of(status: os.stat_result) -> tuple[int, int]:
    """Tell a folder from others, whatever its names."""
    return status.st_dev, status.st_ino


def _list_url(argument: str, found: _List) -> None:
    file_system, path = _open_url(argument)
    try:
        if file_system.isfile(path):
            paths = [path]
        elif glob.has_magic(path):
            paths = sorted(file_system.glob(path))
        else:
            paths = sorted(file_system.find(path))
    except Exception as error:  # libraries for object stores raise errors of their own
        raise BulkError(f"cannot list {argument}: {error}") from error
    if not paths:
        raise BulkError(f"nothing is found at {argument}")
    urls = [_url_of(file_system, one) for one in paths]
    others = [url for url in urls if found.output_url is None or not url.startswith(found.output_url)]
    if len(others) < len(urls):
        found.notes.append(f"the output {found.output_url} is left out")
    for url in others:
        _list_file(url.encode("utf-8", "surrogateescape"), found)


def _url_of(file_system: Any, path: str) -> str:  # noqa: ANN401  # of fsspec's own class
    return str(file_system.unstrip_protocol(path))


def _open_url(url: str) -> tuple[Any, str]:
    try:
        import fsspec

        file_system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise BulkError(f"cannot open {url}: {error}") from error
    return file_system, path


def _list_file(file: bytes, found: _List) -> None:
    if file in found.files:
        found.twice_count += 1
        return
    found.files.add(file)
    name = file.lower()
    if name.endswith(b".tar"):
        _list_tar(file, found)
    elif name.endswith(b".parquet"):
        _list_parquet(file, found)
    elif COMPRESSED_TAR.search(shown_name(name)):
        found.add_problem(file, "expected a tar file without compression, whose members can be read in any order: decompress it")
    else:
        found.add(file, FILE)


def _list_tar(file: bytes, found: _List) -> None:
    """List the images of a tar file: of each sample (members of one name up to the first dot) those with an image's suffix.

    Of a sample without any, all members are listed, so that nothing is passed over in silence; nor is a link.
    """
    members: list[tuple[str, int | None, int]] = []  # name, place, size; no place where it is no plain file
    problem = None
    try:
        with open_source(file) as opened:
            try:
                with tarfile.open(fileobj=opened, mode="r:") as archive:
                    for member in archive:
                        if not 0 <= member.size <= MAX_MEMBER_BYTES:  # what is behind it would be looked for anywhere
                            raise tarfile.ReadError(f"a member of {member.size:,} bytes")
                        is_plain = member.isreg() and not member.issparse()
                        if not member.isdir():
                            members.append((member.name, member.offset_data if is_plain else None, member.size))
                    end = archive.offset
            except (tarfile.TarError, ValueError, OverflowError) as error:
                problem = f"expected a whole tar file, got one that is damaged after {len(members):,} members: {error}"
            else:
                opened.seek(end)
                if opened.read(BLOCK_BYTES).strip(b"\0"):  # where tarfile stops in silence
                    problem = f"expected a whole tar file, got one that is damaged after {len(members):,} members"
    except OSError as error:
        problem = f"expected a tar file that can be read: {error.strerror or error}"
    samples = {_sample_of(name) for name, _, _ in members if _is_image(name)}
    images = [member for member in members if _is_image(member[0]) or _sample_of(member[0]) not in samples]
    found.field_count += len(members) - len(images)
    for text, place, size in images:
        name = text.encode("utf-8", "surrogateescape")
        if place is None:
            found.add_problem(file + b"/" + name, "expected a plain file in a tar file, got a link, a sparse file, or the like")
        else:
            found.append(file, TAR, name, place, size, None)
    if problem is not None:
        found.add_problem(file, problem)


def _sample_of(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _list_parquet(file: bytes, found: _List) -> None:
    try:
        with open_source(file) as opened, pq.ParquetFile(opened) as parquet:
            schema, row_count = parquet.schema_arrow, parquet.metadata.num_rows
            names = ", ".join(schema.names)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        found.add_problem(file, f"expected a Parquet file that can be read: {_first_line(error)}")
        return
    if not any(_holds_images(field.type) for field in schema):  # such as a table about the images beside it
        found.add_problem(file, f"expected a column of binary values in a Parquet file, got {names or 'none'}")
        return
    column = find_image_column(schema, found.column)
    if column is None:
        named = "a column of binary values" if found.column is None else f"the binary column {found.column!r}"
        raise BulkError(f"expected {named} in {shown_name(file)}, or name one with --column: it has {names}")
    found.add(file, PARQUET, ((None, row, None) for row in range(row_count)))


def find_image_column(schema: pa.Schema, name: str | None) -> str | None:
    """Find the column of images: binary values, or structs that hold them as `bytes`, as Hugging Face's data sets do.

    Returns:
        the one that is named, or the only one, or the only one with a usual name; None where there is none or a choice.
    """
    fitting = [field.name for field in schema if _holds_images(field.type)]
    if name is not None:
        return name if name in fitting else None
    usual = [one for one in fitting if one in ("image", "img", "data", "bytes", "content")]
    return next((names[0] for names in (fitting, usual) if len(names) == 1), None)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


# --- reading


def read_images(images: pa.Table, column: str | None = None) -> Iterator[bytes | ImageProblem]:
    """Read images in their order.

    Args:
        images: of IMAGES_SCHEMA, a part of what `list_images` gave.
        column: as for `list_images`.
    Returns:
        for each the bytes of its file, or why there are none.
    Raises:
        BulkError: a URL cannot be read, after some tries.
        OSError: something that would befall other files too.
    """
    start = 0
    kinds, files = images["kind"].cast(pa.string()).to_numpy().tolist(), images["file"].to_numpy().tolist()
    for (kind, file), same in groupby(zip(kinds, files, strict=True)):
        count = sum(1 for _ in same)
        start += count
        if kind == FILE:  # most often; the other columns, which are slow to take apart, say nothing of it
            yield from (read_file(file) for _ in range(count))
            continue
        rows = images.slice(start - count, count).to_pylist()
        if kind == PROBLEM:
            yield from (ImageProblem("UnreadableFile", row["problem"]) for row in rows)
        elif kind == TAR:
            yield from _read_members(file, rows)
        else:
            yield from _read_rows(file, [row["place"] for row in rows], column)


def read_file(file: bytes) -> bytes | ImageProblem:
    """Read one image file. Nothing is waited for: a pipe, a device or a socket is no image file."""
    if not file.startswith(b"/"):
        return _read_url(file, 0, None)
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return ImageProblem("UnreadableFile", "expected a file, got a pipe, a device, or the like")
            if status.st_size > MAX_BODY_BYTES:
                return _too_large(status.st_size)
            content = b""
            while len(content) < status.st_size and (piece := os.read(descriptor, status.st_size - len(content))):
                content += piece
            return content
        finally:
            os.close(descriptor)
    except OSError as error:
        return _problem_of(error)


def _problem_of(error: OSError) -> ImageProblem:
    """Say why a file cannot be read. What is not the file's fault is raised again."""
    if error.errno not in FAULTS_OF_A_FILE:
        raise error
    return ImageProblem("UnreadableFile", f"expected a file that can be read: {error.strerror}")


def _too_large(size: int) -> ImageProblem:
    return ImageProblem("RequestTooLarge", f"expected at most {MAX_BODY_BYTES:,} bytes in a file, got {size:,}", 413)


def _read_members(file: bytes, rows: Sequence[dict[str, Any]]) -> Iterator[bytes | ImageProblem]:
    if URL.match(shown_name(file)):
        yield from (_read_member(row, partial(_read_url, file)) for row in rows)
        return
    try:
        opened = open_source(file)
    except OSError as error:
        yield from [_problem_of(error)] * len(rows)
        return

    def read_at(place: int, size: int) -> bytes | ImageProblem:
        try:
            opened.seek(place)
            return opened.read(size)
        except OSError as error:
            return _problem_of(error)

    with opened:
        yield from (_read_member(row, read_at) for row in rows)


def _read_member(row: Mapping[str, Any], read: Callable[[int, int], bytes | ImageProblem]) -> bytes | ImageProblem:
    """Read a member of a tar file, and check that the file still holds all of it. Nothing is asked for where it is empty."""
    if row["size"] > MAX_BODY_BYTES:
        return _too_large(row["size"])
    content = read(row["place"], row["size"]) if row["size"] else b""
    if isinstance(content, ImageProblem) or len(content) == row["size"]:
        return content
    return ImageProblem("UnreadableFile", "expected a whole tar file, got less")


def _read_rows(file: bytes, places: Sequence[int], column: str | None) -> Iterator[bytes | ImageProblem]:
    """Read rows of a Parquet file that follow each other."""
    given, what = 0, "fewer rows than when it was listed"
    try:
        # Without `pre_buffer`, a piece is read at a time, and not a whole row group, which may hold all of a data set.
        with open_source(file) as opened, pq.ParquetFile(opened, buffer_size=PIECE_BYTES, pre_buffer=False) as parquet:
            name = find_image_column(parquet.schema_arrow, column)
            starts, row_groups, start = [], [], 0
            for group in range(parquet.metadata.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                if start <= places[-1] and start + count > places[0]:
                    row_groups.append(group)
                    starts.append(start)
                start += count
            row = starts[0] if starts else 0
            for batch in parquet.iter_batches(ROWS_READ, row_groups=row_groups, columns=[name]):
                values = batch.column(0)
                values = values.field("bytes") if pa.types.is_struct(values.type) else values
                for value in values:
                    if places[0] <= row <= places[-1]:
                        given += 1
                        yield _read_value(value)
                    row += 1
    except (pa.ArrowException, OSError, LookupError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            _problem_of(error)
        what = _first_line(error)
    problem = ImageProblem("UnreadableFile", f"expected a Parquet file that can be read: {what}")
    yield from [problem] * (len(places) - given)


def _read_value(value: pa.Scalar) -> bytes | ImageProblem:
    if not value.is_valid:
        return ImageProblem("EmptyRequest", "expected the bytes of an image file, got null", 400)
    content: bytes = value.as_py()
    return _too_large(len(content)) if len(content) > MAX_BODY_BYTES else content


def _read_url(file: bytes, start: int, size: int | None) -> bytes | ImageProblem:
    """Read a file at a URL, or a part of one."""
    url = shown_name(file)
    for tried in range(TRIES):
        try:
            file_system, path = _open_url(url)
            if size is None:
                whole = file_system.size(path)
                if whole is not None and whole > MAX_BODY_BYTES:
                    return _too_large(whole)
            content: bytes = file_system.cat_file(path, start=start, end=None if size is None else start + size)
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            return ImageProblem("UnreadableFile", f"expected a file that can be read: {_first_line(error)}")
        except Exception as error:  # libraries for object stores raise errors of their own
            if tried == TRIES - 1:
                raise BulkError(f"cannot read {url}: {_first_line(error)}") from error
            time.sleep(PAUSE_S * 2**tried)
        else:
            return content
    raise AssertionError


def open_source(file: bytes) -> BinaryIO:
    """Open a container by path or URL, for reading at any place.

    Raises:
        OSError: it cannot be opened, or is no file.
    """
    if URL.match(shown_name(file)):
        file_system, path = _open_url(shown_name(file))
        opened: BinaryIO = file_system.open(path, "rb")
        return opened
    local = Path(os.fsdecode(file))
    if not stat.S_ISREG(local.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no file", str(local))
    return local.open("rb")


def shown_name(name: bytes) -> str:
    """Write a file's name as text. Bytes that are no UTF-8 are escaped, each as a backslash, x and two digits."""
    return name.decode("utf-8", "backslashreplace")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
