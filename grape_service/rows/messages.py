"""Chat messages: what pools, templates and reports share."""

from __future__ import annotations

from typing import Any

import orjson

from grape_service.json_types import JsonObject
from grape_service.rows.candidate import Message
from grape_service.rows.columns import MESSAGE_FIELDS

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold what its writer thought; templates of reasoning models leave them out of past turns."""


PROMPT_FIELDS = frozenset(
    {
        *("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "tools", "functions"),
        *(*THOUGHTS, "thoughts", "refusal", "channel", "recipient", "prefix"),
        *("parts", "text", "images", "image", "image_url", "videos", "video", "audios", "audio", "files", "file"),
        *("documents", "attachments", "context", "citations"),
    }
)
"""Fields of a message that could belong into a prompt; all others are notes, which no template has to show."""
SHOWN_FIELDS = ("role", "content", "name")
IGNORED = "notes"
"""The field of a message that holds those of its fields that pool.messages.ignore names: no template sees it."""
WITHOUT_LOSS = "weight"
"""A message of the assistant has this field at 0 where it is read and not trained on."""


def is_note(name: str) -> bool:
    """Whether a field of a message only says something about it."""
    return name not in PROMPT_FIELDS


def without_notes(messages: list[Message]) -> list[Message]:
    """Messages with the fields alone that could belong into a prompt."""
    if all(len(message) == 2 for message in messages):  # role and content
        return messages
    return [{name: value for name, value in message.items() if not is_note(name)} for message in messages]


def has_loss(message: Message) -> bool:
    """Whether a message of the assistant is trained on."""
    return message.get(WITHOUT_LOSS) != 0


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
    if any(value for key, value in response[0].items() if key in PROMPT_FIELDS and key not in SHOWN_FIELDS):
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
    extra: JsonObject = {}
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
