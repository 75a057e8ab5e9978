"""Shards of rows to score: cut between rows at about the same number of tokens."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_service.rows.ragged import list_array, offsets_from_lengths
from grape_service.score.shards import Shards, ShardWriter
from grape_service.storage.parquet import open_parquet
from grape_service.storage.storage import Storage

pytestmark = pytest.mark.quick


def rows(lengths: list[int], first: int = 0) -> pa.Table:
    offsets = offsets_from_lengths(lengths)
    ids = np.arange(offsets[-1], dtype=np.int32)
    return pa.table({"input_ids": list_array(offsets, ids, pa.int32()), "row": range(first, first + len(lengths))})


def shards_of(lengths: list[list[int]], shard_tokens: int, root: str) -> tuple[Shards, list[list[int]]]:
    """What a writer says of tables of rows of these lengths, and the rows of each shard."""
    writer, first = ShardWriter(Storage(root), "folder/b", "b", shard_tokens), 0
    for table in lengths:
        writer.add(rows(table, first))
        first += len(table)
    shards = writer.close()
    found = []
    for path in shards.paths:
        with open_parquet(writer.storage, path) as file:
            found.append(file.read()["row"].to_pylist())
    return shards, found


def test_shards_are_cut_between_rows(tmp_path):
    shards, found = shards_of([[3, 3, 3], [1, 9, 2], [5, 5]], 6, str(tmp_path))
    assert found == [[0, 1], [2, 3], [4], [5, 6], [7]]
    assert shards == Shards("folder/b", "b", 5, 8, 31)
    assert list(shards.paths) == [f"folder/b/shard-{number:05d}.parquet" for number in range(5)]
    empty, _ = shards_of([], 6, str(tmp_path))
    assert empty == Shards("folder/b", "b", 0, 0, 0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(1, 12), max_size=6), max_size=6), st.integers(1, 20))
def test_every_row_is_in_one_shard_of_about_so_many_tokens(tmp_path_factory, tables, shard_tokens):
    shards, found = shards_of(tables, shard_tokens, str(tmp_path_factory.mktemp("shards")))
    lengths = [length for table in tables for length in table]
    assert [row for of_shard in found for row in of_shard] == list(range(len(lengths)))
    assert (shards.number, shards.rows, shards.tokens) == (len(found), len(lengths), sum(lengths))
    tokens = [sum(lengths[row] for row in of_shard) for of_shard in found]
    last = [lengths[of_shard[-1]] for of_shard in found]
    assert all(here - end < shard_tokens for here, end in zip(tokens, last, strict=True))
    starts = [lengths[of_shard[0]] for of_shard in found[1:]]
    assert all(here + following > shard_tokens for here, following in zip(tokens, starts, strict=False))


@pytest.mark.parametrize(("total", "number"), [(10, 3), (2, 5), (0, 2), (7, 7)])
def test_parts_add_up_and_are_of_one_size(total, number):
    shards = Shards("folder", "b", number, total, 10 * total)
    for whole in (shards.rows, shards.tokens):
        parts = [shards.part(whole, place) for place in range(number)]
        assert sum(parts) == whole
        assert max(parts) - min(parts) <= 1
