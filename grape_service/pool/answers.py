"""Responses as servers answer and as preference sets keep them: content parts, items, whole conversations."""

from __future__ import annotations

import re
from typing import Any

from grape_service.pool.content import ITEMS, Unusable, chat_fields, messages_of_items, messages_of_parts
from grape_service.pool.messages import (
    RESPONSE_ROLES,
    conversation_of,
    ends_with_response,
    is_conversation,
    parsed_json,
    prompt_messages,
)
from grape_service.rows.candidate import Message, Row
from grape_service.rows.prefill import without_prefill

TURN = re.compile(r"\n\n(Human|Assistant):")
"""How a turn begins in a transcript such as those of Anthropic's HH."""
SAYS_ROLE = re.compile(r"""\s*\[?\s*\{[^{}]{0,200}?['"]role['"]\s*:""")
"""How messages begin that are text."""


def api_answer(value: Any) -> tuple[Any, Any] | None:
    """The response in what a server of Anthropic, OpenAI (Responses) or Gemini answered, and why it ended; None for
    anything else. Raises Unusable where a part of it is neither text, thoughts nor a call."""
    if isinstance(value, dict):
        answers = value.get("candidates")
        if isinstance(answers, list) and len(answers) == 1 and isinstance(answers[0], dict):  # the body of Gemini's
            value = answers[0]
        content, items = value.get("content"), value.get("output")
        if isinstance(value.get("parts"), list):
            return _of_parts(value["parts"]), None
        if isinstance(content, dict) and isinstance(content.get("parts"), list):
            return _of_parts(content["parts"]), value.get("finishReason")
        if isinstance(content, list | str) and ("stop_reason" in value or value.get("type") == "message"):
            parts = content if isinstance(content, list) else [content]
            return _of_parts(parts, chat_fields(value)), value.get("stop_reason")
        if isinstance(items, list):
            details = value.get("incomplete_details")
            return _of_items(items), details.get("reason") if isinstance(details, dict) else value.get("status")
        return None
    if not isinstance(value, list) or not value or not isinstance(value[0], dict) or "from" in value[0]:
        return None
    if any(isinstance(item, dict) and item.get("type") in ITEMS for item in value):
        return _of_items(value), None
    if all(isinstance(part, dict) and "type" in part and "role" not in part for part in value):
        return _of_parts(value), None
    return None


def _of_items(items: list[Any]) -> Any:
    """OpenAI's items as a response: text, or messages where there are thoughts, calls or answers of tools."""
    if not all(isinstance(item, dict) for item in items):
        raise Unusable("response has the wrong type", "an item of it is not an object")
    return _plainly(messages_of_items(items, "response"))


def _of_parts(parts: list[Any], fields: Row | None = None) -> Any:
    """Content parts as text, or as one message of the assistant where there are thoughts, calls or other fields."""
    return _plainly(messages_of_parts("assistant", parts, fields or {}, "response", between=""))


def _plainly(messages: list[Message]) -> Any:
    return messages[0]["content"] if len(messages) == 1 and set(messages[0]) == {"role", "content"} else messages


def as_answered(answer: Any, given: Any) -> tuple[Any, Any, list[Message] | None]:
    """(response, why it ended, prompt) of a response that is not plain text: the answer of a server, or a conversation
    with its prompt. The last two are None where it does not say. `given` is the row's own prompt. Raises Unusable."""
    if isinstance(answer, str):
        answer = _messages_as_text(answer) or answer
    answered = api_answer(answer)
    if answered is None and isinstance(answer, dict) and ends_with_response([answer]):
        answer = [answer]  # one message
    answer, finish = (answer, None) if answered is None else answered
    if is_whole(answer) or (given is None and is_transcript(answer)):
        prompt, response = whole_conversation(answer, given)
        return response, finish, prompt
    return answer, finish, None


def _messages_as_text(text: str) -> list[Message] | None:
    """Messages of the assistant and of tools that a text is, in JSON or as Python writes them; None for others."""
    value = parsed_json(text) if SAYS_ROLE.match(text) else None
    messages: list[Message] = [value] if isinstance(value, dict) else value or []
    roles = [message.get("role") for message in messages] if is_conversation(messages) else []
    is_response = roles[:1] in (["assistant"], ["model"]) and {*roles} <= {"model", *RESPONSE_ROLES}
    return messages if is_response else None


def is_whole(value: Any) -> bool:
    """Whether a value is a conversation with its prompt: it begins before the response and ends with it."""
    value = parsed_json(value) if isinstance(value, str) else value
    return ends_with_response(value) and not ends_with_response(value[:1])


def is_transcript(value: Any) -> bool:
    """Whether a text is a conversation of Human and Assistant that begins with the one and ends with the other."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and TURN.split(value)[-2:-1] == ["Assistant"]


def whole_conversation(value: Any, given: Any) -> tuple[list[Message], str | list[Message]]:
    """(prompt, response) of a conversation, or a transcript, with its prompt in it. `given` is the row's own prompt, or
    None. Raises Unusable where the two have not the same words."""
    prompt, response = conversation_of(_turns(value) if is_transcript(value) else value)
    if given is None:
        return prompt, response
    whole = prompt_messages(given)
    asked = without_prefill(whole)
    said = [message for message in prompt if message["role"] not in ("system", "developer")]
    wanted = [message for message in asked if message["role"] not in ("system", "developer")]
    if wanted != said[: len(wanted)] and wanted != said[-len(wanted) :]:
        raise Unusable("prompt and conversation differ", "the response is a whole conversation, with another prompt")
    return [*(prompt if len(said) > len(wanted) or len(prompt) > len(asked) else asked), *whole[len(asked) :]], response


def _turns(text: str) -> list[Message]:
    pieces = TURN.split("\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]
