"""Training jobs on a real Ray with its Jobs API, as on a cluster: commands, webhooks, retries, cancelling."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import grape_service
from grape_service.config.loading import parse_config
from grape_service.config.training import SftJob, TrainConfig
from grape_service.errors import StageError, UserError
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from tests.workers.training.webhook import Webhook
from workers.cluster.ray import private_ray
from workers.stages import train as train_stage
from workers.training import attempts, records, runs
from workers.training.request import NO_TARGET, Target, starting_model

pytestmark = pytest.mark.alone

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
    for module in (attempts, runs):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.2)


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
    assert [line for line in said if "checkpoint" in line] == [
        f"sft: succeeded, checkpoint {tmp_path / 'sft' / 'model'}",
        f"rl: succeeded, checkpoint {tmp_path / 'rl' / 'model'}",
    ]
    assert Path(record["stages"]["sft"]["log"]).read_text().splitlines()[-1] == "starting to whole"

    again = train_stage.train(reference, config, cluster)
    assert again == record
    assert len(starts(tmp_path / "sft")) == len(starts(tmp_path / "rl")) == 1
    on_disk = json.loads((tmp_path / "out" / "tiny" / "runs" / f"{record['id']}.json").read_text())
    assert on_disk == record
    other = train_stage.train(reference, config, cluster, key="once more")
    assert other["id"] != record["id"]
    # The folders hold the first run's results, so the second has its own below them.
    assert len(starts(tmp_path / "sft")) == len(starts(tmp_path / "rl")) == 1
    assert {Path(stage["output"]).parent for stage in other["stages"].values()} == {tmp_path / "sft", tmp_path / "rl"}


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


class Gate:
    """A way to an address that can be closed: as a dashboard that restarts, or a port-forward that broke."""

    def __init__(self, address: str):
        host, port = address.removeprefix("http://").split(":")
        self.target = host, int(port)
        self.port = 0
        self.listener: socket.socket | None = None
        self.open()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port), reuse_port=True)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, args=(self.listener,), daemon=True).start()

    def close(self) -> None:
        assert self.listener is not None
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = listener.accept()[0]
                far = socket.create_connection(self.target)
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def test_a_head_that_is_away_for_a_while_is_waited_for(
    trainer: str, cluster: str, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = plan(tmp_path / "sft", "nap")
    gate = Gate(cluster)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "cannot be asked" in line:
            gate.open()

    def close_when_started() -> None:
        _until(lambda: starts(output))
        gate.close()

    thread = threading.Thread(target=close_when_started)
    thread.start()
    config = TrainConfig(sft=command(trainer, output))
    record = train_stage.train(reference, config, gate.address, say=say)
    thread.join(30)
    assert (record["state"], record["stages"]["sft"]["attempt"]) == ("succeeded", 1)
    assert any(f"the Ray cluster at {gate.address} cannot be asked" in line for line in said)

    # One that stays away: the record says so, and the next run follows the job that went on.
    monkeypatch.setattr(attempts, "LOST_SECONDS", 0.5)
    config = TrainConfig(sft=command(trainer, plan(tmp_path / "other", "nap")))
    thread = threading.Thread(target=lambda: (_until(lambda: starts(tmp_path / "other")), gate.close()))
    thread.start()
    with pytest.raises(StageError, match=r"cannot be asked: .*; run again to ask once more"):
        train_stage.train(reference, config, gate.address)
    thread.join(30)
    assert train_stage.read(reference, config)["stages"]["sft"]["state"] == "failed"
    gate.open()
    record = train_stage.train(reference, config, gate.address)
    gate.close()
    assert (record["state"], record["stages"]["sft"]["attempt"]) == ("succeeded", 1)
    assert starts(tmp_path / "other") == [""]


# Webhooks and deployments


def test_a_webhook_trains_and_its_state_is_followed(
    reference: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPE_WEBHOOK_SECRET", "s3cret")
    named = str(tmp_path / "ckpt" / "model")
    done = {"state": "succeeded", "checkpoint": named, "metrics": {"loss": 1.5}}
    words = [{"state": "queued"}, {"state": "PENDING"}, {"state": "In Progress"}, done]
    with Webhook(words, made=model).running() as service:
        section = {"webhook": service.url, "parameters": {"queue": "b"}, "output": str(tmp_path / "ckpt")}
        said: list[str] = []
        record = train_stage.train(reference, TrainConfig(sft=section), say=said.append)
    assert [line for line in said if "says" in line] == [
        f"sft: its webhook says '{word}'" for word in ("queued", "PENDING", "In Progress")
    ]
    assert record["stages"]["sft"]["checkpoint"] == named
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
        said: list[str] = []
        assert train_stage.train(reference, config, say=said.append)["stages"]["sft"]["state"] == "sent"
        assert "sft: its webhook took the job and names no status_url, so how it ends is not known here" in said
        train_stage.train(reference, config)
        assert len(service.posts) == 1
        with pytest.raises(StageError, match="RL starts when SFT has succeeded with a checkpoint, and SFT is 'sent'"):
            train_stage.train(reference, TrainConfig(sft={"webhook": service.url}, rl={"webhook": service.url}))
        assert len(service.posts) == 1, "SFT is the same, with RL after it or without"


def test_another_rl_section_takes_the_sft_that_is_there(reference: str, model: str) -> None:
    with Webhook([{"state": "succeeded"}], made=model).running() as service:
        alone = train_stage.train(reference, TrainConfig(sft={"webhook": service.url}))
        for number, count in ((1, 2), (2, 3), (2, 3)):
            config = TrainConfig(sft={"webhook": service.url}, rl={"webhook": service.url, "parameters": {"a": number}})
            record = train_stage.train(reference, config)
            assert record["stages"]["sft"]["checkpoint"] == alone["stages"]["sft"]["checkpoint"]
            assert [body["stage"] for body, _ in service.posts] == ["sft", *["rl"] * (count - 1)]
        assert service.posts[1][0]["checkpoint"] == alone["stages"]["sft"]["checkpoint"]


def test_what_another_job_left_in_a_fixed_output_is_not_this_ones_result(
    reference: str, model: str, tmp_path: Path
) -> None:
    output = tmp_path / "ckpt"
    second = write_release(tmp_path / "out", make_rows(4), {"target": {"model": model}})
    said: list[str] = []
    with Webhook([{"state": "succeeded"}], made=model).running() as service:
        section = {"webhook": service.url, "output": str(output)}
        first = train_stage.train(reference, TrainConfig(sft=section))["stages"]["sft"]
        assert first["checkpoint"] == str(output / "model")
        for release, over in ((second, {}), (reference, {"parameters": {"learning_rate": 0.1}})):
            made = train_stage.train(release, TrainConfig(sft={**section, **over}), say=said.append)["stages"]["sft"]
            assert made["checkpoint"] == str(output / made["inputs"][:16] / "model")
            assert f"so this one's output is {output / made['inputs'][:16]}" in "".join(said)
        assert len(service.posts) == 3
    # A job that writes nothing, and one that names what was there before it.
    old = make_model(tmp_path / "old")
    for answer, sentence in (({}, "there is no checkpoint in"), ({"checkpoint": old}, "is older than the job")):
        with Webhook([{"state": "succeeded", **answer}]).running() as service:
            with pytest.raises(StageError, match=f"sft ended well, but .*{sentence}"):
                train_stage.train(reference, TrainConfig(sft={"webhook": service.url, "output": str(output)}))
            assert (
                train_stage.read(reference, TrainConfig(sft={"webhook": service.url, "output": str(output)}))["state"]
                == "failed"
            )


def test_a_status_that_names_no_checkpoint_ends_as_failed(reference: str, model: str) -> None:
    for named in (7, "gs://bucket/model", {"path": "model"}):
        with Webhook([{"state": "succeeded", "checkpoint": named}], made=model).running() as service:
            config = TrainConfig(sft={"webhook": service.url})
            with pytest.raises(StageError, match="sft ended well, but "):
                train_stage.train(reference, config)
            assert train_stage.read(reference, config)["stages"]["sft"]["state"] == "failed"
            shutil.rmtree(service.posts[0][0]["output"] + "/model")


def test_a_model_that_is_cut_off_is_not_replaced_by_a_checkpoint_before_it(
    reference: str, model: str, tmp_path: Path
) -> None:
    output = tmp_path / "ckpt"
    with Webhook([{"state": "succeeded"}], made=model).running() as service:
        config = TrainConfig(sft={"webhook": service.url, "output": str(output)})
        train_stage.train(reference, config)
        shutil.copytree(output / "model", output / "checkpoint-7")
        for broken, sentence in (
            ("model", "model.safetensors is cut off at 500 bytes"),
            ("checkpoint-9", "is cut off"),
        ):
            shutil.rmtree(output / "model")
            shutil.copytree(model, output / broken, dirs_exist_ok=True)
            os.truncate(output / broken / "model.safetensors", 500)
            service.made = None
            with pytest.raises(StageError, match=sentence):
                train_stage.train(reference, config)
            shutil.rmtree(output / broken)
            (output / "model").mkdir()
        (output / "config.json").write_text('{"what": "the settings of a trainer"}')
        found = train_stage.train(reference, config)["stages"]["sft"]["checkpoint"]
        assert found == str(output / "checkpoint-7")


def test_a_command_that_is_not_there_is_not_tried_again(cluster: str, reference: str) -> None:
    section = {"command": ["pyhton", "train.py"], "attempts": 3, "resources": {"cpus": 0.1}}
    with pytest.raises(UserError, match=r"train\.sft\.command: there is no program 'pyhton'"):
        train_stage.train(reference, TrainConfig(sft=section), cluster)
    assert train_stage.read(reference, TrainConfig(sft=section))["stages"]["sft"]["attempt"] == 1


def test_what_nobody_follows_and_cannot_be_found_is_failed(reference: str, cluster: str) -> None:
    section = {"command": ["sleep", "9"], "resources": {"cpus": 0.1}}
    with Webhook([{"http": 404}, {"state": "queued"}]).running() as service:
        for job, where, problem in (
            (section, {"address": cluster}, "no longer knows the job j"),
            (section, {"address": "http://127.0.0.1:9"}, "nobody follows the job j, and it cannot be asked: no Ray"),
            ({"webhook": service.url}, {"status_url": service.url}, "and it cannot be asked: the webhook at 127.0.0.1"),
            ({"webhook": service.url}, {"status_url": service.url}, None),
        ):
            config = TrainConfig(sft={**job, "environment": {"N": str(problem)}})
            run = runs.TrainingRun(grape_service.load(reference), config, config.jobs, None, print, None)
            run.note("sft", state="running", attempt=1, job_id="j", started=time.time(), **where)
            stage = train_stage.read(reference, config)["stages"]["sft"]
            assert stage["state"] == ("failed" if problem else "running"), stage
            assert (problem or "") in (stage.get("error") or "")


def test_a_run_is_named_by_all_that_it_is_made_of(reference: str, model: str, tmp_path: Path) -> None:
    base = {"command": ["a"], "working_dir": str(tmp_path / "code")}
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text("1")
    other = make_model(tmp_path / "other", seed=5)

    def id_of(section: dict[str, Any], release: str = reference, key: str | None = None, target: str = model) -> str:
        opened = grape_service.load(release)
        return runs.run_id_of(runs.inputs_of(opened, TrainConfig(sft=section).jobs, key, runs.Target(target)))

    ids = [id_of(base)]
    assert [
        id_of({**base, **over}) for over in ({"attempts": 3}, {"timeout_seconds": 9}, {"resources": {"cpus": 2}})
    ] == (ids * 3), "what has no effect on the result names no other run"
    ids += [id_of({**base, "environment": {"A": "b"}}), id_of({**base, "resources": {"gpus": 2}}), id_of(base, key="b")]
    ids += [id_of(base, target=other), id_of({**base, "output": "x"}), id_of({"model": other}), id_of({})]
    ids += [id_of({"learning_rate": 0.5}), id_of({}, target=other)]
    ids.append(id_of(base, write_release(tmp_path / "out", make_rows(3), {"target": {"model": model}})))
    (tmp_path / "code" / "train.py").write_text("2")
    ids.append(id_of(base))
    tokenizer = Path(other) / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    ids.append(id_of(base, target=other))
    (Path(other) / "additional_chat_templates").mkdir()
    (Path(other) / "additional_chat_templates" / "rag.jinja").write_text("{{ 1 }}")
    ids.append(id_of(base, target=other))
    assert len(set(ids)) == len(ids)


def test_rl_alone_starts_from_the_revision_that_was_scored(tmp_path: Path) -> None:
    target = {"model": "team/m", "revision": "r1"}
    release = grape_service.load(write_release(tmp_path, make_rows(3), {"target": target}))
    section: dict[str, Any] = {"rewards": [{"type": "math"}]}

    def start(target: Target = NO_TARGET, **over: Any) -> tuple[str, str | None] | None:
        return starting_model(release, TrainConfig(rl={**section, **over}).jobs["rl"], target)

    assert start() == ("team/m", "r1")
    assert start(Target("team/m", "r2")) == ("team/m", "r2")
    assert start(model="team/n") == ("team/n", None)


def test_a_result_that_is_gone_is_trained_again(reference: str, model: str) -> None:
    with Webhook([{"state": "succeeded"}], made=model).running() as service:
        config = TrainConfig(sft={"webhook": service.url})
        record = train_stage.train(reference, config)
        shutil.rmtree(record["stages"]["sft"]["checkpoint"])
        again = train_stage.train(reference, config)
        assert (again["id"], again["stages"]["sft"]["attempt"]) == (record["id"], 2)
        assert len(service.posts) == 2


def test_a_result_of_a_ray_job_that_is_gone_is_trained_again(
    trainer: str, cluster: str, reference: str, tmp_path: Path
) -> None:
    sft, rl = command(trainer, tmp_path / "sft"), command(trainer, tmp_path / "rl")
    both = TrainConfig(sft=sft, rl=rl)
    record = train_stage.train(reference, both, cluster)
    assert train_stage.train(reference, both, cluster) == record
    for stage in ("rl", "sft"):
        shutil.rmtree(record["stages"][stage]["checkpoint"])
        assert train_stage.train(reference, both, cluster)["state"] == "succeeded"
    assert (len(starts(tmp_path / "sft")), len(starts(tmp_path / "rl"))) == (2, 2)


def test_prompts_and_rewards_name_a_run_by_their_content(reference: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "code" / "judges").mkdir(parents=True)
    (tmp_path / "code" / "judges" / "__init__.py").write_text("from judges.short import score\n")
    judge, prompts = tmp_path / "code" / "judges" / "short.py", tmp_path / "p.jsonl"
    helper = tmp_path / "code" / "judges_helper.py"
    judge.write_text("def score(prompt, response, row): return 1.0\n")
    prompts.write_text('{"prompt": "1+1?"}\n')
    section = {
        "model": model,
        "prompts": {"path": str(prompts)},
        "rewards": [{"type": "function", "function": "judges:score"}],
    }

    def id_of(place: str) -> str:
        given = {**section, "working_dir": str(tmp_path / "code")} if place == "working_dir" else section
        jobs = TrainConfig(rl=given).jobs
        return runs.run_id_of(runs.inputs_of(grape_service.load(reference), jobs, None, runs.Target(model)))

    for place in ("working_dir", "path"):
        with pytest.MonkeyPatch.context() as patch:
            if place == "path":
                patch.syspath_prepend(str(tmp_path / "code"))
            ids = [id_of(place)]
            os.utime(prompts)
            assert id_of(place) == ids[0], "the same content is the same run"
            prompts.write_text('{"prompt": "2+2?"}\n')
            ids.append(id_of(place))
            judge.write_text("from judges_helper import score\n")
            for value in (0.5, 0.7):
                helper.write_text(f"def score(prompt, response, row): return {value}\n")
                ids.append(id_of(place))
            assert len(set(ids)) == 4, place
            assert "judges" not in sys.modules
        prompts.write_text('{"prompt": "1+1?"}\n')
        judge.write_text("def score(prompt, response, row): return 1.0\n")


def test_a_status_that_cannot_be_asked_is_waited_for_and_then_failed(
    reference: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "LOST_SECONDS", 1.5)
    for gone in ({"http": 404}, {"http": 401}, {"state": "warming up"}):
        said: list[str] = []
        with Webhook([gone, gone, {"state": "succeeded"}], made=model).running() as service:
            config = TrainConfig(sft={"webhook": service.url})
            assert train_stage.train(reference, config, say=said.append)["state"] == "succeeded"
        assert any("waiting for up to" in line for line in said)
        with Webhook([gone], made=model).running() as service:
            config = TrainConfig(sft={"webhook": service.url})
            with pytest.raises(StageError, match=r"404|401|is 'warming up': known are running, succeeded, failed"):
                train_stage.train(reference, config)
            assert train_stage.read(reference, config)["stages"]["sft"]["state"] == "failed"
            shutil.rmtree(service.posts[0][0]["output"] + "/model")
            service.statuses = [gone, {"state": "succeeded"}]
            assert train_stage.train(reference, config)["stages"]["sft"]["attempt"] == 2
            assert len(service.posts) == 2
            service.posts.clear()


def test_a_lost_job_that_answers_again_is_followed(reference: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "LOST_SECONDS", 0.5)
    with Webhook([{"http": 404}], made=model).running() as service:
        config = TrainConfig(sft={"webhook": service.url})
        with pytest.raises(StageError, match="run again to ask once more"):
            train_stage.train(reference, config)
        service.statuses = [{"state": "running"}, {"state": "succeeded"}]
        assert train_stage.train(reference, config)["stages"]["sft"]["attempt"] == 1
        assert len(service.posts) == 1


def test_a_run_of_a_private_ray_whose_follower_was_killed_does_not_run_for_ever(reference: str) -> None:
    config = TrainConfig(sft={"command": ["sleep", "9"]})
    run = runs.TrainingRun(grape_service.load(reference), config, config.jobs, None, print, None)
    assert run.lease.acquire()
    run.note("sft", state="running", attempt=1, job_id="j", address="private", started=time.time())
    assert train_stage.read(reference, config)["state"] == "running"
    run.lease.release()
    record = train_stage.read(reference, config)
    assert (record["state"], record["stages"]["sft"]["state"]) == ("failed", "failed")
    assert "has ended, and its private Ray with it" in record["stages"]["sft"]["error"]


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
        ({"rl": {"num_generation": 1}}, "unknown key 'train.rl.num_generation'; did you mean 'num_generations'"),
        ({"sft": {"command": ["a", "{dataset_pth}"]}}, "'{dataset_pth}' is not filled in; known are {dataset_path}"),
        ({"sft": {"command": ["a"], "learning_rate": 1}}, "'learning_rate' is for the built-in trainer"),
        ({"sft": {"command": ["a"], "webhook": "http://b"}}, "not command and webhook"),
        ({"sft": {"trainer": "command"}}, "trainer: command does not fit"),
        ({"sft": {"packing": True}}, "packing needs max_length"),
        ({"sft": {"resources": {"gpu": 1}}}, "unknown key 'train.sft.resources.gpu'; did you mean 'gpus'"),
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


def test_a_section_that_was_written_out_whole_is_the_same_request(reference: str) -> None:
    given = TrainConfig(sft={"command": ["a"], "resources": {"gpus": 2}})
    again = TrainConfig.model_validate(given.model_dump(mode="json"))
    release = grape_service.load(reference)
    ids = [runs.inputs_of(release, config.jobs, None, runs.Target()) for config in (given, again)]
    assert ids[0] == ids[1]


def _until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)
