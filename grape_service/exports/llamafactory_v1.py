"""LLaMA-Factory v1 (USE_V1=1): the release's own tokens and weights through a trainer of its classes, and messages with
a loss_weight each for its own.

v1's own renderer makes tokens of the messages and gives each message one loss_weight; its loss divides each
micro-batch by the sum of its weights. grape_llamafactory.py, started in the place of `llamafactory-cli sft`, is its
trainer with the release's tokens and the loss sum(w * nll) / tokens with loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import orjson
import pyarrow as pa

from grape_service.exports.effects import EFFECTS, PLAIN_EFFECTS
from grape_service.exports.lines import write_lines
from grape_service.exports.llamafactory import ROLES
from grape_service.exports.prefills import num_prefilled
from grape_service.exports.rows import (
    WeightTotals,
    arrays_of,
    chat_messages,
    left_behind,
    loss_spans,
    message_fields,
    row_weights,
    system_prompt_of,
)
from grape_service.exports.summary import ExportSummary, Target
from grape_service.exports.turns import called_functions
from grape_service.release.load import Release
from grape_service.rows.candidate import Message

IDS = ["prompt_id", "candidate_id"]
TOKENS = ["input_ids", "loss_mask", "loss_weights"]
CARRIED = ("role", "content", "tool_calls", "reasoning_content")
USAGE = """```
USE_V1=1 python {folder}/grape_llamafactory.py config.yaml      # instead of llamafactory-cli sft config.yaml
```

with `train_dataset: {folder}/dataset.yaml` in config.yaml."""


def export(release: Release, target: Target) -> ExportSummary:
    """Write train.jsonl, dataset.yaml and grape_llamafactory.py."""
    seen = WeightTotals()
    has_tools, system_prompt = "tools" in release.schema.names, system_prompt_of(release)

    def objects(batch: pa.RecordBatch, split: str) -> Iterator[dict[str, Any]]:
        weights = [1.0] * batch.num_rows if target.drop_weights else row_weights(batch).tolist()
        arrays = {name: arrays_of(batch, name) for name in TOKENS if name != "loss_weights" or not target.drop_weights}
        tools = batch.column("tools").to_pylist() if has_tools else itertools.repeat(None)
        ids = zip(*(batch.column(name).to_pylist() for name in IDS), strict=True)
        rows = zip(batch.column("messages").to_pylist(), loss_spans(batch), weights, tools, ids, strict=False)
        for place, (messages, num_spans, weight, offered, (prompt_id, candidate_id)) in enumerate(rows):
            line: dict[str, Any] = {
                "messages": v1_messages(chat_messages(messages, system_prompt), int(num_spans), weight)
            }
            if has_tools:
                line["tools"] = offered or ""
            line.update({name: rows_of[place] for name, rows_of in arrays.items()})
            yield {**line, "prompt_id": prompt_id, "candidate_id": candidate_id}

    columns = [*IDS, *TOKENS, "messages", *(["tools"] if has_tools else [])]
    rows = write_lines(release, target, columns, seen, objects)
    for split in target.splits:
        name = "dataset.yaml" if split == "train" else "eval_dataset.yaml"
        info = f"{release.name}:\n  path: {target.folder}/{split}.jsonl\n  source: local\n"
        target.storage.write(name, info.encode())
    target.add_loader("grape_llamafactory.py")
    how = "for LLaMA-Factory v1: start grape_llamafactory.py beside them instead of llamafactory-cli sft"
    if target.drop_weights and seen.weighted:
        sentence = f"{seen.rows} rows without their loss weights, as asked, {how}."
    else:
        kind = "with token weights" if seen.weighted else seen.unweighted_words
        sentence = (
            f"{seen.rows} rows {kind} {how} ({EFFECTS['llamafactory-v1'][seen.level].words}); with v1's own trainer, "
            f"{PLAIN_EFFECTS['llamafactory-v1'][seen.level].words}."
        )
    fields = [f"messages.{name}" for name in message_fields(release) if name not in CARRIED]
    kept = [*IDS, "messages", *TOKENS[: 2 if target.drop_weights else 3], *(["tools"] if has_tools else [])]
    lost = [*fields, *left_behind(release, kept)]
    usage, notes = USAGE.format(folder=target.folder), seen.notes(target.drop_weights)
    if number := num_prefilled(release):
        notes.append(f"v1's own trainer would have loss on the prefill of {number} rows, which has none here.")
    return target.summary("llamafactory-v1", release, rows, sentence, usage, kept, lost, notes)


def v1_messages(messages: list[Message], num_spans: int, weight: float) -> list[dict[str, Any]]:
    """Messages in v1's form: content in typed parts; the last `num_spans` assistant turns have loss_weight `weight`."""
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    with_loss = set(turns[len(turns) - num_spans :]) if num_spans else set()
    converted = []
    for place, message in enumerate(messages):
        content = []
        if message.get("reasoning_content"):
            content.append({"type": "reasoning", "value": message["reasoning_content"]})
        if message.get("content") or not message.get("tool_calls"):
            content.append({"type": "text", "value": message.get("content") or ""})
        for function in called_functions(message.get("tool_calls") or []):
            content.append({"type": "tool_call", "value": orjson.dumps(function).decode()})
        role = ROLES.get(message["role"], message["role"])
        converted.append({"role": role, "content": content, "loss_weight": weight if place in with_loss else 0.0})
    return converted
