"""pool.where: which rows are looked at."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from grape_service.config.schema import Filter

MISSING = object()


def passes(row: dict[str, Any], filters: Iterable[Filter]) -> bool:
    """Whether a row satisfies every condition; a row without the column satisfies none."""
    return all(_passes(value_at(row, condition.column), condition) for condition in filters)


def value_at(row: dict[str, Any], column: str) -> Any:
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
    if "equals" in given and value != condition.equals:
        return False
    if "not_equals" in given and value == condition.not_equals:
        return False
    if condition.one_of is not None and value not in condition.one_of:
        return False
    if condition.at_least is not None or condition.at_most is not None:
        if not isinstance(value, int | float) or value != value:
            return False
        if condition.at_least is not None and value < condition.at_least:
            return False
        if condition.at_most is not None and value > condition.at_most:
            return False
    return True


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, or None where none is."""
    known = {other.lower(): other for other in sorted(names)}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return known[close[0]] if close else None
