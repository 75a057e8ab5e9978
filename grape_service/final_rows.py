"""From kept or weighed rows to rows of a release: every array as long as input_ids and aligned with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.parquet import array_of, read_row_groups
from grape_service.ragged import Int64s, gather_rows, list_array, list_offsets_and_values, offsets_from_lengths
from grape_service.schemas import message_type, release_schema
from grape_service.storage import Storage
from grape_service.weigh import PEAR, UNIFORM

IGNORED_LABEL = -100
"""What labels hold off the mask."""

BATCH_BYTES = 16 * 2**20
"""Bytes in memory of the rows that are widened at a time; they grow about four times."""


def final_batches(
    storage: Storage,
    path: str,
    message_fields: list[str],
    other_columns: list[pa.Field],
    weight_factor: float = 1.0,
) -> Iterator[pa.RecordBatch]:
    """Rows of a kept or weighed file in `schemas.release_schema`, in the file's order.

    `other_columns` are the pool's own; one that the file lacks is null. PEAR weights are multiplied by
    `weight_factor` (see weigh.dataset_factor); rows without weights get 1.0.
    """
    schema = release_schema(message_fields, other_columns)
    for table in read_row_groups(storage, path):
        rows = max(1, table.num_rows * BATCH_BYTES // max(1, table.nbytes))
        for start in range(0, table.num_rows, rows):
            yield _final_batch(table.slice(start, rows), schema, message_fields, weight_factor)


def _final_batch(table: pa.Table, schema: pa.Schema, message_fields: list[str], weight_factor: float) -> pa.RecordBatch:
    offsets, ids = list_offsets_and_values(array_of(table, "input_ids"))
    mask_offsets, mask_values = list_offsets_and_values(array_of(table, "loss_mask"))
    assert np.array_equal(offsets, mask_offsets), "a mask is as long as its tokens"
    mask = mask_values > 0
    made: dict[str, pa.Array] = {
        "messages": messages_array(array_of(table, "messages"), message_type(message_fields)),
        "loss_mask": list_array(offsets, mask, pa.bool_()),
        "labels": list_array(offsets, np.where(mask, ids, IGNORED_LABEL).astype(np.int32), pa.int32()),
    }
    for name in ("target_logprobs", "behavior_logprobs"):
        if name in table.column_names:
            made[name] = spread(array_of(table, name), offsets, mask)
    if "behavior_logprobs" not in made and "recorded_logprobs" in table.column_names:
        # Kept for `grape weigh`. A turn end that was not recorded is 0.0: NaN has no place in a release.
        recorded = spread(array_of(table, "recorded_logprobs"), offsets, mask)
        flat = np.nan_to_num(np.asarray(recorded.values), nan=0.0)
        made["behavior_logprobs"] = pa.ListArray.from_arrays(recorded.offsets, pa.array(flat), mask=recorded.is_null())
    if "weights" in table.column_names:
        made["weight_source"] = array_of(table, "weight_source")
        weights = scale_weights(array_of(table, "weights"), made["weight_source"], weight_factor)
        made["loss_weights"] = spread(weights, offsets, mask)
    else:
        made["weight_source"] = pa.array([UNIFORM]).take(pa.array(np.zeros(table.num_rows, dtype=np.int64)))
        made["loss_weights"] = list_array(offsets, mask.astype(np.float32), pa.float32())
    columns = []
    for item in schema:
        if item.name in made:
            columns.append(made[item.name].cast(item.type))
        elif item.name in table.column_names:
            columns.append(array_of(table, item.name).cast(item.type))
        else:
            columns.append(pa.nulls(table.num_rows, item.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def spread(column: pa.ListArray, offsets: Int64s, mask: npt.NDArray[np.bool_]) -> pa.ListArray:
    """One value a token with loss -> one a token: 0.0 off the mask [T], null where `column` [N] is null."""
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    value_offsets, values = list_offsets_and_values(column)
    lengths = np.where(valid, np.diff(offsets), 0)
    values = values[gather_rows(value_offsets[:-1], np.where(valid, np.diff(value_offsets), 0))]
    wide = np.zeros(int(lengths.sum()), dtype=np.float32)
    wide[mask[gather_rows(offsets[:-1], lengths)]] = values
    wide_offsets = pa.array(offsets_from_lengths(lengths).astype(np.int32))
    return pa.ListArray.from_arrays(wide_offsets, pa.array(wide), mask=pa.array(~valid))


def scale_weights(weights: pa.ListArray, weight_source: pa.Array, factor: float) -> pa.ListArray:
    """Weights of PEAR rows times `factor`."""
    if factor == 1.0:
        return weights
    offsets, values = list_offsets_and_values(weights)
    is_pear = np.repeat(pc.equal(weight_source, PEAR).to_numpy(zero_copy_only=False), np.diff(offsets))
    return list_array(offsets, np.where(is_pear, values * factor, values).astype(np.float32), pa.float32())


def messages_array(texts: pa.Array, kind: pa.DataType) -> pa.Array:
    """JSON lists of chat messages -> list<struct>; a field that is not text becomes JSON text."""
    names = [item.name for item in kind.value_type]
    columns: list[list[str | None]] = [[] for _ in names]
    lengths = []
    for text in texts.to_pylist():
        messages = orjson.loads(text)
        lengths.append(len(messages))
        for name, column in zip(names, columns, strict=True):
            column.extend([_text(message.get(name)) for message in messages])
    structs = pa.StructArray.from_arrays([pa.array(column, type=pa.string()) for column in columns], names=names)
    return pa.ListArray.from_arrays(pa.array(offsets_from_lengths(lengths).astype(np.int32)), structs)


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else orjson.dumps(value).decode()
