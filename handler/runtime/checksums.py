"""The list of files that an archive carries, and whether they are what it says.

The list is SHA256SUMS, in the format of `sha256sum`, so that `sha256sum --check SHA256SUMS` holds in an unpacked archive. Imports
neither torch nor numpy: the launcher, which checks an archive before it serves it, stays small.
"""

import hashlib
from pathlib import Path

SUMS_FILE = "SHA256SUMS"


class ArchiveError(RuntimeError):
    """The archive is not fit to be served: a file is missing, damaged, or does not match the others."""


def verify_files(model_dir: Path) -> dict[str, str]:
    """Check every file that SHA256SUMS lists.

    Returns:
        the SHA-256 of each listed file, in hexadecimal, by its path in the archive.
    Raises:
        ArchiveError: the list or a listed file is missing, or a file is not what the list says.
    """
    sums_file = model_dir / SUMS_FILE
    if not sums_file.is_file():
        raise ArchiveError(f"the archive has no {SUMS_FILE}; build it with python -m scripts.packaging")
    sums = {}
    for line in sums_file.read_text().splitlines():
        expected, _, name = line.partition("  ")
        path = model_dir / name
        if not path.is_file():
            raise ArchiveError(f"{name} is missing from the archive")
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if actual != expected:
            raise ArchiveError(f"{name} is damaged: its SHA-256 is {actual}, and {SUMS_FILE} says {expected}")
        sums[name] = actual
    return sums
