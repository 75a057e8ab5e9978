"""Rows of one file dealt to a number of slices, each read by itself in one request.

A file is Arrow record batches one after the other, one for each slice that has rows; where each begins is not in the
file but with whoever wrote it: reading a slice takes no look at the file's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.storage.concurrent_map import concurrent_map
from grape_service.storage.storage import Storage

Int64s = npt.NDArray[np.int64]

READS_IN_FLIGHT = 16
"""Slices that are read at the same time on S3."""


@dataclass(frozen=True)
class SliceFiles:
    """Files whose rows are dealt to the same number of slices S."""

    paths: Sequence[str]  # [F]
    bounds: Int64s  # [F, S + 1] bytes at which each slice begins and ends; equal where it has no rows

    def of(self, start: int, end: int) -> SliceFiles:
        """Files [start, end) alone."""
        return SliceFiles(self.paths[start:end], self.bounds[start:end])


def write_slices(storage: Storage, path: str, table: pa.Table, slices: Int64s, num_slices: int) -> list[int]:
    """Write a table's rows by their slice [N], in their order within each; the bounds [num_slices + 1]."""
    table = table.combine_chunks()
    ends = np.array([0, len(slices)])
    if num_slices > 1:
        order = np.argsort(slices, kind="stable")
        ends = np.searchsorted(slices[order], np.arange(num_slices + 1))
        table = table.take(pa.array(order)).combine_chunks()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with storage.open_write(path) as file, pa.ipc.new_stream(file, table.schema, options=options) as writer:
        writer.write_batch(
            pa.RecordBatch.from_pylist([], schema=table.schema)
        )  # has the schema written, before the first slice
        bounds = [file.tell()]
        for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            if end > start:
                writer.write_batch(table.slice(start, end - start).to_batches()[0])
            bounds.append(file.tell())
    return bounds


def read_slice(storage: Storage, files: SliceFiles, number: int, schema: pa.Schema) -> pa.Table:
    """The rows of a slice in all of the files, in the files' order; nothing else is read."""
    starts, ends = files.bounds[:, number].tolist(), files.bounds[:, number + 1].tolist()
    wanted = [place for place in zip(files.paths, starts, ends, strict=True) if place[2] > place[1]]

    def read(place: tuple[str, int, int]) -> pa.RecordBatch:
        return pa.ipc.read_record_batch(pa.py_buffer(storage.read_range(*place)), schema)

    batches = (
        list(concurrent_map(read, wanted, READS_IN_FLIGHT)) if storage.is_s3 else [read(place) for place in wanted]
    )
    return pa.Table.from_batches(batches, schema)


def top_bits(numbers: npt.NDArray[np.uint64], skip: int, bits: int) -> Int64s:
    """`bits` leading bits of 64-bit numbers [N] after the first `skip`."""
    if bits == 0:
        return np.zeros(len(numbers), dtype=np.int64)
    return ((numbers << np.uint64(skip)) >> np.uint64(64 - bits)).astype(np.int64)
