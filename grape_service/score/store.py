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
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from grape_service.errors import StageError
from grape_service.json_types import JsonObject
from grape_service.rows.columns import SCORE, SCORE_FIELDS
from grape_service.rows.ragged import Int64s, list_array
from grape_service.rows.statistics import LOGPROB, ordered
from grape_service.score.tables import Collector, Found, KeyIndex, RowKeys, ScoreTable
from grape_service.storage.concurrent_map import concurrent_map
from grape_service.storage.parquet import open_parquet, open_small, write_parquet
from grape_service.storage.storage import Storage

PARTITION_PATTERN = re.compile(r"b[01]*")
REPEAT_SUFFIX = "-repeat"
"""After a policy id: repeated scorings of a few rows, which show how much of the weights is the engine's noise."""
AUDIT_SUFFIX = "-audit"
"""After a policy id: scores of a few responses that it sampled itself."""
SHUFFLED_SUFFIX = "-shuffled"
"""After a policy id: scores of a few rows under other prompts. In the policy's own folder, where they belong to no
partition, every stage would look at them for every partition."""
STOPPED_SUFFIX = "-stopped"
"""After a policy id: rows of which a race scored the first tokens alone; see score/stopped.py."""
COMPLETE = "complete"
"""Folder beside the partitions: names of shards whose rows all have scores."""
METADATA_KEY = b"grape.engine"
"""Key of a score file's schema metadata: JSON that describes the engine."""
POLICY_KEY = b"grape.policy"
"""Key of a score file's schema metadata: the policy id under which it was stored."""


def engine_version(made_by: Mapping[str, Any]) -> str:
    """Whose code computed, as an engine's description or a file's metadata has it: its library and torch."""
    torch = made_by.get("torch") or (made_by.get("extra") or {}).get("torch")
    return f"{made_by.get('engine')} {made_by.get('version')}" + (f" with torch {torch}" if torch else "")


@dataclass(frozen=True, eq=False)
class ScoreStore:
    """Scores of rows under one policy."""

    storage: Storage
    policy_id: str
    folders: frozenset[str] | None = None
    """The partitions that have files, where that is known: see `with_folders`."""
    root: str = "scores"
    """The folder of the workspace that they lie below; samples, which are found in the same way, have another."""

    @property
    def folder(self) -> str:
        """Where they lie in the workspace."""
        return f"{self.root}/{self.policy_id}"

    def with_folders(self) -> ScoreStore:
        """This store as a stage's tasks get it: which partitions have files is looked up here, once for all of them."""
        return replace(self, folders=frozenset(self._list_folders()))

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
        parts = {name: Collector(index.num_unique) for name in ordered(names)}
        for found in self._each_file(partition, index, tuple(parts)):
            for name, lists in found.lists.items():
                parts[name].add(found.rows, lists)
        return {name: part.table(index.inverse) for name, part in parts.items()}

    def missing(self, partition: str, keys: RowKeys, names: Iterable[str] = ()) -> npt.NDArray[np.bool_]:
        """Which of `keys` [N] lack log-probabilities, or another of the statistics `names`."""
        index = KeyIndex(keys)
        missing = {name: np.ones(index.num_unique, dtype=bool) for name in ordered(names)}
        for found in self._each_file(partition, index, tuple(missing), keys_only=True):
            for name in found.lists:
                missing[name][found.rows] = False
        return np.logical_or.reduce(list(missing.values()))[index.inverse]

    def versions(self, partition: str, keys: RowKeys, names: Iterable[str] = ()) -> set[str]:
        """The engines, with their versions, that made the scores of `keys` which are read, log-probabilities and the
        other statistics `names`: (transformers 5.23.0 with torch 2.13.0+cpu)."""
        index = KeyIndex(keys)
        found = {name: np.zeros(index.num_unique, dtype=bool) for name in ordered(names)}
        versions = set()
        for path in self.partition_files(partition):
            part = self._read_file(path, index, tuple(found), keys_only=True)
            if any((~found[name][part.rows]).any() for name in part.lists):
                versions.add(self.version_of(path))
            for name in part.lists:
                found[name][part.rows] = True
        return versions

    def version_of(self, path: str) -> str:
        """The engine, with its version, that made a file."""
        return engine_version(self.metadata(path))

    def write(
        self,
        partition: str,
        keys: RowKeys,
        offsets: Int64s,
        logprobs: npt.NDArray[np.float32],
        metadata: JsonObject,
        shard: str = "scores",
        statistics: Mapping[str, npt.NDArray] | None = None,
    ) -> str:
        """Store scores [L] of rows [N] as a new file and give its path; `metadata` describes the engine.

        `statistics` [L] by name are what is stored beside log-probabilities.
        """
        path = self.new_path(partition, shard)
        keys = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
        values = {LOGPROB: logprobs, **(statistics or {})}
        columns = {SCORE_FIELDS[name].name: (SCORE_FIELDS[name], values[name]) for name in ordered(values)}
        lists = [
            list_array(offsets, array.astype(item.type.value_type.to_pandas_dtype(), copy=False), item.type.value_type)
            for item, array in columns.values()
        ]
        schema = pa.schema([SCORE.field("row_key"), *(item for item, _ in columns.values())])
        batch = pa.RecordBatch.from_arrays([keys, *lists], schema=schema)
        made_by = orjson.dumps(metadata, option=orjson.OPT_SORT_KEYS)
        schema = schema.with_metadata({METADATA_KEY: made_by, POLICY_KEY: self.policy_id.encode()})
        write_parquet(self.storage, path, schema, [batch])
        return path

    def new_path(self, partition: str, shard: str) -> str:
        """Where a new file of a partition goes, that says which shard it is of."""
        assert PARTITION_PATTERN.fullmatch(partition), partition
        name = re.sub(r"[^A-Za-z0-9_.]", "-", shard.rsplit("/", 1)[-1].removesuffix(".parquet"))
        milliseconds = time.time_ns() // 1_000_000
        return f"{self.folder}/{partition}/{milliseconds:013d}-{name}-{uuid.uuid4().hex[:8]}.parquet"

    def is_complete(self, name: str) -> bool:
        """Whether `note_complete(name)` was called and none of the score files of then is gone: one listing."""
        noted = self.storage.read_note(f"{self.folder}/{COMPLETE}/{name}.json", "files", "digest")
        if noted is None:
            return False
        files = self._files()
        return bool(files[: noted["files"]] and _digest_of_paths(files[: noted["files"]]) == noted["digest"])

    def note_complete(self, name: str) -> None:
        """Note that every row of the shards called `name` has a score here."""
        files = self._files()
        noted = {"files": len(files), "digest": _digest_of_paths(files)}
        self.storage.write_json(f"{self.folder}/{COMPLETE}/{name}.json", noted)

    def forget_complete(self, name: str) -> None:
        """Take back `note_complete(name)`: some of those rows turned out to lack a score."""
        self.storage.delete(f"{self.folder}/{COMPLETE}/{name}.json")

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
    ) -> Iterator[Found]:
        def read(path: str) -> Found:
            return self._read_file(path, index, names, keys_only)

        return concurrent_map(read, self.partition_files(partition), 16 if self.storage.is_s3 else 2)

    def _read_file(self, path: str, index: KeyIndex, names: tuple[str, ...], keys_only: bool) -> Found:
        """The rows that are looked for, with those of the statistics `names` that the file has."""
        parts: list[Found] = []
        try:
            with open_small(self.storage, path) as file:
                schema = file.schema_arrow
                whose = (schema.metadata or {}).get(POLICY_KEY, self.policy_id.encode()).decode()
                if whose != self.policy_id:
                    raise pa.ArrowInvalid(f"it holds scores of {whose}, not of {self.policy_id}")
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
        return Found.concatenate(parts, names)


@lru_cache(maxsize=8)
def _sorted(folders: frozenset[str]) -> list[str]:
    return sorted(folders)


def _digest_of_paths(paths: list[str]) -> str:
    return hashlib.sha256("\n".join(paths).encode()).hexdigest()
