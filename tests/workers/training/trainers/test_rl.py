"""A real GRPO run of a tiny model, and its rewards and prompts."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import grape_service
from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.config.training import (
    LoraSettings,
    PromptSettings,
    RewardSettings,
    RlSettings,
    RlTask,
    SftSettings,
    SftTask,
)
from grape_service.errors import UserError
from grape_service.release.manifest import Parents, Rendering
from grape_service.render.loading import load_renderer
from grape_service.rows.candidate import Candidate, Rendered
from grape_service.rows.columns import release_schema
from grape_service.rows.messages import response_messages, stored_message
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from workers.training.trainers import checkpoints
from workers.training.trainers.prompts import rl_prompts
from workers.training.trainers.rendering import prompt_tokens, renderer_of
from workers.training.trainers.rl import _example, run_rl
from workers.training.trainers.sft import run_sft


def long_answer(prompt: object, response: str, row: dict[str, object]) -> float:
    """A reward that a random policy can earn: the share of its characters that are letters."""
    assert row["answer"] is not None
    return sum(character.isalpha() for character in response) / max(1, len(response))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, model: str) -> str:
    return write_release(tmp_path_factory.mktemp("out"), make_rows(6), {"target": {"model": model}})


def test_grpo_trains_and_goes_on_from_a_checkpoint(reference: str, model: str, tmp_path: Path) -> None:
    rewards = [
        RewardSettings(type="function", function=f"{__name__}:long_answer"),
        RewardSettings(type="math", weight=0.5),
    ]
    settings = RlSettings(
        steps=2,
        prompts_per_step=2,
        num_generations=2,
        max_response_tokens=8,
        learning_rate=1e-2,
        save_steps=1,
        rewards=rewards,
        device="cpu",
        beta=0.01,
    )
    task = RlTask(dataset=reference, checkpoint=model, output=str(tmp_path), settings=settings)
    facts = run_rl(task)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert 0 < lines[0]["rewards/function/mean"] <= 1
    assert lines[0]["rewards/math_1/mean"] == 0
    assert facts["prompts"] == 4
    before, after = load_file(Path(model) / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)

    (tmp_path / "checkpoint-2" / "model.safetensors").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    assert run_rl(task)["steps"] == 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    assert checkpoints.check_whole(checkpoints.Storage(str(tmp_path / "model")))["stage"] == "rl"


def test_a_token_id_that_the_model_does_not_have_is_refused_before_anything_is_asked(
    model: str, tmp_path: Path
) -> None:
    rows = make_rows(6)
    rows[4]["input_ids"][0] = 515
    reference = write_release(tmp_path / "out", rows, {"target": {"model": model}})
    rewards = [RewardSettings(type="function", function=f"{__name__}:long_answer")]
    settings = RlSettings(steps=1, prompts_per_step=2, num_generations=2, rewards=rewards, device="cpu")
    with pytest.raises(UserError, match=r"row 5 of .* \(prompt_id prompt-4\) holds the token id 515, and .* 0 to 514:"):
        run_rl(RlTask(dataset=reference, checkpoint=model, output=str(tmp_path / "rl"), settings=settings))


@pytest.mark.parametrize("at", [2, 3])
def test_a_job_that_is_resumed_in_a_later_epoch_is_as_one_that_was_not_stopped(
    at: int, reference: str, model: str, tmp_path: Path
) -> None:
    """Five prompts, two a step: two steps an epoch."""
    rewards = [RewardSettings(type="function", function=f"{__name__}:long_answer")]
    on_cpu = {"device": "cpu", "save_steps": 1, "keep_checkpoints": 9, "learning_rate": 1e-2, "max_response_tokens": 8}
    settings = RlSettings(steps=4, prompts_per_step=2, num_generations=4, max_prompts=5, rewards=rewards, **on_cpu)
    made = []
    for name in ("straight", "stopped"):
        output = tmp_path / name
        task = RlTask(dataset=reference, checkpoint=model, output=str(output), settings=settings)
        run_rl(task)
        if name == "stopped":
            shutil.rmtree(output / "model")
            for step in range(at + 1, 5):
                shutil.rmtree(output / f"checkpoint-{step}")
            run_rl(task)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        figures = [{key: value for key, value in line.items() if "time" not in key} for line in lines]
        made.append((figures, (output / "model" / "model.safetensors").read_bytes()))
    assert [line["step"] for line in made[0][0]] == list(range(1, 5))
    assert made[1] == made[0]


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)], ids=["full", "lora"])
def test_an_accumulated_step_is_that_of_one_big_batch(
    lora: LoraSettings | None, reference: str, model: str, tmp_path: Path
) -> None:
    made = {}
    for size in (8, 2):
        settings = RlSettings(
            steps=1,
            prompts_per_step=2,
            num_generations=4,
            micro_batch_size=size,
            max_response_tokens=8,
            learning_rate=1.0,
            optimizer="sgd",
            max_grad_norm=0.0,
            lora=lora,
            device="cpu",
            rewards=[RewardSettings(type="function", function=f"{__name__}:long_answer")],
        )
        output = tmp_path / str(size)
        run_rl(RlTask(dataset=reference, checkpoint=model, output=str(output), settings=settings))
        (line,) = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        made[size] = (line["grad_norm"], line["reward"], load_file(output / "model" / "model.safetensors"))
    assert made[8][0] > 0
    assert made[2][:2] == pytest.approx(made[8][:2], rel=1e-4)
    for name, value in made[8][2].items():
        torch.testing.assert_close(made[2][2][name], value, rtol=1e-4, atol=1e-6)


def test_prompts_end_with_the_users_last_turn_and_come_once(model: str, tmp_path: Path) -> None:
    rows = make_rows(5)
    rows[1]["messages"] = rows[0]["messages"]
    rows[2]["messages"] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    release = grape_service.load(write_release(tmp_path, rows, {}))
    prompts = rl_prompts(release, RlSettings(), {})
    assert len(prompts) == 4
    longest = max(prompts, key=lambda prompt: len(prompt["messages"]))
    assert [message["content"] for message in longest["messages"]] == ["s", "a", "b", "c"]
    assert longest["row"]["answer"] == "3"
    assert rl_prompts(release, RlSettings(max_prompts=2), {}) == prompts[:2]
    assert rl_prompts(release, RlSettings(seed=1), {}) != prompts
    with pytest.raises(UserError, match="without the column 'solution'"):
        rl_prompts(release, RlSettings(rewards=[RewardSettings(answer_column="solution")]), {})


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}


TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]


CALLED = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
]


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], str | list[dict[str, Any]]]] = {
    "calls before": ([*CALLED, {"role": "assistant", "content": "2."}, {"role": "user", "content": "And 3?"}], "5"),
    "after a tool": (CALLED, "It is 2."),
    "trajectory": (CALLED[:1], [*CALLED[1:], {"role": "assistant", "content": "It is 2."}]),
    "own system prompt": ([{"role": "system", "content": "Be kind."}, CALLED[0]], "2"),
}


def test_prompts_have_the_tokens_of_the_release(model: str, tmp_path: Path) -> None:
    """Tools, calls and earlier turns reach RL as they were rendered; so do the prompts of another pool."""
    policy = PolicyConfig(model=model, system_prompt="You are terse.")
    renderer = load_renderer(model, policy, RenderConfig())
    rows = make_rows(len(CONVERSATIONS))
    for row, (prompt, response) in zip(rows, CONVERSATIONS.values(), strict=True):
        (made,) = renderer.render([Candidate(prompt, response, "p", "c", tools=TOOLS)])
        assert isinstance(made, Rendered)
        row |= {"messages": [stored_message(m) for m in [*prompt, *response_messages(response)]]}
        row |= {"tools": json.dumps(TOOLS), "input_ids": made.input_ids, "loss_mask": made.loss_mask > 0}
        row |= {"labels": made.input_ids, "loss_weights": np.ones(len(made.input_ids), np.float32)}
        row |= {"target_logprobs": None, "behavior_logprobs": None, "prompt_len": made.prompt_len}
    config = {"target": {"model": model, "system_prompt": "You are terse."}}
    schema = release_schema(["tool_calls"], [pa.field("tools", pa.string()), pa.field("answer", pa.string())])
    release = grape_service.load(write_release(tmp_path, rows, config, schema=schema))
    prompts = rl_prompts(release, RlSettings(rewards=[RewardSettings(type="exact")]), {})
    assert len(prompts) == len(rows)
    tokenizer = AutoTokenizer.from_pretrained(model)
    notes: list[str] = []
    found = renderer_of(model, tokenizer, RlSettings(), release.manifest.rendered_with, notes.append)
    ids, others = prompt_tokens(prompts, found)
    assert (others, notes) == (0, [])
    expected = {tuple(row["input_ids"][: row["prompt_len"]].tolist()) for row in rows}
    assert {tuple(one) for one in ids} == expected
    for prompt, one in zip(prompts, ids, strict=True):
        example = _example(prompt, tokenizer, "You are terse.")
        assert tokenizer.apply_chat_template(
            example["prompt"], tools=example["tools"], add_generation_prompt=True, tokenize=False
        ) == tokenizer.decode(one)
    of_a_pool = [{**prompt, "ids": None, "response": []} for prompt in prompts]
    assert prompt_tokens(of_a_pool, found) == (ids, 0)
    prompts[0]["ids"] = prompts[0]["ids"][1:]
    assert prompt_tokens(prompts, found)[1] == 1


def with_foreign_end(tmp_path: Path) -> tuple[str, Any, str]:
    """A base model with chatml's turn end in its template and <|endoftext|> as its own end, as Qwen2.5's; its
    tokenizer; a release of four sums for it."""
    model = make_model(tmp_path / "model", hidden_size=64, initializer_range=0.02)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(model)
    for name in ("config.json", "generation_config.json"):
        path = Path(model) / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": tokenizer.eos_token_id}))
    renderer = load_renderer(model, PolicyConfig(model=model), RenderConfig())
    rows = make_rows(4)
    for number, row in enumerate(rows):
        question, answer = f"What is {number}+{number}?", str(2 * number)
        (made,) = renderer.render([Candidate([{"role": "user", "content": question}], answer, "p", "c")])
        assert isinstance(made, Rendered)
        row |= {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        row |= {"input_ids": made.input_ids, "loss_mask": made.loss_mask > 0, "labels": made.input_ids}
        row |= {"loss_weights": (made.loss_mask > 0).astype(np.float32), "answer": answer}
        row |= {"target_logprobs": None, "behavior_logprobs": None}
    return model, tokenizer, write_release(tmp_path / "out", rows, {"target": {"model": model}})


def test_a_base_model_with_another_end_token_stops_where_the_template_ends_a_turn(tmp_path: Path) -> None:
    model, tokenizer, reference = with_foreign_end(tmp_path)
    sft = SftSettings(batch_size=4, max_steps=60, learning_rate=0.01, schedule="constant", device="cpu", save_steps=999)
    run_sft(SftTask(dataset=reference, output=str(tmp_path / "sft"), settings=sft))
    end, own = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    generation = json.loads((tmp_path / "sft" / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end, own]

    settings = RlSettings(
        steps=1,
        num_generations=4,
        prompts_per_step=4,
        max_response_tokens=16,
        temperature=0.3,
        rewards=[RewardSettings(type="exact")],
        device="cpu",
    )
    task = RlTask(
        dataset=reference, checkpoint=str(tmp_path / "sft/model"), output=str(tmp_path / "rl"), settings=settings
    )
    facts = run_rl(task)
    (line,) = [json.loads(text) for text in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert line["completions/clipped_ratio"] == 0
    assert line["reward"] > 0.4
    assert facts["notes"] == []
    assert json.loads((tmp_path / "rl/model/generation_config.json").read_text())["eos_token_id"] == [end, own]
    # The model before SFT does not end its turns: told with the first batch.
    untaught = task.model_copy(update={"checkpoint": model, "output": str(tmp_path / "untaught")})
    (note,) = run_rl(untaught)["notes"]
    assert "answers of the first batch are cut at max_response_tokens 16: raise it, or see whether" in note
    assert "'<|im_end|>', '<|endoftext|>'" in note


def test_rl_raises_the_reward_of_a_base_model_with_another_end_token(tmp_path: Path) -> None:
    _, _, reference = with_foreign_end(tmp_path)
    on_cpu: dict[str, Any] = {"schedule": "constant", "device": "cpu", "save_steps": 999}
    sft = SftSettings(batch_size=4, max_steps=30, learning_rate=0.01, **on_cpu)
    run_sft(SftTask(dataset=reference, output=str(tmp_path / "sft"), settings=sft))
    settings = RlSettings(
        steps=20,
        num_generations=8,
        prompts_per_step=4,
        max_response_tokens=8,
        learning_rate=0.003,
        rewards=[RewardSettings(type="exact")],
        **on_cpu,
    )
    start, output = str(tmp_path / "sft" / "model"), str(tmp_path / "rl")
    run_rl(RlTask(dataset=reference, checkpoint=start, output=output, settings=settings))
    lines = [json.loads(text) for text in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines]
    assert len(rewards) == 20
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1, rewards
    assert lines[-1]["completions/clipped_ratio"] == 0


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def is_asked_tersely(prompt: list[dict[str, Any]], response: str, row: dict[str, object]) -> float:
    """Whether the prompt begins with the system prompt of the rows' rendering."""
    return float(prompt[0] == {"role": "system", "content": "You are terse."})


def test_a_release_that_was_weighed_at_another_target_is_trained_as_its_rows_were_rendered(
    model: str, tmp_path: Path
) -> None:
    render = {"chat_template": TEMPLATE}
    policy = PolicyConfig(model=model, system_prompt="You are terse.")
    renderer = load_renderer(model, policy, RenderConfig.model_validate(render))
    rows = make_rows(4)
    for number, row in enumerate(rows):
        question = [{"role": "user", "content": f"What is {number}+{number}?"}]
        (made,) = renderer.render([Candidate(question, str(2 * number), "p", "c")])
        assert isinstance(made, Rendered)
        row |= {"messages": [*question, {"role": "assistant", "content": str(2 * number)}]}
        row |= {"input_ids": made.input_ids, "loss_mask": made.loss_mask > 0, "labels": made.input_ids}
        row |= {"loss_weights": (made.loss_mask > 0).astype(np.float32)}
        row |= {"target_logprobs": None, "behavior_logprobs": None}
    rendering = Rendering(
        model=model,
        system_prompt="You are terse.",
        render=render,
        digest=renderer.digest(),
        tokenizer_digest=renderer.vocabulary.digest,
        template_digest=renderer.template_digest(),
        stop_ids=sorted(renderer.stop_ids),
    )
    other = {"target": {"model": model, "system_prompt": "Ramble."}, "render": {"chat_template": None}}
    reference = write_release(tmp_path / "out", rows, other, parents=Parents(rendering=rendering))
    on_cpu = {"device": "cpu", "save_steps": 9}
    sft = SftTask(dataset=reference, output=str(tmp_path / "sft"), settings=SftSettings(max_steps=1, **on_cpu))
    run_sft(sft)
    settings = RlSettings(
        steps=1,
        num_generations=2,
        prompts_per_step=2,
        max_response_tokens=4,
        rewards=[RewardSettings(type="function", function=f"{__name__}:is_asked_tersely")],
        **on_cpu,
    )
    task = RlTask(
        dataset=reference, checkpoint=str(tmp_path / "sft/model"), output=str(tmp_path / "rl"), settings=settings
    )
    notes = run_rl(task)["notes"]
    (line,) = [json.loads(text) for text in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert line["reward"] == 1
    assert not any("render otherwise" in note for note in notes)
    for stage in ("sft", "rl"):
        assert AutoTokenizer.from_pretrained(tmp_path / stage / "model").chat_template == TEMPLATE


def test_prompts_of_another_pool(reference: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n\n{"question": "2+2?", "answer": "4"}\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"question": [{"role": "user", "content": "3+3?"}], "answer": "6"}\n')
    settings = RlSettings(prompts=PromptSettings(path=str(tmp_path), column="question"))
    prompts = rl_prompts(grape_service.load(reference), settings, {})
    found = {prompt["messages"][-1]["content"]: prompt["row"]["answer"] for prompt in prompts}
    assert found == {"1+1?": "2", "2+2?": "4", "3+3?": "6"}
    with pytest.raises(UserError, match=":1: there is no column 'prompt'"):
        rl_prompts(
            grape_service.load(reference), RlSettings(prompts=PromptSettings(path=str(tmp_path / "a.jsonl"))), {}
        )
