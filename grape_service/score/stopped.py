"""Rows that a race stopped: their first tokens with loss and what their score can reach, apart from whole scores.

    scores/<policy_id>-stopped/<partition>/<milliseconds>-<shard>-<random>.parquet      columns.STOPPED

They lie in a store of their own beside the policy's, so that whoever reads scores, of this version or an older one,
finds none of such a row. Files are only ever added. Of two entries of a row the one with more tokens is read, then the
first file name. Later runs take its tokens as they are and score the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from grape_service.errors import StageError
from grape_service.json_types import JsonObject
from grape_service.rows.columns import SCORE_FIELDS, STOPPED
from grape_service.rows.ragged import Int64s, gather_rows, list_array, list_offsets_and_values, offsets_from_lengths
from grape_service.rows.statistics import LOGPROB, ordered
from grape_service.score.store import METADATA_KEY, STOPPED_SUFFIX, ScoreStore
from grape_service.score.tables import KeyIndex, RowKeys, ScoreTable
from grape_service.storage.concurrent_map import concurrent_map
from grape_service.storage.parquet import array_of, open_small, write_parquet

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """What the scores of N rows can reach."""

    method: npt.NDArray[np.object_]
    """[N] Whose score, as text; '' for a row of which nothing is stored."""
    bound: Float64s
    """[N] What it cannot exceed; NaN where nothing is stored, in the next two as well."""
    reach: Float64s
    """[N] What it is taken not to exceed."""
    risk: Float64s
    """[N] Of that; 0 where it is certain."""

    @classmethod
    def of_none(cls, number: int) -> Limits:
        """Of rows of which nothing is stored."""
        return cls(np.full(number, "", dtype=object), *(np.full(number, np.nan) for _ in range(3)))

    def take(self, rows: slice | npt.NDArray[Any]) -> Limits:
        """Of some of the rows."""
        return Limits(self.method[rows], self.bound[rows], self.reach[rows], self.risk[rows])


@dataclass(frozen=True)
class Stopped:
    """What is stored of N rows, in the order in which they were asked for."""

    tables: Mapping[str, ScoreTable]
    """Statistics by name of each row's first tokens with loss."""
    limits: Limits

    def of_rows(self, rows: Int64s) -> Stopped:
        """Of some rows, in that order."""
        return Stopped({name: table.of_rows(rows) for name, table in self.tables.items()}, self.limits.take(rows))

    @property
    def known(self) -> Int64s:
        """Tokens with loss of each row [N] that have statistics."""
        return self.tables[LOGPROB].lengths


def stopped_store(store: ScoreStore) -> ScoreStore:
    """Where the rows lie that were stopped while they were scored for `store`."""
    return replace(store, policy_id=f"{store.policy_id}{STOPPED_SUFFIX}", folders=None)


def read_stopped(store: ScoreStore, partition: str, keys: RowKeys, names: Iterable[str]) -> Stopped:
    """What `store`, one of stopped rows, has of `keys` [N] with all statistics `names`. Raises StageError on a bad
    file."""
    index, names = KeyIndex(keys), ordered(names)
    found: list[_Entries] = []
    for entries in concurrent_map(
        lambda path: _read(store, path, index, names),
        store.partition_files(partition),
        16 if store.storage.is_s3 else 2,
    ):
        found.append(entries)
    number = len(index.inverse)
    if not any(len(one.rows) for one in found):
        nothing = np.zeros(number, dtype=np.int64)
        empty = ScoreTable(nothing > 0, nothing, nothing, np.zeros(0, dtype=np.float32))
        return Stopped(dict.fromkeys(names, empty), Limits.of_none(number))
    return _Entries.longest(found, names, index)


@dataclass(frozen=True)
class _Entries:
    """What a file has of the rows that are looked for."""

    rows: Int64s  # [M] places among the unique keys
    lengths: Int64s  # [M]
    values: dict[str, npt.NDArray[np.float32]]
    limits: pa.Table  # [M] method, bound, reach, risk

    @classmethod
    def longest(cls, found: list[_Entries], names: tuple[str, ...], index: KeyIndex) -> Stopped:
        """Of each row the entry with the most tokens; of equal ones the first."""
        rows, lengths = (np.concatenate([getattr(one, name) for one in found]) for name in ("rows", "lengths"))
        order = np.lexsort((np.arange(len(rows)), -lengths, rows))
        first = np.ones(len(order), dtype=bool)
        first[1:] = rows[order][1:] != rows[order][:-1]
        chosen = np.full(index.num_unique, -1, dtype=np.int64)
        chosen[rows[order[first]]] = order[first]
        place = chosen[index.inverse]
        there = place >= 0
        starts = np.where(there, offsets_from_lengths(lengths)[:-1][place], 0)
        counts = np.where(there, lengths[place], 0)
        tables = {
            name: ScoreTable(there, starts, counts, np.concatenate([one.values[name] for one in found]))
            for name in names
        }
        taken = pa.concat_tables([one.limits for one in found]).take(pa.array(place, mask=~there))
        method = np.array([name or "" for name in taken["method"].to_pylist()], dtype=object)
        numbers = (taken[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in ("bound", "reach", "risk"))
        return Stopped(tables, Limits(method, *numbers))


def _read(store: ScoreStore, path: str, index: KeyIndex, names: tuple[str, ...]) -> _Entries:
    limits = STOPPED.names[2:]
    try:
        with open_small(store.storage, path) as file:
            there = file.schema_arrow.names
            lists = [SCORE_FIELDS[name].name for name in names]
            if not set(STOPPED.names) <= set(there):
                raise pa.ArrowInvalid(f"its columns are {', '.join(there)}, not {', '.join(STOPPED.names)}")
            if not set(lists) <= set(there):  # its rows were scored for less: they are scored again
                table = STOPPED.empty_table()
                lists = ["logprobs"] * len(names)
            else:
                table = file.read(columns=["row_key", *dict.fromkeys([*lists, *limits])], use_threads=False)
    except pa.ArrowInvalid as error:
        raise StageError(
            f"{store.storage.url(path)} is no file of stopped rows: {error}; move it out of the folder and run again"
        ) from error
    except OSError as error:
        raise StageError(f"the file {store.storage.url(path)} cannot be read: {error}") from error
    places = index.places(table["row_key"])
    mine = np.flatnonzero(places >= 0)
    values, lengths = {}, np.zeros(len(mine), dtype=np.int64)
    for name, column in zip(names, lists, strict=True):
        offsets, flat = list_offsets_and_values(array_of(table, column))
        lengths = np.diff(offsets)[mine]
        values[name] = flat[gather_rows(offsets[:-1][mine], lengths)].astype(np.float32, copy=False)
    return _Entries(places[mine], lengths, values, table.select(limits).take(pa.array(mine)))


def write_stopped(
    store: ScoreStore,
    partition: str,
    keys: RowKeys,
    offsets: Int64s,
    statistics: Mapping[str, npt.NDArray[np.float32]],
    limits: Limits,
    metadata: JsonObject,
    shard: str,
) -> str:
    """Store the first tokens [K] of rows [N] that were stopped in `store`, one of stopped rows; gives the file's path.

    `statistics` [K] by name, log-probabilities among them, are the rows' one after the other, cut at `offsets` [N + 1].
    """
    columns = [SCORE_FIELDS[name] for name in ordered(statistics)]
    lists = [
        list_array(offsets, values.astype(item.type.value_type.to_pandas_dtype(), copy=False), item.type.value_type)
        for item, values in zip(columns, (statistics[name] for name in ordered(statistics)), strict=True)
    ]
    numbers = [pa.array(list(limits.method), pa.string()), *map(pa.array, (limits.bound, limits.reach, limits.risk))]
    schema = pa.schema([STOPPED.field("row_key"), columns[0], *list(STOPPED)[2:], *columns[1:]])
    keys = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    batch = pa.RecordBatch.from_arrays([keys, lists[0], *numbers, *lists[1:]], schema=schema)
    schema = schema.with_metadata({METADATA_KEY: orjson.dumps(metadata, option=orjson.OPT_SORT_KEYS)})
    path = store.new_path(partition, shard)
    write_parquet(store.storage, path, schema, [batch])
    return path
