"""Two rounds of select, release and train as a Prefect deployment's run, killed in the second, and on a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from grape_service.release.catalog import read_catalog
from grape_service.release.rounds import Rounds, all_rounds
from grape_service.release.tags import list_tags
from grape_service.storage.storage import Storage
from tests.jobs import pool_rows, tiny_job
from tests.prefect_service import prefect_service
from tests.ray_cluster import ray_cluster
from tests.tiny_models import make_model

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(1500)]

TRAIN: dict[str, Any] = {
    "sft": {"batch_size": 8, "learning_rate": 0.05, "device": "cpu", "save_steps": 1},
    "rounds": 2,
    "refresh": {"max_churn": 1.0},
}


def two_rounds(folder: Path) -> Rounds:
    """The one job with rounds of a folder, which must have come to its end, each thing made once."""
    output = Storage(str(folder / "datasets"))
    (job,) = all_rounds(output, "tiny")
    assert (job.state, job.error, [one.name for one in job.rounds]) == ("succeeded", None, ["round-1", "round-2"])
    first, second = job.rounds
    assert second.target == first.checkpoint
    tags = {tag.name: tag.version for tag in list_tags(output, "tiny")}
    assert tags == {"round-1": first.version, "round-2": second.version, "latest": second.version}
    assert len(read_catalog(output, "tiny")) == 2
    for one in job.rounds:
        facts = json.loads((Path(str(one.checkpoint)) / "complete.json").read_text())
        assert (facts["model"], facts["dataset"]) == (one.target, one.reference)
    assert len([path for path in (folder / "datasets/tiny/runs").glob("*.json") if not path.name.startswith(".")]) == 2
    return job


def test_rounds_of_a_deployment_go_on_after_a_kill(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    behavior = {"model": model, "dtype": "float32", "engine": "transformers"}
    over: dict[str, Any] = {"train": TRAIN, "behavior": behavior, "weights": {"method": "pear"}}
    folder = tmp_path / "job"
    folder.mkdir()
    with prefect_service(
        folder, model, output={"path": str(folder / "datasets"), "tags": ["latest"]}, **over
    ) as service:
        service.start_worker()
        run_id = service.run("curate/curate")
        output = Storage(str(folder / "datasets"))

        def in_second() -> bool:
            return any(len(job.rounds) == 2 for job in all_rounds(output, "tiny"))

        service.wait(in_second, 400, "the second round does not begin")
        pid = service.process_of(run_id)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        run = service.wait_final_after_crash(run_id, 600)
        assert run["state_type"] == "COMPLETED", "\n".join(service.logs(run_id))
        rounds = two_rounds(folder)
        artifacts = service.artifacts(run_id)
        assert f"tiny@{rounds.rounds[-1].version}" in artifacts["tiny-version"]["data"]

        again = service.run("curate/curate")
        assert service.wait_final(again)["state_type"] == "COMPLETED", "\n".join(service.logs(again))
        assert two_rounds(folder).rounds == rounds.rounds


def test_rounds_on_a_ray_cluster(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    train = {**TRAIN, "sft": {**TRAIN["sft"], "resources": {"cpus": 1, "gpus": 0}}}
    with ray_cluster(tmp_path) as cluster, tiny_job(tmp_path / "job", model, pool_rows(8), train=train) as job:
        cluster.start_worker(num_cpus=4)
        job.environment = cluster.environment
        job.config["workers"] = {"shard_tokens": 400, "ray_address": cluster.address}
        job.config["output"]["tags"] = ["latest"]
        outcome = job.run(timeout=900)
        rounds = two_rounds(job.folder)
        assert [one["version"] for one in outcome["rounds"]] == [one.version for one in rounds.rounds]
        again = job.run(timeout=600)
        assert (again["is_new"], two_rounds(job.folder).rounds) == (False, rounds.rounds)
