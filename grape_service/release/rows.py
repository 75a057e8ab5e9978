"""From kept or weighed rows to rows of a release: every array as long as input_ids and aligned with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.errors import UserError
from grape_service.prepare.counts import pack_ids, union_of_ids
from grape_service.release.token_ids import refuse_unknown_ids
from grape_service.rows.columns import (
    BEHAVIOR_KNOWN,
    LOSS_TOKEN,
    LOSS_TURN_END,
    PLACES,
    PREFILL,
    SHARD,
    TARGET_FIELDS,
    TURN_ENDS,
    computed_fields,
    kept_columns,
    message_type,
    release_schema,
)
from grape_service.rows.keys import row_keys
from grape_service.rows.messages import stored_message, whole_message
from grape_service.rows.prefill import one_turn, two_turns
from grape_service.rows.ragged import (
    Int64s,
    gather_rows,
    list_array,
    list_offsets_and_values,
    offsets_from_lengths,
    segment_sums,
)
from grape_service.rows.spans import mask_with_turn_ends, num_prompt_messages, num_spans
from grape_service.rows.statistics import STATISTICS
from grape_service.storage.parquet import array_of, open_checked, read_row_groups, write_parquet
from grape_service.storage.storage import Storage
from grape_service.weigh.batch import UNIFORM

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
    computed: Sequence[pa.Field] = (),
    look: Callable[[pa.Table, pa.RecordBatch], None] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Rows of a kept or weighed file in `release_schema`, in the file's order.

    `other_columns` are the pool's own, `computed` those of `columns.computed_fields`; one that the file lacks is null.
    Weights are multiplied by `weight_factor` (see weigh.dataset_factor); rows without weights get 1.0. `look` sees rows
    as they are in the file and as they are released.
    """
    schema = release_schema(message_fields, other_columns, computed)
    for table in read_row_groups(storage, path):
        rows = max(1, table.num_rows * BATCH_BYTES // max(1, table.nbytes))
        for start in range(0, table.num_rows, rows):
            part = table.slice(start, rows)
            batch = _final_batch(part, schema, message_fields, weight_factor)
            if look is not None:
                look(part, batch)
            yield batch


def _final_batch(table: pa.Table, schema: pa.Schema, message_fields: list[str], weight_factor: float) -> pa.RecordBatch:
    offsets, ids = list_offsets_and_values(array_of(table, "input_ids"))
    mask_offsets, mask_values = list_offsets_and_values(array_of(table, "loss_mask"))
    assert np.array_equal(offsets, mask_offsets), "a mask is as long as its tokens"
    mask = mask_values > 0
    texts = array_of(table, "messages")
    in_release: dict[str, pa.Array] = {}
    if PREFILL.name in schema.names:
        texts, in_release = _one_turn_each(texts, array_of(table, "num_prompt_messages"))
    arrays: dict[str, pa.Array] = {
        **in_release,
        "messages": messages_array(texts, message_type(message_fields)),
        "loss_mask": list_array(offsets, mask, pa.bool_()),
        "labels": list_array(offsets, np.where(mask, ids, IGNORED_LABEL).astype(np.int32), pa.int32()),
    }
    for name in ("target_logprobs", "behavior_logprobs", *(item.name for item in TARGET_FIELDS.values())):
        if name in table.column_names:
            arrays[name] = spread(array_of(table, name), offsets, mask)
    if "behavior_logprobs" not in arrays and "recorded_logprobs" in table.column_names:
        # Kept for `grape weigh`. A turn end that was not recorded is 0.0: NaN has no place in a release.
        recorded = spread(array_of(table, "recorded_logprobs"), offsets, mask)
        flat = np.nan_to_num(np.asarray(recorded.values), nan=0.0)
        arrays["behavior_logprobs"] = pa.ListArray.from_arrays(
            recorded.offsets, pa.array(flat), mask=recorded.is_null()
        )
    if BEHAVIOR_KNOWN.name in schema.names and "behavior_logprobs" in arrays:
        arrays[BEHAVIOR_KNOWN.name] = _known(table, arrays["behavior_logprobs"], offsets, mask)
    if TURN_ENDS.name in schema.names:
        arrays[TURN_ENDS.name] = list_array(offsets, mask_values == LOSS_TURN_END, pa.bool_())
    if "weights" in table.column_names:
        arrays["weight_source"] = array_of(table, "weight_source")
        weights = scale_weights(array_of(table, "weights"), arrays["weight_source"], weight_factor)
        arrays["loss_weights"] = spread(weights, offsets, mask)
    else:
        arrays["weight_source"] = pa.array([UNIFORM]).take(pa.array(np.zeros(table.num_rows, dtype=np.int64)))
        arrays["loss_weights"] = list_array(offsets, mask.astype(np.float32), pa.float32())
    columns = []
    for item in schema:
        if item.name in arrays:
            columns.append(arrays[item.name].cast(item.type))
        elif item.name in table.column_names:
            columns.append(array_of(table, item.name).cast(item.type))
        else:
            columns.append(pa.nulls(table.num_rows, item.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _one_turn_each(texts: pa.Array, num_prompt: pa.Array) -> tuple[pa.Array, dict[str, pa.Array]]:
    """Messages of a shard's rows [N] as a release has them, and the columns that say where responses begin."""
    rows = [one_turn(orjson.loads(text), n) for text, n in zip(texts.to_pylist(), num_prompt.to_pylist(), strict=True)]
    numbers = pa.array([number for _, number, _ in rows], pa.int32())
    prefills = pa.array([prefill for _, _, prefill in rows], PREFILL.type)
    told = pa.array([orjson.dumps(messages).decode() for messages, _, _ in rows], pa.string())
    return told, {PLACES[0].name: numbers, PREFILL.name: prefills}


def _known(table: pa.Table, behavior: pa.ListArray, offsets: Int64s, mask: npt.NDArray[np.bool_]) -> pa.ListArray:
    """Which of the behavior's log-probabilities are known [T]: false off the mask, null where `behavior` is null."""
    if BEHAVIOR_KNOWN.name in table.column_names:
        wide = spread(array_of(table, BEHAVIOR_KNOWN.name), offsets, mask)
        values = np.asarray(wide.values) > 0
    else:
        valid = behavior.is_valid().to_numpy(zero_copy_only=False)
        values = mask[np.repeat(valid, np.diff(offsets))]
        if "behavior_logprobs" not in table.column_names:
            recorded = spread(array_of(table, "recorded_logprobs"), offsets, mask)
            values = values & ~np.isnan(np.asarray(recorded.values))
    return pa.ListArray.from_arrays(behavior.offsets, pa.array(values), mask=behavior.is_null())


def spread(column: pa.ListArray, offsets: Int64s, mask: npt.NDArray[np.bool_]) -> pa.ListArray:
    """One value per token with loss -> one per token: 0.0 off the mask [T], null where `column` [N] is null."""
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    value_offsets, values = list_offsets_and_values(column)
    lengths = np.where(valid, np.diff(offsets), 0)
    values = values[gather_rows(value_offsets[:-1], np.where(valid, np.diff(value_offsets), 0))]
    wide = np.zeros(int(lengths.sum()), dtype=np.float32)
    wide[mask[gather_rows(offsets[:-1], lengths)]] = values
    wide_offsets = pa.array(offsets_from_lengths(lengths).astype(np.int32))
    return pa.ListArray.from_arrays(wide_offsets, pa.array(wide), mask=pa.array(~valid))


def scale_weights(weights: pa.ListArray, weight_source: pa.Array, factor: float) -> pa.ListArray:
    """Weights of rows that have weights of their own times `factor`."""
    if factor == 1.0:
        return weights
    offsets, values = list_offsets_and_values(weights)
    is_weighed = np.repeat(pc.not_equal(weight_source, UNIFORM).to_numpy(zero_copy_only=False), np.diff(offsets))
    with np.errstate(over="ignore"):
        scaled = np.where(is_weighed, values * np.float64(factor), values).astype(np.float32)
    if not np.isfinite(scaled).all():
        raise UserError("a weight divided by the dataset's mean is larger than a float32: narrow weights.weight_clip")
    return list_array(offsets, scaled, pa.float32())


def messages_array(texts: pa.Array, kind: pa.DataType) -> pa.Array:
    """JSON lists of chat messages -> list<struct>."""
    names = [item.name for item in kind.value_type]
    columns: list[list[str | None]] = [[] for _ in names]
    lengths = []
    for text in texts.to_pylist():
        messages = [stored_message(message) for message in orjson.loads(text)]
        lengths.append(len(messages))
        for name, column in zip(names, columns, strict=True):
            column.extend([message.get(name) for message in messages])
    structs = pa.StructArray.from_arrays([pa.array(column, type=pa.string()) for column in columns], names=names)
    return pa.ListArray.from_arrays(pa.array(offsets_from_lengths(lengths).astype(np.int32)), structs)


BATCH_ROWS = 4096


def write_kept_rows(
    output: Storage,
    part_path: str,
    sha256: str,
    workspace: Storage,
    kept_path: str,
    other_fields: list[pa.Field],
    stop_ids: Collection[int],
    keep_scores: bool,
    computed: Sequence[pa.Field] = (),
    known_ids: tuple[int, str] | None = None,
) -> tuple[int, str, int]:
    """Write a data file of a release, which has to have the digest `sha256`, as a kept file; the number of rows, the
    ids of their tokens with loss (see `pack_ids`), and how many rows lack a statistic of the target.

    `stop_ids` are the target's: a token with loss that is one of these and ends a span is a turn end. The target's
    statistics are taken over when `keep_scores`, or null, to be scored again. `computed` are those of
    `columns.computed_fields` that the kept rows have. `known_ids`: how many token ids there are, and which model has
    them; raises UserError for a row with another.
    """
    schema = pa.schema([*SHARD, *other_fields, *kept_columns(list(computed))])
    statistics = ["target_logprobs", *(item.name for item in TARGET_FIELDS.values() if item in computed)]
    rows = unscored = 0
    used = ""

    def tables() -> Iterator[pa.Table]:
        nonlocal rows, used, unscored
        with open_checked(output, part_path, sha256) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                table = pa.Table.from_batches([batch])
                if known_ids is not None:
                    refuse_unknown_ids(batch, *known_ids, output.url(part_path), rows)
                rows += table.num_rows
                kept = kept_rows(table, schema, stop_ids, keep_scores)
                used = union_of_ids([used, tokens_with_loss(kept)])
                unscored += max(kept[name].null_count for name in statistics)
                yield kept

    write_parquet(workspace, kept_path, schema, tables())
    return rows, used, unscored


def kept_rows(table: pa.Table, schema: pa.Schema, stop_ids: Collection[int], keep_scores: bool) -> pa.Table:
    """Release rows [N] in the columns of a kept file."""
    table = table.combine_chunks()
    offsets, ids = list_offsets_and_values(array_of(table, "input_ids"))
    _, has_loss = list_offsets_and_values(array_of(table, "loss_mask"))
    if TURN_ENDS.name in table.column_names:
        _, turn_ends = list_offsets_and_values(array_of(table, TURN_ENDS.name))
        mask = np.where(turn_ends, LOSS_TURN_END, has_loss * LOSS_TOKEN).astype(np.uint8)
    else:
        mask = mask_with_turn_ends(ids, has_loss.astype(bool), offsets, stop_ids)
    messages = [[whole_message(m) for m in row] for row in table["messages"].to_pylist()]
    if "num_prompt_messages" in table.column_names:
        prompt_messages = table["num_prompt_messages"].to_pylist()
    else:
        spans = num_spans(mask > 0, offsets).tolist()
        prompt_messages = [num_prompt_messages(row, number) for row, number in zip(messages, spans, strict=True)]
    if PREFILL.name in table.column_names:
        parts = zip(messages, prompt_messages, table[PREFILL.name].to_pylist(), strict=True)
        split = [two_turns(*part) for part in parts]
        messages, prompt_messages = [row for row, _ in split], [number for _, number in split]
    arrays: dict[str, Any] = {
        "row_key": row_keys(ids, mask, offsets),
        "loss_mask": list_array(offsets, mask, pa.uint8()),
        "prompt_len": pa.array(_prompt_lens(mask, offsets), pa.int32()),
        "messages": pa.array([orjson.dumps(row).decode() for row in messages]),
        "num_prompt_messages": pa.array(prompt_messages, pa.int32()),
        "recorded_logprobs": _recorded(table, offsets, mask),
    }
    for name in ("target_logprobs", *(item.name for item in TARGET_FIELDS.values())):
        there = keep_scores and name in table.column_names
        arrays[name] = narrow(array_of(table, name), offsets, mask) if there else None
    columns = []
    for field in schema:
        values = arrays.get(field.name)
        if values is None and field.name in table.column_names and field.name not in arrays:
            values = array_of(table, field.name)
        columns.append(pa.nulls(table.num_rows, field.type) if values is None else values.cast(field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _recorded(table: pa.Table, offsets: Int64s, mask: npt.NDArray[np.uint8]) -> pa.ListArray:
    """The behavior's log-probabilities as they were recorded: NaN where one is not known.

    A release without BEHAVIOR_KNOWN knows all of them, but for rows without weights from before there was that column:
    there 0.0 stands for a turn end that was not recorded.
    """
    recorded = narrow(array_of(table, "behavior_logprobs"), offsets, mask)
    if BEHAVIOR_KNOWN.name not in table.column_names:
        not_weighed = pc.equal(array_of(table, "weight_source"), UNIFORM).to_numpy(zero_copy_only=False)
        valid = recorded.is_valid().to_numpy(zero_copy_only=False)
        with_loss = (mask > 0) & np.repeat(valid, np.diff(offsets))
        is_turn_end = (mask == LOSS_TURN_END) & np.repeat(not_weighed, np.diff(offsets))
        values = np.array(recorded.values)
        values[is_turn_end[with_loss] & (values == 0)] = np.nan
        return pa.ListArray.from_arrays(recorded.offsets, pa.array(values), mask=recorded.is_null())
    known = narrow(array_of(table, BEHAVIOR_KNOWN.name), offsets, mask)
    values = np.where(np.asarray(known.values) > 0, np.asarray(recorded.values), np.float32(np.nan)).astype(np.float32)
    return pa.ListArray.from_arrays(recorded.offsets, pa.array(values), mask=recorded.is_null())


def narrow(column: pa.ListArray, offsets: Int64s, mask: npt.NDArray[np.uint8]) -> pa.ListArray:
    """One value per token -> one per token with loss, null where the column is null."""
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = np.diff(offsets)
    _, values = list_offsets_and_values(column.drop_null()) if valid.any() else (None, np.zeros(0, np.float32))
    mask_of_valid = mask[np.repeat(valid, lengths)]
    flat = values[mask_of_valid > 0].astype(np.float32)
    counts = np.where(valid, segment_sums(mask > 0, offsets), 0)
    return pa.ListArray.from_arrays(
        pa.array(offsets_from_lengths(counts).astype(np.int32)), pa.array(flat, pa.float32()), mask=pa.array(~valid)
    )


def _prompt_lens(mask: npt.NDArray[np.uint8], offsets: Int64s) -> Int64s:
    first = np.flatnonzero(mask > 0)
    places = np.searchsorted(first, offsets[:-1])
    return first[places] - offsets[:-1]


def tokens_with_loss(kept: pa.Table) -> str:
    """Ids of the tokens with loss of kept rows, packed; turn ends, which may differ between policies, are left out."""
    _, ids = list_offsets_and_values(array_of(kept, "input_ids"))
    _, mask = list_offsets_and_values(array_of(kept, "loss_mask"))
    return pack_ids(ids[mask == LOSS_TOKEN])


def other_fields_of(schema: pa.Schema) -> list[pa.Field]:
    """The pool's own columns in a release's schema."""
    ours = {
        *release_schema([], [], computed_fields(STATISTICS, True, raced=True)).names,
        *(BEHAVIOR_KNOWN.name, TURN_ENDS.name, PREFILL.name),
    }
    return [field for field in schema if field.name not in ours and field.name not in SHARD.names]
