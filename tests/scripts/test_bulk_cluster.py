"""`scripts.bulk` on a simulated Ray cluster: nodes of one CPU on this machine, of which one is killed."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts.paths import ROOT, SAMPLE_FILES
from tests.conftest import label_of
from tests.servers import wait_for

IMAGE_COUNT, SHARD_SIZE, BAD = 4000, 200, 5


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without a CPU, and two nodes."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": checks}  # by default Ray waits a minute
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


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
    command = [sys.executable, "-m", "scripts.bulk", str(folder), "--archive", str(archive), "--output", str(output)]
    job = subprocess.Popen(
        [*command, "--ray", cluster.address, "--shard-size", str(SHARD_SIZE)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
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
