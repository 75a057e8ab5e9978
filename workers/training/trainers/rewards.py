"""Rewards that can be checked: a mathematical answer, an exact one, or a Python function's verdict."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import orjson

from grape_service.config.training import RewardSettings
from grape_service.errors import UserError

Reward = Callable[..., list[float | None]]
"""As TRL calls it: prompts, completions and each further column as lists of one length."""


def reward_function(settings: RewardSettings, number: int) -> Reward:
    """The function of a reward, named for the logs. Raises UserError where a function cannot be imported."""
    judge = _judge(settings)

    def reward(prompts: list[Any], completions: list[Any], row: list[str], **_: Any) -> list[float | None]:
        rows = [orjson.loads(text) for text in row]
        return [
            float(judge(prompt, response_text(completion), values))
            for prompt, completion, values in zip(prompts, completions, rows, strict=True)
        ]

    reward.__name__ = f"{settings.type}_{number}" if number else settings.type
    return reward


def response_text(completion: Any) -> str:
    """The text of a completion: a string, or the content of its messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


def _judge(settings: RewardSettings) -> Callable[[Any, str, dict[str, Any]], float]:
    if settings.type == "function":
        assert settings.function is not None
        return imported(settings.function)
    if settings.type == "math":
        return lambda prompt, response, row: math_correct(response, str(row[settings.answer_column]))
    pattern = re.compile(settings.pattern) if settings.pattern else None
    return lambda prompt, response, row: exact_match(response, str(row[settings.answer_column]), pattern)


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


def imported(path: str) -> Callable[..., float]:
    """The function at module:name. Raises UserError."""
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"train.rl.rewards: '{path}' cannot be imported: {error}") from None
    if not callable(function):
        raise UserError(f"train.rl.rewards: '{path}' is no function")
    return function
