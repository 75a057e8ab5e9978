"""Finding the rows of a file among those that are wanted, by their keys."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.rows.columns import SCORE_FIELDS
from grape_service.rows.ragged import Int64s, gather_rows, list_offsets_and_values
from grape_service.score.tables import NO_LISTS, Found, Lists
from grape_service.storage.parquet import array_of

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
