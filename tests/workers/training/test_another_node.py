"""A job whose node is lost goes on at another node of a real cluster, which has nothing of it on its disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from grape_service.config.training import Stage, TrainConfig
from grape_service.errors import StageError
from grape_service.storage.storage import Storage
from tests.ray_cluster import RayCluster, ray_cluster
from tests.workers.training.tiny_release import make_rows, write_release
from workers.stages import train as train_stage
from workers.training.trainers import checkpoints

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(900), pytest.mark.usefixtures("quick")]

STEPS = 30


def node(cluster: RayCluster, name: str, disk: Path, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[bytes]:
    """A worker with a resource of its name, and a disk of its own."""
    disk.mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(disk))
        return cluster.start_worker(2, 120, f"--resources={json.dumps({name: 1})}")


def metrics(storage: Storage) -> list[dict[str, Any]]:
    """What was logged, without what a clock says."""
    lines = [json.loads(line) for line in storage.read("metrics.jsonl").splitlines()]
    return [{name: value for name, value in line.items() if "time" not in name} for line in lines]


def letters(prompt: object, response: str, row: dict[str, object]) -> float:
    """A reward that a random policy can earn: the share of its characters that are letters."""
    return sum(character.isalpha() for character in response) / max(1, len(response))


SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"batch_size": 4, "micro_batch_size": 2, "max_steps": STEPS},
    "rl": {
        "steps": STEPS,
        "prompts_per_step": 2,
        "num_generations": 4,
        "max_response_tokens": 8,
        "rewards": [{"type": "function", "function": f"{__name__}:letters"}],
    },
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """One for all tests: Ray keeps the first token that it reads for the life of a process."""
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_job_goes_on_at_another_node(
    stage: Stage, model: str, s3_url: str, tmp_path: Path, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = write_release(f"{s3_url}/out", make_rows(8), {"target": {"model": model}})

    def config(place: str) -> TrainConfig:
        settings = {"save_steps": 1, "device": "cpu", "learning_rate": 1e-2, "keep_checkpoints": STEPS}
        resources = {"cpus": 1, "gpus": 0, "custom": {f"{stage}-{place}": 0.01}}
        return TrainConfig.model_validate({stage: {**SETTINGS[stage], **settings, "resources": resources}})

    disks = {name: tmp_path / name for name in ("a", "b")}
    lost = node(cluster, f"{stage}-a", disks["a"], monkeypatch)
    node(cluster, f"{stage}-b", disks["b"], monkeypatch)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(train_stage.train, reference, config("a"), cluster.address)
        run_id, output = "", Storage(s3_url)
        deadline = time.monotonic() + 240
        while checkpoints.last_whole(output) is None:
            assert time.monotonic() < deadline, "no checkpoint is written"
            assert not first.done(), first.exception()
            time.sleep(0.2)
            runs = [i.path for i in Storage(f"{s3_url}/out/tiny/runs").list() if "/" not in i.path]
            run_id = runs[0].removesuffix(".json") if runs else ""
            output = Storage(f"{s3_url}/out/tiny/runs/{run_id}/{stage}") if run_id else output
        cluster.kill_node(lost)
        with pytest.raises(StageError):
            first.result(240)
    at = checkpoints.last_whole(output)
    assert at is not None
    assert int(at.removeprefix("checkpoint-")) < STEPS, "it had ended already"
    before = output.info(f"{at}/complete.json")
    assert not output.exists("model/complete.json")
    assert list(disks["a"].glob("grape-train-*"))
    assert not list(disks["b"].glob("grape-train-*"))
    shutil.rmtree(disks["a"])

    record = train_stage.train(reference, config("b"), cluster.address)
    done = record["stages"][stage]
    assert (record["id"], done["state"], done["attempt"]) == (run_id, "succeeded", 2)
    assert list(disks["b"].glob("grape-train-*"))
    assert output.info(f"{at}/complete.json") == before, "its steps were not made again"
    straight = train_stage.train(reference, config("b"), cluster.address, key="straight")["stages"][stage]

    found, expected = metrics(output), metrics(Storage(straight["output"]))
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert found == expected
    weights = [Storage(one["checkpoint"]).read("model.safetensors") for one in (done, straight)]
    assert weights[0] == weights[1]
    assert weights[0] != (Path(model) / "model.safetensors").read_bytes()
