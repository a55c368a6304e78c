"""What a server needs of the machine around it: each lack by itself, in a process of its own where it would harm this one."""

import fcntl
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.paths import ROOT
from scripts.serving import surroundings
from scripts.serving.settings import Ports, ServeError
from scripts.serving.surroundings import (
    clean_environment,
    find_temp_dir,
    log_folder,
    memory_limit,
    process_limit,
    require_limits,
    require_memory,
    temporary_folder,
)


@pytest.fixture
def temp_dirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system whose only folder for temporary files is this one, unless the environment names another."""
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    usual = tmp_path / "usual"
    usual.mkdir()
    monkeypatch.setattr(surroundings, "TEMP_DIRS", (str(usual),))
    monkeypatch.setattr(surroundings, "SOCKET_PATH_BYTES", len(str(tmp_path)) + 60)
    return usual


def test_temp_dir_of_the_environment_is_used(temp_dirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_temp_dir(1) == temp_dirs
    own = temp_dirs.parent / "own"
    own.mkdir()
    monkeypatch.setenv("TMPDIR", str(own))
    assert find_temp_dir(1) == own


@pytest.mark.parametrize("name", ["with space", "tëmp", "a$b", "a:b", "n" * 110, "missing", "a;b", "a\\b"])
def test_another_folder_is_used_where_the_environments_will_not_do(
    temp_dirs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name != "missing":
        (temp_dirs.parent / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(temp_dirs.parent / name))
    assert find_temp_dir(1) == temp_dirs


def test_no_folder_for_temporary_files_is_one_sentence(temp_dirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    with pytest.raises(ServeError) as raised:
        find_temp_dir(2**60)
    assert re.fullmatch(
        r"there is no folder for temporary files: /nonexistent cannot be written; \S+/usual has \d+ MB free and not \d+; "
        r"make room, or name another folder with TMPDIR",
        str(raised.value),
    )


def test_folders_of_killed_servers_are_removed_and_others_kept(temp_dirs: Path) -> None:
    stale, running, young, foreign = (temp_dirs / f"serve-{name}" for name in ("stale000", "running0", "young000", "foreign0"))
    for folder in (stale, running, young, foreign):
        folder.mkdir()
        if folder is not foreign:
            (folder / "lock").touch()
    for folder in (stale, running, foreign):
        os.utime(folder, (time.time() - 100, time.time() - 100))
    with (running / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with temporary_folder(1) as own:
            assert own.parent == temp_dirs
            assert own.stat().st_mode & 0o777 == 0o700
            assert {*temp_dirs.iterdir()} == {running, young, foreign, own}
    assert not own.exists()


def test_folder_of_logs_belongs_to_one_server(tmp_path: Path) -> None:
    with log_folder(tmp_path / "logs" / "8080", private=True):
        assert (tmp_path / "logs" / "8080").stat().st_mode & 0o777 == 0o700
        with (
            pytest.raises(ServeError, match=r"another running server writes its logs into .*--log-dir"),
            log_folder(tmp_path / "logs" / "8080", private=True),
        ):
            pytest.fail("two servers share a folder")
    with log_folder(tmp_path / "logs" / "8080", private=True):
        pass


@pytest.mark.parametrize("folder", ["/dev/null/logs", "/proc/logs", "/dev/null"])
def test_folder_of_logs_that_cannot_be_written_is_named(folder: str) -> None:
    with (
        pytest.raises(ServeError, match=f"cannot write logs into {folder} .*; choose another folder with --log-dir"),
        log_folder(Path(folder), private=False),
    ):
        pytest.fail("it was written")


def limited(limit: str, soft: int | str, hard: int | str) -> subprocess.CompletedProcess[str]:
    """Check the resources in a process with another limit; prints the limit of open files in the end."""
    code = (
        "import resource\n"
        "from scripts.serving.settings import ServeError\n"
        "from scripts.serving.surroundings import require_limits\n"
        f"resource.setrlimit(resource.{limit}, ({soft}, {hard}))\n"
        "try:\n    require_limits()\n    print('fine', resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "except ServeError as error:\n    print(error)\n"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    ("limit", "value", "advice"),
    [
        ("RLIMIT_NOFILE", 64, "only 64 files may be open, and a server takes 1024; allow more with: ulimit -n 65536"),
        ("RLIMIT_AS", 4 << 30, "ulimit -v unlimited"),
        ("RLIMIT_DATA", 1 << 30, "ulimit -d unlimited"),
        ("RLIMIT_FSIZE", 1_000_000, "ulimit -f unlimited"),
        ("RLIMIT_CPU", 3600, "ulimit -t unlimited"),
    ],
)
def test_small_limit_is_named(limit: str, value: int, advice: str) -> None:
    assert limited(limit, value, value).stdout.rstrip("\n").endswith(advice)


def test_soft_limit_of_open_files_is_raised() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    printed = limited("RLIMIT_NOFILE", 64, hard).stdout.split()
    assert printed[0] == "fine"
    assert int(printed[1]) >= 1024


def test_container_with_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_memory(1)
    monkeypatch.setattr(surroundings, "memory_limit", lambda: 1_000_000_000)
    with pytest.raises(ServeError, match=r"allows 1000 MB of memory, and a server with 2 workers takes 1600 MB: .*--workers"):
        require_memory(2)


def test_container_with_few_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "process_limit", lambda: 20)
    with pytest.raises(ServeError, match="allows 20 more processes and threads"):
        require_limits()


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        pytest.param("0::/pod/box\n", {"pod/box/memory.max": "max", "pod/memory.max": "3000"}, 3000, id="v2, of the group above"),
        pytest.param("0::/\n", {"memory.max": "2000"}, 2000, id="v2, in a container that sees its group as the root"),
        pytest.param(
            "9:cpu:/x\n4:memory:/box\n0::/\n",
            {"memory/box/memory.limit_in_bytes": "1000", "memory/memory.limit_in_bytes": "9223372036854771712"},
            1000,
            id="v1",
        ),
        pytest.param("4:cpu,memory:/host/path\n", {"memory/memory.limit_in_bytes": "500"}, None, id="v1, two controllers"),
        pytest.param("", {}, None, id="none"),
    ],
)
def test_control_groups_are_read(tmp_path: Path, groups: str, files: dict[str, str], expected: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "cgroup").write_text(groups)
    numbers = surroundings.cgroup_numbers(
        "memory", "memory.max", "memory.limit_in_bytes", root=tmp_path, membership=tmp_path / "cgroup"
    )
    if "host" in groups:
        assert numbers == [500]
    else:
        assert min(numbers, default=None) == expected


def test_this_machine_has_limits() -> None:
    assert 1e9 < memory_limit() < 1e14
    assert process_limit() > 0


def test_misleading_variables_are_left_out() -> None:
    kept = {"PATH": "/bin", "HOME": "/root", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", "PYTHONHOME": "/usr"}
    kept["TS_OPEN_INFERENCE_PROTOCOL"] = "oip"  # which messages gRPC speaks is for the user to say
    dropped = dict.fromkeys(
        [
            *("PYTHONPATH", "PYTHONWARNINGS", "PYTHONSTARTUP", "LANG", "LC_CTYPE"),
            *("CLASSPATH", "JAVA_HOME", "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS"),
            *("TS_CONFIG_FILE", "TS_INFERENCE_ADDRESS", "MODEL_SERVER_HOME"),
        ],
        "anything",
    )
    assert clean_environment(kept | dropped) == kept | {"LC_ALL": "C.UTF-8"}


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        (Ports(99999), "expected a port from 1 to 65535 as --inference-port, got 99999"),
        (Ports(0), "expected a port from 1 to 65535 as --inference-port, got 0"),
        (Ports(9080, 9080), "port 9080 is given twice; choose another with --management-port or --inference-port"),
    ],
)
def test_impossible_ports_are_named(ports: Ports, message: str) -> None:
    with pytest.raises(ServeError, match=message):
        ports.require_free()


def test_foreign_address_is_named() -> None:
    with pytest.raises(ServeError, match=r"cannot listen on 192\.0\.2\.1, port \d+ .*--inference-host"):
        Ports.free().require_free("192.0.2.1")
