"""Chat messages: what pools, templates and reports share."""

from __future__ import annotations

from typing import Any

import orjson

from grape_service.rows.candidate import Message
from grape_service.rows.columns import MESSAGE_FIELDS


def text_of_parts(content: Any) -> str | None:
    """The text of a content list whose parts are all text, joined by newlines; None for anything else."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "\n".join(part["text"] for part in content)
    return None


def shown_content(content: Any) -> str:
    """A message's content as text."""
    return content if isinstance(content, str) else "" if content is None else orjson.dumps(content).decode()


def response_messages(response: str | list[Message]) -> list[Message]:
    """A response in chat form: text is one assistant message."""
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def tool_names(message: Message) -> list[str]:
    """Names of the functions that a message calls."""
    calls = message.get("tool_calls") or []
    return [str(call.get("function", call).get("name", "")) for call in calls]


def only_text(response: str | list[Message]) -> str | None:
    """The text of a response that is text, or one assistant message of nothing but text; else None."""
    if isinstance(response, str):
        return response
    if len(response) != 1 or response[0].get("role") != "assistant" or not isinstance(response[0].get("content"), str):
        return None
    if any(value for key, value in response[0].items() if key not in ("role", "content", "name")):
        return None
    return response[0]["content"]


def field_of(name: str, value: Any) -> str:
    """In which of MESSAGE_FIELDS a release keeps this field of a message."""
    if name == "tool_calls" or (name in MESSAGE_FIELDS and name != "extra" and isinstance(value, str)):
        return name
    return "extra"


def stored_message(message: Message) -> dict[str, str]:
    """A message as a release keeps it, in MESSAGE_FIELDS."""
    stored: dict[str, str] = {}
    extra: dict[str, Any] = {}
    for name, value in message.items():
        if value is None:
            continue
        if field_of(name, value) == "extra":
            extra[name] = value
        else:
            stored[name] = value if isinstance(value, str) else orjson.dumps(value).decode()
    return {**stored, "extra": orjson.dumps(extra).decode()} if extra else stored


def whole_message(stored: dict[str, str | None]) -> Message:
    """The inverse of `stored_message`: tool calls as objects, and nothing that is absent."""
    message: Message = {name: value for name, value in stored.items() if value is not None and name != "extra"}
    if "tool_calls" in message:
        message["tool_calls"] = orjson.loads(message["tool_calls"])
    return {**message, **orjson.loads(stored.get("extra") or "{}")}
