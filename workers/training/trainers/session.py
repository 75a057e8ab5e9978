"""What SFT and RL share: output folder, precision, arguments, checkpoints and the final model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, TrainerCallback
from trl import SFTConfig

from grape_service.config.policy import PolicyConfig
from grape_service.config.training import OptimizerSettings, SftSettings
from grape_service.errors import UserError
from grape_service.models.files import resolve_model
from grape_service.storage.patience import be_patient
from grape_service.storage.storage import Storage
from grape_service.storage.temporary import temporary_folder
from workers.training.trainers import checkpoints
from workers.training.trainers.checkpoints import PROGRESS_FILE

LONG_WAIT_SECONDS = 7200
"""How long processes wait for the one that copies a dataset or a model."""
PROGRESS_SECONDS = 2.0
"""How often progress is written, at most."""


class Output:
    """A job's output folder, and the local folder where it works: the same, or a copy of an s3:// one."""

    def __init__(self, url: str, options: dict[str, Any]):
        be_patient()
        self.storage = Storage(url, options)
        if self.storage.is_s3:
            name = hashlib.sha256(self.storage.root.encode()).hexdigest()[:16]
            self.folder = temporary_folder(f"grape-train-{name}")
        else:
            self.folder = Path(self.storage.root)
            self.folder.mkdir(parents=True, exist_ok=True)

    def publish(self, name: str) -> None:
        """Copy a whole folder or a file of the local folder to where the output is."""
        path = self.folder / name
        if not self.storage.is_s3 or not path.exists():
            return
        if path.is_dir():
            checkpoints.upload(path, self.storage.sub(name))
        else:
            self.storage.write(name, path.read_bytes())

    def resume_from(self) -> str | None:
        """The newest whole checkpoint, brought to the local folder; None to start from the beginning."""
        with one_process_first():
            name = checkpoints.last_whole(self.storage)
            if name is not None and self.storage.is_s3 and not checkpoints.is_whole(Storage(str(self.folder / name))):
                checkpoints.download(self.storage.sub(name), self.folder / name)
        return str(self.folder / name) if name is not None else None


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint when it is written, publishes it, and removes old ones."""

    def __init__(self, output: Output, facts: dict[str, Any]):
        self.output = output
        self.facts = facts

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            name = f"checkpoint-{state.global_step}"
            checkpoints.mark_whole(self.output.folder / name, {**self.facts, "step": state.global_step})
            self.output.publish(name)
            self.output.publish("metrics.jsonl")
            if self.output.storage.is_s3:
                for old in checkpoints.step_folders(self.output.storage)[args.save_total_limit :]:
                    self.output.storage.sub(old).delete(checkpoints.MARKER)
                    self.output.storage.delete_folder(old)
        PartialState().wait_for_everyone()


class MetricsFile(TrainerCallback):
    """Writes each line of metrics to metrics.jsonl in the output folder."""

    def __init__(self, output: Output):
        self.path = output.folder / "metrics.jsonl"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Progress(TrainerCallback):
    """Writes where training is to progress.json in the output, for whoever follows the job."""

    def __init__(self, output: Output):
        self.output = output
        self.started, self.first_step, self.written = 0.0, 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.first_step = time.time(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        now, step = time.time(), state.global_step
        is_last = step >= state.max_steps
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        if now - self.written < PROGRESS_SECONDS and not is_last:
            return
        done = step - self.first_step
        left = (state.max_steps - step) * (now - self.started) / done if done else None
        figures: dict[str, float | None] = {
            name: float(logs[name]) for name in ("loss", "ess", "reward") if name in logs
        }
        known: dict[str, float | None] = {
            "step": step,
            "steps": state.max_steps,
            **figures,
            "seconds_left": left,
            "time": now,
        }
        self.output.storage.write_json(PROGRESS_FILE, known)
        self.written = now


def num_processes() -> int:
    """Processes of this job, from torchrun's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def split_batch(batch_size: int, micro_batch_size: int | None, processes: int) -> tuple[int, int]:
    """(rows at once in a process, times that it does so in a step). Raises UserError where they do not fit."""
    share, rest = divmod(batch_size, processes)
    if micro_batch_size is None and not rest:
        micro_batch_size = max(size for size in range(1, 9) if share % size == 0)
    if rest or not micro_batch_size or share % micro_batch_size:
        raise UserError(
            f"a batch of {batch_size} cannot be split evenly over {processes} processes "
            f"with a micro_batch_size of {micro_batch_size}: change one of them"
        )
    return micro_batch_size, share // micro_batch_size


@contextlib.contextmanager
def one_process_first() -> Iterator[None]:
    """The first process of each machine runs the block before the others."""
    with PartialState().local_main_process_first():
        yield


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
    return SFTConfig(
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


def local_model(model: str, settings: OptimizerSettings, options: dict[str, Any]) -> str:
    """A hub id, local folder or s3:// folder as a folder on this machine. Raises UserError."""
    policy = PolicyConfig(model=model, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    with one_process_first():
        return resolve_model(policy, options).folder


def load_tokenizer(folder: str, settings: OptimizerSettings, run_config: dict[str, Any]) -> Any:
    """The model's tokenizer, with the chat template with which the release was rendered."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    template = (run_config.get("render") or {}).get("chat_template")
    if template:
        tokenizer.chat_template = template
    return tokenizer


def save_final(
    trainer: Any,
    settings: OptimizerSettings,
    output: Output,
    facts: dict[str, Any],
    scratch: Sequence[Path] = (),
) -> dict[str, Any]:
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
    }
    if trainer.is_world_process_zero():
        checkpoints.mark_whole(folder, facts)
        output.publish("metrics.jsonl")
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
    model.save_pretrained(str(folder))
    trainer.processing_class.save_pretrained(str(folder))
