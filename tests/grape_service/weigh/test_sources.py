"""Whose behavior the rows of each source are, and what is said before anything is scored."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from grape_service.config.loading import parse_config
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.weigh.behavior import (
    RECORDED,
    missing_sources,
    refuse_missing,
    refuse_missing_sources,
    refuse_unrecorded,
    row_behaviors,
    unknown_sources,
)

PEOPLE = {"human": "none", "gen-a": {"column": "behavior_logprobs"}}


def config_of(behavior: dict[str, Any]) -> Config:
    return parse_config(
        {
            "name": "t",
            "pool": {"path": "pool"},
            "target": {"model": "m"},
            "behavior": behavior,
            "weights": {"method": "pear"},
            "output": {"path": "out"},
        }
    )


@pytest.mark.parametrize("none", ["none", None])
def test_a_source_without_a_policy_leaves_missing_error_to_the_others(none: str | None) -> None:
    config = config_of({"sources": {**PEOPLE, "human": none}, "missing": "error"})
    assert config.behavior is not None
    assert config.model_dump(mode="json")["behavior"]["sources"]["human"] == "none"
    assert missing_sources(config, {"human": 3, "gen-a": 2}, 0) == {}
    refuse_missing_sources(config, {"human": 3, "gen-a": 2}, 0)
    with pytest.raises(UserError, match="gen-b"):
        refuse_missing_sources(config, {"human": 3, "gen-a": 2, "gen-b": 1}, 0)
    table = pa.table(
        {
            "prompt_id": list("abcd"),
            "candidate_id": list("abcd"),
            "source": ["human", "gen-a", "gen-a", None],
            "sampling": pa.array([None] * 4, pa.string()),
            "recorded_logprobs": pa.array([None, [-1.0], None, [-1.0]], pa.list_(pa.float32())),
        }
    )
    found = row_behaviors(table, config.behavior)
    assert (found.policy == RECORDED).tolist() == [False, True, False, False]
    census = found.census()
    assert census["human"] == {"behavior.sources says none": 1}
    refuse_missing({"human": census["human"]})
    for source in ("gen-a", "(none)"):
        with pytest.raises(UserError, match=r"cannot be weighed"):
            refuse_missing({source: census[source]})


def test_a_name_that_is_no_source_is_told_with_those_there_are() -> None:
    config = config_of({"sources": {"gen-A": {"column": "behavior_logprobs"}}, "missing": "uniform"})
    assert unknown_sources(config, {"gen-a": 2, "human": 1}, 4) == (
        "behavior.sources names gen-A, which no row of the pool has as its source: there are gen-a, human, (none)"
    )
    assert unknown_sources(config, {"gen-A": 2}, 0) is None


def test_a_column_that_no_row_has_is_refused_whatever_becomes_of_missing_rows() -> None:
    config = config_of({"column": "behavior_logprobs", "missing": "uniform"})
    refuse_unrecorded(config, 1)
    with pytest.raises(UserError, match=r"'behavior_logprobs', which no row .* \(columns: logprobs\)"):
        refuse_unrecorded(config, 0, ["logprobs"])
    refuse_unrecorded(config_of({"sources": PEOPLE}), 0)
