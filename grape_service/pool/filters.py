"""pool.where: which rows are looked at."""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Iterable
from typing import Any

from grape_service.config.pool import Filter
from grape_service.pool.messages import Unusable
from grape_service.rows.candidate import Row

MISSING = object()
NOT_COMPARED = "pool.where cannot compare a value"
TRUTHS = {"true": True, "false": False}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?P<rest>\.[0-9]*)?|\.[0-9]+)(?P<power>[eE][+-]?[0-9]+)?")


def passes(row: Row, filters: Iterable[Filter]) -> bool:
    """Whether a row satisfies every condition; a row without the column satisfies none.

    Numbers and true or false may be written as text, as decimals of Parquet and cells of .csv are. Raises Unusable for
    a value that a condition cannot be compared with: a list, an object, a text where a number is asked for.
    """
    return all(_passes(value_at(row, condition.column), condition) for condition in filters)


def value_at(row: Row, column: str) -> Any:
    """The value of a column, or of a field in an object where there is no such column: a.b. MISSING where it is not."""
    value = row.get(column, MISSING)
    if value is not MISSING or "." not in column:
        return value
    value = row
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value


def _passes(value: Any, condition: Filter) -> bool:
    if value is MISSING:
        return False
    given = condition.model_fields_set
    if "equals" in given and not _is_equal(value, condition.equals, condition):
        return False
    if "not_equals" in given and _is_equal(value, condition.not_equals, condition):
        return False
    if condition.one_of is not None and not _is_one_of(value, condition.one_of, condition):
        return False
    if condition.at_least is not None or condition.at_most is not None:
        if value is None or value != value:
            return False
        number = value if isinstance(value, int | float) else number_of(value) if isinstance(value, str) else None
        if number is None:
            raise _not_compared(value, condition)
        if condition.at_least is not None and number < condition.at_least:
            return False
        if condition.at_most is not None and number > condition.at_most:
            return False
    return True


def _is_one_of(value: Any, wanted: list[Any], condition: Filter) -> bool:
    problems = []
    for one in wanted:
        try:
            if _is_equal(value, one, condition):
                return True
        except Unusable as problem:
            problems.append(problem)
    if problems and len(problems) == len(wanted):
        raise problems[0]
    return False


def _is_equal(value: Any, wanted: Any, condition: Filter) -> bool:
    if value is None or value != value or wanted is None:
        return value is None and wanted is None
    if type(value) is type(wanted) or (isinstance(value, str) and isinstance(wanted, str)):
        return bool(value == wanted)
    if isinstance(value, int | float) and isinstance(wanted, int | float):
        return value == wanted
    if isinstance(wanted, datetime.date) and isinstance(value, str):
        return value in (str(wanted), wanted.isoformat())
    if isinstance(value, str) and isinstance(wanted, int | float):
        number = value_of_text(value)
        if number is not None:
            return number == wanted
    if isinstance(wanted, str) and isinstance(value, int | float):
        number = value_of_text(wanted)
        if number is not None:
            return number == value
    raise _not_compared(value, condition)


def value_of_text(text: str) -> int | float | None:
    """The number, or the truth, that a text spells."""
    truth = TRUTHS.get(text.strip().lower())
    return number_of(text) if truth is None else truth


def number_of(text: str) -> int | float | None:
    """The number that a text spells, whole ones with every digit; None for other texts."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    is_whole = match["rest"] is None and match["power"] is None and "." not in text
    return int(text) if is_whole else float(text)


def _not_compared(value: Any, condition: Filter) -> Unusable:
    kind = {list: "a list", dict: "an object", str: "a text", bool: "true or false"}.get(type(value), "a number")
    wanted = ", ".join(
        f"{name} {condition_value!r}"
        for name in ("equals", "not_equals", "one_of", "at_least", "at_most")
        if name in condition.model_fields_set and (condition_value := getattr(condition, name)) is not None
    )
    shown = f" '{value[:40]}'" if isinstance(value, str) else ""
    return Unusable(NOT_COMPARED, f"'{condition.column}' is {kind}{shown}, which the filter ({wanted}) cannot compare")


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The name most like `name`, or None where none is: `cutoff` is difflib's ratio, 1 for the same name."""
    known = {other.lower(): other for other in sorted(names)}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=cutoff)
    return known[close[0]] if close else None
