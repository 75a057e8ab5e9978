"""Counts add up, survive JSON, and leave what they are made of alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from grape_service.rows.counts import Counts, add_dicts

pytestmark = pytest.mark.quick


@dataclass
class Inner(Counts):
    rows: int = 0
    seconds: float = 0.0


@dataclass
class Outer(Counts):
    rows: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    sources: dict[str, Inner] = field(default_factory=dict)
    nested: dict[str, dict[str, int]] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


LEFT = Outer(1, {"b": 1, "a": 2}, {"x": Inner(1, 0.5)}, {"x": {"r": 1}}, Inner(5))
RIGHT = Outer(2, {"b": 3, "c": 4}, {"x": Inner(2, 0.25), "y": Inner(1)}, {"x": {"r": 2, "s": 1}}, Inner(6))


def test_sums_reach_into_dicts_and_counts():
    both = LEFT + RIGHT
    assert both == Outer(
        3, {"a": 2, "b": 4, "c": 4}, {"x": Inner(3, 0.75), "y": Inner(1)}, {"x": {"r": 3, "s": 1}}, Inner(11)
    )
    assert list(both.reasons) == ["a", "b", "c"]
    assert LEFT.reasons == {"b": 1, "a": 2}
    assert both + Outer() == both


def test_counts_survive_json():
    assert Outer.from_json(json.loads(json.dumps(RIGHT.to_json()))) == RIGHT


def test_dicts_of_dicts_add_up():
    assert add_dicts({"x": {"a": 1}}, {"x": {"b": 2}, "y": {"c": 3}}) == {"x": {"a": 1, "b": 2}, "y": {"c": 3}}
