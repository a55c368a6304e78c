"""Tests of the autoscaling signal notice each part of its rule that is missing; tests/e2e/test_metrics.py runs them as well."""

import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.paths import SERVE_CONFIG

RULE = SERVE_CONFIG / "prometheus" / "autoscaling.yml"
TESTS = SERVE_CONFIG / "prometheus" / "autoscaling.test.yml"
NEEDS_PROMTOOL = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")


def passes(rule: str, folder: Path) -> bool:
    (folder / RULE.name).write_text(rule)
    shutil.copy(TESTS, folder)
    finished = subprocess.run(
        ["promtool", "test", "rules", TESTS.name], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert "parse error" not in finished.stdout + finished.stderr
    return finished.returncode == 0


@NEEDS_PROMTOOL
def test_signal_is_right(tmp_path: Path) -> None:
    assert passes(RULE.read_text(), tmp_path)


@NEEDS_PROMTOOL
@pytest.mark.parametrize(
    ("part", "instead"),
    [
        pytest.param("sum by (job, namespace) (\n", "sum by (job) (\n", id="namespaces apart"),
        pytest.param("/ 1e6", "/ 1e3", id="in seconds"),
        pytest.param(' and on (job, instance) up{job="saliency"} == 1', "", id="of servers that answer"),
        pytest.param(' and up{job="saliency"})', ")", id="a removed pod is gone"),
        pytest.param("max_over_time(up{job=\"saliency\"}[5m]) == 1 and ", "", id="a new pod raises nothing"),
        pytest.param(' and up{job="saliency"})', ' and up{job="saliency"} == 1)', id="a lost pod counts"),
        pytest.param("[5m]", "[15m]", id="and no longer than five minutes"),
        pytest.param("rate(ts", "delta(ts", id="a restarted pod begins anew"),
    ],
)  # fmt: skip
def test_a_rule_without_one_of_its_parts_is_found(part: str, instead: str, tmp_path: Path) -> None:
    rule = RULE.read_text()
    assert part in rule
    assert not passes(rule.replace(part, instead), tmp_path)
