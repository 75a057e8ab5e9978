"""Plain JSONL: a line per row, with chat messages, and the tokens that the weights belong to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from grape_service.exports.lines import write_lines
from grape_service.exports.rows import (
    WeightTotals,
    arrays_of,
    chat_messages,
    left_behind,
    other_columns,
    system_prompt_of,
)
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release

DESCRIPTIVE = (
    "prompt_id",
    "candidate_id",
    "source",
    "grape_score",
    "grape_rank",
    "grape_margin",
    "margin_at_least",
    "num_candidates",
    "truncated",
    "weight_source",
)
TOKENS = ("input_ids", "loss_mask", "loss_weights")


def export(release: Release, target: Target) -> ExportSummary:
    """Write train.jsonl."""
    tokens = () if target.drop_weights else TOKENS
    described = [name for name in (*DESCRIPTIVE, *other_columns(release)) if name in release.schema.names]
    if target.drop_weights:
        described.remove("weight_source")
    columns = [*described, "messages", *TOKENS]
    seen, system = WeightTotals(), system_prompt_of(release)

    def objects(batch: pa.RecordBatch, split: str) -> Iterator[dict[str, Any]]:
        arrays = {name: arrays_of(batch, name) for name in tokens}
        for place, row in enumerate(batch.select([*described, "messages"]).to_pylist()):
            row["messages"] = chat_messages(row["messages"], system)
            row.update({name: rows[place] for name, rows in arrays.items()})
            yield row

    rows = write_lines(release, target, columns, seen, objects)
    if target.drop_weights:
        sentence = f"{seen.rows} rows of chat messages without loss weights, as asked."
    elif seen.weighted:
        sentence = (
            f"{seen.rows} rows of chat messages with input_ids, loss_mask and loss_weights: a trainer that reads "
            "messages alone trains without the weights."
        )
    else:
        sentence = f"{seen.rows} rows of chat messages with input_ids and loss_mask, {seen.unweighted_words}."
    kept = [*described, "messages", *tokens]
    # Messages alone are trained on, whatever has no loss here.
    lost, notes = left_behind(release, kept), [] if target.drop_weights else seen.notes(target.drop_weights)
    return target.summary("jsonl", release, rows, sentence, "Each line of train.jsonl is a row.", kept, lost, notes)
