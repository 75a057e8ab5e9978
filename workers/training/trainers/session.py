"""What SFT and RL share: model, tokenizer, precision, arguments and the final model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer
from trl import SFTConfig

from grape_service.config.policy import PolicyConfig
from grape_service.config.training import OptimizerSettings, SftSettings
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.models.files import ModelFiles, resolve_model
from grape_service.models.tokenizer import vocabulary_size
from grape_service.models.whole import CheckpointFacts
from grape_service.storage.options import StorageOptions
from workers.training.trainers import checkpoints
from workers.training.trainers.output import METRICS_FILE, TRACKING_FILE, Output, one_process_first

Arguments = TypeVar("Arguments")

LONG_WAIT_SECONDS = 7200
"""How long processes wait for the one that copies a dataset or a model."""


def num_processes() -> int:
    """Processes of this job, from torchrun's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def precision(settings: OptimizerSettings) -> tuple[bool, torch.dtype]:
    """Whether arithmetic is bfloat16, and the dtype of the weights."""
    on_gpu = settings.device == "auto" and torch.cuda.is_available()
    name = settings.precision if settings.precision != "auto" else ("bf16" if on_gpu else "fp32")
    return name == "bf16", torch.bfloat16 if name == "pure_bf16" else torch.float32


def shared_arguments(settings: OptimizerSettings, folder: Path) -> dict[str, Any]:
    """Arguments that SFTConfig and GRPOConfig have in common."""
    autocast, dtype = precision(settings)
    model_arguments: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    if settings.attention is not None:
        model_arguments["attn_implementation"] = settings.attention
    return {
        "output_dir": str(folder),
        "model_init_kwargs": model_arguments,
        "trust_remote_code": settings.trust_remote_code,
        "bf16": autocast,
        "use_cpu": settings.device == "cpu" or not torch.cuda.is_available(),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": settings.optimizer,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "save_total_limit": settings.keep_checkpoints,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "report_to": "none",
        "remove_unused_columns": False,
        "ddp_timeout": LONG_WAIT_SECONDS,
        "disable_tqdm": True,
    }


def sft_arguments(settings: SftSettings, folder: Path, micro_batch_size: int, accumulation: int) -> SFTConfig:
    """Our settings in TRL's words."""
    return trl_arguments(
        SFTConfig,
        "train.sft",
        **shared_arguments(settings, folder),
        per_device_train_batch_size=micro_batch_size,
        per_device_eval_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        train_sampling_strategy="random" if settings.shuffle else "sequential",
        eval_strategy="steps" if settings.eval_share and settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def trl_arguments(config: Callable[..., Arguments], key: str, **arguments: Any) -> Arguments:
    """A configuration of TRL's. Raises UserError, which names the section, where TRL refuses it."""
    try:
        return config(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: TRL refuses these settings: {error}") from None


def lora_config(settings: OptimizerSettings) -> Any:
    """peft's LoraConfig, or None for full training."""
    if settings.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora.r,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=settings.lora.target_modules,
        task_type="CAUSAL_LM",
    )


def local_model(model: str, revision: str | None, settings: OptimizerSettings, options: StorageOptions) -> ModelFiles:
    """A hub id, local folder or s3:// folder on this machine. Raises UserError."""
    policy = PolicyConfig(model=model, revision=revision, trust_remote_code=settings.trust_remote_code)
    with one_process_first():
        return resolve_model(policy, options)


def load_tokenizer(folder: str, settings: OptimizerSettings, render: JsonObject) -> Any:
    """The model's tokenizer, with the chat template with which the release was rendered: `render` is that section."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    template = template_text(tokenizer.chat_template, render.get("chat_template"), folder)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def num_token_ids(folder: str, tokenizer: Any) -> int:
    """How many token ids a model has: those of its tokenizer for which it has an embedding too."""
    ids = 1 + max(tokenizer.get_vocab().values())
    return min(ids, vocabulary_size(folder) or ids)


def template_text(own: str | dict[str, str] | None, wanted: str | None, model: str) -> str | None:
    """The Jinja text of the template that a release was rendered with; None: the model's own.

    `wanted` is a text, or the name of one of the model's templates; a checkpoint that was trained with a named one
    has it as its only one. Raises UserError for a name that the model does not have.
    """
    if wanted is None:
        return None
    if isinstance(own, dict) and wanted in own:
        return own[wanted]
    if "{" in wanted:
        return wanted
    if isinstance(own, str):
        return None
    raise UserError(
        f"the release was rendered with the chat template '{wanted}', and the model {model} has none so named"
    )


def save_final(
    trainer: Any,
    settings: OptimizerSettings,
    output: Output,
    facts: CheckpointFacts,
    scratch: Sequence[Path] = (),
) -> CheckpointFacts:
    """Write model/ (and adapter/), whole, in the base model's own dtype; remove `scratch`; returns the facts."""
    folder = output.folder / "model"
    trainer.accelerator.wait_for_everyone()
    if settings.lora is not None:
        trainer.save_model(str(output.folder / "adapter"))
        if settings.lora.merge and trainer.is_world_process_zero():
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            _save_model(merged, folder, trainer, settings)
        elif trainer.is_world_process_zero():
            shutil.copytree(output.folder / "adapter", folder, dirs_exist_ok=True)
    elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(str(folder))
    elif trainer.is_world_process_zero():
        _save_model(trainer.accelerator.unwrap_model(trainer.model), folder, trainer, settings)
    trainer.accelerator.wait_for_everyone()
    history = [line for line in trainer.state.log_history if "loss" in line]
    facts = {
        **facts,
        "metrics": {**({"first": history[0], "last": history[-1]} if history else {}), **facts.get("metrics", {})},
        "steps": trainer.state.global_step,
        "notes": output.notes,
    }
    if output.storage.exists(TRACKING_FILE):
        facts["tracking"] = output.storage.read_json(TRACKING_FILE)
    if trainer.is_world_process_zero():
        checkpoints.mark_whole(folder, facts)
        output.publish(METRICS_FILE)
        output.publish("model")
        for path in scratch:
            path.unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()
    return facts


def _save_model(model: Any, folder: Path, trainer: Any, settings: OptimizerSettings) -> None:
    source = model.config._name_or_path
    dtype = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code).dtype
    if dtype is not None and settings.precision != "fp32":
        model = model.to(dtype)
    broken = next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), None)
    if broken is not None:
        raise UserError(
            f"training has diverged: {broken} holds values that are no finite numbers in {model.dtype}: lower "
            "learning_rate"
        )
    model.save_pretrained(str(folder))
    trainer.processing_class.save_pretrained(str(folder))
