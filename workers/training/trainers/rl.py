"""GRPO on an SFT checkpoint, with rewards that can be checked.

    python -m workers.training.trainers.rl --settings task.json

The task file holds an RlTask. The output folder gets metrics.jsonl, checkpoint-<step>/ to go on from, and
model/, the trained model with its tokenizer, whole when its complete.json is there.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import orjson

import grape_service
from grape_service.config.training import RlSettings, RlTask, require_train_extra
from grape_service.errors import UserError
from workers.training.trainers.task_file import main


def run_rl(task: RlTask) -> dict[str, Any]:
    """Train, from the last whole checkpoint in the output folder if there is one; returns the final facts.

    Raises UserError for settings that do not fit the prompts, the machine or the number of processes.
    """
    settings = task.settings
    require_train_extra(*(["math_verify"] if any(reward.type == "math" for reward in settings.rewards) else []))
    from datasets import Dataset
    from trl import GRPOTrainer

    from workers.training.trainers import session
    from workers.training.trainers.prompts import rl_prompts
    from workers.training.trainers.rewards import reward_function

    release = grape_service.load(task.dataset, task.storage)
    run_config = release.manifest.config
    output = session.Output(task.output, task.storage)
    model = session.local_model(task.checkpoint, settings, task.storage)
    tokenizer = session.load_tokenizer(model, settings, run_config)
    prompts = rl_prompts(release, settings, task.storage)
    facts = {
        "stage": "rl",
        "dataset": release.reference,
        "run": task.run,
        "model": task.checkpoint,
        "settings": settings.model_dump(mode="json"),
        "prompts": len(prompts),
    }
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[reward_function(reward, number) for number, reward in enumerate(settings.rewards)],
        args=grpo_arguments(settings, output, run_config),
        train_dataset=Dataset.from_list([_example(prompt, tokenizer, run_config) for prompt in prompts]),
        processing_class=tokenizer,
        peft_config=session.lora_config(settings),
        callbacks=[session.WholeCheckpoints(output, facts), session.MetricsFile(output), session.Progress(output)],
    )
    trainer.train(resume_from_checkpoint=output.resume_from())
    return session.save_final(trainer, settings, output, facts)


def grpo_arguments(settings: RlSettings, output: Any, run_config: dict[str, Any]) -> Any:
    """Our settings in TRL's words. Raises UserError where the answers of a step cannot be split evenly."""
    import torch
    from trl import GRPOConfig

    from workers.training.trainers import session

    answers = settings.prompts_per_step * settings.num_generations
    micro_batch_size, accumulation = session.split_batch(answers, settings.micro_batch_size, session.num_processes())
    on_gpu = settings.device == "auto" and torch.cuda.is_available()
    has_vllm = importlib.util.find_spec("vllm") is not None
    if settings.rollouts == "vllm" and not (on_gpu and has_vllm):
        raise UserError("train.rl.rollouts: vllm needs a GPU and vLLM in the job's environment; use transformers")
    template_kwargs = (run_config.get("render") or {}).get("template_kwargs") or None
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
        "chat_template_kwargs": template_kwargs,
        "use_vllm": settings.rollouts != "transformers" and on_gpu and has_vllm,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": settings.vllm_memory,
    }
    try:
        return GRPOConfig(**{**arguments, **settings.extra})
    except (TypeError, ValueError) as error:
        raise UserError(f"train.rl: TRL refuses these settings: {error}") from None


def _example(prompt: dict[str, Any], tokenizer: Any, run_config: dict[str, Any]) -> dict[str, Any]:
    """A row of TRL's dataset: the prompt as it was rendered for the release, and its other columns as JSON."""
    messages = prompt["messages"]
    render = run_config.get("render") or {}
    system_prompt = (run_config.get("target") or {}).get("system_prompt")
    if system_prompt is not None and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system_prompt}, *messages]
    row = orjson.dumps(prompt["row"], default=str).decode()
    if render.get("mode") == "plain" or not tokenizer.chat_template:
        return {"prompt": render.get("separator", "\n\n").join([*(m["content"] for m in messages), ""]), "row": row}
    return {"prompt": [{"role": m["role"], "content": m["content"]} for m in messages], "row": row}


if __name__ == "__main__":
    main(RlTask, run_rl)
