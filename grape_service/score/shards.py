"""Shards of rows to score: files of about the same number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from grape_service.rows.ragged import list_offsets_and_values
from grape_service.storage.parquet import array_of, write_parquet
from grape_service.storage.storage import Storage


@dataclass(frozen=True)
class ShardFile:
    """A file of rows to score."""

    path: str
    partition: str
    rows: int
    tokens: int


class ShardWriter:
    """Collects rows and writes a shard whenever about `shard_tokens` tokens are there."""

    def __init__(self, storage: Storage, folder: str, partition: str, shard_tokens: int):
        self.storage, self.folder, self.partition, self.shard_tokens = storage, folder, partition, shard_tokens
        self.shards: list[ShardFile] = []
        self.waiting: list[pa.Table] = []
        self.tokens = 0

    def add(self, table: pa.Table) -> None:
        """Rows in order; cut between rows."""
        offsets, _ = list_offsets_and_values(array_of(table, "input_ids"))
        start = 0
        while start < table.num_rows:
            room = self.shard_tokens - self.tokens
            stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + room, side="right")) - 1)
            self.waiting.append(table.slice(start, stop - start))
            self.tokens += int(offsets[stop] - offsets[start])
            start = stop
            if self.tokens >= self.shard_tokens or start < table.num_rows:
                self._write()

    def _write(self) -> None:
        table = pa.concat_tables(self.waiting).combine_chunks()
        path = f"{self.folder}/shard-{len(self.shards):05d}.parquet"
        write_parquet(self.storage, path, table.schema, [table])
        self.shards.append(ShardFile(path, self.partition, table.num_rows, self.tokens))
        self.waiting, self.tokens = [], 0

    def close(self) -> list[ShardFile]:
        """Write the rest; every shard that there is."""
        if self.waiting:
            self._write()
        return self.shards
