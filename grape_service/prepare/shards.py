"""For the stages after prepare: which shards there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from grape_service.prepare.reduce import has_shards, shard_folder, shard_path
from grape_service.prepare.result import Prepared
from grape_service.storage.concurrent_map import concurrent_map
from grape_service.storage.storage import Storage

LISTINGS_IN_FLIGHT = 16
"""Folders that are listed at the same time: all of a listing's time is waiting for the disk or S3."""


@dataclass(frozen=True)
class ShardPaths(Sequence[str]):
    """Paths of the shards in a folder, in order, made as they are asked for: a pool may have millions."""

    folder: str
    number: int

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        numbers = range(self.number)[place]
        if isinstance(numbers, range):
            return [shard_path(self.folder, number) for number in numbers]
        return shard_path(self.folder, numbers)


def shard_paths(prepared: Prepared, partition: str) -> ShardPaths:
    """Paths of a partition's shards; relative to the workspace."""
    return ShardPaths(shard_folder(prepared.folder, partition), prepared.partitions[partition].num_shards)


def are_all_there(prepared: Prepared, storage: Storage) -> bool:
    """Whether no shard of a prepared pool is gone: one listing for each partition."""

    def is_there(partition: str) -> bool:
        paths = shard_paths(prepared, partition)
        return has_shards(paths.folder, paths.number, storage)

    return all(concurrent_map(is_there, prepared.partitions, LISTINGS_IN_FLIGHT))
