"""A run that another process takes over, and one whose storage is away: nothing is started twice."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import grape_service
from grape_service.config.training import TrainConfig
from tests.workers.training.webhook import Webhook
from workers.stages import train as train_stage
from workers.training import records

pytestmark = pytest.mark.usefixtures("quick")


def _until(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def take_over(reference: str, run_id: str, monkeypatch: pytest.MonkeyPatch) -> records.Lease:
    """Take a run's lease for long, as where the process that had it was held up for longer than it lasts."""
    release = grape_service.load(reference)
    lease = records.Lease(records.RunRecords(release.storage, release.name), run_id)

    def expire(record: records.Record) -> None:
        record["lease"]["expires"] = 0.0

    monkeypatch.setattr(records, "LEASE_SECONDS", 60.0)
    while not lease.acquire():
        lease.records.change(run_id, expire, news=False)
    return lease


def test_a_process_whose_run_was_taken_over_starts_nothing_and_writes_nothing(
    reference: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    done: list[records.Record] = []
    with Webhook([{"state": "running"}], made=model).running() as service:
        config = TrainConfig(sft={"webhook": service.url, "attempts": 2})
        monkeypatch.setattr(records, "LEASE_SECONDS", 1.0)
        thread = Thread(target=lambda: done.append(train_stage.train(reference, config, say=said.append)))
        thread.start()
        _until(lambda: service.posts)
        run_id = train_stage.read(reference, config)["id"]
        other = take_over(reference, run_id, monkeypatch)
        _until(lambda: any("is followed from here" in line for line in said))
        state = other.records.read(run_id)["stages"]["sft"]
        assert (state["state"], state["attempt"], state.get("error")) == ("running", 1, None)
        service.statuses = [{"state": "succeeded"}]
        time.sleep(0.5)
        assert other.records.read(run_id)["stages"]["sft"]["state"] == "running", "the record is the other's"
        other.release()
        thread.join(30)
        assert done[0]["state"] == "succeeded"
        assert (done[0]["stages"]["sft"]["attempt"], len(service.posts)) == (1, 1)


@pytest.mark.alone
def test_a_job_of_a_private_ray_ends_when_another_process_takes_over(
    reference: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, shutil, sys, time; output, model = sys.argv[1:]; os.makedirs(output, exist_ok=True)\n"
        "first = not os.path.exists(output + '/started'); print(os.getpid(), file=open(output + '/started', 'a'))\n"
        "time.sleep(300) if first else shutil.copytree(model, output + '/model')\n"
    )
    parts = [sys.executable, "-c", code, "{output}", model]
    output = tmp_path / "ckpt"
    config = TrainConfig(sft={"command": parts, "output": str(output), "resources": {"cpus": 0.1}})
    monkeypatch.setattr(records, "LEASE_SECONDS", 1.0)
    done: list[records.Record] = []

    def started() -> list[str]:
        return (output / "started").read_text().split() if (output / "started").exists() else []

    with train_stage.open_run(reference, config) as run:
        thread = Thread(target=lambda: done.append(run.do("sft")))
        thread.start()
        _until(started, 60)
        other = take_over(reference, run.id, monkeypatch)
        _until(lambda: not Path(f"/proc/{started()[0]}").exists())
        assert other.records.read(run.id)["stages"]["sft"]["state"] == "running", "the record is the other's"
        run.stop_private_jobs()
        assert other.records.read(run.id)["stages"]["sft"]["state"] == "running", "the record is the other's"
        other.release()
        thread.join(60)
    assert (done[0]["state"], done[0]["stages"]["sft"]["attempt"]) == ("succeeded", 2)


def test_storage_that_is_away_for_a_while_is_waited_for(
    reference: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out" / "tiny" / "runs"
    away = folder.with_name("runs.away")
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "the run's record cannot be read" in line:
            _until(folder.is_file)  # it may have been read between the two steps of `take_away`
            folder.unlink()
            away.rename(folder)

    def take_away() -> None:
        _until(lambda: service.posts and train_stage.read(reference, config)["stages"]["sft"].get("status_url"))
        folder.rename(away)
        folder.write_text("no folder")  # so that reading it is an error of the storage
        service.statuses = [{"state": "succeeded"}]

    with Webhook([{"state": "running"}], made=model).running() as service:
        section = {"webhook": service.url, "attempts": 2, "output": str(tmp_path / "ckpt")}
        config = TrainConfig(sft=section)
        thread = Thread(target=take_away)
        thread.start()
        record = train_stage.train(reference, config, say=say)
        thread.join(30)
        assert (record["state"], record["stages"]["sft"]["attempt"], len(service.posts)) == ("succeeded", 1, 1)
    assert any("the run's record cannot be read" in line for line in said)
