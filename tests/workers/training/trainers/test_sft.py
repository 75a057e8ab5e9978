"""SFT as a job: resumed, its adapters, checkpoints and evaluation, and rows that it leaves out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
import torch
from safetensors.torch import load_file

import grape_service
from grape_service.config.training import LoraSettings, SftTask
from grape_service.errors import StageError, UserError
from grape_service.rows.columns import BEHAVIOR_KNOWN, release_schema
from grape_service.storage.storage import Storage
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from tests.workers.training.trainers.sft_steps import (
    NUM_ROWS,
    first_loss,
    step_by_hand,
    step_settings,
)
from workers.training.trainers import checkpoints
from workers.training.trainers.sft import local_rows, run_sft

pytestmark = pytest.mark.alone


def test_a_resumed_run_ends_with_the_same_weights(reference: str, tmp_path: Path) -> None:
    settings = step_settings(
        batch_size=4, micro_batch_size=2, max_steps=6, save_steps=2, optimizer="adamw_torch", learning_rate=1e-2
    )
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_sft(SftTask(dataset=reference, output=str(straight), settings=settings))
    run_sft(SftTask(dataset=reference, output=str(broken), settings=settings))
    # As if the job had died while it wrote checkpoint-6: that one is cut off, checkpoint-4 is whole.
    weights = broken / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for path in (broken / "model").iterdir():
        path.unlink()
    (broken / "checkpoint-4" / "made").write_text("once")
    mark_again(broken / "checkpoint-4")

    run_sft(SftTask(dataset=reference, output=str(broken), settings=settings))
    assert (broken / "checkpoint-4" / "made").exists(), "steps 1 to 4 were not made again"
    metrics = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (broken, straight)]
    assert metrics[0] == metrics[1]
    assert [json.loads(line)["step"] for line in metrics[0]] == [1, 2, 3, 4, 5, 6]
    expected = load_file(straight / "model" / "model.safetensors")
    for name, value in load_file(broken / "model" / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("unknown", [514, 515, 2**31 - 1, -1])
def test_a_token_id_that_the_model_does_not_have_is_refused_before_the_first_step(
    unknown: int, model: str, tmp_path: Path
) -> None:
    rows = make_rows(1100)
    rows[1050]["input_ids"][0] = unknown
    reference = write_release(tmp_path / "out", rows, {"target": {"model": model}})
    task = SftTask(dataset=reference, output=str(tmp_path / "sft"), settings=step_settings())
    if unknown == 514:
        run_sft(task)
        return
    with pytest.raises(UserError) as refused:
        run_sft(task)
    where = f"row 1,051 of {reference} (prompt_id prompt-1050)"
    assert str(refused.value).startswith(f"{where} holds the token id {unknown}, and {model} has the ids 0 to 514:")
    assert not (tmp_path / "sft" / "metrics.jsonl").exists()


def test_what_damaged_files_leave_of_a_stopped_run(reference: str, tmp_path: Path) -> None:
    """Local rows that a full disk cut short are made again; a damaged marker or inputs file is named in a sentence."""
    settings = step_settings(batch_size=4, micro_batch_size=2, max_steps=2, save_steps=1)
    task = SftTask(dataset=reference, output=str(tmp_path / "sft"), settings=settings)
    release = grape_service.load(reference)
    folder = tmp_path / "rows"
    rows = local_rows(release, folder, 0.0, 515, "m")
    os.truncate(rows.path, rows.path.stat().st_size // 2)
    again = local_rows(release, folder, 0.0, 515, "m")
    assert (again.path, len(again)) == (rows.path, NUM_ROWS)

    run_sft(task)
    shutil.rmtree(tmp_path / "sft" / "model")
    for name, text, sentence in (
        ("checkpoint-2/complete.json", "null", "holds no JSON object"),
        ("checkpoint-2/complete.json", '{"by": "another trainer"}', "its complete.json names no files"),
        ("inputs.json", "[1]", "inputs.json holds no JSON object"),
    ):
        (tmp_path / "sft" / name).write_text(text)
        if "names no files" in sentence:
            with pytest.raises(StageError, match=sentence):
                checkpoints.check_whole(Storage(str(tmp_path / "sft" / "checkpoint-2")))
            shutil.rmtree(tmp_path / "sft" / "checkpoint-2")
        else:
            with pytest.raises(UserError, match=sentence):
                run_sft(task)


def mark_again(folder: Path) -> None:
    """The marker of a checkpoint into which a test has put something."""
    facts = checkpoints.Storage(str(folder)).read_json("complete.json")
    checkpoints.mark_whole(folder, {key: value for key, value in facts.items() if key != "files"})


@pytest.mark.parametrize("place", ["local", "s3"])
def test_another_jobs_checkpoint_in_the_output_is_not_resumed(
    place: str, reference: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    output = str(tmp_path / "sft") if place == "local" else f"{request.getfixturevalue('s3_url')}/fixed"
    storage = checkpoints.Storage(output)
    first = step_settings(max_steps=2, save_steps=1, batch_size=4, micro_batch_size=4)
    run_sft(SftTask(dataset=reference, output=output, settings=first))
    before = storage.read("model/model.safetensors")
    settings = first.model_copy(update={"learning_rate": 0.25})
    facts = run_sft(SftTask(dataset=reference, output=output, settings=settings))
    run_sft(SftTask(dataset=reference, output=str(tmp_path / "fresh"), settings=settings))
    assert storage.read("model/model.safetensors") == (tmp_path / "fresh/model/model.safetensors").read_bytes()
    assert storage.read("metrics.jsonl") == (tmp_path / "fresh/metrics.jsonl").read_bytes()
    assert storage.read_json("model/complete.json")["settings"] == settings.model_dump()
    (kept,) = [folder for folder in storage.folders() if folder.startswith("earlier-")]
    assert storage.read(f"{kept}/model/model.safetensors") == before, "nothing is lost"
    assert facts["notes"] == [
        f"{storage.root} held a job of other inputs, which is in {kept}/ now: training from the start"
    ]
    if place == "local":
        shutil.rmtree(tmp_path / "sft" / "model")
        (tmp_path / "sft" / "model").write_text("no folder")
        with pytest.raises(UserError, match="sft/model is a file where the job writes a folder: move it away"):
            run_sft(SftTask(dataset=reference, output=output, settings=settings))


def test_a_row_whose_behavior_is_partly_unknown_counts_as_a_ratio_of_one(tmp_path: Path) -> None:
    from workers.training.trainers.rows import LocalRows, write_local_rows

    rows = make_rows(5)
    schema = release_schema([], [BEHAVIOR_KNOWN])
    for number, row in enumerate(rows):
        known = row["loss_mask"].copy()
        known[-1] = number == 3
        row["behavior_known"] = None if row["behavior_logprobs"] is None else known
    table = pa.Table.from_pylist(rows, schema=schema)
    write_local_rows(pads.dataset(table), tmp_path / "rows.arrow", 0.0)
    local = LocalRows(tmp_path / "rows.arrow")
    for number, row in enumerate(rows[:-1]):
        found = local.row(number).behavior_logprobs
        assert found is not None
        expected = np.where(row["behavior_known"], row["behavior_logprobs"], np.nan)
        np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert local.row(4).behavior_logprobs is None


def test_a_checkpoint_has_our_card_and_the_folders_permissions(reference: str, model: str, tmp_path: Path) -> None:
    output = tmp_path / "sft"
    output.mkdir(mode=0o755)
    run_sft(SftTask(dataset=reference, output=str(output), run="r7", settings=step_settings(save_steps=1)))
    for folder in (output / "model", output / "checkpoint-1"):
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {folder.stat().st_mode & 0o666}
        text = (folder / "README.md").read_text()
        assert f"of the dataset version `{reference}`, from the model `{model}`" in text
        assert '"learning_rate": 0.5' in text
        assert "| run | `r7` |" in text
        checkpoints.check_whole(checkpoints.Storage(str(folder)))
    assert not (output / "README.md").exists()


def test_an_adapter_is_trained_and_merged(reference: str, model: str, tmp_path: Path) -> None:
    settings = step_settings(lora=LoraSettings(r=4, dropout=0.1), loss="online", max_steps=2, optimizer="adamw_torch")
    run_sft(SftTask(dataset=reference, output=str(tmp_path), settings=settings))
    before = load_file(Path(model) / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000
    assert checkpoints.check_whole(checkpoints.Storage(str(tmp_path / "model")))["settings"]["lora"]["r"] == 4


def test_bfloat16_is_close_to_float32(reference: str, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16", "pure_bf16"):
        task = SftTask(dataset=reference, output=str(tmp_path / precision), settings=step_settings(precision=precision))
        run_sft(task)
        losses[precision] = first_loss(tmp_path / precision)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["pure_bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert len(set(losses.values())) == 3
    weights = load_file(tmp_path / "bf16" / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_evaluation_counts_each_token_once(reference: str, model: str, tmp_path: Path) -> None:
    settings = step_settings(eval_share=0.4, micro_batch_size=2, learning_rate=0.0)
    facts = run_sft(SftTask(dataset=reference, output=str(tmp_path), settings=settings))
    assert 0 < facts["eval_rows"] < NUM_ROWS
    assert facts["rows"] + facts["eval_rows"] == NUM_ROWS
    assert facts["metrics"]["eval_loss_tokens"] + facts["metrics"]["first"]["loss_tokens"] == sum(
        int(row["loss_mask"].sum()) for row in make_rows(NUM_ROWS)
    )
    # Training changed nothing (rate 0), so both sides together are the loss of all rows.
    whole, _ = step_by_hand(model, step_settings())
    parts = [
        (facts["metrics"]["eval_loss"], facts["metrics"]["eval_loss_tokens"]),
        (facts["metrics"]["first"]["loss"], facts["metrics"]["first"]["loss_tokens"]),
    ]
    together = sum(loss * tokens for loss, tokens in parts) / sum(tokens for _, tokens in parts)
    assert together == pytest.approx(whole, rel=1e-5)


def test_long_rows_are_left_out_and_counted(reference: str, tmp_path: Path) -> None:
    lengths = [len(row["input_ids"]) for row in make_rows(NUM_ROWS)]
    limit = sorted(lengths)[NUM_ROWS // 2]
    settings = step_settings(max_length=limit, max_left_out_share=0.6)
    facts = run_sft(SftTask(dataset=reference, output=str(tmp_path), settings=settings))
    assert facts["rows"] == sum(length <= limit for length in lengths)
    too_long = sum(length > limit for length in lengths)
    assert facts["rows_too_long"] == too_long > 0
    sentence = f"{too_long} of 12 rows are longer than max_length {limit} and left out"
    assert facts["notes"] == [sentence]
    assert json.loads((tmp_path / "progress.json").read_text())["notes"] == [sentence]
    with pytest.raises(UserError, match=rf"{sentence} in .*, more than train\.sft\.max_left_out_share 0\.1 allows"):
        run_sft(SftTask(dataset=reference, output=str(tmp_path / "limit"), settings=step_settings(max_length=limit)))
    with pytest.raises(UserError, match="12 are longer than max_length 3"):
        run_sft(SftTask(dataset=reference, output=str(tmp_path / "none"), settings=step_settings(max_length=3)))


def test_rows_longer_than_the_model_has_positions_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "gpt2", arch="gpt2")
    positions = json.loads((Path(model) / "config.json").read_text())["n_positions"]
    rows = make_rows(6)
    for name in ("input_ids", "loss_mask", "labels", "target_logprobs", "behavior_logprobs", "loss_weights"):
        rows[0][name] = np.resize(rows[0][name], positions + 1)
    reference = write_release(tmp_path / "out", rows, {"target": {"model": model}})
    settings = step_settings(batch_size=4, micro_batch_size=4, max_left_out_share=0.5)
    with pytest.raises(UserError, match=rf"has {positions + 1} tokens, and .*gpt2 has positions for {positions}: set"):
        run_sft(SftTask(dataset=reference, output=str(tmp_path / "sft"), settings=settings))
    shorter = settings.model_copy(update={"max_length": positions})
    assert run_sft(SftTask(dataset=reference, output=str(tmp_path / "sft"), settings=shorter))["rows_too_long"] == 1


def test_rows_that_train_nothing_are_told_or_refused(model: str, tmp_path: Path) -> None:
    rows = make_rows(8)
    for row in rows[:2]:
        row["loss_weights"] = np.zeros_like(row["loss_weights"])
    rows[2]["loss_mask"] = np.zeros_like(rows[2]["loss_mask"])
    reference = write_release(tmp_path / "out", rows, {"target": {"model": model}})
    settings = step_settings(batch_size=4, micro_batch_size=4, max_left_out_share=0.5)
    facts = run_sft(SftTask(dataset=reference, output=str(tmp_path / "sft"), settings=settings))
    assert (facts["rows"], facts["rows_without_loss"], facts["rows_without_weight"]) == (7, 1, 2)
    assert facts["notes"] == [
        "1 of 8 rows have no token with loss and are left out",
        "2 of 8 rows have loss weights that are all 0 and train nothing",
    ]
    uniform = settings.model_copy(update={"loss": "uniform"})
    found = run_sft(SftTask(dataset=reference, output=str(tmp_path / "uniform"), settings=uniform))
    assert found["rows_without_weight"] == 0

    for row in rows:
        row["loss_weights"] = np.zeros_like(row["loss_weights"])
    zero = write_release(tmp_path / "zero", rows, {"target": {"model": model}})
    with pytest.raises(UserError, match=r"all loss weights of .* are 0, so that nothing would be trained"):
        run_sft(SftTask(dataset=zero, output=str(tmp_path / "none"), settings=settings))


def test_training_that_diverges_ends_without_a_model(reference: str, model: str, tmp_path: Path) -> None:
    half = Path(shutil.copytree(model, tmp_path / "half"))
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    for over, sentence in (
        ({"learning_rate": 1e38, "max_steps": 4, "save_steps": 1}, r"(loss|grad_norm) is (nan|inf) at step \d: lower"),
        (
            {"learning_rate": 1e10, "model": str(half)},
            r"weight holds values that are no finite numbers in torch\.float16",
        ),
    ):
        output = tmp_path / str(over["learning_rate"])
        with pytest.raises(UserError, match=f"training has diverged: .*{sentence}"):
            run_sft(SftTask(dataset=reference, output=str(output), settings=step_settings(**over)))
        assert not checkpoints.is_whole(Storage(str(output / "model")))


def test_a_batch_that_cannot_be_split_is_refused(reference: str, tmp_path: Path) -> None:
    task = SftTask(dataset=reference, output=str(tmp_path), settings=step_settings(batch_size=10, micro_batch_size=4))
    with pytest.raises(UserError, match="cannot be split evenly"):
        run_sft(task)


def test_checkpoints_on_s3_are_whole_and_gone_on_from(
    reference: str, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = step_settings(batch_size=4, max_steps=4, micro_batch_size=4, save_steps=2, keep_checkpoints=1)
    task = SftTask(dataset=reference, output=f"{s3_url}/sft", settings=settings)
    run_sft(task)
    storage = checkpoints.Storage(task.output)
    assert {info.path.split("/")[0] for info in storage.list()} == {
        "checkpoint-4",
        "model",
        "metrics.jsonl",
        "progress.json",
        "inputs.json",
    }
    assert checkpoints.check_whole(storage.sub("model"))["steps"] == 4
    assert checkpoints.last_whole(storage) == "checkpoint-4"
    metrics = storage.read("metrics.jsonl")
    # Another node, which has nothing of the job on its disk, goes on.
    storage.delete_folder("model")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_sft(task)["steps"] == 4
    assert storage.read("metrics.jsonl") == metrics
    storage.delete("checkpoint-4/optimizer.pt")
    assert checkpoints.last_whole(storage) is None


def test_a_missing_package_is_named(reference: str, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(SftTask(dataset=reference, output=str(tmp_path)).model_dump_json())
    code = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'trl' else real(name, *a)\n"
        f"sys.argv = ['sft', '--settings', {str(tmp_path / 'task.json')!r}]\n"
        "import runpy; runpy.run_module('workers.training.trainers.sft', run_name='__main__')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    root = Path(__file__).parents[4]
    command = f"{sys.executable} -m pip install -c {root}/requirements/constraints.txt -e '{root}[run,train]'"
    assert ended.stderr.strip().endswith(f"training needs the package 'trl': {command}")
