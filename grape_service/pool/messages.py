"""Prompts, responses and tools of a pool row, checked and in one form."""

from __future__ import annotations

import ast
import io
import itertools
import re
import tokenize
import warnings
from collections.abc import Collection
from typing import Any

import orjson

from grape_service.json_types import JsonObject
from grape_service.pool.content import MASKED, TRAINED, Unusable, is_item, messages_of_items, messages_of_parts
from grape_service.pool.lines import holds_long_integer, load_json
from grape_service.rows.candidate import Message, Tool
from grape_service.rows.control_tokens import without_turn_ends
from grape_service.rows.messages import IGNORED, WITHOUT_LOSS, has_loss

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
SHAREGPT_NOTES = (*TRAINED, *MASKED, "markdown")
"""Fields of ShareGPT's turns that say how to train on them, and are no part of the conversation."""


PYTHON_VALUE = re.compile(r"\s*(?:\[?\s*\{\s*'|\[\s*(?:['\"]|True\b|False\b|None\b|-?[0-9]))")
"""How a list of objects, texts, numbers or truths begins as Python writes it."""
SIDE_BY_SIDE = re.compile(r"['\"]\s+['\"]")
"""Between texts without a comma, as numpy prints them and Python would join them."""
MESSAGES_AS_TEXT = re.compile(r"""\s*(?:array\()?\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
MOST_PYTHON = 2**20
"""Characters of a text that is read as Python writes it."""

MISSING_RESPONSE = "missing response"
LONG_INTEGER = ("an integer has more than 64 bits", "a call or a definition of a tool would have it as text")


def prompt_messages(value: Any) -> list[Message]:
    """A prompt, text or chat messages, as chat messages that end with a user or tool turn, or behind that with one of
    the assistant (see prefills.py). Raises Unusable."""
    if value is None:
        raise Unusable("missing prompt")
    if isinstance(value, str):
        if not value.strip():
            raise Unusable("empty prompt")
        parsed = parsed_json(value)
        if not is_conversation(parsed):
            if MESSAGES_AS_TEXT.match(value):
                raise Unusable("prompt has the wrong type", "it is a list of messages as text that is not JSON")
            return [{"role": "user", "content": value}]
        value = parsed
    messages = _messages(value, "prompt")
    if not messages or not any(_says_something(message) for message in messages):
        raise Unusable("empty prompt")
    for message in messages:
        if message["role"] not in PROMPT_ROLES:
            raise Unusable("unknown role in the prompt", f"'{message['role']}' is none of {', '.join(PROMPT_ROLES)}")
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked or asked[-1]["role"] not in LAST_PROMPT_ROLES:
        raise Unusable("prompt does not end with a user or tool turn", f"it ends with '{messages[-1]['role']}'")
    return messages


def response_of(value: Any) -> str | list[Message]:
    """A response, text or the assistant and tool messages of a trajectory. Raises Unusable."""
    if value is None:
        raise Unusable(MISSING_RESPONSE)
    if isinstance(value, str):
        value = without_turn_ends(value)
        if not value.strip():
            raise Unusable("empty response")
        return value
    messages = _messages(value, "response")
    if not any(message["role"] == "assistant" and _says_something(message) for message in messages):
        raise Unusable("empty response")
    for message in messages:
        if message["role"] not in ("assistant", "tool"):
            raise Unusable("unknown role in the response", f"'{message['role']}' is not assistant or tool")
    if not any(message["role"] == "assistant" and has_loss(message) for message in messages):
        raise Unusable("no loss in the response", "each of its messages says that it is not trained on")
    return messages[0]["content"] if set(messages[0]) == {"role", "content"} and len(messages) == 1 else messages


def conversation_of(value: Any) -> tuple[list[Message], str | list[Message]]:
    """Messages that end with the response as prompt and response: what follows the last turn of a user. Raises
    Unusable."""
    if value is None:
        raise Unusable(MISSING_RESPONSE, "there are no messages")
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


def refuse_another_response(own: Any, response: str | list[Message]) -> None:
    """Raises Unusable for the column `response` of a row whose messages end with another `response`."""
    last = response if isinstance(response, str) else response[-1]["content"]
    said = without_turn_ends(own).strip() if isinstance(own, str) else own
    if said not in (None, "", last.strip(), response):
        raise Unusable(
            "both response and messages", f"'response' is {str(said)[:80]!r}, which the messages do not end with"
        )


def with_ignored(messages: Any, ignore: Collection[str]) -> Any:
    """Messages with the fields that pool.messages.ignore names kept apart, where no template sees them."""
    if not ignore or not isinstance(messages, list):
        return messages
    converted = []
    for message in messages:
        ignored = {name: value for name, value in message.items() if name in ignore and name not in ("role", "content")}
        rest = {name: value for name, value in message.items() if name not in ignored}
        there = rest.get(IGNORED)
        notes = {**(there if isinstance(there, dict) else {}), **ignored}
        converted.append({**rest, IGNORED: notes} if ignored else message)
    return converted


def response_message(message: Message) -> Any:
    """One message of the assistant as a response: its text, where it is nothing more."""
    return _text_or_messages([message])


def with_system_prompt(system: Any, prompt: list[Message]) -> list[Message]:
    """The prompt with a row's own system prompt in front. Raises Unusable where it has another already."""
    if system is None or system == [] or (isinstance(system, str) and not system.strip()):
        return prompt
    if not isinstance(system, str):
        raise Unusable("system_prompt has the wrong type", f"it is {type_name(system)}, not text")
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
    if not is_conversation(value):
        return False
    role = "assistant" if value[-1].get("role") == "model" else _role(value[-1])
    return (role if value[-1].get("role") is not None else SHAREGPT_ROLES.get(role.lower(), role)) == "assistant"


def parsed_json(text: str) -> Any:
    """The list or object that a text is, in JSON or as Python writes it; None for other texts."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        value = load_json(text)
    except ValueError:
        value = _parsed_python(text) if PYTHON_VALUE.match(text) else None
    return value if isinstance(value, list | dict) else None


def _parsed_python(text: str) -> Any:
    if len(text) > MOST_PYTHON or (SIDE_BY_SIDE.search(text) and _joins_texts(text)):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            value = ast.literal_eval(text.strip())
        orjson.dumps(value)  # sets, bytes and integers beyond 64 bits are none of JSON's values
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return value


def _joins_texts(text: str) -> bool:
    """Whether Python would join two texts of a list, which has no comma between them."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text.strip()).readline))
    except (tokenize.TokenError, SyntaxError):
        return True
    kinds = [token.type for token in tokens if token.type not in (tokenize.NL, tokenize.NEWLINE)]
    return (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds)


def without_nulls(value: Any) -> Any:
    """A value of a Parquet file without the keys that are null: an Arrow struct has the keys of all rows together."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _role(message: Message) -> Any:
    return message.get("role") if message.get("role") is not None else message.get("from")


def _has_content(message: Message) -> bool:
    return any(name in message for name in ("content", "value", "tool_calls", "parts"))


def _text_or_messages(messages: list[Message]) -> Any:
    extra = {name for name, field in messages[0].items() if field or name in TRAINED or name in MASKED}
    extra -= {"role", "content"}
    if len(messages) == 1 and not extra:
        content = messages[0].get("content")
        return content if isinstance(content, str) else messages
    return messages


def tools_of(value: Any) -> list[Tool] | None:
    """Tool definitions, a list of objects or JSON text of one. Raises Unusable."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = load_json(value)
        except ValueError:
            raise Unusable("tools are not a list of objects", "the text is not JSON") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Unusable("tools are not a list of objects")
    if holds_long_integer(value):
        raise Unusable(*LONG_INTEGER)
    return value


def _messages(value: Any, what: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unusable(f"{what} has the wrong type", f"it is {type_name(value)}, not text or a list of messages")
    if any(is_item(message) for message in value):
        value = messages_of_items(value, what)
    messages = [converted for message in value for converted in _chat_messages(message, what)]
    if any(len(message) > 2 and holds_long_integer(message) for message in messages):
        raise Unusable(*LONG_INTEGER)
    return messages


def _chat_messages(message: Message, what: str) -> list[Message]:
    """What a message is in our form: one message, or more where its parts hold what tools answered."""
    role, content = message.get("role"), message.get("content")
    is_sharegpt = role is None and "from" in message
    if is_sharegpt:
        role, content = message["from"], message.get("value", content)
        role = SHAREGPT_ROLES.get(role.lower(), role) if isinstance(role, str) else role
    elif role == "model":  # Gemini's word
        role = "assistant"
    if not isinstance(role, str):
        raise Unusable(f"{what} has the wrong type", "a message has no role")
    if content is None and isinstance(message.get("parts"), list):
        content = message["parts"]
    ours = ("role", "content", "from", "value", *SHAREGPT_NOTES) if is_sharegpt else ("role", "content")
    kept = {name: field for name, field in message.items() if field is not None and name not in ours}
    if kept.get("type") == "message":  # says nothing
        del kept["type"]
    if role == "assistant" and not _is_trained(message, what):
        kept[WITHOUT_LOSS] = 0
    if isinstance(content, list):
        kept.pop("parts", None)
        return messages_of_parts(role, content, kept, what)
    if content is not None and not isinstance(content, str):
        raise Unusable(f"{what} has the wrong type", f"the content of a message is {type_name(content)}, not text")
    if is_sharegpt and message["from"] == "function_call":
        return [{"role": role, "content": "", "tool_calls": _sharegpt_calls(content, what), **kept}]
    content = without_turn_ends(content or "") if role == "assistant" else content or ""
    return [{"role": role, "content": content, **kept}]


def _is_trained(message: Message, what: str) -> bool:
    """Whether a message of the assistant is trained on, by its own fields. Raises Unusable for a part of it."""
    for name in TRAINED:
        value = message.get(name)
        if value is None or (name == "loss" and not isinstance(value, bool | int) and value not in (0.0, 1.0)):
            continue  # a loss that was measured
        if value not in (0, 1):
            raise Unusable(f"a message's {name} is not 0 or 1", f"a message of the {what} has {value!r}")
        if not value:
            return False
    if message.get("masked") is not None and not isinstance(message["masked"], bool):
        raise Unusable("a message's masked is not true or false", f"a message of the {what} has {message['masked']!r}")
    for name in MASKED[1:]:
        if message.get(name) not in (None, []):
            raise Unusable(f"a message's {name} is not read", f"a message of the {what} has it: say weight, 0 or 1")
    return not message.get("masked")


def _sharegpt_calls(content: str | None, what: str) -> list[JsonObject]:
    calls = parsed_json(content or "")
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise Unusable(f"{what} has the wrong type", "a function_call is not JSON with a name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def characters_of(message: Message) -> int:
    """How much a message says, about."""
    calls = message.get("tool_calls")
    return len(message["content"]) + (len(str(calls)) if calls else 0)
