"""A real GRPO run of a tiny model, and its rewards and prompts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import grape_service
from grape_service.config.training import PromptSettings, RewardSettings, RlSettings, RlTask
from grape_service.errors import UserError
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from workers.training.trainers import checkpoints
from workers.training.trainers.prompts import rl_prompts
from workers.training.trainers.rewards import exact_match, imported, math_correct, reward_function
from workers.training.trainers.rl import run_rl


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
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert 0 < lines[0]["rewards/function/mean"] <= 1
    assert lines[0]["rewards/math_1/mean"] == 0
    assert facts["prompts"] == 4
    before, after = load_file(Path(model) / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)

    (tmp_path / "checkpoint-2" / "model.safetensors").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    assert run_rl(task)["steps"] == 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 2]
    assert checkpoints.check_whole(checkpoints.Storage(str(tmp_path / "model")))["stage"] == "rl"


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


def test_prompts_of_another_pool(reference: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n\n{"question": "2+2?", "answer": "4"}\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"question": [{"role": "user", "content": "3+3?"}], "answer": "6"}\n')
    settings = RlSettings(prompts=PromptSettings(path=str(tmp_path), column="question"))
    prompts = rl_prompts(grape_service.load(reference), settings, {})
    found = {prompt["messages"][-1]["content"]: prompt["row"]["answer"] for prompt in prompts}
    assert found == {"1+1?": "2", "2+2?": "4", "3+3?": "6"}
    with pytest.raises(UserError, match="row 0: there is no column 'prompt'"):
        rl_prompts(
            grape_service.load(reference), RlSettings(prompts=PromptSettings(path=str(tmp_path / "a.jsonl"))), {}
        )


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("so we get $\\frac{1}{2}$", "0.5", 1),
        ("The answer is \\boxed{180}.", "180", 1),
        ("The answer is \\boxed{18}.", "180", 0),
        ("x = 3 or rather $x = 4$", "$4$", 1),
        ("I do not know", "7", 0),
        ("", "7", 0),
    ],
)
def test_mathematical_answers(response: str, answer: str, score: float) -> None:
    assert math_correct(response, answer) == score


def test_exact_answers_and_functions() -> None:
    assert exact_match(" Paris\n", "Paris", None) == 1
    reward = reward_function(RewardSettings(type="exact", pattern=r"answer: (\w+)"), 0)
    rows = [json.dumps({"answer": "b"})] * 3
    assert reward(prompts=["p"] * 3, completions=["answer: a answer: b", "b", "answer: c"], row=rows) == [1, 0, 0]
    messages = [[{"role": "assistant", "content": "answer: b"}]]
    assert reward(prompts=["p"], completions=messages, row=rows[:1], trainer_state=None) == [1]
    assert imported("math:sqrt")(4.0) == 2.0
    with pytest.raises(UserError, match="'math:nothing' cannot be imported"):
        imported("math:nothing")
