"""Prompts, responses and tools of a pool row, checked and in one form."""

from __future__ import annotations

from typing import Any

import orjson

from grape_service.rows.candidate import Message, Rejection
from grape_service.rows.messages import text_of_parts

PROMPT_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
LAST_PROMPT_ROLES = ("user", "tool", "function")


class Unusable(Exception):
    """Why a row cannot be used; caught where rows become candidates."""

    def __init__(self, reason: str, detail: str | None = None):
        super().__init__(reason)
        self.rejection = Rejection(reason, detail)


def prompt_messages(value: Any) -> list[Message]:
    """A prompt, text or chat messages, as chat messages that end with a user or tool turn. Raises Unusable."""
    if value is None:
        raise Unusable("missing prompt")
    if isinstance(value, str):
        if not value.strip():
            raise Unusable("empty prompt")
        return [{"role": "user", "content": value}]
    messages = _messages(value, "prompt")
    if not messages or not any(_says_something(message) for message in messages):
        raise Unusable("empty prompt")
    for message in messages:
        if message["role"] not in PROMPT_ROLES:
            raise Unusable("unknown role in the prompt", f"'{message['role']}' is none of {', '.join(PROMPT_ROLES)}")
    if messages[-1]["role"] not in LAST_PROMPT_ROLES:
        raise Unusable("prompt does not end with a user or tool turn", f"it ends with '{messages[-1]['role']}'")
    return messages


def response_of(value: Any) -> str | list[Message]:
    """A response, text or the assistant and tool messages of a trajectory. Raises Unusable."""
    if value is None:
        raise Unusable("missing response")
    if isinstance(value, str):
        if not value.strip():
            raise Unusable("empty response")
        return value
    messages = _messages(value, "response")
    if not any(message["role"] == "assistant" and _says_something(message) for message in messages):
        raise Unusable("empty response")
    for message in messages:
        if message["role"] not in ("assistant", "tool"):
            raise Unusable("unknown role in the response", f"'{message['role']}' is not assistant or tool")
    return messages


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """Tool definitions, a list of objects or JSON text of one. Raises Unusable."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise Unusable("tools are not a list of objects", "the text is not JSON") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Unusable("tools are not a list of objects")
    return value


def _messages(value: Any, what: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unusable(f"{what} has the wrong type", f"it is {_type_name(value)}, not text or a list of messages")
    return [_message(message, what) for message in value]


def _message(message: dict[str, Any], what: str) -> Message:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise Unusable(f"{what} has the wrong type", "a message has no role")
    content = content if text_of_parts(content) is None else text_of_parts(content)
    if content is not None and not isinstance(content, str):
        raise Unusable(f"{what} has the wrong type", f"the content of a message is {_type_name(content)}, not text")
    kept = {name: field for name, field in message.items() if field is not None and name not in ("role", "content")}
    return {"role": role, "content": content or "", **kept}


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _type_name(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
