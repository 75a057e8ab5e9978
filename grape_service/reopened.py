"""A release's rows as kept rows again, to be weighed anew at the same or another target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from grape_service import schemas
from grape_service.digests import row_keys
from grape_service.parquet import array_of, open_parquet, write_parquet
from grape_service.ragged import Int64s, list_array, list_offsets_and_values, offsets_from_lengths, segment_sums
from grape_service.select import KEPT_COLUMNS
from grape_service.storage import Storage

BATCH_ROWS = 4096


def write_kept_rows(
    output: Storage,
    part_path: str,
    workspace: Storage,
    kept_path: str,
    other_fields: list[pa.Field],
    turn_end_id: int | None,
    keep_scores: bool,
) -> tuple[int, npt.NDArray[np.int64]]:
    """Write a data file of a release as a kept file; the number of rows, and the ids of their tokens with loss.

    `turn_end_id` is the target's: a token with loss that has this id and ends a span is a turn end. The target's
    log-probabilities are taken over when `keep_scores`, or null, to be scored anew.
    """
    schema = pa.schema([*schemas.SHARD, *other_fields, *KEPT_COLUMNS])
    rows = 0
    used = np.zeros(0, dtype=np.int64)

    def tables() -> Iterator[pa.Table]:
        nonlocal rows, used
        with open_parquet(output, part_path) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                table = pa.Table.from_batches([batch])
                rows += table.num_rows
                kept = kept_rows(table, schema, turn_end_id, keep_scores)
                used = np.union1d(used, tokens_with_loss(kept))
                yield kept

    write_parquet(workspace, kept_path, schema, tables())
    return rows, used


def kept_rows(table: pa.Table, schema: pa.Schema, turn_end_id: int | None, keep_scores: bool) -> pa.Table:
    """Release rows [N] in the columns of a kept file."""
    table = table.combine_chunks()
    offsets, ids = list_offsets_and_values(array_of(table, "input_ids"))
    _, has_loss = list_offsets_and_values(array_of(table, "loss_mask"))
    mask = mask_with_turn_ends(ids, has_loss.astype(bool), offsets, turn_end_id)
    spans = segment_sums(_span_starts(mask > 0, offsets), offsets)
    messages = [[_message(m) for m in row] for row in table["messages"].to_pylist()]
    made: dict[str, Any] = {
        "row_key": row_keys(ids, mask, offsets),
        "loss_mask": list_array(offsets, mask, pa.uint8()),
        "prompt_len": pa.array(_prompt_lens(mask, offsets), pa.int32()),
        "messages": pa.array([orjson.dumps(row).decode() for row in messages]),
        "num_prompt_messages": pa.array(
            [num_prompt_messages(row, int(n)) for row, n in zip(messages, spans, strict=True)], pa.int32()
        ),
        "recorded_logprobs": narrow(array_of(table, "behavior_logprobs"), offsets, mask, unknown_turn_ends=True),
        "target_logprobs": narrow(array_of(table, "target_logprobs"), offsets, mask) if keep_scores else None,
    }
    columns = []
    for field in schema:
        values = made.get(field.name)
        if values is None and field.name in table.column_names and field.name not in made:
            values = array_of(table, field.name)
        columns.append(pa.nulls(table.num_rows, field.type) if values is None else values.cast(field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def mask_with_turn_ends(
    ids: npt.NDArray[np.int32], has_loss: npt.NDArray[np.bool_], offsets: Int64s, turn_end_id: int | None
) -> npt.NDArray[np.uint8]:
    """Booleans [T] -> LOSS_* [T]: the last token of a span is a turn end when it has that id."""
    mask = has_loss.astype(np.uint8) * schemas.LOSS_TOKEN
    if turn_end_id is not None:
        followed = np.zeros(len(mask), dtype=bool)
        followed[:-1] = has_loss[1:]
        followed[offsets[1:] - 1] = False
        mask[has_loss & ~followed & (ids == turn_end_id)] = schemas.LOSS_TURN_END
    return mask


def num_prompt_messages(messages: list[dict[str, Any]], num_spans: int) -> int:
    """Messages before the response: it begins with the assistant message of its first span."""
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return places[-num_spans] if len(places) >= num_spans else max(len(messages) - 1, 0)


def narrow(
    column: pa.ListArray, offsets: Int64s, mask: npt.NDArray[np.uint8], unknown_turn_ends: bool = False
) -> pa.ListArray:
    """One value a token -> one a token with loss, null where the column is null.

    A release has 0.0 where a turn end was not recorded: with `unknown_turn_ends` it becomes NaN again.
    """
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = np.diff(offsets)
    _, values = list_offsets_and_values(column.drop_null()) if valid.any() else (None, np.zeros(0, np.float32))
    mask_of_valid = mask[np.repeat(valid, lengths)]
    flat = values[mask_of_valid > 0].astype(np.float32)
    if unknown_turn_ends:
        turn_ends = mask_of_valid[mask_of_valid > 0] == schemas.LOSS_TURN_END
        flat[turn_ends & (flat == 0)] = np.nan
    counts = np.where(valid, segment_sums(mask > 0, offsets), 0)
    return pa.ListArray.from_arrays(
        pa.array(offsets_from_lengths(counts).astype(np.int32)), pa.array(flat, pa.float32()), mask=pa.array(~valid)
    )


def _span_starts(has_loss: npt.NDArray[np.bool_], offsets: Int64s) -> npt.NDArray[np.bool_]:
    before = np.zeros(len(has_loss), dtype=bool)
    before[1:] = has_loss[:-1]
    before[offsets[:-1]] = False
    return has_loss & ~before


def _prompt_lens(mask: npt.NDArray[np.uint8], offsets: Int64s) -> Int64s:
    first = np.flatnonzero(mask > 0)
    places = np.searchsorted(first, offsets[:-1])
    return first[places] - offsets[:-1]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Without absent fields; tool calls as they were before they became text."""
    kept = {name: value for name, value in message.items() if value is not None or name in ("role", "content")}
    if isinstance(kept.get("tool_calls"), str):
        kept["tool_calls"] = orjson.loads(kept["tool_calls"])
    return kept


def tokens_with_loss(kept: pa.Table) -> npt.NDArray[np.int64]:
    """Ids of the tokens with loss of kept rows, ascending, each once."""
    _, ids = list_offsets_and_values(array_of(kept, "input_ids"))
    _, mask = list_offsets_and_values(array_of(kept, "loss_mask"))
    return np.unique(ids[mask > 0]).astype(np.int64)


def other_fields_of(schema: pa.Schema) -> list[pa.Field]:
    """The pool's own columns in a release's schema."""
    ours = set(schemas.release_schema([], []).names)
    return [field for field in schema if field.name not in ours and field.name not in schemas.SHARD.names]
