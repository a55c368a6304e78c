"""An archive as a file: its entries, its bytes, its SHA-256. Imports no torch, as the launcher reads archives too."""

import hashlib
import zipfile
from pathlib import Path
from typing import BinaryIO

from handler.runtime.checksums import SUMS_FILE

Entries = dict[str, bytes]  # an archive's files by their names in it


def checksum_file_of(archive: Path) -> Path:
    """Name the file beside an archive that holds its SHA-256, as `sha256sum` writes it."""
    return archive.with_name(f"{archive.name}.sha256")


def read_archive(archive: Path | BinaryIO) -> Entries:
    """Read all files of an archive."""
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def write_archive(output: Path, entries: Entries) -> str:
    """Write an archive, with a new list of checksums, such that the same entries always give the same bytes.

    Returns:
        SHA-256 of the archive, in hexadecimal.
    """
    listed = sorted(entries.keys() - {SUMS_FILE})
    sums = "".join(f"{hashlib.sha256(entries[name]).hexdigest()}  {name}\n" for name in listed)
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as opened:  # deflate's bytes differ between zlib versions
        for name, content in sorted({**entries, SUMS_FILE: sums.encode()}.items()):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, wherever it is built
            entry.external_attr = 0o644 << 16
            opened.writestr(entry, content)
    return hashlib.sha256(output.read_bytes()).hexdigest()
