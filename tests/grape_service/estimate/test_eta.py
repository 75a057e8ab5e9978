"""What a run says that it has ahead of it."""

from __future__ import annotations

from typing import Any

import pytest

from grape_service.config.schema import Config
from grape_service.estimate.eta import upcoming_stages


def config(**over: Any) -> Config:
    plain = {"name": "x", "pool": {"path": "p"}, "target": {"model": "m"}, "output": {"path": "o"}}
    return Config.model_validate({**plain, **over})


def test_stages_are_those_that_the_config_asks_for() -> None:
    def names(done: bool = False, **over: Any) -> list[str]:
        return [item.stage for item in upcoming_stages(config(**over), 8e6, 8, cores=2, done=done)]

    assert names() == ["prepare", "shard", "score target", "select", "release"]
    assert names(done=True, select={"method": "longest"}) == ["select", "release"]
    assert names(done=True, checks={"refusal": "warn"}) == ["score target", "select", "check", "release"]
    recorded = {"behavior": {"column": "c"}, "weights": {"method": "pear"}}
    assert names(done=True, **recorded) == ["score target", "select", "weigh", "release"]


def test_behavior_policies_score_what_is_kept() -> None:
    sources = {"a": {"model": "x"}, "b": {"model": "y"}}
    settings = {"behavior": {"sources": sources}, "weights": {"method": "pear"}, "select": {"keep": 2}}
    upcoming = upcoming_stages(config(**settings), tokens=8e6, per_prompt=8, cores=2, done=True)
    tokens = {item.stage: item.tokens for item in upcoming if item.tokens}
    assert tokens == {
        "score target": 8e6,
        "score winners under behavior policy a": 1e6,
        "score winners under behavior policy b": 1e6,
    }


def test_twice_the_cores_are_half_the_seconds() -> None:
    two, four = (sum(item.seconds for item in upcoming_stages(config(), 8e6, 8, cores, done=False)) for cores in (2, 4))
    assert two == pytest.approx(2 * four)
    assert two > 0
