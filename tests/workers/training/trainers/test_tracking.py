"""What jobs report to a real MLflow server and to wandb's offline files: each step once, beside the release."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from grape_service.config.training import RewardSettings, RlSettings, RlTask, SftSettings, SftTask
from grape_service.release.load import load
from grape_service.release.rounds import Round, Rounds, write_rounds
from grape_service.storage.storage import Storage
from tests.ray_cluster import free_port
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from tests.workers.training.trainers.wandb_files import offline_run
from workers.training import tracking
from workers.training.trainers import reports
from workers.training.trainers.reports import Reporter, about, flat
from workers.training.trainers.rl import run_rl
from workers.training.trainers.sft import run_sft
from workers.training.trainers.trackers import Line, add_figures

pytestmark = pytest.mark.alone

PACKAGES = Path(sys.prefix) / "trainers" / "tracking"
"""MLflow's server, its client and wandb, in a folder of their own."""
VARIABLES = [name for names in tracking.VARIABLES.values() for name in names]
SETTINGS: dict[str, Any] = {"device": "cpu", "learning_rate": 1e-2, "schedule": "constant", "save_steps": 2}


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(PACKAGES),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not is_healthy(uri):
            is_starting = server.poll() is None and time.monotonic() < deadline
            assert is_starting, (folder / "log").read_text()
            time.sleep(0.2)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def is_healthy(uri: str) -> bool:
    try:
        return httpx.get(f"{uri}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"), arch="llama")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, model: str) -> str:
    return write_release(tmp_path_factory.mktemp("out"), make_rows(12), {"target": {"model": model}})


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGES))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(reports, "SEND_SECONDS", 0.1)


def sft_task(reference: str, output: Path, **over: Any) -> SftTask:
    settings = {**SETTINGS, "batch_size": 4, "micro_batch_size": 4, "max_steps": 6, "eval_share": 0.2, **over}
    return SftTask(dataset=reference, output=str(output), run="0123456789abcdef", settings=SftSettings(**settings))


def lose_the_end(output: Path) -> None:
    """As if the job had died in step 6, whose figures were reported: checkpoint-4 is the last that is whole."""
    weights = output / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (output / "model" / "complete.json").unlink()


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def points(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def test_wandb_offline_holds_each_step_once_beside_the_release(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    where = run_sft(sft_task(reference, tmp_path))["tracking"]["wandb"]
    assert where["project"] == "tiny"
    add_figures({"tracking": {"wandb": where}}, {"gate/pass@2": 0.5}, pytest.fail)
    rows, config, summary = offline_run(tmp_path / "wandb", where["run"])
    assert summary["gate/pass@2"] == 0.5
    lines = metrics(tmp_path)
    for name in ("loss", "ess", "learning_rate", "eval_loss"):
        expected = [(line["step"], line[name]) for line in lines if name in line]
        assert [(row["_step"], row[name]) for row in rows if name in row] == expected, name
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert config["grape.dataset"] == reference
    assert config["grape.content_digest"] == load(reference).manifest.content_digest
    assert config["learning_rate"] == "0.01"


def test_wandb_offline_goes_on_after_the_last_whole_checkpoint(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = tmp_path / "sft"
    where = run_sft(sft_task(reference, output))["tracking"]["wandb"]
    lose_the_end(output)
    again = run_sft(sft_task(reference, output))["tracking"]["wandb"]
    assert again["run"] == where["run"]
    rows, _, _ = offline_run(Path(again["folder"]), where["run"])
    assert [row["_step"] for row in rows] == [5, 6], "what the first part has until the checkpoint is not told again"


def test_sft_stands_in_mlflow_beside_its_release_each_step_once(
    mlflow_uri: str,
    reference: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri.replace("://", "://someone:hunter-two@"))
    output = tmp_path / "sft"
    facts = run_sft(sft_task(reference, output))
    run_id = facts["tracking"]["mlflow"]["run"]
    lose_the_end(output)
    assert run_sft(sft_task(reference, output))["tracking"]["mlflow"]["run"] == run_id, "the same run goes on"

    client = MlflowClient(mlflow_uri)
    lines = metrics(output)
    for name in ("loss", "ess", "learning_rate", "grad_norm", "eval_loss"):
        assert points(client, run_id, name) == [(line["step"], line[name]) for line in lines if name in line], name
    assert [step for step, _ in points(client, run_id, "loss")] == [1, 2, 3, 4, 5, 6]
    assert len(points(client, run_id, "eval_loss")) == 1

    run = client.get_run(run_id)
    release = load(reference)
    assert client.get_experiment(run.info.experiment_id).name == "tiny"
    assert (run.info.run_name, run.info.status) == ("tiny@v0001 sft", "FINISHED")
    tags = {key: value for key, value in run.data.tags.items() if key.startswith("grape.")}
    assert tags == {
        "grape.stage": "sft",
        "grape.dataset": reference,
        "grape.version": "tiny@v0001",
        "grape.content_digest": release.manifest.content_digest,
        "grape.target": model,
        "grape.model": model,
        "grape.run": "0123456789abcdef",
        "grape.inputs": json.loads((output / "inputs.json").read_text())["digest"],
    }
    assert run.data.params["learning_rate"] == "0.01"
    assert run.data.params["loss"] == "column"
    (used,) = [entry.dataset for entry in run.inputs.dataset_inputs]
    assert (used.name, used.digest) == ("tiny@v0001", release.manifest.content_digest)
    assert json.loads(used.source) == {"uri": reference}
    said = capfd.readouterr()
    assert f"reports to MLflow at {mlflow_uri.replace('://', '://***@')}" in said.err
    assert "hunter" not in said.out + said.err + str(run) + files_text(output)


def test_rl_reports_its_rewards_to_the_experiment_that_is_named(
    mlflow_uri: str, reference: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "everything")
    rl = {"steps": 2, "prompts_per_step": 2, "num_generations": 2, "max_response_tokens": 4}
    settings = RlSettings(**SETTINGS, **rl, rewards=[RewardSettings(type="exact")])
    task = RlTask(dataset=reference, checkpoint=model, output=str(tmp_path / "rl"), settings=settings)
    where = run_rl(task)["tracking"]["mlflow"]
    client = MlflowClient(mlflow_uri)
    assert client.get_experiment(where["experiment"]).name == "everything"
    lines = metrics(tmp_path / "rl")
    assert [line["step"] for line in lines] == [1, 2]
    for name in ("reward", "rewards/exact/mean", "loss"):
        assert points(client, where["run"], name) == [(line["step"], line[name]) for line in lines], name
    assert client.get_run(where["run"]).data.tags["grape.stage"] == "rl"


def test_figures_of_a_gate_are_added_to_the_run_once(
    mlflow_uri: str, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    facts = run_sft(sft_task(reference, tmp_path, max_steps=3))
    said: list[str] = []
    for figures in ({"gate/held_out_loss": 1.5, "gate/pass@2": 0.5}, {"gate/pass@2": 0.5}, {"gate/pass@2": 0.25}):
        add_figures(facts, figures, said.append)
    client, run_id = MlflowClient(mlflow_uri), facts["tracking"]["mlflow"]["run"]
    assert points(client, run_id, "gate/held_out_loss") == [(3, 1.5)]
    assert points(client, run_id, "gate/pass_at_2") == [(3, 0.5), (3, 0.25)]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert said == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    add_figures(facts, {"gate/pass@2": 1.0}, said.append)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    add_figures(facts, {"gate/pass@2": 1.0}, said.append)
    where = f"gate/pass@2 are not added to run {run_id} of mlflow"
    assert said[0].startswith(f"{where}: ConnectionRefusedError")
    assert said[1:] == [f"{where}: MLFLOW_TRACKING_URI is not set here"]


def test_a_run_that_is_gone_from_the_tracker_is_begun_again_with_all_steps(
    mlflow_uri: str, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    output = tmp_path / "sft"
    first = run_sft(sft_task(reference, output))["tracking"]["mlflow"]["run"]
    client = MlflowClient(mlflow_uri)
    client.delete_run(first)
    lose_the_end(output)
    second = run_sft(sft_task(reference, output))["tracking"]["mlflow"]["run"]
    assert second != first
    expected = [(line["step"], line["loss"]) for line in metrics(output) if "loss" in line]
    assert points(client, second, "loss") == expected, "steps of before the resume too"


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(403, "not for you")

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("server", ["away", "mute", "refusing"])
def test_training_goes_on_where_the_server_does_not_take_it(
    server: str, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if server == "mute":  # the others answer, once the client is imported
        monkeypatch.setattr(reports, "CLOSE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute, http.server.HTTPServer(("127.0.0.1", 0), Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        port = {"away": free_port(), "mute": mute.getsockname()[1], "refusing": refusing.server_port}[server]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:hunter-two@127.0.0.1:{port}")
        facts = run_sft(sft_task(reference, tmp_path / "sft"))
        refusing.shutdown()
    assert facts["steps"] == 6
    assert "tracking" not in facts
    where = f"MLflow at http://***@127.0.0.1:{port}"
    if server != "mute":  # that one has not said anything yet
        assert facts["notes"][0].startswith(f"{where} does not take what this job reports (")
        assert ("refused" if server == "away" else "403") in facts["notes"][0]
    assert facts["notes"][-1] == (
        f"7 lines of metrics are not known to {where}: metrics.jsonl in the job's output has all of them"
    )
    said = capfd.readouterr()
    assert "hunter" not in said.out + said.err + files_text(tmp_path / "sft")


def files_text(output: Path) -> str:
    return "".join(path.read_text() for path in output.rglob("*.json*"))


class Shaky:
    """A tracker that is away at first, and breaks off after it has taken something."""

    label = "a tracker"

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.opened = 0
        self.ended: bool | None = None

    def open(self, run_id: str | None, first_step: int) -> dict[str, str]:
        self.opened += 1
        if self.opened == 1:
            raise ConnectionError("away")
        return {"run": run_id or "new"}

    def send(self, lines: Any) -> None:
        self.steps += [line.step for line in lines if line.step not in self.steps]
        if self.opened == 2:
            raise TimeoutError("no answer")

    def close(self, is_finished: bool) -> None:
        self.ended = is_finished


def test_what_was_not_taken_is_sent_when_the_server_answers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "RETRY_SECONDS", 0.05)
    tracker, notes, runs = Shaky(), [], []
    reporter = Reporter(tracker, None, lambda where: runs.append(where["run"]), notes.append)
    reporter.start([Line(1, {"loss": 1.0}, 0.0)], 1)
    deadline = time.monotonic() + 20
    for step in (2, 3):
        reporter.put(Line(step, {"loss": 1.0}, 0.0))
    while tracker.opened < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    reporter.put(True)
    reporter.wait(20)
    assert (tracker.steps, tracker.ended, runs) == ([1, 2, 3], True, ["new", "new"])
    assert notes == [
        "a tracker does not take what this job reports (ConnectionError: away): training goes on, and it is asked "
        "again every 0 seconds"
    ], "told once"


def test_a_tracker_without_its_package_is_told_with_what_to_install(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.VARIABLES, "no_such_tracker", ("NO_SUCH_TRACKER",))  # type: ignore[arg-type]
    monkeypatch.setenv("NO_SUCH_TRACKER", "http://127.0.0.1")
    notes = run_sft(sft_task(reference, tmp_path / "sft", max_steps=1))["notes"]
    assert len(notes) == 1
    assert notes[0].startswith("NO_SUCH_TRACKER is set and the package 'no_such_tracker' is not there")
    assert "pip install" in notes[0]
    assert "tracking]" in notes[0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"MLFLOW_TRACKING_URI": "http://a"}, {"mlflow": "MLFLOW_TRACKING_URI"}),
        ({"MLFLOW_TRACKING_URI": ""}, {}),
        (
            {"WANDB_API_KEY": "k", "MLFLOW_TRACKING_URI": "x"},
            {"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_API_KEY"},
        ),
        ({"WANDB_MODE": "offline"}, {"wandb": "WANDB_MODE"}),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, {}),
        ({"WANDB_DISABLED": "true", "WANDB_API_KEY": "k"}, {}),
    ],
)
def test_which_trackers_an_environment_configures(environment: dict[str, str], expected: dict[str, str]) -> None:
    assert tracking.configured(environment) == expected


def test_a_cluster_job_that_is_not_told_of_the_tracker_is_told_of() -> None:
    here = {"MLFLOW_TRACKING_URI": "http://a"}
    assert tracking.not_passed_on(here, here, "http://head:8265") is None
    sentence = tracking.not_passed_on(here, {}, "http://head:8265")
    assert sentence is not None
    assert sentence.startswith("MLFLOW_TRACKING_URI is set here, and a job at http://head:8265 has the environment of")


def test_a_round_is_told_and_no_secret_of_the_settings(tmp_path: Path, model: str) -> None:
    reference = write_release(tmp_path, make_rows(3), {"target": {"model": model}})
    rounds = [Round("round-1", model, reference, "v0001", checkpoint="c"), Round("round-2", "c", reference, "v0001")]
    write_rounds(Storage(str(tmp_path)), Rounds("job", "tiny", 3, rounds=rounds))
    settings = {"extra": {"hub_token": "hunter-two", "a": {"b": 1}}, "prompts": None, "rewards": [{"type": "math"}]}
    facts = {"stage": "sft", "model": "s3://user:pw@b/c", "run": None, "inputs": "d", "settings": settings}
    told = about(facts, load(reference))
    assert told.name == "tiny@v0001 round-2 sft"
    assert (told.tags["grape.round"], told.tags["grape.rounds"], told.tags["grape.model"]) == (
        "round-2",
        "job",
        "s3://***@b/c",
    )
    assert told.settings == flat({"extra": {"hub_token": "***", "a": {"b": 1}}, "rewards": [{"type": "math"}]})
    assert told.settings["rewards"] == '[{"type":"math"}]'
