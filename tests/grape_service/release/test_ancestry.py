"""A checkpoint is told back to the pool's files, and what is withdrawn is found in every version and checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from grape_service.cli.app import app
from grape_service.errors import UserError
from grape_service.release.ancestry import (
    Wanted,
    facts_of,
    holders,
    lineage_of_checkpoint,
    lineage_of_release,
    rows_of_checkpoint,
)
from grape_service.release.load import load
from grape_service.release.manifest import Parents, PoolFile
from grape_service.storage.storage import Storage, json_bytes
from tests.grape_service.release.made_up import publish_version, rows
from workers.training.trainers.checkpoints import mark_whole

PARENTS = Parents(pool=[PoolFile(path="s3://team/pool/a.jsonl", size=10)])


def checkpoint(folder: Path, stage: str, dataset: str, model: str) -> str:
    """A checkpoint as our trainers leave it."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    facts: dict[str, Any] = {"stage": stage, "dataset": dataset, "model": model, "inputs": "x", "settings": {}}
    mark_whole(folder, {**facts, "steps": 1200, "run": "r1"})
    return str(folder)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Storage, str, str]:
    """Two versions, SFT on the first and RL from there on the second; the RL checkpoint is on record."""
    storage = Storage(str(tmp_path / "datasets"))
    publish_version(storage, parts=[rows(0, 30)], parents=PARENTS)
    publish_version(storage, parts=[rows(20, 30)])
    root = storage.root
    sft = checkpoint(tmp_path / "sft", "sft", f"{root}/math-sft@v0001", "org/base")
    rl = checkpoint(tmp_path / "rl", "rl", f"{root}/math-sft@v0002", sft)
    record = {"id": "r1", "version": "v0002", "stages": {"rl": {"state": "succeeded", "checkpoint": rl}}}
    storage.write("math-sft/runs/r1.json", json_bytes(record))
    return storage, sft, rl


def test_a_checkpoint_is_told_back_to_the_pools_files(trained: tuple[Storage, str, str]) -> None:
    storage, sft, rl = trained
    text = lineage_of_checkpoint(rl, {}).render_text()
    for said in (f"{rl}  rl, 1,200 steps, run r1", f"{sft}  sft", "math-sft@v0001  30 rows", "a.jsonl", "org/base"):
        assert said in text
    ids = pa.concat_tables(rows_of_checkpoint(rl, {}))
    assert ids.num_rows == 60
    wanted = load(f"{storage.root}/math-sft@v0001").dataset.to_table(columns=["prompt_id", "candidate_id"])
    of_first = ids.filter(pa.compute.equal(ids["release"], f"{storage.root}/math-sft@v0001"))
    assert of_first.select(["prompt_id", "candidate_id"]).to_pylist() == wanted.to_pylist()


def test_what_is_withdrawn_is_found_everywhere(trained: tuple[Storage, str, str]) -> None:
    storage, _, rl = trained
    first = load(f"{storage.root}/math-sft@v0001").dataset.to_table().to_pylist()
    both = [
        holder.reference.rpartition("@")[2] for holder in holders(storage.root, Wanted(source=first[0]["source"]), {})
    ]
    assert both == ["v0001", "v0002"]
    (only,) = holders(storage.root, Wanted(row=first[0]["prompt_id"]), {})
    assert (only.reference, only.rows, only.checkpoints) == (f"{storage.root}/math-sft@v0001", 1, [])
    assert only.descendants == [rl], "RL went on from a checkpoint that was trained on it, which is on no record"
    later = load(f"{storage.root}/math-sft@v0002").dataset.to_table().to_pylist()[-1]
    (only,) = holders(storage.root, Wanted(row=later["candidate_id"]), {})
    assert (only.checkpoints, only.descendants) == ([rl], [])
    (of_file,) = holders(storage.root, Wanted(file="a.jsonl"), {})
    assert (of_file.reference.rpartition("@")[2], of_file.rows) == ("v0001", None)
    assert holders(storage.root, Wanted(source="nobody"), {}) == []
    for folder in ("s3://team/pool", "pool/"):
        assert [holder.rows for holder in holders(storage.root, Wanted(file=folder), {})] == [None]
    with pytest.raises(UserError, match="math-sft is a dataset: name the folder that it is in"):
        holders(f"{storage.root}/math-sft", Wanted(source="a"), {})
    with pytest.raises(UserError, match=r"there is no dataset in .*/nowhere"):
        holders(f"{storage.root}/nowhere", Wanted(source="a"), {})


def test_what_another_trainer_made_further_is_found_by_the_records(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for number in (1, 2, 3):
        publish_version(storage, parts=[rows(20 * number, 20)])
        target = f"/checkpoints/{number - 1}" if number > 1 else "org/base"
        stages = {"sft": {"state": "sent", "checkpoint": f"/checkpoints/{number}"}}
        record = {"id": f"r{number}", "version": f"v000{number}", "target": target, "stages": stages}
        storage.write(f"math-sft/runs/r{number}.json", json_bytes(record))
    first = load(f"{tmp_path}/math-sft@v0001").dataset.to_table().to_pylist()[0]
    (only,) = holders(str(tmp_path), Wanted(row=first["prompt_id"]), {})
    assert (only.checkpoints, only.descendants) == (["/checkpoints/1"], ["/checkpoints/2", "/checkpoints/3"])


def test_the_prompts_of_gathered_candidates_are_among_the_files(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    prompts = Parents(prompts=[PoolFile(path="s3://team/prompts/q.jsonl", size=10)])
    publish_version(storage, parts=[rows(0, 3)], parents=prompts)
    publish_version(storage, parts=[rows(0, 3)], parents=Parents(candidates={"c@latest": f"{tmp_path}/math-sft@v0001"}))
    publish_version(storage, parts=[rows(0, 3)], parents=Parents(candidates={"c@latest": f"{tmp_path}/gone@v0001"}))
    found = holders(str(tmp_path), Wanted(file="q.jsonl"), {})
    assert [one.reference.rpartition("@")[2] for one in found] == ["v0001", "v0002"]
    assert "prompts: s3://team/prompts/q.jsonl" in lineage_of_release(load(f"{tmp_path}/math-sft@v0001")).render_text()


def test_a_version_is_told_back_through_the_checkpoint_that_chose_it(trained: tuple[Storage, str, str]) -> None:
    storage, sft, _ = trained
    publish_version(storage, parts=[rows(40, 30)], config={"target": {"model": sft}})
    text = lineage_of_release(load(f"{storage.root}/math-sft@v0003")).render_text()
    assert f"{sft}  sft, 1,200 steps" in text
    assert "from the model org/base" in text


def test_the_command(trained: tuple[Storage, str, str], tmp_path: Path) -> None:
    storage, sft, rl = trained
    run = CliRunner().invoke
    assert "math-sft@v0001" in run(app, ["lineage", rl]).stdout
    assert "math-sft@v0001" in run(app, ["lineage", f"{storage.root}/math-sft@v0001"]).stdout
    assert run(app, ["lineage", sft, "--rows", str(tmp_path / "ids.parquet")]).exit_code == 0
    assert pq.read_table(tmp_path / "ids.parquet").num_rows == 30
    found = json.loads(run(app, ["lineage", storage.root, "--file", "a.jsonl", "--json"]).stdout)
    assert [one["rows"] for one in found["held_by"]] == [None]
    with pytest.raises(UserError, match="give one of"):
        run(app, ["lineage", storage.root, "--file", "a", "--row", "b"], catch_exceptions=False)


def test_a_file_that_cannot_be_written_and_folders_that_are_no_checkpoint(
    trained: tuple[Storage, str, str], tmp_path: Path
) -> None:
    _, sft, _ = trained
    (tmp_path / "job" / "sft").mkdir(parents=True)
    Path(sft).rename(tmp_path / "job" / "sft" / "model")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "pool.jsonl").write_text("{}")
    model = str(tmp_path / "job" / "sft" / "model")
    for arguments, sentence in (
        ([model, "--rows", str(tmp_path / "absent" / "ids.parquet")], "there is no folder"),
        ([model, "--rows", str(tmp_path)], "cannot be written"),
        ([str(tmp_path / "job")], f"is a training job's folder: name its checkpoint, {model}"),
        ([str(tmp_path / "base")], "neither a dataset version nor a checkpoint of our trainers"),
        ([str(tmp_path / "pool.jsonl")], "is a file, not a dataset"),
    ):
        with pytest.raises(UserError, match=sentence):
            CliRunner().invoke(app, ["lineage", *arguments], catch_exceptions=False)


def test_a_folder_that_says_nothing_is_refused(tmp_path: Path) -> None:
    assert facts_of(str(tmp_path), {}) is None
    with pytest.raises(UserError, match=r"neither a dataset version nor a checkpoint"):
        lineage_of_checkpoint(str(tmp_path), {})
