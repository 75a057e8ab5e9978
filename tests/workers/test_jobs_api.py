"""`grape submit` on a real cluster of two processes, with a token; its worker is killed in the middle."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

import grape_service
from grape_service.config import Config
from tests import tiny_models
from tests.jobs import pool_rows, tiny_job
from tests.ray_cluster import RayCluster, ray_cluster
from workers.jobs_api import for_cluster, outcome_in

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_model(tmp_path_factory.mktemp("model"), arch="llama"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> RayCluster:
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


def test_a_job_on_a_cluster_of_two_nodes(tmp_path: Path, model: str, cluster: RayCluster) -> None:
    cluster.start_worker(num_cpus=4)
    workers = {"shard_tokens": 400, "replicas": 2}
    with tiny_job(tmp_path, model, pool_rows(30), workers=workers) as job:
        job.environment = cluster.environment
        process = job.start("submit", str(job.config_path), "--address", cluster.address, "--json")
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        outcome = orjson.loads(out)
        assert outcome["rows"] == 30
        assert outcome["failed"] == 0
        table = grape_service.load(outcome["reference"]).dataset.to_table()
        assert table.num_rows == 30
        assert table["num_candidates"].unique().to_pylist() == [4]

        listed = orjson.loads(job.grape("jobs", "list", "--address", cluster.address, "--json").stdout)["jobs"]
        assert listed[0]["id"] == outcome["job"]
        assert listed[0]["state"] == "succeeded"

        job.environment = {"RAY_AUTH_MODE": "disabled"}
        refused = job.grape("jobs", "list", "--address", cluster.address)
        assert refused.returncode == 2
        assert "RAY_AUTH_TOKEN_PATH" in refused.stderr

        # The same job through `grape run` and workers.ray_address: nothing is left to score.
        job.environment = cluster.environment
        job.config["workers"]["ray_address"] = cluster.address
        again = job.run(timeout=300)
        assert again["version"] == "v0001"
        assert not again["is_new"]
        assert again["scored"] == 0


def test_detached_stopped_and_failed_jobs(tmp_path: Path, model: str, cluster: RayCluster) -> None:
    with tiny_job(tmp_path, model, pool_rows(2)) as job:
        job.environment = cluster.environment
        detached = job.grape("submit", str(job.config_path), "--address", cluster.address, "--detach")
        assert detached.returncode == 0, detached.stderr
        name = detached.stdout.strip()
        stopped = job.grape("jobs", "stop", name, "--address", cluster.address)
        assert stopped.stdout.strip() == f"{name} cancelled"
        job.config["pool"]["path"] = str(tmp_path / "nothing")
        failed = job.grape("submit", str(job.config_path), "--address", cluster.address)
        assert failed.returncode == 2, failed.stderr[-2000:]
        assert "nothing" in failed.stderr.strip().splitlines()[-1]


def test_local_paths_become_absolute_and_the_job_submits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = Config.model_validate(
        {
            "name": "x",
            "pool": {"path": "pool/"},
            "target": {"model": "model"},
            "behavior": {"sources": {"a": {"model": "team/model"}, "b": {"column": "lp"}}},
            "output": {"path": "s3://team/datasets"},
            "workers": {"ray_address": "http://head:8265", "replicas": 3},
        }
    )
    values = for_cluster(config)
    assert values["pool"]["path"] == str(tmp_path / "pool")
    assert values["target"]["model"] == str(tmp_path / "model")
    assert values["behavior"]["sources"]["a"]["model"] == "team/model"
    assert values["output"]["path"] == "s3://team/datasets"
    assert values["workers"] == {"ray_address": "auto", "replicas": 3}
    assert Config.model_validate(values).behavior == config.behavior


def test_the_object_is_found_in_a_log() -> None:
    log = 'job x\n{\n  "other": 1\n}\nprepare: 1\n{\n  "reference": "r",\n  "rows": 3\n}\nbye\n'
    assert outcome_in(log) == {"reference": "r", "rows": 3}
    assert outcome_in("nothing\n}\n") is None
