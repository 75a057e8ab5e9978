"""The responses of a row that has a list of them: what each has of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set
from typing import Any

from grape_service.pool.column_names import ALIASES, ELEMENT_TEXTS, MASKS
from grape_service.pool.layout import Layout
from grape_service.pool.messages import MASKED, TRAINED, Unusable, response_message, type_name
from grape_service.rows.candidate import Row
from grape_service.rows.messages import THOUGHTS

MESSAGE_KEYS = frozenset(
    ("role", "content", "tool_calls", "tool_call_id", "name", "function_call", "refusal", *THOUGHTS, *TRAINED, *MASKED),
)
"""What of a response that is one message belongs to the message; the rest are fields of the candidate."""
NOT_DEALT = "a list does not match the responses"


def dealt_lists(row: Row, number: int, names: Iterable[str], lists: Set[str], layout: Layout) -> dict[str, list[Any]]:
    """The lists of a row, of those that may be dealt, that have an element for each of its responses.

    `lists` are columns that hold a list for each response. Raises Unusable where a list that has to match does not.
    """
    dealt = {}
    for name in names:
        values = row.get(name)
        if values is None:
            continue
        must = name in layout.dealt
        if not isinstance(values, list):
            if must:
                raise Unusable(NOT_DEALT, f"'{name}' is {type_name(values)}, not a list with one for each response")
            continue
        if name in lists and not isinstance(next((one for one in values if one is not None), []), list):
            continue
        if len(values) == number:
            dealt[name] = values
        elif must or name in layout.theirs.values():
            raise Unusable(NOT_DEALT, f"'{name}' has {len(values)} elements for {number} responses")
    return dealt


def element_of(response: Any, theirs: dict[str, str], carried: Collection[str]) -> Row:
    """One of a row's responses under the pool's names: text, messages, one message, or an object with a response, of
    which `carried` fields are left as they are."""
    name = theirs["response"]
    if not isinstance(response, dict):
        return {name: response}
    if "message" in response and isinstance(response["message"], dict):  # a choice of a chat completion
        rest = {field: value for field, value in response.items() if field not in ("message", "index")}
        if rest.get(name) is not None:
            raise Unusable("both response and message", f"a choice has a message, and '{name}' beside it")
        return {**_named(rest, theirs, carried), name: response_message(response["message"])}
    if "role" in response and name not in response and "response" not in response:
        lists = {field for field in MASKS if isinstance(response.get(field), list)}  # of its tokens
        message = {field: value for field, value in response.items() if field in MESSAGE_KEYS - lists}
        rest = {field: value for field, value in response.items() if field not in message}
        return {**_named(rest, theirs, carried), name: response_message(message)}
    named = _named(response, theirs, carried)
    if name not in named:
        text = next((text for text in ELEMENT_TEXTS if text in named), None)
        if text is not None:
            named[name] = named.pop(text)
    return named


def _named(element: Row, theirs: dict[str, str], carried: Collection[str]) -> Row:
    """An object's fields, ours under the names that the row has for them."""
    named = {
        theirs[name] if name in theirs and theirs[name] not in element else name: value
        for name, value in element.items()
    }
    for ours, names in ALIASES.items():
        if named.get(theirs[ours]) is not None:
            continue
        name = next((name for name in names if name not in carried and named.get(name) is not None), None)
        if name is not None:
            named[theirs[ours]] = named[name]
            if ours != "sampling":  # which is carried along as it is
                del named[name]
    return named
