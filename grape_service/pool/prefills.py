"""Prefills of pool rows: a prompt that ends with the assistant's own words, or a column with the beginning of a
response that the policy did not write."""

from __future__ import annotations

from typing import Any

from grape_service.pool.content import Unusable
from grape_service.pool.messages import type_name
from grape_service.pool.values import NOTHING
from grape_service.rows.candidate import Message
from grape_service.rows.messages import PROMPT_FIELDS, response_messages
from grape_service.rows.prefill import prefill_of, without_prefill

SAYS_PREFILL = ("role", "content", "prefix")
"""Fields of a message that is a prefill; DeepSeek and Mistral mark it with `prefix: true`."""


def with_prefill(prompt: list[Message], column: Any = None) -> list[Message]:
    """A prompt whose last message, if it is the assistant's, is a prefill as rows/prefill.py has it; `column` is what a
    column of the row says of one. Notes of a prefill are left out. Raises Unusable."""
    said = _text_of(column)
    last = prompt[-1]
    if last["role"] != "assistant":
        return prompt if said is None else [*prompt, {"role": "assistant", "content": said}]
    more = [name for name, value in last.items() if value and name in PROMPT_FIELDS and name not in SAYS_PREFILL]
    if more:
        raise Unusable("prefill is more than text", f"the message that the response continues has {more[0]}")
    if said is not None and said != last["content"]:
        raise Unusable("two prefills", "the prompt ends with one and a column has another")
    before = without_prefill(prompt)
    return [*before, {"role": "assistant", "content": last["content"]}] if last["content"] else before


def _text_of(column: Any) -> str | None:
    if column is None or column != column:
        return None
    if not isinstance(column, str):
        raise Unusable("prefill has the wrong type", f"it is {type_name(column)}, not text")
    return None if column in NOTHING else column


def behind_prefill(prompt: list[Message], response: str | list[Message]) -> str | list[Message]:
    """Of a whole turn, as a conversation has it, what continues the prefill of its prompt. Raises Unusable."""
    prefill = prefill_of(prompt)
    if prefill is None:
        return response
    first, *others = response_messages(response)
    if first["role"] != "assistant" or not first["content"].startswith(prefill):
        raise Unusable("response does not begin with its prefill", f"the conversation's turn has no {prefill[:40]!r}")
    rest = first["content"][len(prefill) :]
    if isinstance(response, str):
        if not rest.strip():
            raise Unusable("empty response", "there is nothing behind its prefill")
        return rest
    return [{**first, "content": rest}, *others]
