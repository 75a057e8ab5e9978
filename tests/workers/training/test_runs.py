"""Runs on a Ray cluster: started once, followed, tried again from a checkpoint, cancelled, named as failed."""

from __future__ import annotations

import contextlib
import json
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
from grape_service.config.training import TrainConfig
from grape_service.errors import StageError, UserError
from tests.workers.training.webhook import Webhook
from workers.cluster.jobs import job_server
from workers.cluster.ray import private_ray
from workers.stages import train as train_stage
from workers.training import attempts, records, runs

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("quick")]


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

QUICK_LEASE = """
import sys; from workers.training import records; from workers.stages.train import train
from grape_service.config.training import TrainConfig; records.LEASE_SECONDS = 2.0
train(sys.argv[1], TrainConfig.model_validate_json(sys.argv[2]), sys.argv[3])
"""


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


def test_a_job_that_nobody_follows_is_cancelled_at_its_cluster(
    trainer: str, cluster: str, reference: str, tmp_path: Path
) -> None:
    output = plan(tmp_path / "sft", "sleep")
    config = TrainConfig(sft=command(trainer, output), rl=command(trainer, tmp_path / "rl"))
    process = subprocess.Popen([sys.executable, "-c", QUICK_LEASE, reference, config.model_dump_json(), cluster])
    try:
        _until(lambda: starts(output))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)  # it is taken for the follower for two seconds more
    record = train_stage.cancel(reference, config)
    sft, rl = record["stages"]["sft"], record["stages"]["rl"]
    assert (sft["state"], sft["error"], rl["state"]) == ("cancelled", "sft was cancelled", "waiting")
    with job_server(cluster) as server:
        assert server.state(sft["job_id"]) == "cancelled"


def test_what_is_cancelled_before_its_job_is_there_does_not_start(
    trainer: str, cluster: str, reference: str, tmp_path: Path
) -> None:
    config = TrainConfig(sft=command(trainer, tmp_path / "sft"), rl=command(trainer, tmp_path / "rl"))
    with train_stage.open_run(reference, config, cluster) as run:
        run.do("sft")
        train_stage.cancel(reference, config)  # while a gate between them takes its time
        with pytest.raises(StageError, match="rl was cancelled"):
            run.do("rl")
    assert (starts(tmp_path / "rl"), train_stage.read(reference, config)["state"]) == ([], "cancelled")
    assert train_stage.train(reference, config, cluster)["state"] == "succeeded", "asked for again, it is done"


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
    process = subprocess.Popen([sys.executable, "-c", QUICK_LEASE, reference, config.model_dump_json(), cluster])
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


def _until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)
