"""Plain JSONL: a line per row, with chat messages, and the tokens that the weights belong to."""

from __future__ import annotations

import orjson

from grape_service.exports.rows import batches, chat_messages, has_weights, other_columns
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release

DESCRIPTIVE = ("prompt_id", "candidate_id", "source", "grape_score", "grape_rank", "weight_source")


def export(release: Release, target: Target) -> ExportSummary:
    """Write train.jsonl."""
    rows, weighted = 0, False
    tokens = [] if target.drop_weights else ["input_ids", "loss_mask", "loss_weights"]
    columns = [*DESCRIPTIVE, "messages", *(tokens or ["loss_mask", "loss_weights"]), *other_columns(release)]
    with target.storage.open_write("train.jsonl") as file:
        for batch in batches(release, columns):
            weighted = weighted or has_weights(batch)
            kept = batch.drop_columns(["loss_mask", "loss_weights"]) if target.drop_weights else batch
            for row in kept.to_pylist():
                row["messages"] = chat_messages(row["messages"])
                file.write(orjson.dumps(row, default=str, option=orjson.OPT_APPEND_NEWLINE))
            rows += batch.num_rows
    if target.drop_weights:
        sentence = f"{rows} rows of chat messages without loss weights, as asked."
    elif weighted:
        sentence = (
            f"{rows} rows of chat messages with input_ids, loss_mask and loss_weights: a trainer that reads "
            "messages alone trains without the weights."
        )
    else:
        sentence = f"{rows} rows of chat messages with input_ids and loss_mask; every token has weight 1."
    target.add_readme(release, sentence, "Each line of train.jsonl is a row.")
    return ExportSummary("jsonl", target.storage.root, rows, sentence)
