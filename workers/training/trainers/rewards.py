"""Rewards that can be checked: a mathematical answer, an exact one, or a Python function's verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import orjson

from grape_service.config.training import RewardSettings
from grape_service.errors import UserError
from grape_service.models.tokenizer import text_behind
from grape_service.rows.prefill import prefill_of
from workers.training.reward_functions import RewardFunction, imported

Reward = Callable[..., list[float]]
"""As TRL calls it: prompts, completions and each further column as lists of one length."""


def reward_function(settings: RewardSettings, number: int, tokenizer: Any = None) -> Reward:
    """The function of a reward, named for the logs. What it judges is the whole turn: behind a prefill, an answer is
    what its ids say there with `tokenizer`. Raises UserError where a function cannot be imported, and when it raises
    or gives no finite number."""
    judge = _judge(settings)

    def reward(
        prompts: list[Any], completions: list[Any], row: list[str], messages: list[str] | None = None, **more: Any
    ) -> list[float]:
        asked = prompts if messages is None else [orjson.loads(text) for text in messages]
        turns = [response_text(completion) for completion in completions]
        for place, prompt in enumerate(asked):
            prefill = prefill_of(prompt) if isinstance(prompt, list) else None
            if prefill is None:
                continue
            if tokenizer is not None and "prompt_ids" in more and "completion_ids" in more:
                ids = more["prompt_ids"][place], more["completion_ids"][place]
                turns[place] = text_behind(tokenizer, *ids, skip_special_tokens=True)
            turns[place] = prefill + turns[place]
        return [
            float(judge(prompt, turn, orjson.loads(values)))
            for prompt, turn, values in zip(asked, turns, row, strict=True)
        ]

    reward.__name__ = f"{settings.type}_{number}" if number else settings.type
    return reward


def response_text(completion: Any) -> str:
    """The text of a completion: a string, or the content of its messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


def _judge(settings: RewardSettings) -> RewardFunction:
    if settings.type == "function":
        assert settings.function is not None
        return _checked(settings.function, imported(settings.function))
    if settings.type == "math":
        return lambda prompt, response, row: math_correct(response, str(row[settings.answer_column]))
    pattern = re.compile(settings.pattern) if settings.pattern else None
    return lambda prompt, response, row: exact_match(response, str(row[settings.answer_column]), pattern)


def _checked(path: str, function: RewardFunction) -> RewardFunction:
    """A user's function whose mistakes are told, with the answer that it was asked about."""

    def judge(prompt: Any, response: str, row: dict[str, Any]) -> float:
        of = f"train.rl.rewards: '{path}'"
        asked = f"of the answer {response[:80]!a}"
        try:
            found = function(prompt, response, row)
        except Exception as error:
            raise UserError(f"{of} raised {type(error).__name__} {asked}: {_first_line(error)}") from error
        try:
            value = float(found)
        except (TypeError, ValueError):
            raise UserError(f"{of} gave a {type(found).__name__} {asked}: it has to give a number") from None
        if isinstance(found, str) or not math.isfinite(value):
            raise UserError(f"{of} gave {found!r} {asked}: it has to give a finite number")
        return value

    return judge


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def math_correct(response: str, answer: str) -> float:
    """1 if the last mathematical expression of a response equals the answer, else 0."""
    from math_verify import parse, verify

    gold = parse(answer, parsing_timeout=None) or parse(f"${answer}$", parsing_timeout=None)
    found = parse(response, parsing_timeout=None)
    return float(bool(gold) and bool(found) and verify(gold, found, timeout_seconds=None))


def exact_match(response: str, answer: str, pattern: re.Pattern[str] | None) -> float:
    """1 if the response, or the first group of the pattern's last match in it, is the answer after trimming."""
    if pattern is not None:
        matches = list(pattern.finditer(response))
        if not matches:
            return 0.0
        response = matches[-1].group(1 if pattern.groups else 0)
    return float(response.strip() == answer.strip())
