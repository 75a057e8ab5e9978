"""GRPO on an SFT checkpoint, with rewards that can be checked.

    python -m workers.training.trainers.rl --settings task.json

The task file holds an RlTask. The output folder gets metrics.jsonl, checkpoint-<step>/ to go on from, and
model/, the trained model with its tokenizer, whole when its complete.json is there.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import orjson

from grape_service.config.training import RlSettings, RlTask, SftSettings, require_train_extra
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.models.whole import CheckpointFacts
from grape_service.release.load import load_training_set
from workers.training.base_model import check_tokenizer
from workers.training.batch_split import split_of
from workers.training.inputs import release_digest, resolved_model_inputs, rl_inputs
from workers.training.trainers.task_file import main

FORMAT = 3
"""Raised when the same inputs come to give another model."""


def run_rl(task: RlTask) -> CheckpointFacts:
    """Train, from the last whole checkpoint in the output folder if there is one; returns the final facts.

    Raises UserError for settings that do not fit the prompts, the machine or the number of processes.
    """
    settings = task.settings
    require_train_extra(*(["math_verify"] if any(reward.type == "math" for reward in settings.rewards) else []))
    from datasets import Dataset

    from workers.training.trainers import output as outputs
    from workers.training.trainers import session
    from workers.training.trainers.grpo import PromptedGRPOTrainer
    from workers.training.trainers.prompts import rl_prompts
    from workers.training.trainers.rendering import prompt_tokens, renderer_of
    from workers.training.trainers.reports import reported
    from workers.training.trainers.rewards import reward_function

    release = load_training_set(task.dataset, task.storage)
    system_prompt, render = release.manifest.rendered_with
    files = session.local_model(task.checkpoint, settings.revision, settings, task.storage)
    facts: CheckpointFacts = {
        "stage": "rl",
        "dataset": release.reference,
        "run": task.run,
        "model": task.checkpoint,
        "settings": settings.model_dump(mode="json"),
    }
    inputs: JsonObject = {"stage": facts["stage"], "dataset": facts["dataset"], "settings": facts["settings"]}
    inputs |= {"format": FORMAT, "release": release_digest(release), "model_files": resolved_model_inputs(files)}
    inputs |= rl_inputs(settings, None, task.storage)
    output = outputs.Output(task.output, task.storage, inputs)
    output.doing("reads the prompts")
    tokenizer = session.load_tokenizer(files.folder, settings, render)
    if settings.prompts is None:
        trusted = SftSettings(trust_remote_code=settings.trust_remote_code)
        check_tokenizer(release, task.checkpoint, files.folder, trusted)
    num_ids = session.num_token_ids(files.folder, tokenizer)
    prompts = rl_prompts(release, settings, task.storage, num_ids, task.checkpoint)
    renderer = renderer_of(files.folder, tokenizer, settings, (system_prompt, render), output.note)
    if renderer is None and settings.prompts is not None:
        raise UserError(f"train.rl.prompts: {task.checkpoint} cannot render them: {output.notes[-1]}")
    ids, others = prompt_tokens(prompts, renderer)
    if others:
        output.note(
            f"{others:,} of {len(ids):,} prompts render otherwise with the template of {task.checkpoint}: they are "
            "asked in the tokens of the release"
        )
    examples = [_example(prompt, tokenizer, system_prompt) for prompt in prompts]
    output.doing("loads the model")
    facts |= {"inputs": output.inputs, "prompts": len(prompts)}
    trainer = PromptedGRPOTrainer(
        renderer=renderer,
        output=output,
        model=files.folder,
        reward_funcs=[reward_function(reward, number, tokenizer) for number, reward in enumerate(settings.rewards)],
        args=grpo_arguments(settings, output, sorted(renderer.stop_ids) if renderer else []),
        train_dataset=Dataset.from_list(
            [_trl_row(example, tokens, tokenizer) for example, tokens in zip(examples, ids, strict=True)]
        ),
        processing_class=tokenizer,
        peft_config=session.lora_config(settings),
        callbacks=outputs.callbacks(output, facts),
    )
    with reported(trainer, output, facts, release):
        trainer.train(resume_from_checkpoint=output.resume_from())
    return session.save_final(trainer, settings, output, facts)


def grpo_arguments(settings: RlSettings, output: Any, stop_ids: list[int]) -> Any:
    """Our settings in TRL's words; `stop_ids` end an answer. Raises UserError where the answers of a step cannot be
    split evenly."""
    import torch
    from trl import GRPOConfig

    from workers.training.trainers import session

    micro_batch_size, accumulation = split_of(settings, session.num_processes())
    on_gpu = settings.device == "auto" and torch.cuda.is_available()
    has_vllm = importlib.util.find_spec("vllm") is not None
    if settings.rollouts == "vllm" and not (on_gpu and has_vllm):
        raise UserError("train.rl.rollouts: vllm needs a GPU and vLLM in the job's environment; use transformers")
    use_vllm = settings.rollouts != "transformers" and on_gpu and has_vllm
    arguments: dict[str, Any] = {
        **session.shared_arguments(settings, output.folder),
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_generations": settings.num_generations,
        "max_completion_length": settings.max_response_tokens,
        "max_steps": settings.steps,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "beta": settings.beta,
        "reward_weights": [reward.weight for reward in settings.rewards],
        "use_vllm": use_vllm,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": settings.vllm_memory,
    }
    extra = dict(settings.extra)
    if use_vllm:  # transformers takes them from the model's generation config
        extra["generation_kwargs"] = {"stop_token_ids": stop_ids, **(extra.get("generation_kwargs") or {})}
    return session.trl_arguments(GRPOConfig, "train.rl", **{**arguments, **extra})


def _example(prompt: dict[str, Any], tokenizer: Any, system_prompt: str | None) -> dict[str, Any]:
    """A prompt as it is asked: messages with the system prompt, the tools that it offers, its tokens in the release
    (None for one of a pool, which is rendered) with their text, and its other columns as JSON."""
    messages, ids = prompt["messages"], prompt["ids"]
    if system_prompt is not None and (not messages or messages[0]["role"] not in ("system", "developer")):
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return {
        "prompt": messages,
        "tools": prompt["tools"],
        "prompt_ids": ids,
        "text": None if ids is None else tokenizer.decode(ids),
        "row": orjson.dumps(prompt["row"], default=str).decode(),
    }


def _trl_row(example: dict[str, Any], ids: list[int], tokenizer: Any) -> dict[str, Any]:
    """A row of TRL's dataset: the prompt's tokens and text, and for the rewards its messages and other columns."""
    return {
        "prompt": example["text"] or tokenizer.decode(ids),
        "prompt_ids": ids,
        "messages": orjson.dumps(example["prompt"], default=str).decode(),
        "row": example["row"],
    }


if __name__ == "__main__":
    main(RlTask, run_rl)
