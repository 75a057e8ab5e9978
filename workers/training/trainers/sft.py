"""Weighted SFT on a release.

    python -m workers.training.trainers.sft --settings task.json
    torchrun --nproc-per-node 8 -m workers.training.trainers.sft --settings task.json

The task file holds an SftTask. The output folder gets metrics.jsonl, checkpoint-<step>/ to go on from, and
model/, the trained model with its tokenizer, whole when its complete.json is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pyarrow import ArrowInvalid

from grape_service.config.methods import WeightsConfig
from grape_service.config.training import ONLINE_NEEDS_NO_DATASET_MEAN, SftSettings, SftTask, require_train_extra
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.keys import digest_of
from grape_service.methods import WEIGHTS
from grape_service.models.tokenizer import position_limit
from grape_service.models.whole import CheckpointFacts
from grape_service.release.load import Release, load_training_set
from grape_service.release.token_ids import refuse_unknown_ids
from workers.training.base_model import base_model, base_revision, check_tokenizer
from workers.training.batch_split import split_of
from workers.training.inputs import release_digest, resolved_model_inputs
from workers.training.trainers.task_file import main

if TYPE_CHECKING:
    import pyarrow as pa

    from workers.training.trainers.rows import LocalRows

FORMAT = 3
"""Raised when the same inputs come to give another model."""


def run_sft(task: SftTask) -> CheckpointFacts:
    """Train, from the last whole checkpoint in the output folder if there is one; returns the final facts.

    Raises UserError for settings that do not fit the release or the number of processes.
    """
    require_train_extra()
    from datasets import Dataset

    from workers.training.trainers import output as outputs
    from workers.training.trainers import session
    from workers.training.trainers.batches import RowCollator
    from workers.training.trainers.rendering import renderer_of, stop_at_turn_ends
    from workers.training.trainers.reports import reported
    from workers.training.trainers.rows import packed_groups, rounded_up, single_groups
    from workers.training.trainers.weighted import WeightedSFTTrainer

    settings = task.settings
    release = load_training_set(task.dataset, task.storage)
    rendered_with = release.manifest.rendered_with
    model_name = base_model(release, settings)
    pear = online_config(settings, release.manifest.config)
    if pear is not None and pear.needs_behavior:
        _refuse_temperatures(release)
    files = session.local_model(model_name, base_revision(release, settings), settings, task.storage)
    check_tokenizer(release, model_name, files.folder, settings)
    facts: CheckpointFacts = {
        "stage": "sft",
        "dataset": release.reference,
        "run": task.run,
        "model": model_name,
        "settings": settings.model_dump(mode="json"),
    }
    inputs: JsonObject = {"stage": facts["stage"], "dataset": facts["dataset"], "settings": facts["settings"]}
    inputs |= {"format": FORMAT, "release": release_digest(release), "model_files": resolved_model_inputs(files)}
    output = outputs.Output(task.output, task.storage, inputs)
    output.doing("reads the rows of the release")

    processes = session.num_processes()
    micro_batch_size, accumulation = split_of(settings, processes)
    arguments = session.sft_arguments(settings, output.folder, micro_batch_size, accumulation)

    tokenizer = session.load_tokenizer(files.folder, settings, rendered_with[1])
    num_ids = session.num_token_ids(files.folder, tokenizer)
    rows = local_rows(release, output.folder, settings.eval_share, num_ids, model_name)
    usable, left_out, notes = usable_rows(rows, settings)
    train_indices = np.flatnonzero(usable & ~rows.is_eval)
    eval_indices = np.flatnonzero(usable & rows.is_eval)
    without_behavior = rows.num_without_behavior(train_indices) if pear is None or pear.needs_behavior else 0
    _check_rows(task, len(train_indices), left_out["rows_too_long"], without_behavior)
    _check_left_out(task, len(rows), left_out, notes)
    _check_positions(task, model_name, files.folder, int(rows.lengths[usable].max()))
    for note in notes:
        output.note(note)

    def dataset_of(indices: np.ndarray, multiple: int, seed: int | None) -> Any:
        if settings.packing:
            assert settings.max_length is not None
            groups = packed_groups(indices, rows.lengths, settings.max_length, seed)
        else:
            groups = single_groups(indices)
        return Dataset.from_dict({"rows": rounded_up(groups, multiple)})

    output.doing("loads the model")
    pad_token_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    facts |= {"inputs": output.inputs, "rows": len(train_indices), "eval_rows": len(eval_indices), **left_out}
    trainer = WeightedSFTTrainer(
        settings=settings,
        pear=pear,
        model=files.folder,
        args=arguments,
        train_dataset=dataset_of(train_indices, settings.batch_size, settings.seed if settings.shuffle else None),
        eval_dataset=dataset_of(eval_indices, micro_batch_size * processes, None) if len(eval_indices) else None,
        data_collator=RowCollator(rows, pad_token_id, settings.packing),
        processing_class=tokenizer,
        peft_config=session.lora_config(settings),
        callbacks=outputs.callbacks(output, facts),
    )
    stop_at_turn_ends(
        trainer.accelerator.unwrap_model(trainer.model).generation_config,
        renderer_of(files.folder, tokenizer, settings, rendered_with, output.note),
    )
    with reported(trainer, output, facts, release):
        trainer.train(resume_from_checkpoint=output.resume_from())
        metrics = last_evaluation(trainer) if len(eval_indices) else {}
    return session.save_final(trainer, settings, output, {**facts, "metrics": metrics}, [rows.path])


def last_evaluation(trainer: Any) -> dict[str, Any]:
    """The figures of an evaluation after the last step, which is made unless it was."""
    for line in trainer.state.log_history:
        if "eval_loss" in line and line["step"] == trainer.state.global_step:
            return {key: value for key, value in line.items() if key != "step"}
    return dict(trainer.evaluate())


def local_rows(release: Release, folder: Path, eval_share: float, num_ids: int, model: str) -> LocalRows:
    """The release's rows in a local file, which is named by their content, by how it is split and by how many token ids
    the model has.

    Raises UserError for a data file that is not what the manifest says, and for a token id that the model does not
    have.
    """
    from workers.training.trainers.output import one_process_first
    from workers.training.trainers.rows import LOCAL_ROWS, LocalRows, write_local_rows

    content = [[entry.sha256, entry.rows] for entry in release.manifest.files]
    path = folder / f"rows-{digest_of([content, eval_share, num_ids, str(LOCAL_ROWS), FORMAT])[:16]}.arrow"

    def check(batch: pa.RecordBatch, first: int) -> None:
        refuse_unknown_ids(batch, num_ids, model, release.reference, first)

    with one_process_first():
        try:
            return LocalRows(path)
        except (FileNotFoundError, ArrowInvalid):  # it is not there yet, or what a full disk left of it
            release.check_files()
            write_local_rows(release.dataset, path, eval_share, check)
            return LocalRows(path)


def usable_rows(rows: LocalRows, settings: SftSettings) -> tuple[np.ndarray, CheckpointFacts, list[str]]:
    """Which rows are trained on [N], how many are not and why, and the same in sentences.

    A row whose weights are all 0 stays: its tokens count in the mean, and it trains nothing.
    """
    total = len(rows)
    too_long = rows.lengths > settings.max_length if settings.max_length else np.zeros(total, bool)
    no_loss = ~rows.has_loss & ~too_long
    usable = ~too_long & ~no_loss
    no_weight = usable & ~rows.has_weight if settings.loss == "column" else np.zeros(total, bool)
    sentences = {
        f"are longer than max_length {settings.max_length} and left out": int(too_long.sum()),
        "have no token with loss and are left out": int(no_loss.sum()),
        "have loss weights that are all 0 and train nothing": int(no_weight.sum()),
    }
    counts: CheckpointFacts = {
        "rows_too_long": int(too_long.sum()),
        "rows_without_loss": int(no_loss.sum()),
        "rows_without_weight": int(no_weight.sum()),
    }
    return usable, counts, [f"{rows:,} of {total:,} rows {words}" for words, rows in sentences.items() if rows]


ONLINE_METHODS = tuple(name for name, method in WEIGHTS.items() if method.online is not None)
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


def _check_left_out(task: SftTask, num_rows: int, left_out: CheckpointFacts, notes: list[str]) -> None:
    """Raises UserError where more rows train nothing than `max_left_out_share` allows, or all of them."""
    too_long_or_empty = left_out["rows_too_long"] + left_out["rows_without_loss"]
    share = (too_long_or_empty + left_out["rows_without_weight"]) / num_rows
    limit = task.settings.max_left_out_share
    if left_out["rows_without_weight"] == num_rows - too_long_or_empty:
        raise UserError(
            f"all loss weights of {task.dataset} are 0, so that nothing would be trained: make the release with other "
            "weights, or use loss: uniform"
        )
    if share > limit:
        raise UserError(
            f"{' and '.join(notes)} in {task.dataset}, more than train.sft.max_left_out_share {limit:g} allows: "
            "correct what leaves them out, or raise that share"
        )


def _check_positions(task: SftTask, model: str, folder: str, longest: int) -> None:
    """Raises UserError where a row is longer than the model has positions for: training would end in the middle."""
    limit = position_limit(folder)
    if limit is not None and longest > limit:
        raise UserError(
            f"the longest row of {task.dataset} has {longest:,} tokens, and {model} has positions for {limit:,}: set "
            f"train.sft.max_length to at most {limit} to leave such rows out, or train another model"
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
