"""What the report's statistics are built from: sums that add up, moments, examples, source names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.report.examples import EXAMPLE_KINDS
from grape_service.report.facts import ExampleChoice
from grape_service.rows.columns import NO_SOURCE
from grape_service.rows.keys import prompt_order
from grape_service.rows.ragged import Int64s

MAX_SOURCES = 12


OTHER_SOURCES = "(other sources)"


EXAMPLES_EACH = 3


def source_names(rows_by_source: dict[str, int], without_source: int = 0) -> list[str]:
    """The names that statistics are kept by: the largest sources, and one for all others."""
    counted = {**rows_by_source, **({NO_SOURCE: without_source} if without_source else {})}
    largest = sorted(counted, key=lambda name: (-counted[name], name))[:MAX_SOURCES]
    return [*largest, *([OTHER_SOURCES] if len(counted) > MAX_SOURCES or not counted else [])]


def source_codes(sources: pa.Array, names: list[str]) -> Int64s:
    """The place of each source [N] in `names`, the last place for one that is not there."""
    found = pc.index_in(pc.fill_null(sources, NO_SOURCE), value_set=pa.array(names, type=pa.string()))
    return pc.fill_null(found, len(names) - 1).to_numpy(zero_copy_only=False).astype(np.int64)


UNIT = 2.0**12
"""Scores are summed as whole numbers of 1 / UNIT, so that any order gives the same sum."""


@dataclass
class Statistics:
    """Base of statistics: arrays of int64, whole numbers, dicts of those, and Examples; all add up."""

    names: list[str]

    def __add__(self, other: Self) -> Self:
        assert self.names == other.names, "statistics are kept by the same sources"
        summed = {
            item.name: _sum(getattr(self, item.name), getattr(other, item.name))
            for item in fields(self)
            if item.name != "names"
        }
        return type(self)(self.names, **summed)


def _sum(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        return {
            key: _sum(left[key], right[key]) if key in left and key in right else left.get(key, right.get(key))
            for key in sorted(left.keys() | right.keys())
        }
    return left + right


@dataclass
class Moments:
    """Sums of pairs (x, y) in whole units of 2**-12, for a correlation."""

    count: int = 0
    x: int = 0
    y: int = 0
    xx: int = 0
    yy: int = 0
    xy: int = 0

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Moments)))

    @classmethod
    def of(cls, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Moments:
        """Sums over pairs [N]; values beyond 64 count as 64."""
        left, right = (np.rint(np.clip(values, -64, 64) * UNIT).astype(np.int64) for values in (x, y))
        sums = (left, right, left * left, right * right, left * right)
        return cls(len(x), *(int(values.sum()) for values in sums))

    def correlation(self) -> float | None:
        """Pearson's r; None where it is not defined."""
        spread_x = self.count * self.xx - self.x**2
        spread_y = self.count * self.yy - self.y**2
        if self.count < 3 or spread_x <= 0 or spread_y <= 0:
            return None
        return (self.count * self.xy - self.x * self.y) / math.sqrt(spread_x) / math.sqrt(spread_y)


@dataclass
class Examples:
    """A few prompts of each kind, [key, order of the id, prompt id], smallest first: the same in any order."""

    chosen: ExampleChoice = field(default_factory=lambda: {kind: [] for kind in EXAMPLE_KINDS})

    def __add__(self, other: Examples) -> Examples:
        both = {kind: sorted([*self.chosen[kind], *other.chosen[kind]]) for kind in EXAMPLE_KINDS}
        return Examples({kind: rows[:EXAMPLES_EACH] for kind, rows in both.items()})

    def offer(self, kind: str, keys: npt.NDArray[np.float64], prompt_ids: pa.Array, rows: Int64s) -> None:
        """Prompts `rows` [M] with their keys [M], smallest wanted."""
        if len(rows) == 0:
            return
        limit = np.partition(keys, min(EXAMPLES_EACH, len(keys)) - 1)[min(EXAMPLES_EACH, len(keys)) - 1]
        near = np.flatnonzero(keys <= limit)
        ids = prompt_ids.take(pa.array(rows[near])).to_pylist()
        found = [[key, prompt_order(i), i] for key, i in zip(keys[near].tolist(), ids, strict=True)]
        self.chosen[kind] = sorted([*self.chosen[kind], *found])[:EXAMPLES_EACH]

    def offer_random(self, prompt_ids: pa.Array, rows: Int64s) -> None:
        """Of prompts `rows` [M] those whose ids come first in the order of their digests."""
        worst = self.chosen["random"][-1][1] if len(self.chosen["random"]) == EXAMPLES_EACH else None
        for prompt_id in prompt_ids.take(pa.array(rows)).to_pylist():
            order = prompt_order(prompt_id)
            if worst is None or order < worst:
                self.chosen["random"] = sorted([*self.chosen["random"], [0.0, order, prompt_id]])[:EXAMPLES_EACH]
                worst = self.chosen["random"][-1][1] if len(self.chosen["random"]) == EXAMPLES_EACH else None

    def prompt_ids(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys(row[2] for kind in EXAMPLE_KINDS for row in self.chosen[kind]))
