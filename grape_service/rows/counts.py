"""Counts that add up over partitions and survive a trip through JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, get_type_hints

from grape_service.errors import StageError
from grape_service.json_types import JsonObject


def check_sum(what: str, total: int, parts: Mapping[str, int]) -> None:
    """Raises StageError where `parts` do not add up to `total`: something was lost, or counted twice, on the way."""
    if sum(parts.values()) != total:
        told = ", ".join(f"{number:,} {name}" for name, number in parts.items())
        raise StageError(
            f"{what}: of {total:,} only these are accounted for: {told}. This is a defect of grape-service, please "
            "report it; nothing is published"
        )


def add_dicts(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Key by key sum, also of dicts of dicts; keys sorted."""
    both = {key: _sum(left[key], right[key]) for key in left.keys() & right.keys()}
    return dict(sorted({**left, **right, **both}.items()))


@dataclass
class Counts:
    """Base of dataclasses whose fields are numbers, dicts of numbers or of Counts, or Counts."""

    def __add__(self, other: Self) -> Self:
        values = {}
        for item in fields(self):
            values[item.name] = _sum(getattr(self, item.name), getattr(other, item.name))
        return type(self)(**values)

    def to_json(self) -> JsonObject:
        """Plain numbers and dicts."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_json(cls, value: JsonObject) -> Self:
        """The inverse of to_json."""
        types = get_type_hints(cls)
        return cls(**{item.name: _typed(types[item.name], value[item.name]) for item in fields(cls)})


def _sum(left: Any, right: Any) -> Any:
    return add_dicts(left, right) if isinstance(left, dict) else left + right


def _plain(value: Any) -> Any:
    if isinstance(value, Counts):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _typed(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, Counts):
        return kind.from_json(value)
    if isinstance(value, dict):
        item = kind.__args__[1]
        return {key: _typed(item, entry) for key, entry in value.items()}
    return value
