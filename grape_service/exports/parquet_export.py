"""Exports that are Parquet files of the release's own tokens, with a Python file beside them that a trainer loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from grape_service.exports.rows import WeightTotals, carried_columns, left_behind, split_batches, write_parquet
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release

FOLDERS = {"train": "data", "eval": "eval"}


@dataclass(frozen=True)
class Form:
    """What such an export holds."""

    tokens: tuple[str, ...]  # the list columns that it carries
    loader: str | None


def export_parquet(
    to: str,
    release: Release,
    target: Target,
    form: Form,
    sentence: Callable[[WeightTotals], str],
    usage: str | Callable[[list[str]], str],
) -> ExportSummary:
    """Write data/*.parquet, eval/*.parquet where it is asked for, the loader and README.md."""
    columns = carried_columns(release, form.tokens, target.drop_weights)
    read = [*columns, *(name for name in ("loss_mask", "loss_weights") if name not in columns)]
    schema = pa.schema([release.schema.field(name) for name in columns])
    seen = WeightTotals()
    rows: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    for split in target.splits:

        def kept(split: str = split) -> Iterator[pa.RecordBatch]:
            for batch in seen.watch(split_batches(release, read, target, split)):
                yield batch.select(columns)

        rows[split], names[split] = write_parquet(target, FOLDERS[split], schema, kept())
    if form.loader:
        target.add_loader(form.loader)
    text = usage if isinstance(usage, str) else usage(names["train"])
    lost = left_behind(release, columns)
    notes = seen.notes(target.drop_weights)
    return target.summary(to, release, rows, sentence(seen), text, columns, lost, notes)
