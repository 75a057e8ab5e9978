"""Prepare on a cluster that Ray's own autoscaler grows: a head with 1 CPU, and fake nodes that start when asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.jobs import ROOT, pool_rows, write_jsonl
from tests.ray_cluster import ray_cluster
from workers.cluster.ray import IN_CLUSTER

pytestmark = [pytest.mark.long, pytest.mark.alone]

PROGRAM = """
import ray
from grape_service.config.loading import load_config
from grape_service.prepare import plan
from workers.cluster.ray import need_ray, ray_for
from workers.run import new_run
from workers.scoring.engines import engines_of
from workers.stages.prepare import prepare

plan.PIECE_BYTES = 1
config = load_config("config.json")
with ray_for(config.workers), new_run(config) as run, engines_of(run) as engines:
    need_ray()
    before = sum(node["Alive"] for node in ray.nodes())
    rows = prepare(run, engines).rows
    print(rows, before, sum(node["Alive"] for node in ray.nodes()))
"""


def autoscaling_config(gcs_port: int) -> dict[str, Any]:
    """What ray.cluster_utils.AutoscalingCluster writes, which itself ends every Ray of the machine when it starts."""
    worker = {"resources": {"CPU": 1, "object_store_memory": 10**8}, "node_config": {}, "min_workers": 0}
    head = {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": f"127.0.0.1:{gcs_port}",
        },
        "available_node_types": {"ray.head.default": head, "ray.worker": {**worker, "max_workers": 2}},
        "head_node_type": "ray.head.default",
        "upscaling_speed": 10,
        "auth": {},
        "docker": {},
        "setup_commands": [],
        "initialization_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


@pytest.mark.timeout(260)
def test_prepare_on_one_cpu_ends_on_three_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.make_model(tmp_path / "model", template="chatml")
    rows = pool_rows(1200)
    pool = write_jsonl(tmp_path / "pool.jsonl", rows)
    config = {
        "name": "grows",
        "pool": {"path": str(pool)},
        "target": {"model": str(model), "dtype": "float32"},
        "output": {"path": str(tmp_path / "datasets")},
        "workers": {"partition_bytes": pool.stat().st_size // 20},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    with ray_cluster(tmp_path, 1, autoscaling=autoscaling_config) as cluster:
        environment = {**os.environ, **cluster.environment, IN_CLUSTER: "1", "PYTHONPATH": str(ROOT)}
        environment["RAY_ADDRESS"] = f"127.0.0.1:{cluster.gcs_port}"
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-3:] == [str(len(rows)), "1", "3"]
