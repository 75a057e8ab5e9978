"""Runs that a webhook trains: their state is followed, their result is theirs, and what cannot be asked is failed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

import grape_service
from grape_service.config.training import TrainConfig
from grape_service.errors import StageError, UserError
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from tests.workers.training.webhook import Webhook
from workers.stages import train as train_stage
from workers.training import attempts, records, runs

pytestmark = pytest.mark.usefixtures("quick")


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


def test_a_result_that_is_gone_is_trained_again(reference: str, model: str) -> None:
    with Webhook([{"state": "succeeded"}], made=model).running() as service:
        config = TrainConfig(sft={"webhook": service.url})
        record = train_stage.train(reference, config)
        shutil.rmtree(record["stages"]["sft"]["checkpoint"])
        again = train_stage.train(reference, config)
        assert (again["id"], again["stages"]["sft"]["attempt"]) == (record["id"], 2)
        assert len(service.posts) == 2


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


def test_a_webhook_whose_answer_was_lost_with_its_follower_is_asked_again_with_the_same_key(
    reference: str, model: str
) -> None:
    with Webhook([{"state": "succeeded"}], made=model).running() as service:
        config = TrainConfig(sft={"webhook": service.url})
        run = runs.TrainingRun(grape_service.load(reference), config, config.jobs, None, print, None)
        run.note("sft", state="running", attempt=1, job_id=f"grape-{run.id}-sft-1", started=time.time())
        stage = train_stage.read(reference, config)["stages"]["sft"]
        assert stage["state"] == "failed"
        assert "nobody follows the job" in (stage["error"] or "")
        assert "run again to ask once more" in (stage["error"] or "")
        stage = train_stage.train(reference, config)["stages"]["sft"]
        assert (stage["state"], stage["attempt"]) == ("succeeded", 1)
        ((_, headers),) = service.posts
        assert headers["Idempotency-Key"] == f"grape-{run.id}-sft-1"


def test_how_a_job_stands_is_told_soon_where_its_webhook_is_mute(reference: str) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        config = TrainConfig(sft={"webhook": f"http://127.0.0.1:{mute.getsockname()[1]}"})
        run = runs.TrainingRun(grape_service.load(reference), config, config.jobs, None, print, None)
        where = {"status_url": config.sft.webhook if config.sft else None}
        run.note("sft", state="running", attempt=1, job_id="j", started=time.time(), **where)
        began = time.monotonic()
        stage = train_stage.read(reference, config)["stages"]["sft"]
    assert time.monotonic() - began < 20
    assert stage["state"] == "failed"
    assert "cannot be asked: the webhook at 127.0.0.1 does not answer" in (stage["error"] or "")


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


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("null", "is not the record of a training run: restore it, or delete it to train again"),
        ('{"format": 1, "lease": null, "stages": {"sft": {"phase": 2}}}', "is not the record of a training run"),
        ('{"format": 1, "lease": "mine", "stages": {}}', "is not the record of a training run"),
        ('{"format": 1, "lease": null, "stages": {}}', "is not the record of a training run"),
        ('{"format": 1, "id": ', "is not the record of a training run"),
        (
            '{"format": 2, "lease": {}, "stages": {"sft": {"phase": 2}}}',
            "was written by a newer grape-service: use that version",
        ),
    ],
)
def test_a_record_that_is_none_is_named(text: str, sentence: str, reference: str) -> None:
    config = TrainConfig(sft={"command": ["true"]})
    run = runs.TrainingRun(grape_service.load(reference), config, config.jobs, None, print, None)
    run.records.storage.write(f"{run.id}.json", text.encode())
    for ask in (train_stage.read, train_stage.cancel, train_stage.train):
        with pytest.raises(UserError, match=f"{run.id}.json {sentence}"):
            ask(reference, config)


def test_a_record_without_one_of_its_stages_is_named(reference: str) -> None:
    config = TrainConfig(sft={"command": ["true"]}, rl={"command": ["true"]})
    run = runs.TrainingRun(grape_service.load(reference), config, config.jobs, None, print, None)

    def cut(record: records.Record) -> None:
        del record["stages"]["sft"]

    run.records.change(run.id, cut)
    with pytest.raises(UserError, match=f"{run.id}.json is not the record of a training run: restore it, or delete it"):
        train_stage.train(reference, config)
