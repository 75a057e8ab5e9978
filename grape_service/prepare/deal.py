"""Between map and reduce: rows are dealt to buckets in levels, so that no task opens every file of every other.

Rows go by the leading bits of their prompt's order. Map deals each piece to at most FAN_OUT buckets; with more
buckets than that the files of each, FAN_OUT at a time, are dealt again by the bits that follow, until there are
plan.num_buckets. Each task of a level reads about as many bytes as a piece has, in at most FAN_OUT requests: with
FAN_OUT = 64 a bucket costs at most 64 of them a level, one level up to 64 buckets and three at 65,536.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from grape_service.prepare.plan import FOLDER_OF_MAP, PREPARED, PreparePlan
from grape_service.rows.ragged import Int64s
from grape_service.storage.once import once
from grape_service.storage.slices import SliceFiles, read_slice, top_bits, write_slices
from grape_service.storage.storage import Storage


@dataclass(frozen=True)
class Dealt:
    """All rows between map and reduce: the files of 2**skip buckets, as many for each, bucket after bucket.

    A bucket is the rows whose order begins with `skip` bits; in its files they are dealt by the next `bits`.
    """

    files: SliceFiles
    skip: int
    bits: int

    @property
    def files_each(self) -> int:
        """Files of a bucket."""
        return len(self.files.paths) >> self.skip

    def find(self, bucket: int) -> tuple[SliceFiles, int]:
        """The files of one of the 2**(skip + bits) next buckets, and its slice in each."""
        parent, number = bucket >> self.bits, bucket & ((1 << self.bits) - 1)
        return self.files.of(parent * self.files_each, (parent + 1) * self.files_each), number

    def groups(self, fan_out: int) -> Iterator[tuple[int, int]]:
        """(bucket, first file) of each task of the next level."""
        for bucket in range(1 << (self.skip + self.bits)):
            for first in range(0, max(1, self.files_each), fan_out):
                yield bucket, first


def deal_group(
    plan: PreparePlan, dealt: Dealt, bits: int, bucket: int, first: int, schema: pa.Schema, storage: Storage
) -> list[int]:
    """Deal a bucket's rows in plan.fan_out of its files, from `first` on, by `bits` more; bounds of the new slices.

    Returns at once what a finished task told.
    """
    path = dealt_path(plan, dealt.skip + dealt.bits, bucket, first)

    def work() -> list[int]:
        files, number = dealt.find(bucket)
        rows = read_slice(storage, files.of(first, first + plan.fan_out), number, schema)
        orders = rows["prompt_order"].to_numpy()
        return write_slices(storage, path, rows, top_bits(orders, dealt.skip + dealt.bits, bits), 1 << bits)

    try:
        bounds: list[int] = once(storage, f"{path}.json", work, lambda _: storage.exists(path))
        return bounds
    except FileNotFoundError:
        # Another run of the same plan was faster, and deleted what map wrote: no partition is read from here.
        if not storage.exists(f"{plan.folder}/{PREPARED}"):
            raise
        return [0] * ((1 << bits) + 1)


def next_level(plan: PreparePlan, dealt: Dealt, bits: int, bounds: Iterable[Sequence[int] | Int64s]) -> Dealt:
    """What the tasks of `dealt.groups` wrote, from their bounds in the same order."""
    skip = dealt.skip + dealt.bits
    paths = [dealt_path(plan, skip, *group) for group in dealt.groups(plan.fan_out)]
    return Dealt(SliceFiles(paths, bounds_array(bounds, len(paths), bits)), skip, bits)


def bounds_array(bounds: Iterable[Sequence[int] | Int64s], num_files: int, bits: int) -> Int64s:
    """Bounds of each file's slices, as they come, in one array [num_files, 2**bits + 1]."""
    array = np.zeros((num_files, (1 << bits) + 1), dtype=np.int64)
    for place, of_file in enumerate(bounds):
        array[place] = of_file
    return array


def dealt_path(plan: PreparePlan, skip: int, bucket: int, first: int) -> str:
    """The file of a task of a level after the first."""
    return f"{plan.folder}/{FOLDER_OF_MAP}/level-{skip:02d}-bucket-{bucket:05d}-from-{first:06d}.arrow"
