"""For the stages after prepare: which shards there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from grape_service.prepare.reduce import shard_folder, shard_path
from grape_service.prepare.result import Prepared


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
