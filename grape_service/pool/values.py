"""Values of a pool's columns that are ours: ids, sources, token ids, log-probabilities, sampling settings."""

from __future__ import annotations

from typing import Any

from grape_service.pool.filters import MISSING, TRUTHS, number_of, value_at
from grape_service.pool.messages import Unusable, parsed_json, type_name
from grape_service.rows.candidate import Message, Row

EXACT_IN_FLOAT = 2.0**53
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p")
"""What of `sampling` is kept: the settings that change probabilities."""
NOTHING = frozenset(("", "null", "None", "NaN", "nan"))
"""What a cell says where there is no value."""


def lift(row: Row, path: str) -> None:
    """Give a row the field a.b of one of its objects as a column of that name; the object has it no more."""
    if path in row:
        return
    value = value_at(row, path)
    row[path] = None if value is MISSING else value
    if value is MISSING:
        return
    inner = row
    *above, last = path.split(".")
    for name in above:
        inner[name] = dict(inner[name])
        inner = inner[name]
    del inner[last]


def text_value(value: Any, name: str) -> str | None:
    """An id or a source: text; whole numbers become text."""
    if value is None or value != value:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_IN_FLOAT:
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        raise Unusable(
            f"{name} has lost digits", "it is a float of more than 53 bits: keep it as an integer or as text"
        )
    raise Unusable(f"{name} has the wrong type", f"it is a {type(value).__name__}, not text or a whole number")


def template_variables(value: Any = None) -> dict[str, Any] | None:
    """Variables of the chat template for one row, an object or JSON text of one. Raises Unusable."""
    value = said(value)
    if value is None or value == {}:
        return None
    if not isinstance(value, dict):
        raise Unusable("chat_template_kwargs are not an object", f"it is {type_name(value)}")
    return value


def with_thoughts(response: str | list[Message], thoughts: Any, column: str) -> str | list[Message]:
    """A response with the thoughts that a column of its row has. Raises Unusable where they have no one place."""
    if not isinstance(thoughts, str):
        raise Unusable("reasoning has the wrong type", f"'{column}' is {type_name(thoughts)}, not text")
    if not thoughts.strip():
        return response
    messages = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
    if len(messages) != 1:
        raise Unusable("reasoning of several messages", f"'{column}' does not say whose of {len(messages)} it is")
    content = messages[0]["content"].lstrip()
    if content.startswith(("<think>", thoughts.strip()[:200])) or messages[0].get("reasoning_content"):
        raise Unusable("reasoning is there twice", f"the response has its thoughts, and so has '{column}'")
    return [{**messages[0], "reasoning_content": thoughts}]


def numbers(value: Any, kinds: set[type], reason: str) -> list[Any] | None:
    """A list of numbers of these types, or JSON text of one. Raises Unusable for anything else."""
    value = said(value)
    if value is None:
        return None
    if not isinstance(value, list):
        raise Unusable(reason, f"it is {type_name(value)}, not a list")
    others = set(map(type, value)) - kinds
    if others:
        raise Unusable(reason, f"there is a {min(other.__name__ for other in others)} in the list")
    return value


def said(value: Any) -> Any:
    """A value as its writer meant it: the list or object that a text is, None for NaN and for text that says nothing.
    Other values as they are."""
    if isinstance(value, str):
        if (parsed := parsed_json(value)) is not None:
            return parsed
        return None if value.strip() in NOTHING else value
    return None if value != value else value


def sampling_settings(value: Any) -> dict[str, Any] | None:
    """How a response was sampled: settings as numbers, also where they are text; what `logprobs` are where it says so.
    Raises Unusable."""
    value = said(value)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Unusable("sampling is not an object", f"it is {type_name(value)}")
    kept: dict[str, Any] = {
        key: number for key in SAMPLING_KEYS if (number := _setting(value.get(key), key)) is not None
    }
    if (what := _numbers_said(value.get("logprobs"))) is not None:
        kept["logprobs"] = what
    return kept or None


def _setting(value: Any, key: str) -> int | float | None:
    value = said(value)
    if value is None:
        return None
    number = number_of(value) if isinstance(value, str) else value
    if not isinstance(number, int | float) or isinstance(number, bool) or not abs(number) < float("inf"):
        raise Unusable("sampling settings are not numbers", f"{key} is {type_name(value)}")
    if key == "temperature" and number < 0:
        raise Unusable("sampling settings are not numbers", "temperature is below 0")
    return number


def _numbers_said(value: Any) -> str | None:
    """What recorded log-probabilities are: raw or processed, also in vLLM's words, or unsaid by their trainer; None
    where a request only says how many it asks for, or whether it does."""
    value = said(value)
    if value is None or isinstance(value, int | float):
        return None
    if isinstance(value, str) and (number_of(value) is not None or value.strip().lower() in TRUTHS):
        return None
    word = str(value).removesuffix("_logprobs")
    if word not in ("raw", "processed", "unsaid"):
        raise Unusable("sampling.logprobs is not known", f"it is '{value}', not raw or processed")
    return word
