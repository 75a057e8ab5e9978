"""What a template leaves out of the messages that it is given."""

from __future__ import annotations

from typing import Protocol

import orjson

from grape_service.render.encoding import MARK_CLOSE, MARK_OPEN
from grape_service.rows.candidate import Message, Tool
from grape_service.rows.messages import THOUGHTS, is_note

SHOWN_AS_WORDS = ("role", "content")
LINKS = ("tool_call_id",)
"""Fields that say which message belongs to which: templates that keep the order need not show them."""


class RendersMessages(Protocol):
    """What is asked of a template."""

    def render(
        self, messages: list[Message], tools: list[Tool] | None = None, generation_prompt: bool = False
    ) -> str: ...


def left_out_words(text: str, messages: list[Message], tools: list[Tool] | None) -> str | None:
    """Which message's words, or which tool's name, a rendering does not show; None where all are there."""
    for index, message in enumerate(messages):
        words = message["content"]
        if message["role"] == "assistant":
            words = words.rsplit("</think>", 1)[-1]
        words = words.strip().strip(MARK_OPEN + MARK_CLOSE)
        if words and words not in text and orjson.dumps(words).decode()[1:-1] not in text and not _as_json(words, text):
            return f"or rewrites the words of message {index} ({message['role']})"
    for tool in tools or []:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in text:
            return f"the tool {name}"
    return None


def _as_json(words: str, text: str) -> bool:
    import json

    return json.dumps(words)[1:-1] in text


def left_out_field(
    template: RendersMessages, messages: list[Message], tools: list[Tool] | None, start: int | None
) -> str | None:
    """Which field of the messages changes nothing in their rendering; None where each one counts.

    `start` is the first message of a response, or None where the messages are a prompt, whose past thoughts may be
    left out. Only rows whose messages have more than a role and words are rendered again, once for each field.
    """
    first = start or 0
    extra = [
        (index, key)
        for index, message in enumerate(messages)
        if index >= first
        for key, value in message.items()
        if key not in SHOWN_AS_WORDS and key not in LINKS and value not in (None, "", [], {}, False)
        if not is_note(key)
        if not (key == "name" and message["role"] == "tool")
        if not (start is None and key in THOUGHTS)
    ]
    if not extra:
        return None
    is_prompt = start is None
    whole = template.render(messages, tools, generation_prompt=is_prompt)
    for index, key in extra:
        for name, changed in _without(messages[index], key):
            others = [*messages[:index], changed, *messages[index + 1 :]]
            if _renders_alike(template, others, tools, is_prompt, whole):
                return f"{name} of message {index} ({messages[index]['role']})"
    return None


def _without(message: Message, key: str) -> list[tuple[str, Message]]:
    """The message without a field, and of tool calls also without the arguments of each."""
    changed = [(f"the field {key}", {name: value for name, value in message.items() if name != key})]
    calls = message[key]
    if key == "tool_calls" and isinstance(calls, list):
        for place, call in enumerate(calls):
            function = call.get("function", call)
            if isinstance(function, dict) and function.get("arguments"):
                empty = {**function, "arguments": {} if isinstance(function["arguments"], dict) else "{}"}
                other = {**call, "function": empty} if "function" in call else empty
                replaced = [*calls[:place], other, *calls[place + 1 :]]
                changed.append(("the arguments of a tool call", {**message, key: replaced}))
    return changed


def _renders_alike(
    template: RendersMessages, messages: list[Message], tools: list[Tool] | None, is_prompt: bool, whole: str
) -> bool:
    try:
        return template.render(messages, tools, generation_prompt=is_prompt) == whole
    except Exception:  # a template that fails without the field looks at it
        return False
