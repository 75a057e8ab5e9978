"""Exports, loaded again; with TRL's own code here, with other trainers' in test_matrix.py."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import grape_service
from grape_service.errors import UserError
from grape_service.exports import export
from grape_service.exports.repeats import num_copies
from grape_service.release.load import Release
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release

NUM_ROWS = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return grape_service.load(write_release(tmp_path / "out", make_rows(NUM_ROWS), {}))


@pytest.fixture
def unweighted(tmp_path: Path) -> Release:
    rows = make_rows(NUM_ROWS)
    for row in rows:
        row["loss_weights"] = row["loss_mask"].astype(np.float32)
    return grape_service.load(write_release(tmp_path / "plain", rows, {}))


def imported_file(path: Path) -> Any:
    """A Python file of an export, as a trainer would import it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_weights_that_are_all_0_are_refused_where_rows_are_repeated(tmp_path: Path) -> None:
    rows = make_rows(4)
    for row in rows:
        row["loss_weights"] = np.zeros_like(row["loss_weights"])
    release = grape_service.load(write_release(tmp_path, rows, {}))
    for to in ("axolotl", "openrlhf", "llamafactory"):
        with pytest.raises(UserError, match=r"all loss weights of .* are 0, so no row would occur"):
            export(release, to, str(tmp_path / to))
        assert export(release, to, str(tmp_path / to), drop_weights=True).rows == 4
    told = "All loss weights are 0, so that nothing would be trained."
    for to in ("trl", "verl", "ms-swift", "tinker", "megatron-bridge", "llamafactory-v1", "jsonl"):
        assert told in export(release, to, str(tmp_path / to)).notes
        assert told not in export(release, to, str(tmp_path / f"{to}-without"), drop_weights=True).notes


def test_rows_of_which_no_token_has_loss_are_not_said_to_have_weight_1(tmp_path: Path) -> None:
    rows = make_rows(4)
    for row in rows:
        row["loss_mask"] = np.zeros_like(row["loss_mask"])
        row["loss_weights"] = np.zeros_like(row["loss_weights"])
        row["labels"] = np.full_like(row["labels"], -100)
    release = grape_service.load(write_release(tmp_path, rows, {}))
    for to in ("axolotl", "openrlhf", "llamafactory"):
        for drop_weights in (False, True):
            with pytest.raises(UserError, match=r"no token of .* has loss, so no row would occur"):
                export(release, to, str(tmp_path / to), drop_weights=drop_weights)
    for to in ("trl", "verl", "ms-swift", "tinker", "megatron-bridge", "llamafactory-v1", "jsonl"):
        summary = export(release, to, str(tmp_path / to))
        assert "4 rows" in summary.sentence
        assert "in which no token has loss" in summary.sentence
        assert "No token has loss, so that nothing would be trained." in summary.notes
        assert "weight 1" not in (tmp_path / to / "README.md").read_text()
        assert "trains on all there is" not in summary.sentence


@pytest.mark.parametrize("to", ["axolotl", "openrlhf", "llamafactory"])
def test_a_row_without_loss_does_not_occur_where_a_trainer_makes_its_own_tokens(to: str, tmp_path: Path) -> None:
    rows = make_rows(4)
    for number, row in enumerate(rows):
        row["loss_mask"] &= number > 0
        row["loss_weights"] = row["loss_mask"].astype(np.float32)
        row["labels"] = np.where(row["loss_mask"], row["input_ids"], -100).astype(np.int32)
    summary = export(grape_service.load(write_release(tmp_path, rows, {})), to, str(tmp_path / to))
    assert "3 rows in which every token has weight 1" in summary.sentence
    assert "1 more have no token with loss and are left out" in summary.sentence
    (file,) = (tmp_path / to).glob("**/train*.jsonl" if to != "axolotl" else "**/*.parquet")
    text = file.read_text() if to != "axolotl" else ""
    assert summary.rows == (len(text.splitlines()) if text else 3)
    assert "0?" not in text


def test_trl_takes_the_weights_to_the_loss(release: Release, model: str, tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl import SFTConfig

    summary = export(release, "trl", str(tmp_path / "trl"))
    assert "train with WeightedSFTTrainer from weighted_sft.py" in summary.sentence
    files = str(tmp_path / "trl" / "data" / "*.parquet")
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    expected, tokens = 0.0, 0
    scorer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    for found, row in zip(rows, make_rows(NUM_ROWS), strict=True):
        np.testing.assert_array_equal(np.float32(found["loss_weights"]), row["loss_weights"])
        with torch.no_grad():
            logits = scorer(torch.tensor([found["input_ids"]])).logits[0, :-1].log_softmax(-1)
        nll = -logits.gather(1, torch.tensor(found["input_ids"])[1:, None])[:, 0]
        expected += float((nll * torch.tensor(row["loss_weights"][1:].astype(float))).sum())
        tokens += int(row["loss_mask"].sum())

    arguments = SFTConfig(
        output_dir=str(tmp_path / "trained"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=5,
        max_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_first_step=True,
    )
    trainer = imported_file(tmp_path / "trl" / "weighted_sft.py").WeightedSFTTrainer(model, arguments, rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected / tokens, rel=1e-5)


def test_trls_own_trainer_takes_an_export_without_weights(unweighted: Release, model: str, tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    summary = export(unweighted, "trl", str(tmp_path / "trl"), drop_weights=True)
    assert "every token has weight 1" in summary.sentence
    files = str(tmp_path / "trl" / "data" / "*.parquet")
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trained"), bf16=False, use_cpu=True, report_to="none", max_length=None
    )
    trainer = SFTTrainer(model, arguments, train_dataset=rows)
    (batch,) = list(trainer.get_train_dataloader())[:1]
    assert int((batch["labels"] != -100).sum()) <= sum(int(row["loss_mask"].sum()) for row in make_rows(NUM_ROWS))
    assert trainer.train_dataset[0]["labels"] == make_rows(NUM_ROWS)[0]["labels"].tolist()


@pytest.mark.parametrize("drop_weights", [False, True])
def test_the_code_in_an_export_for_trl_runs_as_it_stands(
    drop_weights: bool, release: Release, model: str, tmp_path: Path
) -> None:
    """But for the model, which the release names and this machine has elsewhere, and the number of steps."""
    export(release, "trl", str(tmp_path / "trl"), drop_weights=drop_weights)
    text = (tmp_path / "trl" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    named = release.manifest.config.get("target", {}).get("model", "the target's model")
    assert f"model={named!r}" in code
    code = code.replace(repr(named), repr(model)).replace("max_length=None", "max_length=None, max_steps=1")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "trl", env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train_loss" in done.stdout


def test_verl_gets_each_token_with_its_weight(release: Release, tmp_path: Path) -> None:
    summary = export(release, "verl", str(tmp_path / "verl"))
    assert "start grape_verl.py beside them" in summary.sentence
    dataset_class = imported_file(tmp_path / "verl" / "grape_verl.py").ReleaseDataset
    files = [str(path) for path in sorted((tmp_path / "verl" / "data").iterdir())]
    dataset = dataset_class(files, tokenizer=None, config={"pad_mode": "no_padding", "max_length": 64})
    assert len(dataset) == NUM_ROWS
    for index, row in enumerate(make_rows(NUM_ROWS)):
        item = dataset[index]
        np.testing.assert_array_equal(item["input_ids"].numpy(), row["input_ids"])
        np.testing.assert_array_equal(item["loss_mask"].numpy(), row["loss_weights"])
        assert item["position_ids"].tolist() == list(range(len(row["input_ids"])))
    with pytest.raises(ValueError, match=r"has .* tokens, more than"):
        dataset_class(files, tokenizer=None, config={"max_length": 4})[0]

    dropped = export(release, "verl", str(tmp_path / "dropped"), drop_weights=True)
    assert "without their loss weights, as asked" in dropped.sentence
    plain = dataset_class(str(tmp_path / "dropped" / "data" / "part-00000.parquet"), None, {})
    np.testing.assert_array_equal(plain[0]["loss_mask"].numpy(), make_rows(1)[0]["loss_mask"].astype(np.float32))


def test_llamafactory_gets_rows_as_often_as_they_weigh(tmp_path: Path) -> None:
    rows = make_rows(600)
    for number, row in enumerate(rows):
        row["loss_weights"] = row["loss_mask"] * np.float32([0.0, 0.5, 2.5][number % 3])
    release = grape_service.load(write_release(tmp_path / "out", rows, {}))
    summary = export(release, "llamafactory", str(tmp_path / "lf"))
    counts: dict[str, int] = {}
    for line in lines(tmp_path / "lf" / "train.jsonl"):
        counts[line["messages"][0]["content"]] = counts.get(line["messages"][0]["content"], 0) + 1
    by_weight = [[counts.get(f"{number}?", 0) for number in range(kind, 600, 3)] for kind in range(3)]
    assert set(by_weight[0]) == {0}
    assert set(by_weight[1]) == {0, 1}
    assert set(by_weight[2]) == {2, 3}
    assert summary.rows == sum(counts.values()) == pytest.approx(600, rel=0.05)
    assert f"600 rows became {summary.rows}" in summary.sentence
    assert "takes no token weights" in summary.sentence
    export(release, "llamafactory", str(tmp_path / "again"))
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == (tmp_path / "lf" / "train.jsonl").read_bytes()


def test_copies_are_right_in_the_mean() -> None:
    copies = [num_copies(1.3, str(number)) for number in range(4000)]
    assert set(copies) == {1, 2}
    assert np.mean(copies) == pytest.approx(1.3, abs=0.03)


def test_llamafactory_without_weights_is_each_row_once(release: Release, unweighted: Release, tmp_path: Path) -> None:
    dropped = export(release, "llamafactory", str(tmp_path / "a"), drop_weights=True)
    assert "without their loss weights, as asked" in dropped.sentence
    plain = export(unweighted, "llamafactory", str(tmp_path / "b"))
    assert "every token has weight 1" in plain.sentence
    for folder in ("a", "b"):
        assert [line["messages"] for line in lines(tmp_path / folder / "train.jsonl")] == [
            row["messages"] for row in make_rows(NUM_ROWS)
        ]


def test_jsonl_has_messages_and_the_tokens_of_the_weights(release: Release, tmp_path: Path) -> None:
    summary = export(release, "jsonl", tmp_path / "jsonl")
    assert "trains without the weights" in summary.sentence
    for line, row in zip(lines(tmp_path / "jsonl" / "train.jsonl"), make_rows(NUM_ROWS), strict=True):
        assert line["messages"] == row["messages"]
        assert line["answer"] == row["answer"]
        assert line["input_ids"] == row["input_ids"].tolist()
        np.testing.assert_array_equal(np.float32(line["loss_weights"]), row["loss_weights"])

    dropped = export(release, "jsonl", str(tmp_path / "dropped"), drop_weights=True)
    assert "without loss weights, as asked" in dropped.sentence
    (first, *_) = lines(tmp_path / "dropped" / "train.jsonl")
    assert not {"input_ids", "loss_mask", "loss_weights"} & set(first)


def test_an_export_to_s3_and_mistakes(release: Release, tmp_path: Path, s3_url: str) -> None:
    summary = export(release, "verl", f"{s3_url}/verl")
    with release.storage.sub("").__class__(f"{s3_url}/verl").open("data/part-00000.parquet") as file:
        assert pq.read_table(file).num_rows == summary.rows == NUM_ROWS
    with pytest.raises(UserError, match="is not empty"):
        export(release, "jsonl", f"{s3_url}/verl")
    with pytest.raises(UserError, match="--to nemo is no export: choose one of trl, verl, ms-swift"):
        export(release, "nemo", str(tmp_path / "x"))
    with pytest.raises(UserError, match=r"--eval-share 1.5 is no share: give a number from 0"):
        export(release, "jsonl", str(tmp_path / "x"), eval_share=1.5)
    with pytest.raises(UserError, match=r"--eval-share nan is no share"):
        export(release, "jsonl", str(tmp_path / "x"), eval_share=float("nan"))
