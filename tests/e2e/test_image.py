"""The container image: built anew, small, and served read-only by a user without rights, without a shell.

buildah builds it, over a base that mmdebstrap makes of Debian's packages, so that no registry of images is needed; bubblewrap
runs it. Base and wheel are kept in build/image. Where a program is missing, or namespaces are forbidden, these tests are skipped.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from scripts.cluster import image as image_program
from scripts.paths import BUILD, ROOT, SAMPLE_FILES
from scripts.serving.launcher import Ports
from tests.client import TIMEOUT_S
from tests.conftest import label_of
from tests.servers import wait_for

pytestmark = pytest.mark.long

PROGRAMS = ("buildah", "mmdebstrap", "bwrap")  # Debian packages of these names; bwrap is in bubblewrap
CACHE = BUILD / "image"
TAG = "localhost/saliency-serve:tested"
MAX_BYTES = 1_200_000_000
BUILD_TIMEOUT_S = 1000
STOP_TIMEOUT_S = 60  # the pod's terminationGracePeriodSeconds
SHELLS = ("/usr/bin/sh", "/usr/bin/dash", "/usr/bin/bash")
REQUESTS_IN_FLIGHT = 8


@dataclass(frozen=True)
class Image:
    """A built image: its configuration, its size in bytes, its root folder, and the commit that it was built of."""

    config: dict[str, Any]
    size: int
    root: Path
    revision: str


def run(*command: str, **options: Any) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S, **options)
    assert finished.returncode == 0, f"{command}:\n{(finished.stdout + finished.stderr)[-4000:]}"
    return str(finished.stdout).strip()


def require_programs() -> None:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(PROGRAMS)}; missing: {', '.join(missing) or 'root'}")
    tried = subprocess.run(
        ["bwrap", "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode != 0:
        pytest.skip(f"namespaces are forbidden here: {tried.stderr.strip()}")


def make_base(file: Path) -> None:
    """Make what docker.io/library/debian:bookworm-slim is: Debian 12 without documentation."""
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale", "info")]
    emptied = '--customize-hook=rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*'
    partial = file.with_suffix(".partial.tar")
    # As in the published image: usr-is-merged in place of usrmerge, which brings perl.
    merged = "--customize-hook=chroot \"$1\" apt-get purge --yes usrmerge '~nperl!~E'"
    run("mmdebstrap", "--variant=minbase", "--include=usr-is-merged", *left_out, merged, emptied, "bookworm", str(partial))
    partial.rename(file)


def fetch_torch(folder: Path) -> None:
    """Get torch's CPU build: from PyTorch's own index, or from where this machine's pip finds it."""
    lock = ROOT / "serve_config" / "cluster" / "torch-cpu.txt"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--requirement", str(lock)]
    own = ["--find-links", "https://download.pytorch.org/whl/cpu/torch/"]
    tried = [
        subprocess.run([*command, "--dest", str(folder), *more], capture_output=True, text=True, check=False)
        for more in ([], own)
        if not list(folder.glob("torch-*.whl"))
    ]
    if not list(folder.glob("torch-*.whl")):
        pytest.skip(f"torch's CPU build is out of reach: {tried[-1].stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    require_programs()
    folder = tmp_path_factory.mktemp("containers")
    storage = folder / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n')
    environment = {"CONTAINERS_STORAGE_CONF": str(storage), "BUILDAH_ISOLATION": "chroot"}
    (CACHE / "wheels").mkdir(parents=True, exist_ok=True)
    fetch_torch(CACHE / "wheels")
    base = CACHE / "bookworm-slim.tar"
    if not base.is_file():
        make_base(base)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        scratch = run("buildah", "from", "scratch")
        run("buildah", "add", "--quiet", scratch, str(base), "/")
        run("buildah", "commit", "--quiet", "--rm", scratch, "localhost/debian:bookworm-slim")
        options = [
            "--builder=buildah",
            f"--tag={TAG}",
            f"--torch-links={CACHE / 'wheels'}",
            "--base=localhost/debian:bookworm-slim",
        ]
        bundle = os.environ.get("PIP_CERT")  # where this machine's pip is told whom to trust, so is the image's
        if bundle:
            options.append(f"--ca-bundle={bundle}")
        revision = image_program.read_revision()
        assert image_program.main([*options, "--", "--network=host", "--pull=false"]) == 0
        described = json.loads(run("buildah", "inspect", "--type", "image", TAG))["OCIv1"]["config"]
        container = run("buildah", "from", "--pull=false", TAG)
        root = Path(run("buildah", "mount", container))
        listed = run("du", "--summarize", "--apparent-size", "--block-size=1", "--one-file-system", str(root))
        yield Image(described, int(listed.split()[0]), root, revision)
        run("buildah", "rm", container)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running(image: Image, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the image as Kubernetes does: uid 1000, its root read-only, /tmp empty; besides, no shell can be started."""
    config = image.config
    environment = [part for pair in config["Env"] for part in ("--setenv", *pair.split("=", 1))]
    user, _, group = config["User"].partition(":")
    command = [
        *("bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--as-pid-1", "--die-with-parent", "--cap-drop", "ALL"),
        *(
            "--uid",
            user,
            "--gid",
            group,
            "--ro-bind",
            str(image.root),
            "/",
            "--tmpfs",
            "/tmp",
            "--proc",
            "/proc",
            "--dev",
            "/dev",
        ),
        *(part for shell in SHELLS for part in ("--ro-bind", "/dev/null", shell)),
        *("--clearenv", *environment, "--chdir", config["WorkingDir"]),
    ]
    process = subprocess.Popen(
        [*command, *config["Entrypoint"], *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def first_process(process: subprocess.Popen[str]) -> psutil.Process:
    """Find the container's process 1."""
    wait_for(lambda: psutil.Process(process.pid).children(), "process in the container")
    (child,) = psutil.Process(process.pid).children()
    return child


def test_image_is_small_and_says_what_it_is(image: Image) -> None:
    print(f"image: {image.size / 1e6:.0f} MB")
    assert image.size < MAX_BYTES
    assert image.config["User"] == "1000:1000"
    assert set(image.config["ExposedPorts"]) == {"8080/tcp", "8082/tcp"}
    assert image.config["Entrypoint"][:4] == ["python", "-m", "scripts.serving", "--cluster"]
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.version"] == image_program.read_version()
    assert labels["org.opencontainers.image.revision"] == image.revision
    assert labels["org.opencontainers.image.licenses"] == "MIT"


def test_image_holds_no_pip_no_tests_and_nothing_that_its_user_can_write(image: Image) -> None:
    assert not (image.root / "opt/venv/bin/pip").exists()
    assert not (image.root / "opt/saliency-serve/tests").exists()
    assert not (image.root / "opt/saliency-serve/.git").exists()
    found = run("find", str(image.root / "opt"), "(", "-uid", "1000", "-o", "-perm", "-o+w", "-not", "-type", "l", ")")
    assert found == ""


def test_read_only_container_explains_and_answers_what_is_in_flight_when_it_is_stopped(image: Image) -> None:
    ports = Ports.free()
    options = [f"--{name.replace('_', '-')}-port={getattr(ports, name)}" for name in Ports.__dataclass_fields__]
    address = f"http://127.0.0.1:{ports.inference}"
    with running(image, *options, "--workers=2", "--device=cpu", "--drain-delay=3") as process:
        printed: list[str] = []
        assert process.stdout is not None
        threading.Thread(target=lambda: printed.extend(process.stdout or ()), daemon=True).start()
        wait_for(lambda: any("workers ready" in line for line in printed) or process.poll() is not None, "ready server")
        assert process.poll() is None, "".join(printed)
        server = first_process(process)
        assert server.uids().real == os.geteuid() or server.uids().real == 1000  # of the namespace: see /proc/PID/uid_map
        status = Path(f"/proc/{server.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status

        # Others reach inference and metrics at every address, and nothing else.
        file = SAMPLE_FILES[0]
        other = f"http://127.0.0.2:{ports.inference}"
        reply = requests.post(f"{other}/explanations/digits", files={"data": file.read_bytes()}, timeout=TIMEOUT_S)
        assert reply.status_code == 200, reply.text
        assert reply.json()["digit"] == label_of(file)
        assert len(reply.json()["explanation"]["saliency"]) == 28
        metrics = requests.get(f"http://127.0.0.2:{ports.metrics}/metrics", timeout=TIMEOUT_S)
        assert "ts_inference_requests_total" in metrics.text
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.2:{ports.management}/models", timeout=TIMEOUT_S)

        # Stopped with requests in flight: they are answered, as are those that come before load balancers have noticed.
        slow = {"method": "smoothgrad", "samples": "200"}

        def explain() -> int:
            answered = requests.post(
                f"{address}/explanations/digits", files={"data": file.read_bytes()}, data=slow, timeout=STOP_TIMEOUT_S
            )
            return answered.status_code if answered.status_code != 200 else answered.json()["digit"]

        with ThreadPoolExecutor(2 * REQUESTS_IN_FLIGHT) as pool:
            in_flight = [pool.submit(explain) for _ in range(REQUESTS_IN_FLIGHT)]
            time.sleep(0.2)
            server.terminate()
            wait_for(lambda: any("draining" in line for line in printed), "word of draining")
            late = [pool.submit(explain) for _ in range(REQUESTS_IN_FLIGHT)]
            answers = [future.result() for future in (*in_flight, *late)]
        assert answers == [label_of(file)] * (2 * REQUESTS_IN_FLIGHT)
        assert process.wait(STOP_TIMEOUT_S) == 0, "".join(printed[-40:])


def test_unwritable_tmp_is_named(image: Image) -> None:
    """Without the folder that it writes to, the server says so and ends."""
    with running(image, "--log-dir=/opt/logs") as process:
        assert process.stdout is not None
        assert process.wait(60) == 1
        assert "/opt/logs" in process.stdout.read()
