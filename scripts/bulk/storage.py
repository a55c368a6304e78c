"""Where the output goes: a folder, or a URL that fsspec writes to. A file appears there whole or not at all.

Knows nothing of images or of what the files hold.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from scripts.bulk.errors import BulkError
from scripts.bulk.sources import URL

JOB_FOLDER = "_job"  # readers of data sets pass over names that begin with an underscore
LOCK_FILE = "lock"
UNFINISHED = ".tmp"  # the end of the name of what is not whole


class Storage(Protocol):
    """A place for files. Names may hold a `/`."""

    def names(self) -> set[str]:
        """List the files at the top."""

    def read(self, name: str) -> bytes:
        """Read a file whole. Raises FileNotFoundError."""

    def open(self, name: str) -> Any:  # noqa: ANN401  # a binary file, of fsspec's own class
        """Open a file for reading at any place."""

    def create(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """Give a local path to write; at the end of a `with` block without an error it appears under its name, whole."""


class LocalStorage:
    """A folder on this machine, or one that all machines of a cluster share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> set[str]:
        """As `Storage`."""
        return {one.name for one in self.folder.iterdir()} if self.folder.is_dir() else set()

    def read(self, name: str) -> bytes:
        """As `Storage`."""
        return (self.folder / name).read_bytes()

    def open(self, name: str) -> Any:  # noqa: ANN401
        """As `Storage`."""
        return (self.folder / name).open("rb")

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Write beside, flush to the disk, rename: what a power cut leaves is whole or is not there."""
        path = self.folder / name
        unfinished = self.folder / JOB_FOLDER / f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}"
        try:
            yield unfinished
            _flush(unfinished)
            unfinished.replace(path)
            _flush(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)

    @contextlib.contextmanager
    def hold(self) -> Iterator[Path]:
        """Keep other jobs from this folder, and remove what a killed one left unfinished.

        Returns:
            a folder for this job's own files, which is removed at the end.
        Raises:
            BulkError: the folder cannot be made or written, or another job holds it.
        """
        job_folder = self.folder / JOB_FOLDER
        try:
            job_folder.mkdir(parents=True, exist_ok=True)
            lock = (job_folder / LOCK_FILE).open("ab")
        except OSError as error:
            raise BulkError(f"cannot write the output to {self.folder}: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BulkError(f"another job writes to {self.folder} now; wait for it or choose another --output") from error
            for left in job_folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
            # PYTHONPATH, which names the archive's code, has colons between folders.
            place = None if ":" in str(job_folder) else job_folder
            own = Path(tempfile.mkdtemp(prefix="process-", suffix=UNFINISHED, dir=place))
            try:
                yield own
            finally:
                shutil.rmtree(own, ignore_errors=True)


class RemoteStorage:
    """A URL of an object store, where a file that is put appears whole."""

    def __init__(self, url: str) -> None:
        """Open the store.

        Raises:
            BulkError: fsspec, or what it needs for this kind of URL, is not installed.
        """
        try:
            import fsspec

            self._files, self._base = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise BulkError(f"cannot open {url}: {error}") from error
        self._url = url

    def __str__(self) -> str:
        return self._url

    def names(self) -> set[str]:
        """As `Storage`."""
        self._files.invalidate_cache()
        if not self._files.exists(self._base):
            return set()
        return {one.rstrip("/").rpartition("/")[2] for one in self._files.ls(self._base, detail=False)}

    def read(self, name: str) -> bytes:
        """As `Storage`."""
        content: bytes = self._files.cat_file(f"{self._base}/{name}")
        return content

    def open(self, name: str) -> Any:  # noqa: ANN401
        """As `Storage`."""
        return self._files.open(f"{self._base}/{name}", "rb")

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Write on this machine, then put the whole file there."""
        with tempfile.TemporaryDirectory(prefix="bulk-") as folder:
            path = Path(folder) / "file"
            yield path
            target = f"{self._base}/{name}"
            try:
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), target)
            except OSError:
                raise
            except Exception as error:  # libraries for object stores raise errors of their own
                raise BulkError(f"cannot write {name} to {self._url}: {error}") from error

    @contextlib.contextmanager
    def hold(self) -> Iterator[Path]:
        """Give a folder for this job's own files. An object store has no locks: start one job for a URL at a time."""
        with tempfile.TemporaryDirectory(prefix="bulk-") as folder:
            yield Path(folder)


def open_storage(place: str) -> LocalStorage | RemoteStorage:
    """Open a folder by its path, or a URL.

    Raises:
        BulkError: the name is no UTF-8, which Arrow cannot write to; or the URL cannot be opened.
    """
    try:
        place.encode()
    except UnicodeEncodeError as error:
        raise BulkError(f"expected an --output whose name is UTF-8, got {place!r}") from error
    return RemoteStorage(place.rstrip("/")) if URL.match(place) else LocalStorage(Path(os.path.normpath(Path.cwd() / place)))


def _flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
