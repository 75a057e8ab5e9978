"""Why a server stopped writing, in the words of the servers that pools come from."""

from __future__ import annotations

from typing import Any

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
