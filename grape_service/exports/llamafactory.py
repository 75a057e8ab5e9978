"""LLaMA-Factory: chat messages, of which it makes its own tokens; it takes no weights of any kind.

The form of weights that it can take is how often a row occurs: rows are repeated in proportion to their mean
weight, the same for the same release. What a token weighs within its row is lost, and the sentence says so.
"""

from __future__ import annotations

import hashlib

import numpy as np
import orjson

from grape_service.exports.rows import batches, chat_messages, has_weights, row_weights
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release

DATASET_INFO = {
    "file_name": "train.jsonl",
    "formatting": "openai",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "function_call",
        "system_tag": "system",
    },
}


def export(release: Release, target: Target) -> ExportSummary:
    """Write train.jsonl and dataset_info.json."""
    total, rows, weighted = 0.0, 0, False
    for batch in batches(release, ["loss_mask", "loss_weights"]):
        total += float(row_weights(batch).sum())
        rows += batch.num_rows
        weighted = weighted or has_weights(batch)
    resample = weighted and not target.drop_weights and total > 0
    lines = left_out = 0
    columns = ["candidate_id", "prompt_id", "messages", "loss_mask", "loss_weights"]
    with target.storage.open_write("train.jsonl") as file:
        for batch in batches(release, columns):
            shares = row_weights(batch) * (rows / total) if resample else np.ones(batch.num_rows)
            identities = zip(batch.column("prompt_id"), batch.column("candidate_id"), strict=True)
            for messages, share, (prompt_id, candidate_id) in zip(
                batch.column("messages").to_pylist(), shares.tolist(), identities, strict=True
            ):
                copies = num_copies(share, f"{prompt_id}|{candidate_id}")
                line = orjson.dumps({"messages": chat_messages(messages)}, option=orjson.OPT_APPEND_NEWLINE)
                file.write(line * copies)
                lines += copies
                left_out += copies == 0
    target.storage.write_json("dataset_info.json", {release.name: DATASET_INFO})
    if resample:
        sentence = (
            f"LLaMA-Factory takes no token weights: {rows} rows became {lines}, each repeated in proportion to its "
            f"mean weight ({left_out} not at all), and what a token weighs within its row is lost; "
            "it also makes its own tokens of the messages."
        )
    else:
        kept = "without their loss weights, as asked" if weighted else "in which every token has weight 1"
        sentence = f"{rows} rows {kept}; LLaMA-Factory makes its own tokens of the messages."
    usage = f"```\nllamafactory-cli train … --dataset_dir {target.storage.root} --dataset {release.name}\n```"
    target.add_readme(release, sentence, usage)
    return ExportSummary("llamafactory", target.storage.root, lines, sentence)


def num_copies(share: float, identity: str) -> int:
    """`share` rounded up or down with the row's digest as the die, so that it is right in the mean."""
    die = int.from_bytes(hashlib.sha256(f"grape-copies|{identity}".encode()).digest()[:8], "big") / 2**64
    return int(share + die)
