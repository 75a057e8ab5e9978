"""OpenRLHF: chat messages, of which it makes its own tokens; it takes no weights (see repeats.py for what is done).

Its SFT dataset renders the messages with the tokenizer's own template, which takes no tools, and trains on the last
message, or with --data.multiturn on every assistant turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from grape_service.exports.lines import write_lines
from grape_service.exports.prefills import without_prefills
from grape_service.exports.repeats import NEEDED, Repeats
from grape_service.exports.rows import chat_messages, loss_spans, system_prompt_of
from grape_service.exports.summary import ExportSummary, Target
from grape_service.exports.turns import conversations
from grape_service.release.load import Release

USAGE = """```
deepspeed --module openrlhf.cli.train_sft --data.dataset {folder}/train.jsonl --data.input_key messages \\
    --data.apply_chat_template …
```"""


def export(release: Release, target: Target) -> ExportSummary:
    """Write train.jsonl."""
    target, told = without_prefills(release, target, "OpenRLHF")
    repeats, system = Repeats(release, target), system_prompt_of(release)

    def objects(batch: pa.RecordBatch, split: str) -> Iterator[dict[str, Any]]:
        rows = zip(batch.column("messages").to_pylist(), loss_spans(batch), repeats.copies(batch, split), strict=True)
        for messages, num_spans, copies in rows:
            lines = [
                {"messages": part} for part in conversations(chat_messages(messages, system), max(1, int(num_spans)))
            ]
            yield from lines * int(copies)

    rows = write_lines(release, target, [*NEEDED, "messages"], None, objects)
    sentence = repeats.sentence("openrlhf", "OpenRLHF", rows["train"]) + (
        " It makes its own tokens of the messages, with the tokenizer's template and eos token."
    )
    notes = [*told, "Leave --data.multiturn out: each line ends with the one turn that has loss."]
    if "tools" in release.schema.names:
        notes.append("OpenRLHF gives its template no tools: rows that offer some are rendered without them.")
    kept = ["messages"]
    lost = [name for name in release.schema.names if name not in kept]
    usage = USAGE.format(folder=target.folder)
    return target.summary("openrlhf", release, rows, sentence, usage, kept, lost, notes)
