"""Contents of messages that are lists of parts, and items that are messages in other words: what each says.

Anthropic, OpenAI (chat and Responses), Gemini and the SDKs on top write a message as text, thoughts, calls of tools and
what these answered; each becomes the field that chat templates know, or the row is rejected with the part's type.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from grape_service.json_types import JsonObject
from grape_service.rows.candidate import Message, Rejection
from grape_service.rows.messages import PROMPT_FIELDS, THOUGHTS

TEXTS = frozenset({"text", "input_text", "output_text"})
THINKING = frozenset({"reasoning", "thinking", "thought", "thoughts", "reasoning_text", "reasoning_content", "think"})
CALLS = frozenset({"tool_use", "tool_call", "tool-call", "function_call", "functionCall", "server_tool_use"})
RESULTS = frozenset({"tool_result", "tool-result", "function_call_output", "functionResponse", "function_response"})
ITEMS = frozenset({"reasoning", "message", "function_call", "function_call_output"})
"""Types of the items of OpenAI's Responses."""
TRAINED = ("weight", "train", "loss", "training", "trainable", "train_on_turn", "loss_mask", "loss_weight")
"""Fields of a message of the assistant that say whether it is trained on: OpenAI's, Axolotl's, ms-swift's, others'."""
MASKED = ("masked", "mask", "train_detail", "training_detail")
"""Fields that say the same the other way round, in a way that nobody can tell, or of a part of the message."""
CHAT_FIELDS = (PROMPT_FIELDS | frozenset((*TRAINED, *MASKED))) - {"role", "content"}
"""What a chat message says beside its words; a message of OpenAI's Responses has none of them."""
ITEM_FIELDS = frozenset({"type", "id", "status", "role", "content", "phase"})
NAMES_OF_CONTENT = ("content", "output", "result", "response")
"""Under which a part holds what a tool answered."""
BESIDE_CONTENT = frozenset(
    {
        *("type", "id", "name", "toolName", "tool_use_id", "tool_call_id", "call_id", "toolCallId"),
        *("is_error", "isError", "status", "cache_control", "providerOptions", *NAMES_OF_CONTENT),
    }
)
"""What a part has beside what a tool answered, which may be nothing."""


class Unusable(Exception):
    """Why a row cannot be used; caught where rows become candidates."""

    def __init__(self, reason: str, detail: str | None = None):
        super().__init__(reason)
        self.rejection = Rejection(reason, detail)


def is_item(message: Message) -> bool:
    """Whether this is an item of OpenAI's Responses, and no chat message that says `type: message`."""
    if message.get("type") == "message":
        return not chat_fields(message)
    return message.get("type") in ITEMS and message.get("role") is None


def chat_fields(message: Message) -> Message:
    """What a chat message says beside its words."""
    return {name: value for name, value in message.items() if name in CHAT_FIELDS and value not in (None, "", [], {})}


def messages_of_items(items: list[Message], what: str) -> list[Message]:
    """Messages of items: thoughts, words and calls of a turn are one message of the assistant. Raises Unusable."""
    found: list[Message] = []
    goes_on = False
    for item in items:
        if not is_item(item):
            found.append(item)
            goes_on = item.get("role") == "assistant" and item.keys() == {"role", "content"}
            goes_on = goes_on and isinstance(item["content"], str)
            continue
        fields: Message = {}
        if item["type"] == "function_call_output":
            found += messages_of_parts("user", [item], fields, what)
            goes_on = False
            continue
        if item["type"] == "message":
            role, content = item.get("role") or "assistant", item.get("content")
            parts = content if isinstance(content, list) else [content or ""]
            fields = {name: value for name, value in item.items() if name not in ITEM_FIELDS and value is not None}
        else:
            role, parts = "assistant", [item]
        for message in messages_of_parts(role, parts, fields, what, between=""):
            if goes_on and message["role"] == "assistant":
                found[-1] = _joined(found[-1], message)
            else:
                found.append(message)
            goes_on = message["role"] == "assistant"
    return found


def messages_of_parts(role: str, parts: list[Any], fields: Message, what: str, between: str = "\n") -> list[Message]:
    """The messages that a content of parts is: answers of tools first, then words, thoughts and calls as one.

    `fields` are the message's others; `between` is put between its texts. Raises Unusable for other parts.
    """
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[JsonObject] = []
    results: list[Message] = []
    for part in parts:
        kind = _kind(part)
        if kind in TEXTS:
            own = part if isinstance(part, str) else _text_of(part, what)
            (thoughts if isinstance(part, dict) and part.get("thought") is True else texts).append(own)
        elif kind in THINKING:
            thoughts.append(_text_of(part, what))
        elif kind in CALLS:
            calls.append(_call_of(part, what))
        elif kind in RESULTS:
            results.append(_result_of(part, what))
        else:
            raise Unusable(f"{what} has the wrong type", f"a message holds a part of type '{kind}', which is not text")
    message: Message = {"role": role, "content": between.join(texts), **fields}
    if thoughts and not any(fields.get(name) for name in THOUGHTS):
        message["reasoning_content"] = "\n\n".join(thought for thought in thoughts if thought)
    if calls:
        message["tool_calls"] = [*(fields.get("tool_calls") or []), *calls]
    return results if results and not (texts or thoughts or calls) else [*results, message]


def _kind(part: Any) -> str:
    if isinstance(part, str):
        return "text"
    if not isinstance(part, dict):
        return type(part).__name__
    if isinstance(part.get("type"), str):
        return str(part["type"])
    names = ("text", "functionCall", "functionResponse", "thinking")
    return next((name for name in names if part.get(name) is not None), "unknown")


def _flat(part: JsonObject, names: Iterable[str]) -> JsonObject:
    """A part with the fields of the object in it that holds the rest of it, as OpenAI's `function` does."""
    inner = next((name for name in names if isinstance(part.get(name), dict)), None)
    if inner is None:
        return part
    return {**{name: value for name, value in part.items() if name != inner}, **part[inner]}


def _text_of(part: JsonObject, what: str) -> str:
    for name in ("text", "thinking", "reasoning", "reasoning_content", "thought", "summary", "content"):
        value = part.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value and all(isinstance(one, dict) and "text" in one for one in value):
            return "\n".join(str(one["text"]) for one in value)
    if _kind(part) in THINKING:
        return ""  # thoughts that the server kept to itself
    raise Unusable(f"{what} has the wrong type", f"a part of type '{_kind(part)}' has no text")


def _call_of(part: JsonObject, what: str) -> JsonObject:
    kind, part = _kind(part), _flat(part, ("function", *sorted(CALLS)))
    arguments: Any = next((part[name] for name in ("arguments", "input", "args") if part.get(name) is not None), {})
    called = part.get("name") or part.get("toolName")
    if not isinstance(called, str) or not called:
        raise Unusable(f"{what} has the wrong type", f"a part of type '{kind}' does not name the tool that it calls")
    function = {"name": called, "arguments": arguments}
    id_ = next((part[name] for name in ("call_id", "id", "toolCallId") if part.get(name) is not None), None)
    return {**({} if id_ is None else {"id": id_}), "type": "function", "function": function}


def _result_of(part: JsonObject, what: str) -> Message:
    kind, part = _kind(part), _flat(part, sorted(RESULTS))
    value = next((part[name] for name in NAMES_OF_CONTENT if part.get(name) is not None), None)
    others = sorted(name for name in part.keys() - BESIDE_CONTENT if part[name] is not None)
    if others and (value is None or "parts" in others):  # Gemini's parts are files
        raise Unusable(f"{what} has the wrong type", f"'{kind}' holds what is no text in {', '.join(others)}")
    if isinstance(value, list):
        typed = [_kind(one) for one in value if isinstance(one, dict) and isinstance(one.get("type"), str)]
        if other := next((one for one in typed if one not in TEXTS), None):
            raise Unusable(f"{what} has the wrong type", f"'{kind}' holds a part of type '{other}', which is not text")
        if all(isinstance(one, dict | str) and _kind(one) in TEXTS for one in value):
            value = "\n".join(one if isinstance(one, str) else _text_of(one, what) for one in value)
    text = "" if value is None else value if isinstance(value, str) else orjson.dumps(value).decode()
    names = ("tool_use_id", "tool_call_id", "call_id", "toolCallId", "id")
    id_ = next((part[name] for name in names if part.get(name) is not None), None)
    name = part.get("name") or part.get("toolName")
    return {
        "role": "tool",
        "content": text,
        **({} if id_ is None else {"tool_call_id": id_}),
        **({} if name is None else {"name": name}),
    }


def _joined(first: Message, second: Message) -> Message:
    joined = {**first, **second}
    for name in ("content", "reasoning_content"):
        words = [message[name] for message in (first, second) if message.get(name)]
        if words or name == "content":
            joined[name] = ("" if name == "content" else "\n\n").join(words)
    calls = [*(first.get("tool_calls") or []), *(second.get("tool_calls") or [])]
    return {**joined, "tool_calls": calls} if calls else joined
