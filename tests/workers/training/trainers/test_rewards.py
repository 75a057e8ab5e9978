"""Rewards: mathematical answers, exact ones, and functions of a team's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from grape_service.config.schema import RenderConfig
from grape_service.config.training import (
    RewardSettings,
)
from grape_service.errors import UserError
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rendered
from tests.template_families import make
from workers.training.reward_functions import imported
from workers.training.trainers.rewards import exact_match, math_correct, reward_function


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
    assert imported(f"{__name__}:wrong_reward") is wrong_reward
    for path, sentence in (("math:nothing", "has no function"), ("math:pi", "has no function"), ("math:sqrt", "row")):
        with pytest.raises(UserError, match=f"'{path}'.*{sentence}"):
            imported(path)


def test_what_is_judged_behind_a_prefill_is_the_whole_turn() -> None:
    """In the tokens that follow it: a tokenizer that decodes no space before a text would lose the one in between."""
    renderer = Renderer(make("zephyr"), RenderConfig())
    asked = [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "It is"}]
    [row] = renderer.render([Candidate(asked, " 7", "p", "c")])
    assert isinstance(row, Rendered)
    prompt, ids = row.input_ids[: row.prompt_len].tolist(), row.input_ids[row.prompt_len :].tolist()
    text = make("zephyr").decode(ids, skip_special_tokens=True)
    assert text == "7"
    reward = reward_function(RewardSettings(type="exact"), 0, make("zephyr"))
    beside = {"messages": [json.dumps(asked)], "prompt_ids": [prompt], "completion_ids": [ids]}
    for answer, score in (("It is 7", 1), ("It is7", 0), ("7", 0)):
        assert reward(["…"], [text], row=[json.dumps({"answer": answer})], **beside) == [score]
    plain = {**beside, "messages": [json.dumps(asked[:1])]}
    assert reward(["…"], [text], row=[json.dumps({"answer": "7"})], **plain) == [1]


def wrong_reward(prompt: object, response: str, row: dict[str, Any]) -> Any:
    if row["is"] == "raises":
        return row["nothing"]
    return {"none": None, "nan": float("nan"), "text": "1", "inf": float("inf"), "list": [1]}.get(row["is"], 1)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("raises", "raised KeyError of the answer 'b': 'nothing'"),
        ("none", "gave a NoneType of the answer 'b': it has to give a number"),
        ("list", "gave a list of the answer 'b'"),
        ("nan", "gave nan of the answer 'b': it has to give a finite number"),
        ("inf", "gave inf of the answer 'b'"),
        ("text", "gave '1' of the answer 'b'"),
    ],
)
def test_a_function_that_gives_no_number_is_told(what: str, sentence: str) -> None:
    reward = reward_function(RewardSettings(type="function", function=f"{__name__}:wrong_reward"), 0)
    assert reward(prompts=["p"], completions=["a"], row=[json.dumps({"is": "right"})]) == [1]
    with pytest.raises(UserError, match=re.escape(f"train.rl.rewards: '{__name__}:wrong_reward' {sentence}")):
        reward(prompts=["p"] * 2, completions=["a", "b"], row=[json.dumps({"is": of}) for of in ("right", what)])


def test_a_working_folders_rewards_are_its_own_and_as_they_are_now(tmp_path: Path) -> None:
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "judge_of_test.py").write_text(f"def score(prompt, response, row): return {number}\n")
    scores = [imported("judge_of_test:score", str(tmp_path / folder))([], "", {}) for folder in "aba"]
    (tmp_path / "a" / "judge_of_test.py").write_text("def score(prompt, response, row): return 22\n")
    assert [*scores, imported("judge_of_test:score", str(tmp_path / "a"))([], "", {})] == [0, 1, 0, 22]
    with pytest.raises(UserError, match="there is no module"):
        imported("judge_of_test:score")
