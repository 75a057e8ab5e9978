"""Shards of rows to score: files of about the same number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from grape_service.prepare.reduce import ShardPaths, shard_path, shard_paths
from grape_service.prepare.result import Prepared
from grape_service.rows.ragged import list_offsets_and_values
from grape_service.storage.parquet import array_of, write_parquet
from grape_service.storage.storage import Storage


@dataclass(frozen=True)
class Shards:
    """A partition's files of rows to score, `<folder>/shard-00000.parquet` and on: no object for each."""

    folder: str
    partition: str
    number: int
    rows: int  # of all of them
    tokens: int

    @property
    def paths(self) -> ShardPaths:
        """Their paths, in order."""
        return ShardPaths(self.folder, self.number)

    def part(self, total: int, place: int) -> int:
        """What one of them has of `rows` or `tokens`, about: they are of one size. All parts add up."""
        return total * (place + 1) // self.number - total * place // self.number


def shards_of_pool(prepared: Prepared) -> list[Shards]:
    """The shards of each partition of a prepared pool that has any."""
    return [
        Shards(shard_paths(prepared, partition).folder, partition, totals.num_shards, totals.rows, totals.tokens)
        for partition, totals in prepared.partitions.items()
        if totals.num_shards
    ]


class ShardWriter:
    """Collects rows and writes a shard whenever about `shard_tokens` tokens are there."""

    def __init__(self, storage: Storage, folder: str, partition: str, shard_tokens: int):
        self.storage, self.folder, self.partition, self.shard_tokens = storage, folder, partition, shard_tokens
        self.number = self.rows = self.tokens_written = 0
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
        write_parquet(self.storage, shard_path(self.folder, self.number), table.schema, [table])
        self.number += 1
        self.rows += table.num_rows
        self.tokens_written += self.tokens
        self.waiting, self.tokens = [], 0

    def close(self) -> Shards:
        """Write the rest; every shard that there is."""
        if self.waiting:
            self._write()
        return Shards(self.folder, self.partition, self.number, self.rows, self.tokens_written)
