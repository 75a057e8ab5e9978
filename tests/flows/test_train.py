"""Training for real: `grape run` to SFT and RL checkpoints, and `grape train` through a served Prefect deployment."""

from __future__ import annotations

import contextlib
import contextvars
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

import grape_service
from flows.deployments import PrefectDeployments
from grape_service.config.training import Stage, TrainConfig
from grape_service.errors import StageError, UserError
from grape_service.release.ancestry import lineage_of_checkpoint
from tests.jobs import pool_rows, tiny_job
from tests.prefect_service import PASSWORD, Service
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from workers.stages import train as train_stage
from workers.training import attempts
from workers.training.runs import TrainingRun

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

FLOW = """
import shutil, sys, time
from prefect import flow

@flow(log_prints=True)
def team(dataset_path: str, dataset_version: str, checkpoint: str, output: str, seconds: int = 0, fail: bool = False):
    with open(MARKS, "a") as file:
        print(dataset_path, dataset_version, file=file)
    time.sleep(seconds)
    if fail:
        raise ValueError("no quota")
    shutil.copytree(MODEL, output + "/model")

if __name__ == "__main__":
    team.serve(name="sft", pause_on_shutdown=False)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.long
def test_grape_run_ends_with_two_checkpoints(tmp_path: Path, model: str) -> None:
    on_cpu = {"device": "cpu", "save_steps": 1}
    rl = {"steps": 1, "prompts_per_step": 2, "num_generations": 2, "max_response_tokens": 4, **on_cpu}
    train = {"sft": {"batch_size": 4, **on_cpu}, "rl": {**rl, "rewards": [{"type": "exact"}]}}
    rows = [{**row, "answer": "7"} for row in pool_rows(6)]
    with tiny_job(tmp_path, model, rows, train=train) as job:
        done = job.grape("run", str(job.config_path), "--json", timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]
        outcome = json.loads(done.stdout)
        shown = job.grape("datasets", "show", outcome["reference"], "--lineage")
        assert job.wait_gone(15) == {}
    told = done.stderr.splitlines()
    assert any(line.startswith("sft: step ") and "effective sample size" in line for line in told)
    assert any(line.startswith("rl: step 1 of 1, loss ") and "reward" in line for line in told)
    record = outcome["training"]
    assert [line for line in told if "checkpoint" in line] == [
        f"{stage}: succeeded, checkpoint {record['stages'][stage]['checkpoint']}" for stage in ("sft", "rl")
    ]
    assert json.loads((tmp_path / f"datasets/tiny/runs/{record['id']}.json").read_text()) == record
    assert (record["state"], record["dataset"], record["version"]) == ("succeeded", outcome["reference"], "v0001")
    stages = record["stages"]
    assert [stages[stage]["attempt"] for stage in ("sft", "rl")] == [1, 1]
    assert stages["sft"]["metrics"]["last"]["loss"] > 0
    assert 0 <= stages["rl"]["metrics"]["last"]["reward"] <= 1
    for stage in ("sft", "rl"):
        assert (Path(stages[stage]["checkpoint"]) / "model.safetensors").exists()
        assert stages[stage]["checkpoint"] in shown.stdout
    assert any(record["id"] in line and "succeeded" in line for line in shown.stdout.splitlines())

    origin = lineage_of_checkpoint(stages["rl"]["checkpoint"], {}).render_text().splitlines()
    assert origin[0].startswith(f"{stages['rl']['checkpoint']}  rl, ")
    assert any(f"{stages['sft']['checkpoint']}  sft, " in line for line in origin)
    assert sum(outcome["reference"] in line for line in origin) == 2
    assert any("pool.jsonl" in line for line in origin)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Service]:
    """A Prefect server and the deployment team/sft, served by its own process."""
    folder = tmp_path_factory.mktemp("prefect")
    with tiny_job(folder, model) as job:
        made = Service(job)
        (folder / "team.py").write_text(f"MODEL = {model!r}\nMARKS = {str(folder / 'marks')!r}\n{FLOW}")
        with (folder / "serve.log").open("ab") as log:
            subprocess.Popen(
                [sys.executable, "team.py"],
                env=job.environ(),
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        made.wait(lambda: made.client.get("/deployments/name/team/sft").status_code == 200, 120, "nothing is served")
        yield made


def sft(**parameters: Any) -> TrainConfig:
    return TrainConfig(sft={"deployment": "team/sft", "parameters": parameters})


def starts(service: Service) -> list[str]:
    marks = service.job.folder / "marks"
    return marks.read_text().splitlines() if marks.exists() else []


@pytest.fixture
def reference(tmp_path: Path, model: str) -> str:
    return write_release(tmp_path / "out", make_rows(3), {"target": {"model": model}})


@pytest.fixture
def deployments(service: Service) -> Iterator[PrefectDeployments]:
    """In this process, with the server's address set."""
    with temporary_settings({PREFECT_API_URL: service.api, PREFECT_API_AUTH_STRING: PASSWORD}):
        yield PrefectDeployments()


def test_grape_train_runs_a_deployment_once(service: Service, reference: str, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump({**service.job.config, "train": sft().model_dump(exclude_none=True)}))
    before = len(starts(service))
    done = service.job.grape("train", reference, "--config", str(config), "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    stage = record["stages"]["sft"]
    assert stage["checkpoint"] == str(tmp_path / "out" / "tiny" / "runs" / record["id"] / "sft" / "model")
    assert service.state(stage["flow_run"])["idempotency_key"] == stage["job_id"]
    again = service.job.grape("train", reference, "--config", str(config))
    assert again.stdout.splitlines() == [
        f"sft       succeeded  {stage['checkpoint']}",
        f"training  {record['id']}, succeeded",
    ]
    assert starts(service)[before:] == [f"{tmp_path}/out/tiny/versions/v0001/data v0001"]


def test_a_deployment_that_fails_or_cannot_be_started(deployments: PrefectDeployments, reference: str) -> None:
    with pytest.raises(StageError, match=r"the deployment team/sft ended as Failed: .* ValueError: no quota"):
        train_stage.train(reference, sft(fail=True), deployments=deployments)
    with pytest.raises(UserError, match=r"the deployment team/sft refuses these parameters: .*seconds"):
        train_stage.train(reference, sft(seconds="soon"), deployments=deployments)
    with pytest.raises(UserError, match="there is no deployment 'team/dpo' at http"):
        train_stage.train(reference, TrainConfig(sft={"deployment": "team/dpo"}), deployments=deployments)
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(UserError, match="set PREFECT_API_URL to the Prefect server that has it"),
    ):
        train_stage.train(reference, sft(seconds=1), deployments=deployments)


LeftAlone = Callable[..., tuple[TrainConfig, TrainingRun, str]]


@pytest.fixture
def left_alone(deployments: PrefectDeployments, reference: str, tmp_path: Path) -> LeftAlone:
    """A run whose follower was killed right after it had started the deployment, and the id of its flow run, which the
    record may not have."""

    def started(stage: Stage = "sft", noted: bool = True, **parameters: Any) -> tuple[TrainConfig, TrainingRun, str]:
        config = TrainConfig.model_validate({stage: {"deployment": "team/sft", "parameters": parameters}})
        run = TrainingRun(grape_service.load(reference), config, config.jobs, None, print, deployments)
        key = f"grape-{run.id}-{stage}-1"
        output = {"dataset_path": "p", "dataset_version": "v0001", "checkpoint": "", "output": str(tmp_path / run.id)}
        flow_run = deployments.start("team/sft", {**output, **parameters}, key)
        run.note(stage, state="running", attempt=1, job_id=key, started=time.time())
        if noted:
            run.note(stage, flow_run=flow_run)
        return config, run, flow_run

    return started


@contextlib.contextmanager
def prefect_away() -> Iterator[None]:
    """PREFECT_API_URL is an address that takes connections and says nothing."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{mute.getsockname()[1]}/api"}):
            yield


@pytest.mark.parametrize(("stage", "noted"), [("sft", True), ("rl", False)])
def test_a_flow_run_that_nobody_follows_is_cancelled_at_prefect(
    service: Service, deployments: PrefectDeployments, reference: str, left_alone: LeftAlone, stage: Stage, noted: bool
) -> None:
    config, _, flow_run = left_alone(stage, noted, seconds=400)
    service.wait(lambda: service.state(flow_run)["state_type"] == "RUNNING", 90, "it does not start")
    began = time.monotonic()
    with prefect_away(), pytest.raises(StageError) as unended:
        train_stage.cancel(reference, config, deployments=deployments)
    assert time.monotonic() - began < 30
    assert f"{stage} is not cancelled, its job grape-" in str(unended.value)
    assert str(unended.value).endswith("; ask again with --cancel")
    with prefect_away():
        entry = train_stage.read(reference, config, deployments=deployments)["stages"][stage]
    assert (entry["state"], entry["error"]) == ("failed", str(unended.value))
    assert service.state(flow_run)["state_type"] == "RUNNING"

    record = train_stage.cancel(reference, config, deployments=deployments)
    assert service.wait_final(flow_run, 60)["state_name"] == "Cancelled"
    told = f"{stage} was cancelled, and Prefect was told to end its flow run {flow_run}"
    assert (record["state"], record["stages"][stage]["error"]) == ("cancelled", told)
    assert train_stage.cancel(reference, config, deployments=deployments) == record, "once is enough"
    assert train_stage.read(reference, config, deployments=deployments) == record


def test_a_flow_run_that_has_ended_is_not_said_to_be_cancelled(
    service: Service, deployments: PrefectDeployments, reference: str, left_alone: LeftAlone
) -> None:
    config, run, flow_run = left_alone(seconds=5)
    assert service.wait_final(flow_run, 90)["state_type"] == "COMPLETED"
    with pytest.raises(StageError, match=r"sft is not cancelled, as its job .* had ended before: Prefect says that it"):
        train_stage.cancel(reference, config, deployments=deployments)
    deployments.cancel(flow_run)
    assert service.state(flow_run)["state_type"] == "COMPLETED"
    assert run.records.read(run.id)["state"] == "failed"


def test_a_follower_that_cannot_cancel_says_so(
    service: Service, reference: str, left_alone: LeftAlone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "LOST_SECONDS", 6.0)
    config, _, flow_run = left_alone(seconds=401)

    class Forgetful(PrefectDeployments):
        """Of a Prefect that may be read and not be written to, as this user has it."""

        def cancel(self, run_id: str, seconds: float | None = None) -> None:
            with prefect_away():
                super().cancel(run_id, 1.0)

    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        context = contextvars.copy_context()
        follower = pool.submit(
            context.run, train_stage.train, reference, config, deployments=Forgetful(), say=said.append
        )
        service.wait(lambda: any("Prefect says" in line for line in said), 90, "it is not followed")
        train_stage.cancel(reference, config)
        with pytest.raises(StageError, match=r"sft: the job is to end, and Prefect cannot be told so: .*run again to"):
            follower.result(60)
    assert any("cannot be told so" in line and "waiting for up to 6 s" in line for line in said)
    assert service.state(flow_run)["state_type"] == "RUNNING"
    entry = train_stage.cancel(reference, config, deployments=PrefectDeployments())["stages"]["sft"]
    assert (entry["state"], service.wait_final(flow_run, 60)["state_name"]) == ("cancelled", "Cancelled")


def test_a_flow_run_that_nobody_follows_is_asked_for(
    service: Service, deployments: PrefectDeployments, reference: str, tmp_path: Path, left_alone: LeftAlone
) -> None:
    def asked(config: TrainConfig, **over: Any) -> tuple[str, str]:
        stage = train_stage.read(reference, config, **{"deployments": deployments, **over})["stages"]["sft"]
        return stage["state"], stage.get("error") or ""

    config, _, flow_run = left_alone(seconds=400)
    service.wait(lambda: service.state(flow_run)["state_type"] == "RUNNING", 90, "it does not start")
    assert asked(config) == ("running", "")
    deployments.cancel(flow_run)
    service.wait_final(flow_run, 60)
    state, error = asked(config)
    assert (state, "has been cancelled (Cancelled" in error, "nobody followed it" in error) == ("failed", True, True)

    config, _, flow_run = left_alone(fail=True, seconds=1)
    service.wait_final(flow_run, 90)
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({**service.job.config, "train": config.model_dump(exclude_none=True)}))
    shown = service.job.grape("train", reference, "--config", str(path), "--status")
    assert shown.returncode == 0, shown.stderr
    assert "sft       failed  Prefect says that the job grape-" in shown.stdout
    assert "ValueError: no quota), and nobody followed it; run again to ask once more" in shown.stdout

    config, _, flow_run = left_alone(seconds=2)
    began = time.monotonic()
    with prefect_away():
        state, error = asked(config)
    assert time.monotonic() - began < 30
    assert state == "failed"
    assert "and it cannot be asked: Prefect at http://127.0.0.1" in error
    with pytest.raises(StageError, match="ended well, but"):  # it is followed again: its output is not the run's
        train_stage.train(reference, config, deployments=deployments)
    stage = train_stage.read(reference, config)["stages"]["sft"]
    assert (stage["attempt"], stage["flow_run"]) == (1, flow_run)

    config, _, flow_run = left_alone(seconds=3)
    state, error = asked(config, deployments=None)
    assert state == "failed"
    assert f"it cannot be asked: who has it is not known here, its flow run is {flow_run}" in error


def test_a_deployment_is_cancelled(service: Service, deployments: PrefectDeployments, reference: str) -> None:
    before = len(starts(service))

    def cancel_when_started() -> None:
        service.wait(lambda: len(starts(service)) > before, 90, "it does not start")
        train_stage.cancel(reference, sft(seconds=500))

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cancel_when_started)
        with pytest.raises(StageError, match="sft was cancelled"):
            train_stage.train(reference, sft(seconds=500), deployments=deployments)
        asked.result()
    stage = train_stage.read(reference, sft(seconds=500))["stages"]["sft"]
    assert stage["state"] == "cancelled"
    assert service.wait_final(stage["flow_run"], 60)["state_name"] == "Cancelled"


def test_a_flow_run_that_is_deleted_has_failed(
    service: Service, deployments: PrefectDeployments, reference: str
) -> None:
    before = len(starts(service))

    def delete_when_started() -> None:
        service.wait(lambda: len(starts(service)) > before, 90, "it does not start")
        run_id = train_stage.read(reference, sft(seconds=30))["stages"]["sft"]["flow_run"]
        with get_client(sync_client=True) as client:
            client.delete_flow_run(UUID(run_id))

    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(contextvars.copy_context().run, delete_when_started)
        with pytest.raises(StageError, match="ended as a flow run that Prefect does not know any more"):
            train_stage.train(reference, sft(seconds=30), deployments=deployments, say=said.append)
        asked.result()
    assert any(line.startswith("sft: Prefect says '") for line in said), said
    assert train_stage.read(reference, sft(seconds=30))["stages"]["sft"]["state"] == "failed"
