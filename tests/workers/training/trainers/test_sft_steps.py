"""One SGD step of the trainer against the same step made by hand in float64, in every way to form a batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grape_service.config.methods import WeightsConfig
from grape_service.config.training import SftSettings, SftTask
from grape_service.errors import UserError
from grape_service.release.manifest import Parents, PolicyUse
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from tests.workers.training.trainers.sft_steps import (
    BLOCK,
    NUM_ROWS,
    first_loss,
    log_probs_by_hand,
    step_by_hand,
    step_settings,
)
from workers.training.trainers.sft import run_sft

pytestmark = pytest.mark.alone


def assert_same_step(output: Path, model: str, settings: SftSettings) -> None:
    expected_loss, expected = step_by_hand(model, settings)
    assert first_loss(output) == pytest.approx(expected_loss, rel=2e-6)
    found = load_file(output / "model" / "model.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=2e-6)


SAME_LOSS: dict[str, dict[str, Any]] = {
    "padding": {},
    "accumulation": {"micro_batch_size": 2},
    "packing": {"packing": True, "max_length": 64, "batch_size": 8, "micro_batch_size": 8},
    "packing-accumulation": {"packing": True, "max_length": 48, "batch_size": 12, "micro_batch_size": 1},
    "blank-rows": {"batch_size": 16, "micro_batch_size": 4},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("loss", ["uniform", "column", "online"])
@pytest.mark.parametrize("way", SAME_LOSS)
def test_a_step_is_the_one_made_by_hand(way: str, loss: str, reference: str, model: str, tmp_path: Path) -> None:
    settings = step_settings(loss=loss, **SAME_LOSS[way])
    run_sft(SftTask(dataset=reference, output=str(tmp_path), settings=settings))
    assert_same_step(tmp_path, model, settings)


@pytest.mark.parametrize("loss", ["uniform", "column"])
def test_a_dft_step_is_the_one_made_by_hand(loss: str, reference: str, model: str, tmp_path: Path) -> None:
    settings = step_settings(loss=loss, base_loss="dft")
    run_sft(SftTask(dataset=reference, output=str(tmp_path), settings=settings))
    assert_same_step(tmp_path, model, settings)


@pytest.mark.parametrize("arch", ["gemma2", "qwen3"])
def test_packed_rows_see_only_themselves_in_other_architectures(arch: str, tmp_path: Path) -> None:
    # Gemma 2 soft-caps its logits and alternates sliding windows of 16 tokens.
    model = make_model(tmp_path / "model", arch=arch)
    config = {"target": {"model": model}, "weights": {"method": "pear"}}
    reference = write_release(tmp_path / "out", make_rows(NUM_ROWS), config)
    settings = step_settings(packing=True, max_length=64, batch_size=4, micro_batch_size=2)
    run_sft(SftTask(dataset=reference, output=str(tmp_path / "sft"), settings=settings))
    assert_same_step(tmp_path / "sft", model, settings)


def test_two_processes_make_the_step_of_one_big_batch(reference: str, model: str, tmp_path: Path) -> None:
    # 2 processes with 4 micro-batches each, the last of which are blank.
    settings = step_settings(loss="online", micro_batch_size=2, batch_size=16)
    task = SftTask(dataset=reference, output=str(tmp_path), settings=settings)
    (tmp_path / "task.json").write_text(task.model_dump_json())
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "workers.training.trainers.sft", "--settings", str(tmp_path / "task.json")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        check=True,
        timeout=120,
    )
    assert_same_step(tmp_path, model, settings)


def test_weights_of_one_give_the_loss_of_trls_own_trainer(model: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = make_rows(NUM_ROWS)
    for row in rows:
        row["loss_weights"] = row["loss_mask"].astype(np.float32)
    reference = write_release(tmp_path / "out", rows, {"target": {"model": model}})
    settings = step_settings(micro_batch_size=3)
    run_sft(SftTask(dataset=reference, output=str(tmp_path / "ours"), settings=settings))

    arguments = SFTConfig(
        output_dir=str(tmp_path / "theirs"),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        max_steps=1,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        logging_first_step=True,
    )
    theirs = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    theirs.train()
    assert first_loss(tmp_path / "ours") == pytest.approx(theirs.state.log_history[0]["loss"], rel=1e-6)
    ours = load_file(tmp_path / "ours" / "model" / "model.safetensors")
    expected = dict(theirs.model.named_parameters())
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pear", [{}, BLOCK, {"level": "sequence"}, {"center": "sequence"}], ids=str)
def test_online_starts_with_the_weights_of_the_column(pear: dict[str, Any], model: str, tmp_path: Path) -> None:
    """The column as a release has it: made by grape_service.weigh.pear from the model's own log-probabilities."""
    from grape_service.weigh.pear import log_ratios, pear_weights

    config = WeightsConfig(**pear)
    scorer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = make_rows(NUM_ROWS)[:-1]
    for row in rows:
        mask = row["loss_mask"]
        with torch.no_grad():
            target = log_probs_by_hand(scorer, row["input_ids"].tolist(), mask.tolist()).numpy()
        ratios = log_ratios(target, row["behavior_logprobs"][mask])
        row["loss_weights"][mask] = pear_weights(ratios, np.array([0, len(target)]), config).weights
    reference = write_release(
        tmp_path / "out", rows, {"target": {"model": model}, "weights": config.model_dump(mode="json")}
    )
    logs = {}
    for loss in ("column", "online"):
        settings = step_settings(loss=loss, batch_size=len(rows), micro_batch_size=len(rows))
        run_sft(SftTask(dataset=reference, output=str(tmp_path / loss), settings=settings))
        logs[loss] = json.loads((tmp_path / loss / "metrics.jsonl").read_text().splitlines()[0])
    assert logs["online"]["weight_mean"] != pytest.approx(1.0, abs=1e-3) or pear == BLOCK
    for figure in ("loss", "weight_mean", "weight_min", "weight_max", "ess", "grad_norm"):
        assert logs["online"][figure] == pytest.approx(logs["column"][figure], rel=1e-4), figure


def test_online_follows_the_model(reference: str, tmp_path: Path) -> None:
    settings = step_settings(loss="online", max_steps=3)
    run_sft(SftTask(dataset=reference, output=str(tmp_path), settings=settings))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len({line["ess"] for line in lines if "ess" in line}) == 3


def test_online_refuses_what_it_cannot_know(reference: str, model: str, tmp_path: Path) -> None:
    rows = make_rows(4)
    config = {"target": {"model": model}, "weights": {"method": "pear", "normalize": "dataset"}}
    by_dataset = write_release(tmp_path / "by-dataset", rows, config)
    task = SftTask(dataset=by_dataset, output=str(tmp_path / "sft"), settings=step_settings(loss="online"))
    with pytest.raises(UserError, match="refuses normalize: dataset"):
        run_sft(task)
    with pytest.raises(ValueError, match="refuses normalize: dataset"):
        SftSettings(loss="online", pear=WeightsConfig(normalize="dataset"))

    for row in rows:
        row["behavior_logprobs"] = None
    nobody = write_release(tmp_path / "nobody", rows, {"target": {"model": model}, "weights": {"method": "pear"}})
    with pytest.raises(UserError, match=r"no row of .* has them"):
        run_sft(task.model_copy(update={"dataset": nobody}))


def test_online_refuses_rows_of_another_temperature(model: str, tmp_path: Path) -> None:
    use = PolicyUse.model_validate({"role": "target", "policy_id": "t", "model": model, "temperature": 0.7})
    config = {"target": {"model": model}, "weights": {"method": "pear"}}
    reference = write_release(tmp_path / "out", make_rows(3), config, parents=Parents(policies=[use]))
    with pytest.raises(UserError, match=r"were sampled at 0\.7: use loss: column"):
        run_sft(SftTask(dataset=reference, output=str(tmp_path / "sft"), settings=step_settings(loss="online")))
