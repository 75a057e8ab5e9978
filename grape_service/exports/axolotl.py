"""Axolotl: the release's own tokens, already tokenized as it takes them; it has no weights of any kind.

The form of weights that it can take is how often a row occurs (see repeats.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from grape_service.exports.repeats import Repeats
from grape_service.exports.rows import left_behind, split_batches, write_parquet
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release
from grape_service.rows.ragged import list_array, list_offsets_and_values

IDS = ["prompt_id", "candidate_id"]
SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("attention_mask", pa.list_(pa.int8()), nullable=False),
        pa.field("labels", pa.list_(pa.int32()), nullable=False),
    ]
)
USAGE = """```yaml
datasets:
  - path: {folder}/data
    split: train
    type:
sample_packing: …
```

With an eval share, `test_datasets` of the same form take {folder}/eval."""


def export(release: Release, target: Target) -> ExportSummary:
    """Write data/*.parquet with input_ids, attention_mask and labels."""
    repeats = Repeats(release, target)
    rows = {}
    for split in target.splits:

        def repeated(split: str = split) -> Iterator[pa.RecordBatch]:
            columns = [*IDS, "input_ids", "labels", "loss_mask", "loss_weights"]
            for batch in split_batches(release, columns, target, split):
                copies = repeats.copies(batch, split)
                taken = batch.take(pa.array(np.repeat(np.arange(batch.num_rows), copies)))
                offsets, ids = list_offsets_and_values(taken.column("input_ids"))
                attention = list_array(offsets, np.ones(len(ids), np.int8), pa.int8())
                yield pa.RecordBatch.from_arrays(
                    [taken.column("input_ids"), attention, taken.column("labels")], schema=SCHEMA
                )

        rows[split], _ = write_parquet(target, {"train": "data", "eval": "eval"}[split], SCHEMA, repeated())
    sentence = repeats.sentence("axolotl", "Axolotl", rows["train"]) + " It gets the release's own tokens."
    kept = ["input_ids", "labels"]
    usage = USAGE.format(folder=target.folder)
    return target.summary("axolotl", release, rows, sentence, usage, kept, left_behind(release, kept))
