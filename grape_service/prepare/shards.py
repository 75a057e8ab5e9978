"""For the stages after prepare: which shards there are."""

from __future__ import annotations

from grape_service.prepare.reduce import shard_path
from grape_service.prepare.result import Prepared


def shard_paths(prepared: Prepared, partition: str) -> list[str]:
    """Paths of a partition's shards, in order; relative to the workspace."""
    return [
        shard_path(prepared.folder, partition, number) for number in range(prepared.partitions[partition].num_shards)
    ]
