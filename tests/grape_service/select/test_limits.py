"""keep: {column: n} and min_candidates, on real files."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.config.methods import SelectConfig
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.select.counts import SelectCounts
from grape_service.select.limits import check_keep_column, distinct_responses, keep_column, kept_of_prompts
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.storage.storage import Storage
from tests.made_rows import Row, put_shards

pytestmark = pytest.mark.quick


def select(storage: Storage, rows: list[list[Row]], **settings) -> tuple[SelectCounts, list[str]]:
    config = Config.model_validate(
        {
            "name": "test",
            "pool": {"path": "pool.jsonl"},
            "target": {"model": "model"},
            "output": {"path": "out"},
            "select": {"method": "shortest", **settings},
        }
    )
    shards = put_shards(storage, rows, [pa.field("n", pa.float64())])
    counts = select_partition(
        SelectContext(storage, config, None, frozenset()), SelectPartition("b", shards, "kept.parquet")
    )
    return counts, pq.read_table(storage.full("kept.parquet"))["candidate_id"].to_pylist()


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path))


def rows(n_of: dict[str, list[float | None]]) -> list[Row]:
    return [
        Row(prompt, f"{prompt}-{place}", "ab"[place % 2], num_loss=1 + place, other={"n": n})
        for prompt, ns in n_of.items()
        for place, n in enumerate(ns)
    ]


@pytest.mark.parametrize("share", [None, 1.0])
def test_as_many_are_kept_as_the_pools_column_says(storage, share):
    shards = [rows({"p": [2, 2, 2], "q": [1, 1]}), rows({"r": [9, 9]})]
    counts, kept = select(storage, shards, keep={"column": "n"}, max_source_share=share)
    assert kept == ["p-0", "p-1", "q-0", "r-0", "r-1"]
    assert counts.kept_rows == 5


@pytest.mark.parametrize(
    ("kind", "values"),
    [(pa.string(), ["2", "2.0", "+2"]), (pa.decimal128(4, 1), [Decimal(2)] * 3)],
)
def test_numbers_as_text_and_decimals_say_how_many_are_kept(kind, values):
    table = pa.table({"prompt_id": ["p", "p", "p"], "n": pa.array(values, kind)})
    config = SelectConfig(keep={"column": "n"})
    assert kept_of_prompts(table, np.zeros(3, np.int64), 1, config).tolist() == [2]
    unread = pa.table({"prompt_id": ["p"], "n": ["two"]})
    with pytest.raises(UserError, match="has 'two' in the column 'n', not a whole number"):
        kept_of_prompts(unread, np.zeros(1, np.int64), 1, config)


@pytest.mark.parametrize(
    ("ns", "sentence"),
    [
        ([2, 3], "prompt 'p' has both 2 and 3 in the column 'n'"),
        ([None, 1], "prompt 'p' has None in the column 'n', not a whole number"),
        ([1.5, 1.5], "prompt 'p' has 1.5 in"),
        ([0, 0], "prompt 'p' has 0.0 in"),
    ],
)
def test_a_column_that_says_nothing_is_an_error_that_names_the_prompt(storage, ns, sentence):
    with pytest.raises(UserError, match=sentence):
        select(storage, [rows({"p": ns})], keep={"column": "n"})


def test_a_column_that_is_not_there_is_known_before_scoring():
    select = SelectConfig(keep={"column": "num_kept"})
    with pytest.raises(UserError, match=r"the column 'num_kept', which no row has; did you mean 'n_kept'"):
        check_keep_column(select, ["n_kept", "level"])
    check_keep_column(select, ["num_kept"])
    assert keep_column(SelectConfig(keep={"column": "truncated"})) == "pool_truncated"
    assert keep_column(SelectConfig(keep=3)) is None


def test_prompts_with_fewer_distinct_responses_are_left_out(storage):
    same = rows({"p": [1, 1], "q": [1, 1], "r": [1]})
    same[1].__class__ = Twin  # the same text from another source
    counts, kept = select(storage, [same], min_candidates=2)
    assert kept == ["q-0"]
    assert counts.prompts_left_out == {"fewer distinct responses than min_candidates": 2}
    assert counts.rows_left_out == {"not chosen": 1, "fewer distinct responses than min_candidates": 3}
    counts, kept = select(storage, [same])
    assert (len(kept), counts.singletons) == (3, 2)


class Twin(Row):
    """A row with the tokens of the first of its prompt."""

    @property
    def key(self) -> bytes:
        return Row(self.prompt_id, f"{self.prompt_id}-0").key


def test_distinct_responses_are_counted_by_prompt():
    keys = pa.array([b"a" * 16, b"b" * 16, b"a" * 16, b"a" * 16], pa.binary(16))
    assert distinct_responses(np.array([0, 0, 0, 2]), 3, keys).tolist() == [2, 0, 1]
    assert distinct_responses(np.zeros(0, np.int64), 0, pa.array([], pa.binary(16))).tolist() == []
