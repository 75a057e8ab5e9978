"""Exports that are JSON lines: train.jsonl, and eval.jsonl where a share of the prompts is kept back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import orjson
import pyarrow as pa

from grape_service.exports.rows import WeightTotals, split_batches
from grape_service.exports.summary import Target
from grape_service.release.load import Release

OPTIONS = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY


def write_lines(
    release: Release,
    target: Target,
    columns: list[str],
    seen: WeightTotals | None,
    objects: Callable[[pa.RecordBatch, str], Iterable[dict[str, Any]]],
) -> dict[str, int]:
    """Write a line for each of the objects that become of each batch and its split; `seen` looks at the batches.

    Returns the number of lines by split.
    """
    rows: dict[str, int] = {}
    for split in target.splits:
        rows[split] = 0
        with target.storage.open_write(f"{split}.jsonl") as file:
            passing = split_batches(release, columns, target, split)
            for batch in seen.watch(passing) if seen else passing:
                lines = [orjson.dumps(item, default=str, option=OPTIONS) for item in objects(batch, split)]
                file.write(b"".join(lines))
                rows[split] += len(lines)
    return rows
