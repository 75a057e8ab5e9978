"""The score store: log-probabilities and other statistics of tokens by row and policy, in Parquet files by partition.

    scores/<policy_id>/<partition>/<milliseconds>-<shard>-<random>.parquet      schemas.SCORE

A partition is named by a bit string after a 'b'. When the number of partitions changes, the rows of one
lie in the folders of its ancestors (b01 -> b0, b) and descendants (b010, b011), so all of those are read.
Of two scores of one row the first file name wins, for each statistic by itself. Files are only ever added; one holds
log-probabilities, and a column for each other statistic that was asked for with them.
"""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from grape_service.errors import StageError
from grape_service.rows.columns import SCORE
from grape_service.rows.ragged import Int64s, gather_rows, list_array, list_offsets_and_values, offsets_from_lengths
from grape_service.rows.statistics import LOGPROB, SCORE_FIELDS, ordered
from grape_service.storage.ahead import map_ahead
from grape_service.storage.parquet import array_of, open_parquet, open_small, write_parquet
from grape_service.storage.storage import Storage

PARTITION_PATTERN = re.compile(r"b[01]*")
REPEAT_SUFFIX = "-repeat"
"""After a policy id: repeated scorings of a few rows, which show how much of the weights is the engine's noise."""
SHUFFLED_SUFFIX = "-shuffled"
"""After a policy id: scores of a few rows under other prompts. In the policy's own folder, where they belong to no
partition, every stage would look at them for every partition."""
COMPLETE = "complete"
"""Folder beside the partitions: names of shards whose rows all have scores."""
METADATA_KEY = b"grape.engine"
"""Key of a score file's schema metadata: JSON that describes the engine."""

RowKeys: TypeAlias = Any
"""Keys of rows: a pyarrow array, chunked or not, of type binary(16)."""


class ScoreStore:
    """Scores of rows under one policy."""

    def __init__(self, storage: Storage, policy_id: str, folders: frozenset[str] | None = None):
        """`folders`: the partitions that have files, where that is known (see `with_folders`)."""
        self.storage = storage
        self.policy_id = policy_id
        self.folder = f"scores/{policy_id}"
        self.folders = folders

    def with_folders(self) -> ScoreStore:
        """This store as a stage's tasks get it: which partitions have files is looked up here, once for all of them."""
        return ScoreStore(self.storage, self.policy_id, frozenset(self._list_folders()))

    def _list_folders(self) -> list[str]:
        return [name for name in self.storage.folders(self.folder) if PARTITION_PATTERN.fullmatch(name)]

    def is_begun(self) -> bool:
        """Whether there are scores of any row."""
        return bool(self._list_folders())

    def related(self, partition: str) -> list[str]:
        """Partitions with files that may hold scores of this partition's rows: its ancestors, itself, its parts."""
        assert PARTITION_PATTERN.fullmatch(partition), partition
        folders = self.folders if self.folders is not None else frozenset(self._list_folders())
        found = [partition[:end] for end in range(1, len(partition) + 1) if partition[:end] in folders]
        ordered = _sorted(folders)
        first = bisect_right(ordered, partition)
        return found + ordered[first : bisect_left(ordered, f"{partition}2", first)]

    def partition_files(self, partition: str) -> list[str]:
        """Files that may hold scores of a partition's rows, in the order in which they win."""
        related = self.related(partition)
        files = [info.path for folder in related for info in self.storage.list(f"{self.folder}/{folder}")]
        return sorted(files, key=lambda path: (path.rsplit("/", 1)[-1], path))

    def read(self, partition: str, keys: RowKeys) -> ScoreTable:
        """Log-probabilities of `keys` [N]; no others, whatever the files hold. Raises StageError on a bad file."""
        return self.read_statistics(partition, keys, ())[LOGPROB]

    def read_statistics(self, partition: str, keys: RowKeys, names: Iterable[str]) -> dict[str, ScoreTable]:
        """Log-probabilities and other statistics of `keys` [N] by name, in one pass over the files.

        Raises StageError on a bad file.
        """
        index = KeyIndex(keys)
        parts = {name: _Collector(index.num_unique) for name in ordered(names)}
        for found in self._each_file(partition, index, tuple(parts)):
            for name, lists in found.lists.items():
                parts[name].add(found.rows, lists)
        return {name: part.table(index) for name, part in parts.items()}

    def missing(self, partition: str, keys: RowKeys, names: Iterable[str] = ()) -> npt.NDArray[np.bool_]:
        """Which of `keys` [N] lack log-probabilities, or another of the statistics `names`."""
        index = KeyIndex(keys)
        missing = {name: np.ones(index.num_unique, dtype=bool) for name in ordered(names)}
        for found in self._each_file(partition, index, tuple(missing), keys_only=True):
            for name in found.lists:
                missing[name][found.rows] = False
        return np.logical_or.reduce(list(missing.values()))[index.inverse]

    def versions(self, partition: str, keys: RowKeys) -> set[str]:
        """The engines, with their versions, that made the scores of `keys` which are read: (transformers 5.23.0)."""
        index = KeyIndex(keys)
        found = np.zeros(index.num_unique, dtype=bool)
        versions = set()
        for path in self.partition_files(partition):
            rows = self._read_file(path, index, (LOGPROB,), keys_only=True).rows
            if (~found[rows]).any():
                found[rows] = True
                made_by = self.metadata(path)
                versions.add(f"{made_by.get('engine')} {made_by.get('version')}")
        return versions

    def write(
        self,
        partition: str,
        keys: RowKeys,
        offsets: Int64s,
        logprobs: npt.NDArray[np.float32],
        metadata: dict[str, Any],
        shard: str = "scores",
        statistics: Mapping[str, npt.NDArray] | None = None,
    ) -> str:
        """Store scores [L] of rows [N] as a new file and give its path; `metadata` describes the engine.

        `statistics` [L] by name are what is stored beside log-probabilities.
        """
        assert PARTITION_PATTERN.fullmatch(partition), partition
        name = re.sub(r"[^A-Za-z0-9_.]", "-", shard.rsplit("/", 1)[-1].removesuffix(".parquet"))
        milliseconds = time.time_ns() // 1_000_000
        path = f"{self.folder}/{partition}/{milliseconds:013d}-{name}-{uuid.uuid4().hex[:8]}.parquet"
        keys = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
        values = {LOGPROB: logprobs, **(statistics or {})}
        columns = {SCORE_FIELDS[name].name: (SCORE_FIELDS[name], values[name]) for name in ordered(values)}
        lists = [
            list_array(offsets, array.astype(item.type.value_type.to_pandas_dtype(), copy=False), item.type.value_type)
            for item, array in columns.values()
        ]
        schema = pa.schema([SCORE.field("row_key"), *(item for item, _ in columns.values())])
        batch = pa.RecordBatch.from_arrays([keys, *lists], schema=schema)
        schema = schema.with_metadata({METADATA_KEY: orjson.dumps(metadata, option=orjson.OPT_SORT_KEYS)})
        write_parquet(self.storage, path, schema, [batch])
        return path

    def is_complete(self, name: str) -> bool:
        """Whether `note_complete(name)` was called and none of the score files of then is gone: one listing."""
        try:
            noted = self.storage.read_json(f"{self.folder}/{COMPLETE}/{name}.json")
        except FileNotFoundError:
            return False
        files = self._files()
        return bool(files[: noted["files"]] and _digest_of_paths(files[: noted["files"]]) == noted["digest"])

    def note_complete(self, name: str) -> None:
        """Note that every row of the shards called `name` has a score here."""
        files = self._files()
        noted = {"files": len(files), "digest": _digest_of_paths(files)}
        self.storage.write_json(f"{self.folder}/{COMPLETE}/{name}.json", noted)

    def _files(self) -> list[str]:
        """Every score file, the oldest first."""
        found = [info.path for info in self.storage.list(self.folder) if info.path.endswith(".parquet")]
        return sorted(found, key=lambda path: (path.rsplit("/", 1)[-1], path))

    def metadata(self, path: str) -> dict[str, Any]:
        """What `write` was told of the engine of a file."""
        with open_parquet(self.storage, path) as file:
            return orjson.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))

    def _each_file(
        self, partition: str, index: KeyIndex, names: tuple[str, ...], keys_only: bool = False
    ) -> Iterator[_Found]:
        def read(path: str) -> _Found:
            return self._read_file(path, index, names, keys_only)

        return map_ahead(read, self.partition_files(partition), 16 if self.storage.is_s3 else 2)

    def _read_file(self, path: str, index: KeyIndex, names: tuple[str, ...], keys_only: bool) -> _Found:
        """The rows that are looked for, with those of the statistics `names` that the file has."""
        parts: list[_Found] = []
        try:
            with open_small(self.storage, path) as file:
                schema = file.schema_arrow
                known = [SCORE.field("row_key"), *SCORE_FIELDS.values()]
                there = [item for item in known if item.name in schema.names]
                if [(item.name, item.type) for item in schema] != [(item.name, item.type) for item in there] or len(
                    [item for item in SCORE if item in there]
                ) < len(SCORE):
                    raise pa.ArrowInvalid(f"its columns are {', '.join(schema.names)}, not {', '.join(SCORE.names)}")
                names = tuple(name for name in names if SCORE_FIELDS[name].name in schema.names)
                columns = ["row_key", *([] if keys_only else [SCORE_FIELDS[name].name for name in names])]
                for group in range(file.num_row_groups):
                    parts.append(index.find(file.read_row_group(group, columns=columns, use_threads=False), names))
        except pa.ArrowInvalid as error:
            raise StageError(
                f"{self.storage.url(path)} is not a score file: {error}; move it out of the folder and run again"
            ) from error
        except OSError as error:
            raise StageError(f"the score file {self.storage.url(path)} cannot be read: {error}") from error
        return _Found.concatenate(parts, names)


@dataclass(frozen=True)
class _Lists:
    """Values of M rows."""

    lengths: Int64s  # [M]
    values: npt.NDArray[np.float32]  # flat


@lru_cache(maxsize=8)
def _sorted(folders: frozenset[str]) -> list[str]:
    return sorted(folders)


@dataclass(frozen=True)
class _Found:
    """What a file holds of the rows that are looked for."""

    rows: Int64s  # [M] places among the unique keys
    lists: dict[str, _Lists]  # by statistic

    @classmethod
    def concatenate(cls, parts: list[_Found], names: tuple[str, ...]) -> _Found:
        none = _Found(np.zeros(0, dtype=np.int64), dict.fromkeys(names, NO_LISTS))
        parts = [none, *parts]
        lists = {
            name: _Lists(
                np.concatenate([part.lists[name].lengths for part in parts]),
                np.concatenate([part.lists[name].values for part in parts]),
            )
            for name in names
        }
        return cls(np.concatenate([part.rows for part in parts]), lists)


NO_LISTS = _Lists(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))


class _Collector:
    """Collects one statistic of N unique rows, file after file: what comes first stays."""

    def __init__(self, num_rows: int):
        self.found = np.zeros(num_rows, dtype=bool)
        self.starts, self.lengths = np.zeros((2, num_rows), dtype=np.int64)
        self.values: list[npt.NDArray[np.float32]] = []
        self.num_values = 0

    def add(self, found_rows: Int64s, lists: _Lists) -> None:
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

    def table(self, index: KeyIndex) -> ScoreTable:
        """What was collected, in the order of the keys."""
        flat = np.concatenate(self.values) if self.values else NO_LISTS.values
        inverse = index.inverse
        return ScoreTable(self.found[inverse], self.starts[inverse], self.lengths[inverse], flat)


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

    def find(self, table: pa.Table, names: tuple[str, ...]) -> _Found:
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
            lists[name] = _Lists(lengths, taken)
        return _Found(places[there], lists)


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

    def finite(self) -> npt.NDArray[np.bool_]:
        """Rows [N] that were found and whose scores are all finite."""
        bad = np.concatenate([[0], np.cumsum(~np.isfinite(self.values))])
        return self.found & (bad[self.starts + self.lengths] == bad[self.starts])


def _digest_of_paths(paths: list[str]) -> str:
    return hashlib.sha256("\n".join(paths).encode()).hexdigest()


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
