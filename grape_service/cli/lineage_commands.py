"""grape lineage: what a checkpoint or a version was made from, and what holds a row, a source or a pool file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grape_service.cli.output import (
    EndpointOption,
    JsonOption,
    open_file,
    print_json,
    print_table,
    say,
    storage_options,
)
from grape_service.errors import UserError
from grape_service.storage.options import StorageOptions

if TYPE_CHECKING:
    import pyarrow as pa


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(epilog="Example: grape lineage s3://team/datasets/math-sft/runs/1f2e/sft/model")(lineage)


def lineage(
    what: Annotated[
        str,
        typer.Argument(
            help="A checkpoint's folder or a dataset reference; with --row, --source or --file, a folder of datasets."
        ),
    ],
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows",
            help="Write the ids of every row of the versions that it was trained on, as Parquet.",
        ),
    ] = None,
    row: Annotated[
        str | None, typer.Option("--row", help="Which versions hold this prompt_id or candidate_id.")
    ] = None,
    source: Annotated[str | None, typer.Option("--source", help="Which versions hold rows of this source.")] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", help="Which versions were made from this pool file, or files of this folder."),
    ] = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a checkpoint was trained on, back to the pool's files; or which versions and checkpoints hold something."""
    options = storage_options(endpoint)
    wanted = {name: value for name, value in (("row", row), ("source", source), ("file", file)) if value is not None}
    if len(wanted) > 1:
        raise UserError("give one of --row, --source and --file")
    if wanted:
        _print_holders(what, wanted, options, as_json)
        return
    from grape_service.release.ancestry import (
        is_checkpoint,
        lineage_of_checkpoint,
        lineage_of_release,
        rows_of_checkpoint,
        rows_of_release,
    )
    from grape_service.release.lineage import lineage_tree
    from grape_service.release.load import load, load_training_set

    of_checkpoint = is_checkpoint(what, options)
    if rows is not None:
        ids = rows_of_checkpoint(what, options) if of_checkpoint else rows_of_release(load_training_set(what, options))
        path, number = _write(rows, ids)
        print_json({"file": str(path), "rows": number}) if as_json else say(f"{number:,} rows in {path}")
        return
    if of_checkpoint:
        node = lineage_of_checkpoint(what, options)
    else:
        node = lineage_tree(load(what, options)) if as_json else lineage_of_release(load(what, options))
    print_json(node.to_json()) if as_json else say(node.render_text())


def _write(path: Path, tables: Iterator[pa.Table]) -> tuple[Path, int]:
    import pyarrow.parquet as pq

    from grape_service.rows.columns import IDS

    number = 0
    path, file = open_file(path)
    with file, pq.ParquetWriter(file, IDS, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
            number += table.num_rows
    return path, number


def _print_holders(folder: str, wanted: dict[str, str], options: StorageOptions, as_json: bool) -> None:
    from grape_service.release.ancestry import Wanted, holders

    found = holders(folder, Wanted(**wanted), options)
    (what,) = [f"{name} {value}" for name, value in wanted.items()]
    if as_json:
        print_json({**wanted, "held_by": [holder.to_json() for holder in found]})
        return
    if not found:
        whole = "" if "file" in wanted else " (names and ids are compared whole)"
        say(f"no version in {folder} holds {what}{whole}")
        return
    lines = [
        [
            holder.reference,
            "–" if holder.rows is None else f"{holder.rows:,}",
            "\n".join(holder.checkpoints) or "none",
            "\n".join(holder.descendants) or "none",
        ]
        for holder in found
    ]
    print_table(what, ["version", "rows", "checkpoints trained on it", "trained further from those"], lines)
