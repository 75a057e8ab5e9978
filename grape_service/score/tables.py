"""Statistics of rows out of score files: what a file holds, several files in one, and what a reader is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.rows.columns import SCORE_FIELDS
from grape_service.rows.ragged import Int64s, gather_rows, list_offsets_and_values, offsets_from_lengths
from grape_service.storage.parquet import array_of


@dataclass(frozen=True)
class Lists:
    """Values of M rows."""

    lengths: Int64s  # [M]
    values: npt.NDArray[np.float32]  # flat


@dataclass(frozen=True)
class Found:
    """What a file holds of the rows that are looked for."""

    rows: Int64s  # [M] places among the unique keys
    lists: dict[str, Lists]  # by statistic

    @classmethod
    def concatenate(cls, parts: list[Found], names: tuple[str, ...]) -> Found:
        none = Found(np.zeros(0, dtype=np.int64), dict.fromkeys(names, NO_LISTS))
        parts = [none, *parts]
        lists = {
            name: Lists(
                np.concatenate([part.lists[name].lengths for part in parts]),
                np.concatenate([part.lists[name].values for part in parts]),
            )
            for name in names
        }
        return cls(np.concatenate([part.rows for part in parts]), lists)


NO_LISTS = Lists(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))


class Collector:
    """Collects one statistic of N unique rows, file after file: what comes first stays."""

    def __init__(self, num_rows: int):
        self.found = np.zeros(num_rows, dtype=bool)
        self.starts, self.lengths = np.zeros((2, num_rows), dtype=np.int64)
        self.values: list[npt.NDArray[np.float32]] = []
        self.num_values = 0

    def add(self, found_rows: Int64s, lists: Lists) -> None:
        """The rows of a file."""
        fresh, offsets = ~self.found[found_rows], offsets_from_lengths(lists.lengths)
        # Of equal rows within a file the first wins too: np.unique gives the first place of each.
        rows, places = np.unique(found_rows[fresh], return_index=True)
        places = np.flatnonzero(fresh)[places]
        taken = lists.values[gather_rows(offsets[places], lists.lengths[places])]
        self.found[rows] = True
        self.lengths[rows] = lists.lengths[places]
        self.starts[rows] = self.num_values + offsets_from_lengths(lists.lengths[places])[:-1]
        self.num_values += len(taken)
        self.values.append(taken)

    def table(self, inverse: Int64s) -> ScoreTable:
        """What was collected, of each of N keys by its place among the unique ones (`inverse` [N])."""
        flat = np.concatenate(self.values) if self.values else NO_LISTS.values
        return ScoreTable(self.found[inverse], self.starts[inverse], self.lengths[inverse], flat)


@dataclass(frozen=True)
class ScoreTable:
    """Scores of N rows, in the order in which they were asked for."""

    found: npt.NDArray[np.bool_]  # [N]
    starts: Int64s  # [N] into values
    lengths: Int64s  # [N]; 0 where not found
    values: npt.NDArray[np.float32]

    def take(self, rows: Int64s) -> npt.NDArray[np.float32]:
        """Flat scores of rows, one row after the other; nothing for a row that was not found."""
        return self.values[gather_rows(self.starts[rows], self.lengths[rows])]

    def of_rows(self, rows: Int64s) -> ScoreTable:
        """Those of some rows, in that order."""
        return replace(self, found=self.found[rows], starts=self.starts[rows], lengths=self.lengths[rows])

    def finite(self) -> npt.NDArray[np.bool_]:
        """Rows [N] that were found and whose scores are all finite."""
        bad = np.concatenate([[0], np.cumsum(~np.isfinite(self.values))])
        return self.found & (bad[self.starts + self.lengths] == bad[self.starts])


RowKeys: TypeAlias = Any
"""Keys of rows: a pyarrow array, chunked or not, of type binary(16)."""


class KeyIndex:
    """Finds 16-byte keys among N keys: sorted by their first halves, told apart by their second."""

    def __init__(self, keys: RowKeys):
        halves = key_halves(keys)
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        ordered = halves[order]
        new = np.ones(len(order), dtype=bool)
        new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        self.first, self.second = ordered[new].T.copy()
        self.inverse = np.empty(len(order), dtype=np.int64)
        self.inverse[order] = np.cumsum(new) - 1
        self.num_unique = len(self.first)

    def places(self, keys: RowKeys) -> Int64s:
        """Place of each of `keys` [M] among the unique ones, -1 where it is not one of them."""
        wanted = key_halves(keys)
        first, second = wanted[:, 0], wanted[:, 1]
        if self.num_unique == 0:
            return np.full(len(first), -1, dtype=np.int64)
        place = np.searchsorted(self.first, first)
        while True:
            bounded = np.minimum(place, self.num_unique - 1)
            same_first = (place < self.num_unique) & (self.first[bounded] == first)
            step = same_first & (self.second[bounded] < second)
            if not step.any():
                break
            place += step
        return np.where(same_first & (self.second[bounded] == second), bounded, -1)

    def find(self, table: pa.Table, names: tuple[str, ...]) -> Found:
        """The rows of a table of scores that are among the keys; without values where it has the keys alone."""
        places = self.places(table["row_key"])
        there = np.flatnonzero(places >= 0)
        lists = dict.fromkeys(names, NO_LISTS)
        for name in names if table.num_columns > 1 else ():
            column = array_of(table, SCORE_FIELDS[name].name)
            if column.null_count or column.values.null_count:
                raise pa.ArrowInvalid("it holds rows without scores")
            offsets, values = list_offsets_and_values(column)
            lengths = np.diff(offsets)[there]
            taken = values[gather_rows(offsets[there], lengths)].astype(np.float32, copy=False)
            lists[name] = Lists(lengths, taken)
        return Found(places[there], lists)


def key_halves(keys: RowKeys) -> npt.NDArray[np.uint64]:
    """Keys of 16 bytes as pairs of big-endian numbers [N, 2], which sort as the bytes do."""
    if isinstance(keys, pa.ChunkedArray):
        keys = pa.concat_arrays(keys.chunks) if keys.num_chunks else pa.array([], type=pa.binary(16))
    assert keys.type == pa.binary(16), "row keys are 16 bytes each"
    assert keys.null_count == 0, "every row has a key"
    if len(keys) == 0:
        return np.zeros((0, 2), dtype=np.uint64)
    data = np.frombuffer(keys.buffers()[1], dtype=">u8", count=2 * len(keys), offset=16 * keys.offset)
    return data.reshape(-1, 2).astype(np.uint64)
