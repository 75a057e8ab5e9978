"""For the stages after prepare: which shards there are, and their rows."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from grape_service.prepare.counts import PartitionCounts, ShardCounts
from grape_service.prepare.reduce import shard_path
from grape_service.prepare.result import Prepared
from grape_service.storage.storage import Storage


def shard_paths(prepared: Prepared, partition: str) -> list[str]:
    """Paths of a partition's shards, in order; relative to the workspace."""
    return [
        shard_path(prepared.folder, partition, number) for number in range(prepared.partitions[partition].num_shards)
    ]


def partition_counts(storage: Storage, prepared: Prepared, partition: str) -> PartitionCounts:
    """What reduce counted in a partition, each shard's rows and tokens included."""
    return PartitionCounts.from_json(storage.read_json(f"{prepared.folder}/partitions/{partition}.json"))


def partition_shards(storage: Storage, prepared: Prepared, partition: str) -> list[tuple[str, ShardCounts]]:
    """(path, counts) of each shard of a partition, in order."""
    counts = partition_counts(storage, prepared, partition)
    return list(zip(shard_paths(prepared, partition), counts.shards, strict=True))


def read_shard(storage: Storage, path: str, columns: list[str] | None = None) -> pa.Table:
    """A shard's rows: whole prompts, one after the other; some columns only, if named."""
    with storage.open(path) as file:
        return pq.read_table(file, columns=columns, use_threads=False)


def read_partition(
    storage: Storage, prepared: Prepared, partition: str, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """The shards of a partition, one after the other."""
    for path in shard_paths(prepared, partition):
        yield read_shard(storage, path, columns)
