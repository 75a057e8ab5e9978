"""Addresses that move: the newest whole checkpoint of a training's folder, whoever wrote it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.models import newest as module
from grape_service.models.newest import newest, resolved
from grape_service.storage.storage import Storage
from tests.grape_service.models.test_files import write_adapter, write_model
from workers.training.trainers.checkpoints import mark_whole


def checkpoint(folder: Path, step: int | None = None) -> Path:
    """A model as transformers leaves it in a checkpoint: its state last."""
    write_model(folder)
    if step is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def aged(folder: Path, seconds: float = 3600) -> Path:
    """All files of a folder were written a while ago."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)
    return folder


def folder_of(address: Path | str, what: module.What = "model") -> str:
    return newest(str(address), what, {}).folder


def test_the_newest_checkpoint_of_transformers_is_one_with_its_state(tmp_path: Path) -> None:
    for step in (5, 40, 100):
        checkpoint(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-100" / "trainer_state.json").unlink()
    found = newest(f"{tmp_path}/@latest", "model", {})
    assert found.folder == str(tmp_path / "checkpoint-40")
    assert found.passed_over == ["checkpoint-100 is being written: it has no whole trainer_state.json yet"]
    assert found.sentence("x") == f"x is {tmp_path}/checkpoint-40 ({found.passed_over[0]})"
    assert folder_of(f"{tmp_path}@step-5") == str(tmp_path / "checkpoint-5")
    with pytest.raises(UserError, match=r"no checkpoint of step 100 in .* is whole: checkpoint-100 is being written"):
        folder_of(f"{tmp_path}/@step-100")
    with pytest.raises(UserError, match="there is no checkpoint of step 7 in"):
        folder_of(f"{tmp_path}/@step-7")


@pytest.mark.parametrize("cut", ["part", "header", "index", "last", "unnamed"])
def test_weights_that_are_not_all_there_are_not_taken(tmp_path: Path, cut: str) -> None:
    checkpoint(tmp_path / "checkpoint-1", 1)
    folder = checkpoint(tmp_path / "checkpoint-2", 2)
    parts = sorted(folder.glob("*.safetensors"))
    index = {"weight_map": {"a": parts[0].name, "b": parts[1].name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert folder_of(f"{tmp_path}/@latest") == str(folder)
    if cut == "part":
        os.truncate(parts[1], parts[1].stat().st_size - 1)
    elif cut == "header":
        os.truncate(parts[1], 30)
    elif cut == "index":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {')
    else:
        parts[1].unlink()
        if cut == "unnamed":  # transformers writes the index after the parts
            (folder / "model.safetensors.index.json").unlink()
    found = newest(f"{tmp_path}/@latest", "model", {})
    assert found.folder == str(tmp_path / "checkpoint-1")
    assert found.passed_over[0].startswith("checkpoint-2 is not whole: ")


def test_our_own_checkpoints_are_whole_by_their_marker(tmp_path: Path) -> None:
    facts = {"dataset": "x@v0001", "stage": "sft", "model": "team/m", "inputs": "i", "settings": {}}
    for step in (2, 4):
        mark_whole(checkpoint(tmp_path / f"checkpoint-{step}", step), {**facts, "step": step})
    assert folder_of(f"{tmp_path}/@latest") == str(tmp_path / "checkpoint-4")
    mark_whole(checkpoint(tmp_path / "model"), {**facts, "steps": 4})
    assert folder_of(f"{tmp_path}/@latest") == str(tmp_path / "model")
    assert folder_of(f"{tmp_path}/@step-4") == str(tmp_path / "model")
    mark_whole(checkpoint(tmp_path / "checkpoint-6", 6), {**facts, "step": 6})  # the training went on
    assert folder_of(f"{tmp_path}/@latest") == str(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "config.json").write_text("{}")
    assert folder_of(f"{tmp_path}/@latest") == str(tmp_path / "model")


def test_verl_says_which_step_it_has_written(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint(tmp_path / f"global_step_{step}" / "actor" / "huggingface")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("10")
    found = newest(f"{tmp_path}/@latest", "model", {})
    assert found.folder == str(tmp_path / "global_step_10" / "actor" / "huggingface")
    assert found.passed_over == ["global_step_20 is being written: latest_checkpointed_iteration.txt says 10"]
    tracker.write_text("20")
    assert folder_of(f"{tmp_path}/@latest") == str(tmp_path / "global_step_20" / "actor" / "huggingface")
    shards = tmp_path / "global_step_30" / "actor"
    shards.mkdir(parents=True)
    (shards / "model_world_size_8_rank_0.pt").write_bytes(b"shard")
    tracker.write_text("30")
    assert newest(f"{tmp_path}/@latest", "model", {}).passed_over == ["global_step_30 has no config.json"]


def test_a_folder_without_a_last_file_is_taken_when_nobody_writes_to_it(tmp_path: Path) -> None:
    aged(checkpoint(tmp_path / "step_00009"))
    checkpoint(tmp_path / "step_00011")
    found = newest(f"{tmp_path}/@latest", "model", {})
    assert found.folder == str(tmp_path / "step_00009")
    assert found.passed_over == ["step_00011 was written to in the last 60 seconds"]
    aged(tmp_path / "step_00011", 61)
    assert folder_of(f"{tmp_path}/@latest") == str(tmp_path / "step_00011")


def test_what_a_training_ended_with_is_newer_by_its_weights(tmp_path: Path) -> None:
    aged(checkpoint(tmp_path, None), 600)
    aged(checkpoint(tmp_path / "checkpoint-8", 8), 900)
    assert folder_of(f"{tmp_path}/@latest") == str(tmp_path)
    aged(tmp_path / "checkpoint-8", 300)
    assert folder_of(f"{tmp_path}/@latest") == str(tmp_path / "checkpoint-8")


def test_adapters_and_models_are_told_apart(tmp_path: Path) -> None:
    write_adapter(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert folder_of(f"{tmp_path}/@latest", "adapter") == str(tmp_path / "checkpoint-3")
    with pytest.raises(UserError, match="checkpoint-3 holds an adapter and no whole model"):
        folder_of(f"{tmp_path}/@latest")


def test_an_empty_folder_is_one_sentence(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "not-there"):
        with pytest.raises(
            UserError, match=rf"model '{place}/@latest': there is no checkpoint in {place} yet: a train"
        ):
            folder_of(f"{place}/@latest")


def test_on_s3(s3_url: str, tmp_path: Path) -> None:
    storage = Storage(s3_url)
    for step in (1, 2):
        for path in checkpoint(tmp_path / f"checkpoint-{step}", step).iterdir():
            storage.write(f"run/checkpoint-{step}/{path.name}", path.read_bytes())
    assert folder_of(f"{s3_url}/run/@latest") == f"{s3_url}/run/checkpoint-2"
    storage.delete("run/checkpoint-2/trainer_state.json")
    assert folder_of(f"{s3_url}/run/@latest") == f"{s3_url}/run/checkpoint-1"


def values(tmp_path: Path) -> dict[str, Any]:
    moving = f"{tmp_path}/run/@latest"
    return {
        "name": "x",
        "pool": {"path": "pool"},
        "target": {"model": moving},
        "behavior": {"sources": {"a": {"model": moving}, "b": {"model": "team/m", "adapter": f"{tmp_path}/ad@latest"}}},
        "gather": {"policies": {"own": {"model": moving, "samples": 2}, "team": {"model": "team/m"}}},
        "output": {"path": "out"},
    }


def test_all_policies_of_a_config_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "run" / "checkpoint-3", 3)
    write_adapter(tmp_path / "ad")
    aged(tmp_path / "ad")
    config = Config.model_validate(values(tmp_path))
    asked: list[str] = []
    look = newest
    monkeypatch.setattr(module, "newest", lambda *given: (asked.append(given[0]), look(*given))[1])
    made, found = resolved(config)
    target = str(tmp_path / "run" / "checkpoint-3")
    assert asked == [f"{tmp_path}/run/@latest", f"{tmp_path}/ad@latest"]
    assert {address: one.folder for address, one in found.items()} == {asked[0]: target, asked[1]: str(tmp_path / "ad")}
    assert made.target.model == target
    assert made.behavior is not None
    assert made.gather is not None
    assert made.behavior.sources["a"].model == target  # type: ignore[index,union-attr]
    assert made.behavior.sources["b"].adapter == str(tmp_path / "ad")  # type: ignore[index,union-attr]
    assert made.behavior.sources["own"].policy.model == target  # type: ignore[index,union-attr]
    assert [made.gather.policies[name].model for name in ("own", "team")] == [target, "team/m"]
    assert made.gather.policies["own"].samples == 2
    pinned, _ = resolved(config, {f"{tmp_path}/run/@latest": "/elsewhere"})
    assert pinned.target.model == "/elsewhere"


def test_a_config_that_names_what_stays_is_as_it_was(tmp_path: Path) -> None:
    config = Config.model_validate(
        {**values(tmp_path), "target": {"model": "team/m"}, "behavior": None, "gather": None}
    )
    assert resolved(config) == (config, {})


def test_training_refuses_an_address_that_moves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"moves, and that belongs to target\.model"):
        Config.model_validate({**values(tmp_path), "train": {"sft": {"model": f"{tmp_path}/run/@latest"}}})
