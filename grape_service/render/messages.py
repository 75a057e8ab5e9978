"""Chat messages in the form that templates expect."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

from grape_service.render.template import CallForm, ChatTemplate
from grape_service.rows.candidate import Message
from grape_service.rows.messages import IGNORED, THOUGHTS, text_of_parts

THOUGHT_BREAKS = re.compile(r"\A\n+|\n+\Z")

RESPONSE_ROLES = ("assistant", "tool")


class MessageError(ValueError):
    """A message that no template can take."""


class MessageForm:
    """Brings messages into the form that one template expects."""

    def __init__(self, template: ChatTemplate | None, reasoning: Literal["template", "tags", "drop"]):
        self._calls = CallForm() if template is None else template.calls
        self._shows_thoughts = template is None or template.shows_thoughts
        self._reasoning = reasoning

    def prompt(self, messages: list[Message]) -> list[Message]:
        """A prompt's messages: content a string, tool calls as the template takes them, no nulls.

        Thoughts of past turns are left out where render.reasoning decides about them, as reasoning models do. Raises
        MessageError for messages without a role, contents that are not text and tool calls that are no list.
        """
        uniform = self.messages(messages)
        if self._reasoning == "template" or self._shows_thoughts:
            return uniform
        return [{name: value for name, value in message.items() if name not in THOUGHTS} for message in uniform]

    def messages(self, messages: list[Message]) -> list[Message]:
        """Messages as the template expects them. Raises MessageError."""
        return [self._message(message, index) for index, message in enumerate(messages)]

    def thoughts(self, response: list[Message]) -> list[Message]:
        """A response with its thoughts where render.reasoning wants them, if the template has no place for them."""
        if self._reasoning == "template" or self._shows_thoughts:
            return response
        return [self._with_thoughts(message) if isinstance(message, dict) else message for message in response]

    def hint(self, response: list[Message]) -> str:
        """What to do about a response whose thoughts the template has no place for."""
        if self._shows_thoughts or not any(message.get(name) for message in response for name in THOUGHTS):
            return ""
        return ": it has no place for thoughts, and render.reasoning says what becomes of them (tags or drop)"

    def _with_thoughts(self, message: Message) -> Message:
        thoughts = next((message[name] for name in THOUGHTS if message.get(name)), None)
        if not isinstance(thoughts, str):
            return message
        rest = {name: value for name, value in message.items() if name not in THOUGHTS}
        if self._reasoning == "tags":
            words = THOUGHT_BREAKS.sub("", thoughts)
            rest["content"] = f"<think>\n{words}\n</think>\n\n{rest.get('content') or ''}"
        return rest

    def _message(self, message: Message, index: int) -> Message:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise MessageError(f"message {index} has no role")
        if set(message) == {"role", "content"} and isinstance(message["content"], str):
            return message
        plain = {key: value for key, value in message.items() if value is not None and key != IGNORED}
        plain["content"] = content_text(message.get("content"), index)
        if "tool_calls" in plain:
            plain["tool_calls"] = [self._call(call) for call in _tool_calls(plain["tool_calls"], index)]
            if not plain["tool_calls"]:
                del plain["tool_calls"]
        return plain

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        call = {key: value for key, value in call.items() if value is not None}
        if isinstance(call.get("function"), dict):
            return {**call, "function": self._call(call["function"])}
        arguments = call.get("arguments")
        if self._calls.as_text and isinstance(arguments, dict | list):
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        if not self._calls.as_text and isinstance(arguments, str):
            parsed = _json(arguments)
            return {**call, "arguments": parsed if isinstance(parsed, dict) else arguments}
        return call


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
    return calls


def _json(text: str) -> Any:
    """A value that a text is in JSON, with every digit of its integers, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def written_texts(response: list[Message]) -> Iterator[str]:
    """What a policy wrote in the messages of a response, as text."""
    for message in response:
        if message["role"] == "assistant":
            for name in ("content", *THOUGHTS, "tool_calls"):
                value = message.get(name)
                if value:
                    yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
