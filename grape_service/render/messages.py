"""Chat messages in the form that templates expect."""

from __future__ import annotations

from typing import Any

import orjson

from grape_service.rows.candidate import Message
from grape_service.rows.messages import text_of_parts

RESPONSE_ROLES = ("assistant", "tool")


class MessageError(ValueError):
    """A message that no template can take."""


def template_messages(messages: list[Message]) -> list[Message]:
    """Messages as templates expect them: content a string, tool calls with arguments as objects, no nulls.

    Raises MessageError for messages without a role, contents that are not text and tool calls that are no list.
    """
    return [_template_message(message, index) for index, message in enumerate(messages)]


def _template_message(message: Message, index: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise MessageError(f"message {index} has no role")
    if set(message) == {"role", "content"} and isinstance(message["content"], str):
        return message
    plain = {key: value for key, value in message.items() if value is not None}
    plain["content"] = content_text(message.get("content"), index)
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], index)
        if not plain["tool_calls"]:
            del plain["tool_calls"]
    return plain


def content_text(content: Any, index: int) -> str:
    """A message's content as text; the text parts of a list are joined by newlines."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    text = text_of_parts(content)
    if text is not None:
        return text
    raise MessageError(f"the content of message {index} is not text")


def _tool_calls(calls: Any, index: int) -> list[dict[str, Any]]:
    if isinstance(calls, str):
        calls = _json(calls)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise MessageError(f"the tool_calls of message {index} are not a list of objects")
    return [_tool_call(call) for call in calls]


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    call = {key: value for key, value in call.items() if value is not None}
    if isinstance(call.get("function"), dict):
        return {**call, "function": _tool_call(call["function"])}
    if isinstance(call.get("arguments"), str):
        arguments = _json(call["arguments"])
        return {**call, "arguments": arguments if isinstance(arguments, dict) else call["arguments"]}
    return call


def _json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
