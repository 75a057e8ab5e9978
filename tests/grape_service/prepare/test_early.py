"""A column that the config mistypes, and a path that nothing fills in, are told before anything is started."""

from __future__ import annotations

import pytest

from grape_service.config.loading import parse_config
from grape_service.errors import UserError
from grape_service.prepare.groups import refuse_mistyped
from tests.prepared_pools import make_config, write_jsonl

OBJECTS = [{"question": "q", "completions": [{"model": "m", "response": f"a {n}", "score": n} for n in range(2)]}] * 5


@pytest.mark.parametrize(
    ("pool", "sentence"),
    [
        ({"where": [{"column": "scor", "equals": 1}]}, "pool.where names the column 'scor', .*did you mean 'score'"),
        (
            {"where": [{"column": "zzz", "equals": 1}]},
            "pool.where names the column 'zzz', which no row of a",
        ),
        ({"columns": {"prompt": "frage"}}, "pool.columns.prompt names the column 'frage'"),
        ({"columns": {"source": "modle"}}, "pool.columns.source names the column 'modle', .*did you mean 'model'"),
    ],
)
def test_a_mistyped_column_is_refused_from_a_sample(tmp_path, pool, sentence):
    path = write_jsonl(tmp_path / "p.jsonl", OBJECTS)
    with pytest.raises(UserError, match=sentence):
        refuse_mistyped(make_config(path, pool=pool))


@pytest.mark.parametrize(
    "pool",
    [
        {},
        {"where": [{"column": "score", "at_least": 1}, {"column": "source", "equals": "m"}]},
        {"columns": {"finish_reason": "a_column_of_few_rows"}},
        {"carry": ["a_column_of_few_rows"]},
    ],
)
def test_what_rows_further_on_may_have_is_not(tmp_path, pool):
    refuse_mistyped(make_config(write_jsonl(tmp_path / "p.jsonl", OBJECTS), pool=pool))


@pytest.mark.parametrize("path", ["$POOLS/math", "s3://team/${NAME}/x", ""])
def test_a_path_with_an_unset_variable_is_refused(path):
    values = {"name": "t", "pool": {"path": "p"}, "target": {"model": "m"}, "output": {"path": "out"}}
    words = "the path is empty" if not path else "names the variable (POOLS|NAME): write"
    for section in ("pool", "output"):
        with pytest.raises(UserError, match=words):
            parse_config({**values, section: {"path": path}})
    with pytest.raises(UserError, match=words):
        parse_config({**values, "pool": {"path": [{"path": path}]}})
