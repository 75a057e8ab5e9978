"""Metrics in a real scrape of a cluster's port, and the dashboard's queries against what is there."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from tests import tiny_models
from tests.jobs import ROOT, pool_rows, tiny_job
from tests.ray_cluster import ray_cluster
from workers.metrics import exported_names

pytestmark = pytest.mark.timeout(900)

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "grape.json"
SELDOM = {"ray_grape_retries_total", "ray_grape_failures_total", "ray_grape_gpu_seconds_total"}
"""Not there without a failure, or without a GPU."""
SELDOM |= {"ray_grape_rows_reused_total"}


def scrape(port: int) -> str:
    """What the node's metrics port says; nothing while it is not up yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def test_a_scrape_has_what_the_dashboard_asks_for(tmp_path: Path) -> None:
    model = str(tiny_models.make_model(tmp_path / "model", arch="llama"))
    rows = [*pool_rows(12), {"prompt": "", "response": "nothing was asked"}]
    with ray_cluster(tmp_path) as cluster, tiny_job(tmp_path, model, rows) as job:
        names = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine", "DRILL_SECONDS": "4"}
        job.environment = cluster.environment | names
        options = [part for name in names for part in ("--env", name)]
        process = job.start("submit", str(job.config_path), "--address", cluster.address, *options)
        found: set[str] = set()
        scraped = ""
        deadline = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < deadline:
            text = scrape(cluster.metrics_port)
            names_now = set(re.findall(r"^(ray_grape_[a-z_]+)[{ ]", text, re.MULTILINE))
            if len(names_now) >= len(found):
                found, scraped = names_now, text
            time.sleep(1)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err[-3000:]
    expected = exported_names() - SELDOM
    assert expected <= found, f"missing {sorted(expected - found)} in {sorted(found)}"
    assert re.search(r'ray_grape_rejects_total\{[^}]*dataset="tiny"[^}]*\} 1\.0', scraped)


def test_the_dashboard_uses_only_metrics_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(r"ray_grape_[a-z_]+", query)}
    assert used <= exported_names(), sorted(used - exported_names())
    for part in ("tokens_scored", "rows_scored", "tokens_per_second", "queue", "cache", "shard_seconds", "retries"):
        assert any(part in name for name in used), part
    assert {"ray_grape_failures_total", "ray_grape_gpu_seconds_total", "ray_grape_rejects_total"} <= used
