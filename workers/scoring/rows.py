"""Rows of shards as engines take them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.rows.ragged import TokenBatch, list_offsets_and_values
from grape_service.storage.parquet import open_small
from grape_service.storage.storage import Storage
from workers.scoring.work import Unit

COLUMNS = ["row_key", "prompt_id", "candidate_id", "input_ids", "loss_mask", "prompt_len"]


def read_rows(storage: Storage, path: str, columns: list[str] = COLUMNS) -> pa.Table:
    """Columns of a shard; without more, those that scoring needs."""
    with open_small(storage, path) as file:
        return file.read(columns=columns)


def read_unit(storage: Storage, unit: Unit, columns: list[str] = COLUMNS) -> pa.Table:
    """Columns of a unit's rows: its file's, or some of them."""
    table = read_rows(storage, unit.path, columns)
    return table.slice(unit.first, None if unit.last is None else unit.last - unit.first)


def halves(storage: Storage, unit: Unit) -> tuple[Unit, ...]:
    """A unit in two, each with half of its rows; none where it has one row."""
    with open_small(storage, unit.path) as file:
        last = file.metadata.num_rows if unit.last is None else unit.last
    rows = last - unit.first
    if rows < 2:
        return ()
    middle = unit.first + (rows + 1) // 2
    parts = ((unit.first, middle), (middle, last))
    tokens = max(1, unit.tokens // 2)
    return tuple(replace(unit, first=a, last=b, rows=b - a, tokens=tokens, check=True) for a, b in parts)


def distinct_rows(table: pa.Table) -> pa.Table:
    """Without rows whose tokens stand there already: one score serves them all."""
    keys = table["row_key"].combine_chunks()
    first = np.unique(np.asarray(pc.index_in(keys, keys.unique())), return_index=True)[1]
    return table if len(first) == table.num_rows else table.take(np.sort(first))


def token_batch(table: pa.Table) -> TokenBatch:
    """A shard's rows as an engine takes them."""
    table = table.combine_chunks()
    offsets, ids = list_offsets_and_values(table["input_ids"].combine_chunks())
    _, mask = list_offsets_and_values(table["loss_mask"].combine_chunks())
    prompt_lens = table["prompt_len"].combine_chunks().to_numpy()
    return TokenBatch(ids.astype(np.int32, copy=False), mask > 0, offsets, prompt_lens.astype(np.int32, copy=False))


def prompt_slices(batch: TokenBatch, slice_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `slice_tokens` tokens that do not cut between rows with the same prompt."""
    start, tokens = 0, 0
    lengths = batch.lengths
    for row in range(len(batch)):
        if row > start and tokens >= slice_tokens and not _same_prompt(batch, row - 1, row):
            yield start, row
            start, tokens = row, 0
        tokens += int(lengths[row])
    if start < len(batch):
        yield start, len(batch)


def _same_prompt(batch: TokenBatch, left: int, right: int) -> bool:
    length = int(min(batch.prompt_lens[left], batch.prompt_lens[right]))
    first, second = int(batch.offsets[left]), int(batch.offsets[right])
    return bool((batch.input_ids[first : first + length] == batch.input_ids[second : second + length]).all())
