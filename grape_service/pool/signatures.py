"""What of a row decides how it is read, in a value that rows of one kind share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grape_service.config.pool import PoolGroup
from grape_service.pool.answers import is_transcript, is_whole
from grape_service.pool.column_names import FINISHES, KNOWN, NUMBERED, SOURCES
from grape_service.pool.filters import value_at
from grape_service.pool.messages import ends_with_response, is_conversation, parsed_json
from grape_service.rows.candidate import Row


class Signatures:
    """What of a row decides how it is read, as a value that equal rows share: known columns and the kinds in them."""

    def __init__(self, group: PoolGroup):
        said = [name for names in group.columns.values() for name in ([names] if isinstance(names, str) else names)]
        self.said = frozenset(name for name in said if "." not in name)
        self.paths = tuple(name for name in said if "." in name)
        self.carried = frozenset(group.carry)

    def is_watched(self, name: str) -> bool:
        """Whether the values of a column may decide how its row is read."""
        if name in self.carried:
            return False
        return name in KNOWN or name in self.said or NUMBERED.fullmatch(name) is not None

    def of(self, row: Row, names: Iterable[str] | None = None) -> tuple[Any, ...]:
        """The signature of a row; `names`: those of its columns that are watched, where it is known."""
        watched = filter(self.is_watched, row) if names is None else names
        found = [(name, _kind(value)) for name in watched if (value := row.get(name)) is not None]
        if self.paths:
            found += [(path, _kind(value_at(row, path))) for path in self.paths]
        return tuple(found)


MARKS = ("role", "from", "message", "text", "content", "value", "tool_calls", *SOURCES, *FINISHES)
NESTED = (
    *("messages", "choices", "body", "request", "response", "input", "completion", "arguments", "gen_args_0", "doc"),
    *("content", "output", "parts", "candidates"),
)


def _kind(value: Any) -> Any:
    """What a reading asks of a value."""
    if isinstance(value, str):
        if value[:1] in ("[", "{", " ", "\n", "\t", ""):
            if not value.strip():
                return "blank"
            parsed = parsed_json(value)
            if parsed is not None:
                return "json", _kind(parsed)
        return "transcript" if value.lstrip()[:6] == "Human:" and is_transcript(value) else "text"
    if isinstance(value, list):
        if not value:
            return "empty"
        if is_conversation(value):
            return "conversation", "from" in value[0], ends_with_response(value), is_whole(value)
        element = next((one for one in value if one is not None), None)
        if isinstance(element, dict):
            return "objects", tuple(mark for mark in MARKS if mark in element)
        return "list", _kind(element) if isinstance(element, list) else type(element).__name__
    if isinstance(value, dict):
        return "object", tuple((name, _kind(value[name])) for name in NESTED if name in value)
    return type(value).__name__
