"""Metrics in a real scrape of a cluster's port, and the dashboard's queries against what is there."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests import tiny_models
from tests.jobs import ROOT, pool_rows, tiny_job
from tests.ray_cluster import ray_cluster
from workers.scoring.metrics import exported_names

pytestmark = pytest.mark.timeout(900)

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "grape.json"


def scrape(port: int) -> str:
    """What the node's metrics port says; nothing while it is not up yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def test_a_scrape_has_every_metric_and_progress_comes_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One job through `workers.ray_address` in which everything happens: a shard that fails three times, a row that
    is there twice, a row that cannot be used, a GPU (as far as Ray knows)."""
    model = str(tiny_models.make_model(tmp_path / "model", arch="llama"))
    rows = pool_rows(12)
    odd = {"prompt": "What is this?", "response": "A \u2603 snowman.", "source": "book", "correct": True}
    broken = {"prompt": "", "response": "nothing was asked"}
    drill = tmp_path / "drill.json"
    fail_token = unique_token(model, odd, rows)
    drill.write_text(json.dumps({"seconds": 2, "fail_token": fail_token}))
    monkeypatch.setenv("GRAPE_ENGINE_CLASS", "tests.drill_engines:DrillEngine")  # of the cluster's nodes
    monkeypatch.setenv("DRILL_FILE", str(drill))
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    workers = {"shard_tokens": 400, "max_failed_share": 0.5, "replicas": 1}
    with (
        ray_cluster(tmp_path, 4, "--num-gpus=1") as cluster,
        tiny_job(tmp_path, model, [*rows, {**rows[0], "source": "copy"}, odd, broken], workers=workers) as job,
    ):
        job.config["workers"]["ray_address"] = cluster.address
        job.environment = cluster.environment
        process = job.start("run", str(job.config_path), "--json")
        found: set[str] = set()
        scraped = ""
        deadline = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < deadline:
            text = scrape(cluster.metrics_port)
            found |= set(re.findall(r"^(ray_grape_[a-z_]+)[{ ]", text, re.MULTILINE))
            scraped = text if "ray_grape_rejects_total" in text else scraped
            time.sleep(0.5)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err[-3000:]
    missing = exported_names() - found
    assert not missing, f"missing {sorted(missing)} in {sorted(found)}"
    assert re.search(r'ray_grape_rejects_total\{[^}]*dataset="tiny"[^}]*\} 1\.0', scraped)
    outcome = json.loads(out)
    assert outcome["failed"] >= 1
    assert outcome["counts"]["pool"]["rejected"] == 1
    assert re.search(r"^score target: \d+% of [\d,]+ tokens, [\d,]+ tokens/s", err, re.MULTILINE)
    assert re.search(r"^shard .* failed, attempt 1 of 3: .*this batch always fails", err, re.MULTILINE)
    assert "@grape" not in err


def unique_token(model: str, row: dict[str, Any], others: list[dict[str, Any]]) -> int:
    """A token id that only `row` has."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    used = {token for other in others for token in tokenizer(other["prompt"] + other["response"])["input_ids"]}
    return next(token for token in tokenizer(row["response"])["input_ids"] if token not in used)


def test_the_dashboard_uses_only_metrics_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(r"ray_grape_[a-z_]+", query)}
    assert used <= exported_names(), sorted(used - exported_names())
    for part in ("tokens_scored", "rows_scored", "tokens_per_second", "queue", "cache", "shard_seconds", "retries"):
        assert any(part in name for name in used), part
    assert {"ray_grape_failures_total", "ray_grape_gpu_seconds_total", "ray_grape_rejects_total"} <= used
