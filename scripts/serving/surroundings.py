"""What a server needs of the machine around it, checked before anything starts: each lack is one sentence that says what to do.

Where something can be put right without a person, it is: the limit of open files is raised as far as it may be, and the server's
folder for temporary files lies where its sockets' paths are short. Knows nothing of TorchServe's configuration.
"""

import contextlib
import fcntl
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from scripts.serving.settings import ServeError

MIN_OPEN_FILES = 1024  # two for each connection, and a few hundred of the JVM's own
WANTED_OPEN_FILES = 65_536
MIN_LOG_BYTES = 200_000_000  # a limit of file sizes below the logs' own would end processes with SIGXFSZ
MIN_ADDRESS_SPACE = 16 << 30  # the JVM and torch reserve far more than they use
MIN_PROCESSES = 200  # threads too
JVM_BYTES = 700_000_000  # what the JVM takes at rest
WORKER_BYTES = 450_000_000  # and each worker
TEMP_BYTES = 50_000_000  # of temporary files, beside copies of the archive
ARCHIVE_COPIES = 4  # as given, in the store, and unpacked by this program and by TorchServe
SOCKET_PATH_BYTES = 107  # Linux's limit
LONGEST_SOCKET = "/serve-12345678/tmp/.ts.sock.12345"  # in the folder for temporary files
PLAIN_PATH = re.compile(r"[\w./+-]+", re.ASCII)  # what TorchServe passes on unharmed
MIN_FILES = 1000
TEMP_DIRS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108  # where the usual one is no good
TEMP_ADVICE = "make room, or name another folder with TMPDIR"
PREFIX = "serve-"
LOCK = "lock"  # a file in the folder of each server; it is locked as long as the server runs
FORMING_S = 10  # a younger folder is being made, and not locked yet
MISLEADING = re.compile(  # environment variables that would lead a server to other code, another configuration or another Java
    r"TS_(?!OPEN_INFERENCE_PROTOCOL$).*|SM_.*|JAVA_TOOL_OPTIONS|_JAVA_OPTIONS|JDK_JAVA_OPTIONS|JAVA_HOME|CLASSPATH|MODEL_SERVER_HOME"
    r"|LC_.*|LANG|LANGUAGE|PYTHON(?!HOME$|DONTWRITEBYTECODE$|PYCACHEPREFIX$).*"
)


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave out the variables that would change what a server does, and set the locale: file names are UTF-8 in every locale."""
    return {name: value for name, value in environment.items() if not MISLEADING.fullmatch(name)} | {"LC_ALL": "C.UTF-8"}


def require_limits() -> None:
    """Raise ServeError where a limit of this process or its container is too small for any server."""
    _raise_open_files()
    for limit, least, what, advice in (
        (resource.RLIMIT_AS, MIN_ADDRESS_SPACE, "address space", "ulimit -v unlimited"),
        (resource.RLIMIT_DATA, MIN_ADDRESS_SPACE, "data", "ulimit -d unlimited"),
        (resource.RLIMIT_FSIZE, MIN_LOG_BYTES, "file size", "ulimit -f unlimited"),
        (resource.RLIMIT_CPU, resource.RLIM_INFINITY, "processor time", "ulimit -t unlimited"),
    ):
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY and (least == resource.RLIM_INFINITY or allowed < least):
            raise ServeError(f"the limit of {what} is too small for a server ({allowed}); remove it with: {advice}")
    processes = process_limit()
    if processes < MIN_PROCESSES:
        raise ServeError(
            f"the container allows {processes} more processes and threads, and a server takes {MIN_PROCESSES}; raise its limit"
        )


def require_memory(worker_count: int) -> None:
    """Raise ServeError where this machine or its container has too little memory for so many workers."""
    needed = JVM_BYTES + worker_count * WORKER_BYTES
    allowed = memory_limit()
    if allowed < needed:
        raise ServeError(
            f"the container or machine allows {allowed / 1e6:.0f} MB of memory, and a server with {worker_count} workers takes "
            f"{needed / 1e6:.0f} MB: allow more, or start fewer workers with --workers"
        )


def _raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(WANTED_OPEN_FILES, hard)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft < MIN_OPEN_FILES:
        raise ServeError(f"only {soft} files may be open, and a server takes {MIN_OPEN_FILES}; allow more with: ulimit -n 65536")


def memory_limit() -> int:
    """The bytes of memory that this process and its children may use: the machine's, or less in a container."""
    return min([psutil.virtual_memory().total, *cgroup_numbers("memory", "memory.max", "memory.limit_in_bytes")])


def process_limit() -> int:
    """The number of processes and threads that may still start in this container."""
    allowed = cgroup_numbers("pids", "pids.max", "pids.max")
    running = cgroup_numbers("pids", "pids.current", "pids.current")
    left = [most - now for most, now in zip(allowed, running, strict=False)]
    return min([2**31, *left])


def cgroup_numbers(
    controller: str,
    unified_file: str,
    file: str,
    root: Path = Path("/sys/fs/cgroup"),
    membership: Path = Path("/proc/self/cgroup"),
) -> list[int]:
    """Read a number of this process's control group and of all above it; "max" counts as a very large one.

    Args:
        controller: "memory" or "pids".
        unified_file: the file's name in version 2 of control groups.
        file: its name in version 1.
        root: where they are mounted.
        membership: lists this process's groups.
    """
    folders = []
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                folders.append((root, path, unified_file))
            elif controller in controllers.split(","):
                folders.append((root / controller, path, file))
    found = []
    for mounted, path, name in folders:
        group = mounted / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mounted):
                with contextlib.suppress(OSError, ValueError):  # a container may see its own group as the root
                    text = (folder / name).read_text().strip()
                    found.append(2**62 if text == "max" else int(text))
    return found


@contextlib.contextmanager
def temporary_folder(archive_bytes: int) -> Iterator[Path]:
    """Make a server's folder for temporary files, and remove it at the end.

    It lies in TMPDIR, or in another of the system's folders where that one's name is long or odd or it has no room. It holds a
    locked file, so that the folders of servers that were killed can be told from the others; they are removed here.

    Args:
        archive_bytes: size of the archive.
    Raises:
        ServeError: no folder will do.
    """
    parent = find_temp_dir(TEMP_BYTES + ARCHIVE_COPIES * archive_bytes)
    _remove_stale_folders(parent)
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        raise ServeError(f"cannot make a folder in {parent}: {error.strerror}; {TEMP_ADVICE}") from error
    try:
        with (folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_temp_dir(needed: int) -> Path:
    """Find a folder for temporary files.

    Args:
        needed: bytes that must be free.
    Raises:
        ServeError: none will do; it says why, for each.
    """
    given = [os.environ[name] for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)]
    reasons = []
    for folder in map(Path, [*given, *TEMP_DIRS]):
        reason = _unfit_for_temp_files(folder, needed)
        if not reason:
            return folder
        reasons.append(f"{folder} {reason}")
    raise ServeError(f"there is no folder for temporary files: {'; '.join(dict.fromkeys(reasons))}; {TEMP_ADVICE}")


def _unfit_for_temp_files(folder: Path, needed: int) -> str:
    """Say why a folder cannot hold a server's temporary files; "" where it can."""
    if not folder.is_absolute() or not PLAIN_PATH.fullmatch(str(folder)):
        return "has a name with other characters than letters, digits and ._+-"
    if len(os.fsencode(folder)) + len(LONGEST_SOCKET) > SOCKET_PATH_BYTES:
        return f"has a name of more than {SOCKET_PATH_BYTES - len(LONGEST_SOCKET)} characters, which leaves no room for sockets"
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return "cannot be written"
    system = os.statvfs(folder)
    if system.f_flag & os.ST_RDONLY:
        return "is read-only"
    if system.f_flag & os.ST_NOEXEC:  # the JVM unpacks a library into it
        return "is mounted without the right to execute"
    if system.f_bavail * system.f_frsize < needed:
        return f"has {system.f_bavail * system.f_frsize / 1e6:.0f} MB free and not {needed / 1e6:.0f}"
    if system.f_files and system.f_favail < MIN_FILES:
        return "has no room for more files (inodes)"
    return ""


def _remove_stale_folders(parent: Path) -> None:
    """Remove the temporary folders of this user's servers that no longer run."""
    for folder in parent.glob(f"{PREFIX}????????"):
        with contextlib.suppress(OSError):
            status = folder.stat(follow_symlinks=False)
            if status.st_uid != os.geteuid() or not folder.is_dir() or time.time() - status.st_mtime < FORMING_S:
                continue
            with (folder / LOCK).open("rb") as lock:  # a folder of another program has none
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def log_folder(folder: Path, *, private: bool) -> Iterator[None]:
    """Make the folder of a server's logs and hold it for this server alone.

    Args:
        folder: its logs are kept and appended to.
        private: whether nobody else may read it.
    Raises:
        ServeError: it cannot be written, or another running server has it.
    """
    advice = "choose another folder with --log-dir"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if private:
            folder.chmod(0o700)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise ServeError(f"cannot write logs into {folder} ({error.strerror}); {advice}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ServeError(f"another running server writes its logs into {folder}; {advice}, or other ports") from error
        yield
