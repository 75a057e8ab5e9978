"""Training jobs on a real Ray with its Jobs API, as on a cluster: commands, webhooks, retries, cancelling."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from grape_service.config.loading import parse_config
from grape_service.config.training import SftJob, TrainConfig
from grape_service.errors import StageError, UserError
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from workers.cluster.ray import private_ray
from workers.stages import train as train_stage
from workers.training import records, runs

TRAINER = """
import json, os, pathlib, shutil, sys, time
output, version, checkpoint = sys.argv[1:4]
assert (os.environ["GRAPE_OUTPUT"], os.environ["GRAPE_DATASET_VERSION"]) == (output, version)
assert os.path.exists(os.environ["GRAPE_DATASET_PATH"] + "/part-00000.parquet")
pathlib.Path(output).mkdir(parents=True, exist_ok=True)
with open(output + "/started", "a") as file:
    print(checkpoint, file=file)
with open(output + "/plan") if os.path.exists(output + "/plan") else open(os.devnull) as file:
    plan = file.read().split()
attempt = len(open(output + "/started").readlines())
todo = plan[attempt - 1] if len(plan) >= attempt else "whole"
print("starting to", todo)
if todo == "sleep":
    time.sleep(300)
if todo.startswith("nap"):
    time.sleep(4)
if todo == "fail":
    shutil.copytree(MODEL, output + "/checkpoint-7")
    print("loss is nan")
    sys.exit(3)
if todo == "cut":
    shutil.copytree(MODEL, output + "/model", dirs_exist_ok=True)
    with open(output + "/model/model.safetensors", "r+b") as file:
        file.truncate(500)
else:
    shutil.copytree(MODEL, output + "/model", dirs_exist_ok=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, model: str) -> str:
    script = tmp_path_factory.mktemp("trainer") / "trainer.py"
    script.write_text(f"MODEL = {model!r}\n{TRAINER}")
    return str(script)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray's Jobs API."""
    with private_ray(8, with_jobs=True) as private:
        yield str(private.jobs)


@pytest.fixture
def reference(tmp_path: Path, model: str) -> str:
    return write_release(tmp_path / "out", make_rows(3), {"target": {"model": model}})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.2)


def command(trainer: str, output: Path, **over: Any) -> dict[str, Any]:
    parts = [sys.executable, trainer, "{output}", "{dataset_version}", "{checkpoint}"]
    return {"command": parts, "output": str(output), "resources": {"cpus": 0.1}, **over}


def plan(output: Path, *words: str) -> Path:
    output.mkdir(parents=True)
    (output / "plan").write_text(" ".join(words))
    return output


def starts(output: Path) -> list[str]:
    return (output / "started").read_text().splitlines() if (output / "started").exists() else []


def test_rl_starts_on_the_checkpoint_of_sft_and_nothing_is_done_twice(
    trainer: str, cluster: str, reference: str, tmp_path: Path
) -> None:
    config = TrainConfig(sft=command(trainer, tmp_path / "sft"), rl=command(trainer, tmp_path / "rl"))
    said: list[str] = []
    record = train_stage.train(reference, config, cluster, say=said.append)
    assert record["state"] == "succeeded"
    assert record["dataset"] == reference
    assert record["stages"]["rl"]["checkpoint"] == str(tmp_path / "rl" / "model")
    assert starts(tmp_path / "sft") == [""]
    assert starts(tmp_path / "rl") == [str(tmp_path / "sft" / "model")]
    assert [line.split(":")[0] for line in said] == ["sft", "sft", "rl", "rl"]
    assert Path(record["stages"]["sft"]["log"]).read_text().splitlines()[-1] == "starting to whole"

    again = train_stage.train(reference, config, cluster)
    assert again == record
    assert len(starts(tmp_path / "sft")) == len(starts(tmp_path / "rl")) == 1
    on_disk = json.loads((tmp_path / "out" / "tiny" / "runs" / f"{record['id']}.json").read_text())
    assert on_disk == record
    assert train_stage.train(reference, config, cluster, key="once more")["id"] != record["id"]
    assert len(starts(tmp_path / "sft")) == 2


def test_a_failed_job_ends_with_its_log_and_is_tried_again_from_its_checkpoint(
    trainer: str, cluster: str, reference: str, tmp_path: Path
) -> None:
    output = plan(tmp_path / "sft", "fail", "fail", "whole")
    config = TrainConfig(sft=command(trainer, output), rl=command(trainer, tmp_path / "rl"))
    with pytest.raises(StageError, match=r"sft failed, and its log ends with:(.|\n)*starting to fail\nloss is nan"):
        train_stage.train(reference, config, cluster)
    assert starts(output) == [""]
    assert starts(tmp_path / "rl") == []

    folder = output / "checkpoint-7"
    (output / "plan").write_text("fail whole")
    marker = {"files": {path.name: {"size": path.stat().st_size, "sha256": None} for path in folder.iterdir()}}
    (folder / "complete.json").write_text(json.dumps(marker))
    record = train_stage.train(reference, config, cluster)
    assert starts(output) == ["", f"{output}/checkpoint-7"]
    assert record["stages"]["sft"]["attempt"] == 2
    assert record["stages"]["sft"]["error"] is None
    assert record["state"] == "succeeded"


def test_attempts_are_made_without_being_asked_again(
    trainer: str, cluster: str, reference: str, tmp_path: Path
) -> None:
    output = plan(tmp_path / "sft", "fail", "whole")
    record = train_stage.train(reference, TrainConfig(sft=command(trainer, output, attempts=2)), cluster)
    assert (record["state"], record["stages"]["sft"]["attempt"]) == ("succeeded", 2)


def test_rl_does_not_start_on_a_checkpoint_that_is_cut_off(
    trainer: str, cluster: str, reference: str, tmp_path: Path
) -> None:
    output = plan(tmp_path / "sft", "cut")
    config = TrainConfig(sft=command(trainer, output), rl=command(trainer, tmp_path / "rl"))
    with pytest.raises(StageError, match=r"sft ended well, but .* is cut off at 500 bytes"):
        train_stage.train(reference, config, cluster)
    assert starts(tmp_path / "rl") == []


def test_a_checkpoint_that_broke_after_sft_is_noticed(
    trainer: str, cluster: str, reference: str, tmp_path: Path
) -> None:
    config = TrainConfig(sft=command(trainer, tmp_path / "sft"), rl=command(trainer, tmp_path / "rl"))
    with train_stage.open_run(reference, config, cluster) as run:
        run.do("sft")
        (tmp_path / "sft" / "model" / "model.safetensors").unlink()
        with pytest.raises(StageError, match="is not whole: its weights are missing"):
            run.do("rl")
    assert starts(tmp_path / "rl") == []


def test_a_run_is_cancelled(trainer: str, cluster: str, reference: str, tmp_path: Path) -> None:
    output = plan(tmp_path / "sft", "sleep")
    config = TrainConfig(sft=command(trainer, output, attempts=3))
    ended: list[BaseException] = []

    def follow() -> None:
        try:
            train_stage.train(reference, config, cluster)
        except StageError as error:
            ended.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    _until(lambda: starts(output))
    train_stage.cancel(reference, config)
    thread.join(timeout=30)
    assert str(ended[0]) == "sft was cancelled"
    state = train_stage.read(reference, config)["stages"]["sft"]
    assert (state["state"], state["attempt"]) == ("cancelled", 1)


def test_a_job_that_takes_too_long_is_stopped(trainer: str, cluster: str, reference: str, tmp_path: Path) -> None:
    output = plan(tmp_path / "sft", "sleep")
    with pytest.raises(StageError, match="took longer than timeout_seconds 3"):
        train_stage.train(reference, TrainConfig(sft=command(trainer, output, timeout_seconds=3)), cluster)


def test_two_requests_at_the_same_time_are_one_job(trainer: str, cluster: str, reference: str, tmp_path: Path) -> None:
    output = plan(tmp_path / "sft", "nap")
    config = TrainConfig(sft=command(trainer, output))
    found: list[records.Record] = []

    def request() -> None:
        found.append(train_stage.train(reference, config, cluster))

    threads = [threading.Thread(target=request) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [record["stages"]["sft"]["job_id"] for record in found] == [f"grape-{found[0]['id']}-sft-1"] * 3
    assert starts(output) == [""]


def test_another_process_goes_on_with_the_job_of_one_that_was_killed(
    trainer: str, cluster: str, reference: str, tmp_path: Path
) -> None:
    output = plan(tmp_path / "sft", "nap")
    config = TrainConfig(sft=command(trainer, output))
    code = (
        "import sys; from workers.training import records; from workers.stages.train import train\n"
        "from grape_service.config.training import TrainConfig; records.LEASE_SECONDS = 2.0\n"
        "train(sys.argv[1], TrainConfig.model_validate_json(sys.argv[2]), sys.argv[3])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, reference, config.model_dump_json(), cluster])
    try:
        _until(lambda: starts(output))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    record = train_stage.train(reference, config, cluster)
    assert record["state"] == "succeeded"
    assert record["stages"]["sft"]["attempt"] == 1
    assert starts(output) == [""]


def test_the_number_of_gpus_has_to_be_said_on_a_cluster(cluster: str, reference: str) -> None:
    with pytest.raises(UserError, match=r"train.sft.resources.gpus: say how many GPUs"):
        train_stage.train(reference, TrainConfig(sft={"max_steps": 1}), cluster)


def test_an_address_where_nobody_answers(reference: str, trainer: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Ray answers at http://192\.0\.2\.77:1"):
        train_stage.train(reference, TrainConfig(sft=command(trainer, tmp_path)), "http://192.0.2.77:1")


# Webhooks and deployments


class Webhook:
    """A training service: takes jobs and tells their state."""

    def __init__(self, statuses: list[dict[str, Any]], follow: bool = True):
        self.posts: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.statuses = statuses
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.posts.append((body, dict(self.headers)))
                self._answer({"status_url": f"{service.url}/status"} if follow else {})

            def do_GET(self) -> None:
                self._answer(service.statuses.pop(0) if len(service.statuses) > 1 else service.statuses[0])

            def _answer(self, value: dict[str, Any]) -> None:
                data = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Webhook]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join(10)


def test_a_webhook_trains_and_its_state_is_followed(
    reference: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPE_WEBHOOK_SECRET", "s3cret")
    done = {"state": "succeeded", "checkpoint": model, "metrics": {"loss": 1.5}}
    with Webhook([{"state": "running"}, {"state": "running"}, done]).running() as service:
        config = TrainConfig(sft={"webhook": service.url, "parameters": {"queue": "b"}})
        record = train_stage.train(reference, config)
    assert record["stages"]["sft"]["checkpoint"] == model
    assert record["stages"]["sft"]["metrics"] == {"loss": 1.5}
    (body, headers) = service.posts[0]
    assert (body["dataset_version"], body["queue"], body["stage"]) == ("v0001", "b", "sft")
    assert body["dataset_path"].endswith("/tiny/versions/v0001/data")
    assert headers["Idempotency-Key"] == record["stages"]["sft"]["job_id"]
    assert len(headers["X-Grape-Signature"]) == len("sha256=") + 64
    assert service.url not in json.dumps(record["config"])


def test_a_webhook_that_says_nothing_more_is_not_called_twice(reference: str) -> None:
    with Webhook([], follow=False).running() as service:
        config = TrainConfig(sft={"webhook": service.url})
        assert train_stage.train(reference, config)["stages"]["sft"]["state"] == "sent"
        train_stage.train(reference, config)
        assert len(service.posts) == 1
        with pytest.raises(StageError, match="RL starts when SFT has succeeded with a checkpoint, and SFT is 'sent'"):
            train_stage.train(reference, TrainConfig(sft={"webhook": service.url}, rl={"webhook": service.url}))
        assert len(service.posts) == 2


def test_a_webhook_that_fails(reference: str) -> None:
    with Webhook([{"state": "failed", "error": "out of quota"}]).running() as service:
        config = TrainConfig(sft={"webhook": service.url})
        with pytest.raises(StageError, match="sft failed: out of quota"):
            train_stage.train(reference, config)


def test_a_deployment_needs_somebody_who_knows_prefect(reference: str) -> None:
    with pytest.raises(UserError, match="'team/sft' needs Prefect"):
        train_stage.train(reference, TrainConfig(sft={"deployment": "team/sft"}))


# Settings


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"sft": {"learnin_rate": 1}}, "unknown key 'train.sft.learnin_rate'; did you mean 'learning_rate'?"),
        ({"rl": {"num_generation": 1}}, "unknown key 'train.rl.num_generation'; did you mean 'num_generations'?"),
        ({"sft": {"command": ["a", "{dataset_pth}"]}}, "'{dataset_pth}' is not filled in; known are {dataset_path}"),
        ({"sft": {"command": ["a"], "learning_rate": 1}}, "'learning_rate' is for the built-in trainer"),
        ({"sft": {"command": ["a"], "webhook": "http://b"}}, "not command and webhook"),
        ({"sft": {"trainer": "command"}}, "trainer: command does not fit"),
        ({"sft": {"packing": True}}, "packing needs max_length"),
        ({"sft": {"resources": {"gpu": 1}}}, "unknown key 'train.sft.resources.gpu'; did you mean 'gpus'?"),
        ({"rl": {"rewards": [{"type": "function"}]}}, "type: function needs `function`"),
        ({}, "there is nothing to do"),
    ],
)
def test_mistakes_in_a_train_section_are_named(section: dict[str, Any], sentence: str) -> None:
    values = {"name": "a", "pool": {"path": "p"}, "target": {"model": "m"}, "output": {"path": "o"}, "train": section}
    with pytest.raises(UserError) as raised:
        parse_config(values)
    assert sentence in str(raised.value)


def test_a_section_holds_the_jobs_keys_and_the_trainers() -> None:
    section = {"learning_rate": 2e-5, "lora": {"r": 8}, "resources": {"gpus": 2}, "pip": ["x"]}
    job = TrainConfig(sft=section).jobs["sft"]
    assert isinstance(job, SftJob)
    assert (job.resources.gpus, job.own_settings().learning_rate, job.own_settings().batch_size) == (2, 2e-5, 32)


def test_a_section_that_was_written_out_whole_is_the_same_request() -> None:
    given = TrainConfig(sft={"command": ["a"], "resources": {"gpus": 2}})
    again = TrainConfig.model_validate(given.model_dump(mode="json"))
    assert (
        again.without_defaults()
        == given.without_defaults()
        == {
            "sft": {"command": ["a"], "resources": {"gpus": 2}},
            "rl": None,
        }
    )


def _until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)
