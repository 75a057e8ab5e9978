"""A prefill: words of the assistant that a policy was given, and that its response continues.

A prompt that has one ends with it, as a message of the assistant that is a role and text. In a release it is one turn
with the response, and the column `prefill` says with which words that turn begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from grape_service.rows.candidate import Message


def prefill_of(prompt: Sequence[Message]) -> str | None:
    """The prefill that a prompt ends with, or None."""
    last = prompt[-1] if prompt else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return None
    return last["content"] if isinstance(last.get("content"), str) else None


def without_prefill(prompt: list[Message]) -> list[Message]:
    """A prompt up to where the assistant's turn begins."""
    return prompt if prefill_of(prompt) is None else prompt[:-1]


def whole_turn(prefill: str, response: list[Message]) -> list[Message]:
    """The messages of a response with its prefill in front of the words of the first, which is the assistant's."""
    return [{**response[0], "content": prefill + (response[0].get("content") or "")}, *response[1:]]


def one_turn(messages: list[Message], num_prompt: int) -> tuple[list[Message], int, str | None]:
    """(messages, how many are before the response, prefill) of prompt and response, of which the first `num_prompt` are
    the prompt's, with the prefill in the turn that it begins."""
    prefill = prefill_of(messages[:num_prompt])
    if prefill is None:
        return messages, num_prompt, None
    before = num_prompt - 1
    return [*messages[:before], *whole_turn(prefill, messages[num_prompt:])], before, prefill


def two_turns(messages: list[Message], num_prompt: int, prefill: str | None) -> tuple[list[Message], int]:
    """The inverse of `one_turn`: (messages, how many are the prompt's), the prefill a message of its own again."""
    if prefill is None:
        return messages, num_prompt
    first = messages[num_prompt]
    assert first["content"].startswith(prefill), "a turn begins with its prefill"
    rest = {**first, "content": first["content"][len(prefill) :]}
    given = {"role": "assistant", "content": prefill}
    return [*messages[:num_prompt], given, rest, *messages[num_prompt + 1 :]], num_prompt + 1


def prefills_of(texts: Sequence[str], num_prompt: Sequence[int]) -> list[str | None]:
    """The prefill of each row [N], of its messages as JSON, its response among them, and how many are the prompt's."""
    return [
        prefill_of(orjson.loads(text)[:number]) if text.count('"assistant"') > 1 else None
        for text, number in zip(texts, num_prompt, strict=True)
    ]
