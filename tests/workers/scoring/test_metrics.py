"""Metrics in a real scrape of a cluster's port, and the dashboard's queries against what is there."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests import tiny_models
from tests.jobs import ROOT, pool_rows, tiny_job
from tests.ray_cluster import free_port, ray_cluster
from workers.scoring.metrics import COUNTERS, GAUGES, HISTOGRAMS

pytestmark = [pytest.mark.alone, pytest.mark.timeout(900)]


def exported_names() -> set[str]:
    """Names as a scrape of Ray's metrics port has them."""
    names = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    return names | {f"ray_{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}


PROMETHEUS = shutil.which("prometheus")
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "grape.json"


def scrape(port: int) -> str:
    """What the node's metrics port says; nothing while it is not up yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            return answer.read().decode()
    except OSError:
        return ""


@pytest.mark.long
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
        ExitStack() as stack,
        tiny_job(tmp_path, model, [*rows, {**rows[0], "source": "copy"}, odd, broken], workers=workers) as job,
    ):
        job.config["workers"]["ray_address"] = cluster.address
        job.environment = cluster.environment
        looked_at = stack.enter_context(prometheus(tmp_path, cluster.metrics_port)) if PROMETHEUS else None
        process = job.start("run", str(job.config_path), "--json")
        found: set[str] = set()
        at_first: dict[str, list[str]] = {}
        panels: dict[str, list[float]] = {}
        scraped = ""
        deadline = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < deadline:
            text = scrape(cluster.metrics_port)
            found |= set(re.findall(r"^(ray_grape_[a-z_]+)[{ ]", text, re.MULTILINE))
            scraped = text if "ray_grape_rejects_total" in text else scraped
            for name in COUNTERS:
                at_first.setdefault(name, re.findall(rf"^ray_{name}_total\{{.*\}} (\S+)$", text, re.MULTILINE))
                if not at_first[name]:
                    del at_first[name]
            for query in queries() if looked_at is not None else ():  # a gauge ends with its run
                panels[query] = panels.get(query) or looked_at(query)
            time.sleep(0.5)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err[-3000:]
    missing = exported_names() - found
    assert not missing, f"missing {sorted(missing)} in {sorted(found)}"
    # A counter that first appears above 0 has not grown, for Prometheus. Rejects are counted once, by reason.
    assert {name for name, values in at_first.items() if set(map(float, values)) != {0.0}} <= {"grape_rejects"}
    assert re.search(r'ray_grape_rejects_total\{[^}]*dataset="tiny"[^}]*\} 1\.0', scraped)
    outcome = json.loads(out)
    assert outcome["failed"] >= 1
    assert outcome["counts"]["pool"]["rejected"] == 1
    assert re.search(r"^score target: \d+% of [\d,]+ tokens, [\d,]+ tokens/s", err, re.MULTILINE)
    assert re.search(r"^shard .* failed, attempt 1 of 3: .*this batch always fails", err, re.MULTILINE)
    assert "@grape" not in err
    if looked_at is None:
        pytest.skip("the panels were not looked at: apt-get install prometheus")
    assert [query for query in queries() if not panels[query]] == []


@contextmanager
def prometheus(folder: Path, metrics_port: int) -> Iterator[Callable[[str], list[float]]]:
    """A Prometheus that scrapes a port each second; what gives the values of a query now."""
    port = free_port()
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\nscrape_configs: [{job_name: ray, static_configs: "
        f'[{{targets: ["127.0.0.1:{metrics_port}"]}}]}}]\n'
    )
    process = subprocess.Popen(
        [
            *(str(PROMETHEUS), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"),
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=(folder / "prometheus.log").open("wb"),
    )

    def look(query: str) -> list[float]:
        """Nothing while it is not up yet."""
        address = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}"
        try:
            answer = urllib.request.urlopen(address, timeout=30)
        except OSError:
            return []
        with answer:
            values = [float(one["value"][1]) for one in json.load(answer)["data"]["result"]]
            return [value for value in values if math.isfinite(value)]  # a quantile of nothing is none

    try:
        yield look
    finally:
        process.terminate()
        process.wait(30)


def unique_token(model: str, row: dict[str, Any], others: list[dict[str, Any]]) -> int:
    """A token id that only `row` has."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    used = {token for other in others for token in tokenizer(other["prompt"] + other["response"])["input_ids"]}
    return next(token for token in tokenizer(row["response"])["input_ids"] if token not in used)


def queries() -> list[str]:
    """Those of the dashboard's panels, of all datasets."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"].replace("$dataset", ".*") for panel in panels for target in panel["targets"]]


def test_the_dashboard_uses_only_metrics_that_exist() -> None:
    used = {name for query in queries() for name in re.findall(r"ray_grape_[a-z_]+", query)}
    assert used <= exported_names(), sorted(used - exported_names())
    for part in ("tokens_scored", "rows_scored", "restarts", "queue", "cache", "shard_seconds", "retries"):
        assert any(part in name for name in used), part
    assert {"ray_grape_failures_total", "ray_grape_gpu_seconds_total", "ray_grape_rejects_total"} <= used
