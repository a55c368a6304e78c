"""`scripts.bulk` on a simulated Ray cluster: nodes of one CPU on this machine, of which one is killed."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scripts.paths import ROOT, SAMPLE_FILES
from tests.conftest import label_of
from tests.servers import wait_for

IMAGE_COUNT, SHARD_SIZE, BAD = 4000, 200, 5
SLOW_COUNT, SLOW_SIDE = 100, 1500  # images of so many pixels a side; each takes a hundred times as long as a small one


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without a CPU, and two nodes."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": checks}  # by default Ray waits a minute
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


def start_job(cluster: Any, archive: Path, folder: Path, output: Path, shard_size: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scripts.bulk", str(folder), "--archive", str(archive), "--output", str(output)]
    return subprocess.Popen(
        [*command, "--ray", cluster.address, "--shard-size", str(shard_size)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_node_that_is_lost_costs_no_row_and_makes_none_twice(cluster: Any, archive: Path, tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    folder, output = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for index in range(IMAGE_COUNT):
        (folder / f"{index:05d}.png").write_bytes(SAMPLE_FILES[index % len(SAMPLE_FILES)].read_bytes())
    for index in range(BAD):
        (folder / f"{index:05d} bad.png").write_bytes(b"no image")
    job = start_job(cluster, archive, folder, output, SHARD_SIZE)
    wait_for(lambda: len(list(output.glob("part-*"))) >= 3 or job.poll() is not None, "file")
    assert job.poll() is None
    cluster.remove_node(nodes[0], allow_graceful=False)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 0, printed
    table = pa.concat_tables([pq.read_table(file) for file in sorted(output.glob("part-*"))])
    assert table["index"].to_pylist() == list(range(IMAGE_COUNT + BAD))
    rows = table.select(["path", "class", "error"]).to_pylist()
    assert sum(row["error"] is not None for row in rows) == BAD
    for row in rows:
        if row["error"] is None:
            assert row["class"] == label_of(SAMPLE_FILES[int(Path(row["path"]).stem) % len(SAMPLE_FILES)])
        else:
            assert row["path"].endswith(" bad.png")
    assert f"{IMAGE_COUNT + BAD:,} images" in printed


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_last_shard_of_a_lost_node_goes_to_the_one_that_waits(cluster: Any, archive: Path, tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    folder, output = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    with Image.open(SAMPLE_FILES[0]) as opened:
        opened.resize((SLOW_SIDE, SLOW_SIDE)).save(folder / "slow.png")
    for index in range(SLOW_COUNT - 1):  # a slow shard, then a fast one
        (folder / f"slow {index:03d}.png").hardlink_to(folder / "slow.png")
    for index in range(SLOW_COUNT):
        (folder / f"tiny {index:03d}.png").write_bytes(SAMPLE_FILES[1].read_bytes())
    job = start_job(cluster, archive, folder, output, SLOW_COUNT)
    wait_for(lambda: (output / "part-00001.parquet").exists() or job.poll() is not None, "file of the fast shard")
    assert not (output / "part-00000.parquet").exists()
    cluster.remove_node(max(nodes, key=processor_share), allow_graceful=False)
    printed, _ = job.communicate(timeout=200)
    assert job.returncode == 0, printed
    assert f"{2 * SLOW_COUNT:,} images in 2 files, {2 * SLOW_COUNT:,} answered" in printed


def processor_share(node: Any) -> float:
    """How busy the processes of a node are."""
    (raylet,) = node.all_processes["raylet"]
    processes = psutil.Process(raylet.process.pid).children(recursive=True)
    before = sum(sum(one.cpu_times()[:2]) for one in processes)
    time.sleep(1)
    return sum(sum(one.cpu_times()[:2]) for one in processes) - before
