"""Prompts, responses and tools of a pool row, checked and in one form."""

from __future__ import annotations

from typing import Any

import orjson

from grape_service.rows.candidate import Message, Rejection
from grape_service.rows.messages import text_of_parts

PROMPT_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
LAST_PROMPT_ROLES = ("user", "tool", "function")
RESPONSE_ROLES = ("assistant", "tool", "function")
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""Who speaks in ShareGPT's `from`, in the roles of chat templates."""
SHAREGPT_NOTES = ("weight", "loss", "train", "markdown")
"""Fields of ShareGPT's turns that say how to train on them, and are no part of the conversation."""


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
        parsed = parsed_json(value)
        if not is_conversation(parsed):
            return [{"role": "user", "content": value}]
        value = parsed
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


def conversation_of(value: Any) -> tuple[list[Message], str | list[Message]]:
    """Messages that end with the response as prompt and response: what follows the last turn of a user. Raises
    Unusable."""
    if value is None:
        raise Unusable("missing response", "there are no messages")
    if isinstance(value, str):
        value = parsed_json(value)
    messages = _messages(value, "conversation")
    start = len(messages)
    while start and messages[start - 1]["role"] in RESPONSE_ROLES:
        start -= 1
    if not messages or messages[-1]["role"] != "assistant":
        last = f"it ends with '{messages[-1]['role']}'" if messages else "it is empty"
        raise Unusable("conversation does not end with a response", last)
    return prompt_messages(messages[:start] or None), response_of(_text_or_messages(messages[start:]))


def response_message(message: dict[str, Any]) -> Any:
    """One message of the assistant as a response: its text, where it is nothing more."""
    return _text_or_messages([message])


def with_system_prompt(system: Any, prompt: list[Message]) -> list[Message]:
    """The prompt with a row's own system prompt in front. Raises Unusable where it has another already."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return prompt
    if not isinstance(system, str):
        raise Unusable("system_prompt has the wrong type", f"it is {_type_name(system)}, not text")
    if prompt[0]["role"] in ("system", "developer"):
        if prompt[0]["content"] == system:
            return prompt
        raise Unusable("two system prompts", "the messages have one and the column system_prompt another")
    return [{"role": "system", "content": system}, *prompt]


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of chat messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and isinstance(_role(one), str) and _has_content(one) for one in value)
    )


def ends_with_response(value: Any) -> bool:
    """Whether a value is a list of chat messages, the last of them the assistant's."""
    value = parsed_json(value) if isinstance(value, str) else value
    return is_conversation(value) and _message(value[-1], "conversation")["role"] == "assistant"


def parsed_json(text: str) -> Any:
    """The list or object that a text is in JSON, or None."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, list | dict) else None


def without_nulls(value: Any) -> Any:
    """A value of a Parquet file without the keys that are null: an Arrow struct has the keys of all rows together."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _role(message: dict[str, Any]) -> Any:
    return message.get("role") if message.get("role") is not None else message.get("from")


def _has_content(message: dict[str, Any]) -> bool:
    return any(name in message for name in ("content", "value", "tool_calls"))


def _text_or_messages(messages: list[Message]) -> Any:
    if len(messages) == 1 and not {name for name, field in messages[0].items() if field} - {"role", "content"}:
        content = messages[0].get("content")
        return content if isinstance(content, str) else messages
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
    is_sharegpt = role is None and "from" in message
    if is_sharegpt:
        role, content = message["from"], message.get("value", content)
        role = SHAREGPT_ROLES.get(role.lower(), role) if isinstance(role, str) else role
    if not isinstance(role, str):
        raise Unusable(f"{what} has the wrong type", "a message has no role")
    content = content if text_of_parts(content) is None else text_of_parts(content)
    if content is not None and not isinstance(content, str):
        raise Unusable(f"{what} has the wrong type", f"the content of a message is {_type_name(content)}, not text")
    ours = ("role", "content", "from", "value", *SHAREGPT_NOTES) if is_sharegpt else ("role", "content")
    kept = {name: field for name, field in message.items() if field is not None and name not in ours}
    if is_sharegpt and message["from"] == "function_call":
        return {"role": role, "content": "", "tool_calls": _sharegpt_calls(content, what), **kept}
    return {"role": role, "content": content or "", **kept}


def _sharegpt_calls(content: str | None, what: str) -> list[dict[str, Any]]:
    calls = parsed_json(content or "")
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise Unusable(f"{what} has the wrong type", "a function_call is not JSON with a name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _type_name(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
