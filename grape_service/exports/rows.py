"""Rows of a release in batches, with what exports ask of their weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.release.load import Release
from grape_service.rows.columns import release_schema
from grape_service.rows.ragged import list_offsets_and_values, segment_sums
from grape_service.storage import parquet as storage_parquet
from grape_service.storage.storage import Storage

BATCH_ROWS = 512
TOKEN_COLUMNS = ("input_ids", "loss_mask", "labels", "target_logprobs", "behavior_logprobs", "loss_weights")


def batches(release: Release, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The release's rows with those columns, a few hundred at a time, in order."""
    for file in release.manifest.files:
        with release.open_checked(file) as parquet:
            yield from parquet.iter_batches(BATCH_ROWS, columns=list(columns))


def other_columns(release: Release) -> list[str]:
    """The columns that a pool brought along."""
    ours = set(release_schema([], []).names)
    return [name for name in release.schema.names if name not in ours]


def row_weights(batch: pa.RecordBatch) -> npt.NDArray[np.float64]:
    """Mean weight of each row [N] over its tokens with loss."""
    mask_offsets, mask = list_offsets_and_values(batch.column("loss_mask"))
    _, weights = list_offsets_and_values(batch.column("loss_weights"))
    mask = mask.astype(bool)
    return segment_sums(np.where(mask, weights, 0.0), mask_offsets) / np.maximum(segment_sums(mask, mask_offsets), 1)


def has_weights(batch: pa.RecordBatch) -> bool:
    """Whether a token with loss has another weight than 1."""
    _, mask = list_offsets_and_values(batch.column("loss_mask"))
    _, weights = list_offsets_and_values(batch.column("loss_weights"))
    return bool((weights[mask.astype(bool)] != 1.0).any())


def chat_messages(row: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row's messages as trainers know them: without empty fields, tool calls as objects."""
    messages = []
    for message in row:
        kept = {key: value for key, value in message.items() if value is not None}
        if "tool_calls" in kept:
            kept["tool_calls"] = json.loads(kept["tool_calls"])
        messages.append(kept)
    return messages


def write_parquet(release: Release, storage: Storage, columns: Sequence[str]) -> tuple[int, bool, list[str]]:
    """Write those columns as data/part-00000.parquet and so on, one for each of the release's files.

    Returns the number of rows, whether a token with loss has another weight than 1, and the file names.
    """
    rows, weighted, names = 0, False, []
    read = [*columns, *(name for name in ("loss_mask", "loss_weights") if name not in columns)]
    schema = pa.schema([release.schema.field(name) for name in columns])

    def kept_columns(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        nonlocal weighted
        for batch in batches:
            weighted = weighted or has_weights(batch)
            yield batch.select(list(columns))

    for number, file in enumerate(release.manifest.files):
        name = f"data/part-{number:05d}.parquet"
        with release.open_checked(file) as parquet:
            batches = kept_columns(parquet.iter_batches(BATCH_ROWS, columns=read))
            rows += storage_parquet.write_parquet(storage, name, schema, batches).num_rows
        names.append(name)
    return rows, weighted, names
