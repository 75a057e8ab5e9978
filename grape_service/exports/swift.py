"""ms-swift: the release's own tokens, each with its weight, as the content of one message.

ms-swift takes a message's content as {"token_ids": [...], "loss_scale": [...]}, a value for each token, and divides by
the number of tokens whose loss_scale is above 0. Two of its defaults would change that: a template that puts its own
tokens around a message, for which grape_swift.py registers one that does not, and `is_binary_loss_scale`, under which
the values are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from grape_service.exports.effects import EFFECTS
from grape_service.exports.lines import write_lines
from grape_service.exports.rows import WeightTotals, arrays_of, left_behind, weights_for_counting
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release
from grape_service.rows.ragged import list_offsets_and_values

IDS = ("prompt_id", "candidate_id")
USAGE = """```
swift sft --model … --dataset {folder}/train.jsonl \\
    --external_plugins {folder}/grape_swift.py --template grape --is_binary_loss_scale false \\
    --truncation_strategy delete --split_dataset_ratio 0 …
```

Without `--is_binary_loss_scale false` ms-swift drops the weights, and without `--template grape` it puts its model's
own template around the tokens, which are whole as they are."""


def export(release: Release, target: Target) -> ExportSummary:
    """Write train.jsonl and grape_swift.py."""
    seen = WeightTotals()

    def objects(batch: pa.RecordBatch, split: str) -> Iterator[dict[str, Any]]:
        if target.drop_weights:
            scales = list_offsets_and_values(batch.column("loss_mask"))[1].astype("float32")
        else:
            scales = weights_for_counting(batch)
        tokens, scale_rows = arrays_of(batch, "input_ids"), arrays_of(batch, "input_ids", scales)
        ids = zip(*(batch.column(name).to_pylist() for name in IDS), strict=True)
        for token_ids, loss_scale, (prompt_id, candidate_id) in zip(tokens, scale_rows, ids, strict=True):
            content = {"token_ids": token_ids, "loss_scale": loss_scale}
            messages = [{"role": "assistant", "content": content}]
            yield {"messages": messages, "prompt_id": prompt_id, "candidate_id": candidate_id}

    rows = write_lines(release, target, [*IDS, "input_ids", "loss_mask", "loss_weights"], seen, objects)
    target.add_loader("grape_swift.py")
    if target.drop_weights and seen.weighted:
        told = "without their loss weights, as asked"
    elif seen.weighted:
        told = f"with token weights as loss_scale ({EFFECTS['ms-swift'][seen.level].words})"
    else:
        told = seen.unweighted_words
    sentence = (
        f"{seen.rows} rows {told}, for ms-swift 4.6 or newer with --external_plugins grape_swift.py --template grape "
        "--is_binary_loss_scale false: it gets the release's own tokens."
    )
    kept = [*IDS, "input_ids", "loss_mask", *([] if target.drop_weights else ["loss_weights"])]
    usage = USAGE.format(folder=target.folder)
    lost, notes = left_behind(release, kept), seen.notes(target.drop_weights)
    return target.summary("ms-swift", release, rows, sentence, usage, kept, lost, notes)
