"""Weighted SFT on a release.

    python -m workers.training.trainers.sft --settings task.json
    torchrun --nproc-per-node 8 -m workers.training.trainers.sft --settings task.json

The task file holds an SftTask. The output folder gets metrics.jsonl, checkpoint-<step>/ to go on from, and
model/, the trained model with its tokenizer, whole when its complete.json is there.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

import grape_service
from grape_service.config.methods import WeightsConfig
from grape_service.config.training import ONLINE_NEEDS_NO_DATASET_MEAN, SftSettings, SftTask, require_train_extra
from grape_service.errors import UserError
from grape_service.release.load import Release
from workers.training.base_model import base_model, check_tokenizer
from workers.training.trainers.task_file import main


def run_sft(task: SftTask) -> dict[str, Any]:
    """Train, from the last whole checkpoint in the output folder if there is one; returns the final facts.

    Raises UserError for settings that do not fit the release or the number of processes.
    """
    require_train_extra()
    from datasets import Dataset

    from workers.training.trainers import session
    from workers.training.trainers.batches import RowCollator
    from workers.training.trainers.rows import LocalRows, packed_groups, rounded_up, single_groups, write_local_rows
    from workers.training.trainers.weighted import WeightedSFTTrainer

    settings = task.settings
    release = grape_service.load(task.dataset, task.storage)
    run_config = release.manifest.config
    model_name = base_model(release, settings)
    pear = online_config(settings, run_config)
    if pear is not None and pear.needs_behavior:
        _refuse_temperatures(release)
    output = session.Output(task.output, task.storage)

    processes = session.num_processes()
    micro_batch_size, accumulation = session.split_batch(settings.batch_size, settings.micro_batch_size, processes)
    arguments = session.sft_arguments(settings, output.folder, micro_batch_size, accumulation)

    digest = hashlib.sha256(f"{release.reference}|{settings.eval_share}".encode()).hexdigest()[:16]
    rows_path = output.folder / f"rows-{digest}.arrow"
    with session.one_process_first():
        if not rows_path.exists():
            release.check_files()
            write_local_rows(release.dataset, rows_path, settings.eval_share)
    rows = LocalRows(rows_path)
    fits = rows.lengths <= (settings.max_length or rows.lengths.max(initial=0))
    train_indices = np.flatnonzero(fits & ~rows.is_eval)
    eval_indices = np.flatnonzero(fits & rows.is_eval)
    without_behavior = rows.num_without_behavior(train_indices) if pear is None or pear.needs_behavior else 0
    _check_rows(task, len(train_indices), int((~fits).sum()), without_behavior)

    def dataset_of(indices: np.ndarray, multiple: int, seed: int | None) -> Any:
        if settings.packing:
            assert settings.max_length is not None
            groups = packed_groups(indices, rows.lengths, settings.max_length, seed)
        else:
            groups = single_groups(indices)
        return Dataset.from_dict({"rows": rounded_up(groups, multiple)})

    model = session.local_model(model_name, settings, task.storage)
    check_tokenizer(release, model_name, model, settings)
    tokenizer = session.load_tokenizer(model, settings, run_config)
    pad_token_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    facts = {
        "stage": "sft",
        "dataset": release.reference,
        "run": task.run,
        "model": model_name,
        "settings": settings.model_dump(mode="json"),
        "rows": len(train_indices),
        "eval_rows": len(eval_indices),
        "rows_too_long": int((~fits).sum()),
    }
    trainer = WeightedSFTTrainer(
        settings=settings,
        pear=pear,
        model=model,
        args=arguments,
        train_dataset=dataset_of(train_indices, settings.batch_size, settings.seed if settings.shuffle else None),
        eval_dataset=dataset_of(eval_indices, micro_batch_size * processes, None) if len(eval_indices) else None,
        data_collator=RowCollator(rows, pad_token_id, settings.packing),
        processing_class=tokenizer,
        peft_config=session.lora_config(settings),
        callbacks=[session.WholeCheckpoints(output, facts), session.MetricsFile(output), session.Progress(output)],
    )
    trainer.train(resume_from_checkpoint=output.resume_from())
    metrics = dict(trainer.evaluate()) if len(eval_indices) else {}
    return session.save_final(trainer, settings, output, {**facts, "metrics": metrics}, [rows_path])


ONLINE_METHODS = ("pear", "probability")
"""Weights methods that follow from the log p that a step computes anyway."""


def online_config(settings: SftSettings, run_config: dict[str, Any]) -> WeightsConfig | None:
    """The formula of loss: online: the settings' own, else that of the release. Raises UserError."""
    if settings.loss != "online":
        return None
    config = settings.pear
    if config is None and run_config.get("weights"):
        config = WeightsConfig.model_validate(run_config["weights"])
    if config is None:
        raise UserError("loss: online needs to know the formula, and the release was not weighed: give train.sft.pear")
    if config.method not in ONLINE_METHODS:
        raise UserError(
            f"loss: online cannot make weights of method {config.method} again from the model that is trained "
            f"({' and '.join(ONLINE_METHODS)} it can): use loss: column"
        )
    if config.normalize == "dataset":
        raise UserError(ONLINE_NEEDS_NO_DATASET_MEAN)
    return config


def _refuse_temperatures(release: Release) -> None:
    """Raises UserError where behavior_logprobs are of a sharper or flatter policy than the one that is trained."""
    for policy in release.manifest.parents.policies:
        temperature = (policy.model_extra or {}).get("temperature", 1.0)
        if temperature != 1.0:
            raise UserError(
                f"loss: online compares with the model at temperature 1, and rows of {release.reference} were sampled "
                f"at {temperature:g}: use loss: column"
            )


def _check_rows(task: SftTask, num_rows: int, num_too_long: int, num_without_behavior: int) -> None:
    if not num_rows:
        limit = f"; {num_too_long} are longer than max_length {task.settings.max_length}" if num_too_long else ""
        raise UserError(f"{task.dataset} has no row to train on{limit}")
    if task.settings.loss == "online" and num_without_behavior == num_rows:
        raise UserError(
            f"loss: online needs behavior_logprobs, and no row of {task.dataset} has them: "
            "make the release with a behavior section, or use loss: column"
        )


if __name__ == "__main__":
    main(SftTask, run_sft)
