"""Which turns of a conversation have loss, for trainers that make their own tokens of the messages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from grape_service.rows.candidate import Message


@dataclass
class TurnCounts:
    """What is seen of the turns while rows pass."""

    all_turns: int = 0  # rows in which every assistant turn has loss
    last_turn: int = 0  # rows in which the last one has loss and others before it have none
    several: int = 0  # rows in which the last few have loss and others before them have none

    def add(self, messages: list[Message], num_spans: int) -> None:
        """Count a row: its messages, and in how many stretches its tokens have loss."""
        turns = sum(message["role"] == "assistant" for message in messages)
        if num_spans >= turns:
            self.all_turns += 1
        elif num_spans == 1:
            self.last_turn += 1
        else:
            self.several += 1

    @property
    def masked(self) -> int:
        """Rows with an assistant turn that has no loss."""
        return self.last_turn + self.several


def conversations(messages: list[Message], num_spans: int) -> Iterator[list[dict[str, Any]]]:
    """The conversations, each ending with one turn with loss, that a row amounts to: one for each such turn."""
    ends = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    for end in ends[-num_spans:]:
        yield messages[: end + 1]


def called_functions(tool_calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls as {name, arguments}, with arguments as the object that JSON text of them says."""
    functions = []
    for call in tool_calls:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with contextlib.suppress(orjson.JSONDecodeError):
                arguments = orjson.loads(arguments)
        functions.append({"name": function.get("name"), "arguments": arguments})
    return functions
