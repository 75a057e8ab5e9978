"""Why a server stopped writing, in the words of the servers that pools come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from grape_service.pool.messages import Unusable, type_name
from grape_service.pool.values import said

CUT_OFF = frozenset(
    {
        "length",  # OpenAI, vLLM, SGLang, TGI
        "max_tokens",  # Anthropic, Cohere, Gemini, Bedrock
        "max_output_tokens",
        "max_completion_tokens",
        "max_new_tokens",
        "max_length",
        "max_context_length",
        "model_length",  # Mistral
        "model_context_window_exceeded",
        "token_limit",
        "token_limit_reached",
        "length_limit",
        "truncated",
        "incomplete",
    }
)
"""A limit of tokens ended the response."""

ENDED = frozenset(
    {
        "",
        "stop",
        "eos",
        "eos_token",
        "end",
        "end_turn",
        "stop_sequence",
        "stop_token",
        "stop_word",
        "finished",
        "finish",
        "complete",
        "completed",
        "done",
        "success",
        "normal",
        "eos_token_id",
        "tool_calls",
        "tool_call",
        "tool_use",
        "function_call",
    }
)
"""The policy itself ended its response."""

INSIDE = (
    *(("details", "finish_reason"), ("incomplete_details", "reason"), ("generation_info", "finish_reason")),
    *(("response_metadata", "finish_reason"), ("metadata", "finish_reason"), ("meta", "finish_reason")),
)
"""(column, field of its objects): TGI, OpenAI's Responses, LangChain."""
FLAGS = ("truncated", "is_truncated", "was_truncated")
"""Columns that are true where a limit of tokens ended the response."""


def reason_in(fields: Mapping[str, Any], reason: str | None, carried: Collection[str]) -> str | None:
    """The finish reason of a candidate that says `reason`, or says why it ended in an object or by a flag; columns that
    are carried along say nothing. Raises Unusable for what is no reason."""
    for name in FLAGS:
        value = fields.get(name)
        if name not in carried and (value is True or (isinstance(value, str) and value.strip().lower() == "true")):
            return reason if is_truncation(reason) else "truncated"
    for name, field in () if reason is not None else INSIDE:
        inner = fields.get(name)
        if isinstance(inner, dict) and inner.get(field) is not None and name not in carried:
            return reason_of(inner[field])
    return reason


def reason_of(value: Any) -> str | None:
    """A finish reason as text: SGLang's is an object with a type, vLLM's stop_reason may be the id of a token. Raises
    Unusable for what is no reason."""
    value = said(value)
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        value = value["type"]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return None
    raise Unusable("finish_reason has the wrong type", f"it is {type_name(value)}, not text")


def word_of(value: Any) -> str:
    """A finish reason as these tables write it: FinishReason.MAX_TOKENS and MAX_TOKENS are max_tokens."""
    text = value if isinstance(value, str) else ""
    return text.strip().lower().replace("-", "_").replace(" ", "_").rsplit(".", 1)[-1].removeprefix("finish_reason_")


def is_truncation(value: Any) -> bool:
    """Whether a limit of tokens ended the response."""
    return value is not None and word_of(value) in CUT_OFF


def is_known(value: Any) -> bool:
    """Whether this is a word for the end of a response that is known; any other counts as an end."""
    return word_of(value) in CUT_OFF | ENDED
