"""A run of any method that is killed after one stage after the other leaves the rows of one that was let be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import grape_service
from tests import tiny_models
from tests.jobs import Job, pool_rows, tiny_job
from tests.ray_cluster import RayCluster, ray_cluster
from workers.cluster.ray import IN_CLUSTER

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.drill, pytest.mark.timeout(600)]
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "grape": (
        {"select": {"method": "grape"}, "weights": {"method": "pear"}},
        ("prepare", "score behavior", "release"),
    ),
    "rsr": (
        {"select": {"method": "rsr", "keep": 2}, "weights": {"method": "entropy"}},
        ("score", "select"),
    ),
    "surprise": (
        {"select": {"method": "surprise"}, "weights": {"method": "probability"}},
        ("check", "weigh"),
    ),
}
"""Settings, and the stages after which a run is killed: each stage once, as all of them for each take five minutes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """One that outlives the runs, so that starting a run again takes no new Ray."""
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as made:
        made.start_worker(num_cpus=4)
        yield made


def run(job: Job, *killed_after: str) -> str:
    """The reference of a run's release; before it, one is killed after each of some stages."""
    command = [sys.executable, "-m", "tests.killed_after", str(job.config_path), *killed_after]
    done = subprocess.run(command, env=job.environ(), cwd=job.folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("method", METHODS)
def test_the_rows_are_those_of_a_run_that_was_let_be(
    tmp_path: Path, model: str, cluster: RayCluster, method: str
) -> None:
    methods, stages = METHODS[method]
    settings = {**methods, "workers": {"shard_tokens": 400, "ray_address": "auto"}}
    if method == "grape":
        settings["behavior"] = {"model": model, "system_prompt": "Answer well.", "dtype": "float32"}
    found = []
    for name, killed_after in (("calm", ()), ("killed", stages)):
        with tiny_job(tmp_path / name, model, pool_rows(6), **settings) as job:
            job.environment = {
                **cluster.environment,
                IN_CLUSTER: "1",
                "RAY_ADDRESS": f"127.0.0.1:{cluster.gcs_port}",
                "GRAPE_ENGINE_CLASS": "benchmarks.constant_engine:ConstantEngine",
            }
            found.append(grape_service.load(run(job, *killed_after)))
    calm, killed = found
    assert killed.dataset.to_table().equals(calm.dataset.to_table())
    assert [file.sha256 for file in killed.manifest.files] == [file.sha256 for file in calm.manifest.files]
