"""How this service writes and reads Parquet: one place, so that the same rows give the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grape_service.errors import StageError, UserError
from grape_service.storage.concurrent_map import concurrent_map
from grape_service.storage.storage import Storage

ROW_GROUP_BYTES = 32 * 2**20
"""Bytes in memory of a row group, about; a single larger row makes a larger one."""
READ_BYTES = 32 * 2**20
"""Bytes in memory that a stage works on at a time, about."""


def write_parquet(
    storage: Storage,
    path: str,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch | pa.Table],
    row_group_bytes: int = ROW_GROUP_BYTES,
) -> int:
    """Write batches as one file, whole or not at all; the number of rows.

    Row groups are cut by bytes; nothing depends on the clock.
    """
    num_rows = 0
    with storage.open_write(path) as file, open_writer(file, schema) as writer:
        for group in row_groups(batches, schema, row_group_bytes):
            writer.write_table(group, row_group_size=max(1, group.num_rows))
            num_rows += group.num_rows
    return num_rows


def open_writer(file: object, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer with the settings of every file of this service."""
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    return pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        compression_level=3,
        use_dictionary=texts,
        write_statistics=True,
        store_schema=True,
        data_page_version="1.0",
        version="2.6",
        write_page_checksum=True,
    )


def row_groups(
    batches: Iterable[pa.RecordBatch | pa.Table], schema: pa.Schema, target_bytes: int = ROW_GROUP_BYTES
) -> Iterator[pa.Table]:
    """Rows as tables of about `target_bytes`: each ends with the row that reaches it, however the batches were cut."""
    waiting: list[pa.Table] = []
    filled = 0
    for batch in batches:
        table = (batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])).select(schema.names)
        table = table.cast(schema) if table.schema != schema else table
        if table.num_rows == 0:
            continue
        ends = np.cumsum(row_bytes(table)) + filled
        start = 0
        while start < table.num_rows and ends[-1] >= target_bytes:
            stop = int(np.searchsorted(ends, target_bytes)) + 1
            yield pa.concat_tables([*waiting, table.slice(start, stop - start)]).combine_chunks()
            waiting = []
            ends -= ends[stop - 1]
            start = stop
        if start < table.num_rows:
            waiting.append(table.slice(start))
            filled = int(ends[-1])
        else:
            filled = 0
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def row_bytes(table: pa.Table) -> np.ndarray:
    """Bytes [rows] int64 that each row takes in memory, offsets and null bits left out; at least 1."""
    sizes = np.ones(table.num_rows, np.int64)
    for column in table.columns:
        sizes += np.concatenate([_value_bytes(chunk) for chunk in column.chunks] or [np.zeros(0, np.int64)])
    return sizes


def _value_bytes(array: pa.Array) -> np.ndarray:
    kind = array.type
    if pa.types.is_struct(kind):
        return sum((_value_bytes(child) for child in array.flatten()), np.zeros(len(array), np.int64))
    if _is_list(kind):
        lengths = _lengths(array)
        child_type = kind.value_type
        if not (_is_list(child_type) or pa.types.is_struct(child_type) or _is_text(child_type)):
            return lengths * max(1, child_type.bit_width // 8)
        ends = np.cumsum(lengths)
        totals = np.concatenate([[0], np.cumsum(_value_bytes(array.flatten()))])
        return totals[ends] - totals[ends - lengths]
    if _is_text(kind):
        return np.asarray(pc.fill_null(pc.binary_length(array), 0), np.int64)
    width = kind.bit_width // 8 if pa.types.is_primitive(kind) else 8
    return np.full(len(array), max(1, width), np.int64)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _lengths(array: pa.Array) -> np.ndarray:
    return np.asarray(pc.fill_null(pc.list_value_length(array), 0), np.int64)


def open_parquet(storage: Storage, path: str) -> pq.ParquetFile:
    """A Parquet file for reading; on S3 what is asked of a row group comes in one request, not one for each column.

    Raises FileNotFoundError, pa.ArrowInvalid for a file that is not Parquet."""
    return pq.ParquetFile(
        storage.full(path), filesystem=storage.arrow, page_checksum_verification=True, pre_buffer=storage.is_s3
    )


def open_small(storage: Storage, path: str) -> pq.ParquetFile:
    """A shard or score file, of which most is wanted: on S3 all of it in one request, held while the file is open.

    Raises as open_parquet."""
    if not storage.is_s3:
        return open_parquet(storage, path)
    return pq.ParquetFile(pa.BufferReader(storage.read(path)), page_checksum_verification=True)


def open_checked(storage: Storage, path: str, sha256: str) -> pq.ParquetFile:
    """A Parquet file whose bytes have that digest: read once, whole, and held while the file is open.

    Raises UserError naming a file that is missing, has other contents or is not Parquet."""
    try:
        data = storage.read(path)
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise UserError(
                f"{storage.url(path)} is not the file that its manifest names (sha256 {found[:16]}…, "
                f"not {sha256[:16]}…): restore it, or make another version"
            )
        return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    except FileNotFoundError as error:
        raise UserError(f"{storage.url(path)} is missing: restore it, or make another version") from error
    except pa.ArrowException as error:
        raise UserError(f"{storage.url(path)} is not readable Parquet ({error}): make another version") from error


def read_tables(
    storage: Storage, paths: Sequence[str], columns: list[str] | None = None, target_bytes: int = READ_BYTES
) -> Iterator[pa.Table]:
    """Files one after the other in tables of at least `target_bytes`, the last one less; none without rows.

    A file is never split, so what was written as shards of whole prompts comes back as whole prompts. The
    next files are read ahead. Each is read by `open_small`.
    """
    waiting: list[pa.Table] = []
    waiting_bytes = 0
    for table in concurrent_map(partial(_read_file, storage, columns=columns), paths, 8 if storage.is_s3 else 2):
        if table.num_rows == 0:
            continue
        waiting.append(table)
        waiting_bytes += table.nbytes
        if waiting_bytes >= target_bytes:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting, waiting_bytes = [], 0
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def read_row_groups(storage: Storage, path: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A file's row groups one at a time, none without rows. Raises StageError naming a file that cannot be read."""
    try:
        with open_parquet(storage, path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns, use_threads=False)
                if table.num_rows:
                    yield table.combine_chunks()
    except (pa.ArrowInvalid, OSError) as error:
        raise StageError(f"{storage.url(path)} cannot be read: {error}") from error


def _read_file(storage: Storage, path: str, columns: list[str] | None) -> pa.Table:
    try:
        with open_small(storage, path) as file:
            return file.read(columns=columns, use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise StageError(f"{storage.url(path)} cannot be read: {error}") from error


def array_of(table: pa.Table, name: str) -> pa.Array:
    """A column of a table with one chunk or none as an array."""
    column = table[name]
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=column.type)
