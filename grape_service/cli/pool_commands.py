"""grape init, rejects, rows: from a pool to a config, and what became of its rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from grape_service.cli.output import (
    EndpointOption,
    JsonOption,
    ReferenceArgument,
    SetOption,
    config_of,
    events_told,
    print_json,
    print_table,
    say,
    storage_options,
)
from grape_service.display import short
from grape_service.errors import UserError

LimitOption = Annotated[int, typer.Option("--limit", min=1, help="Rows to show at most.")]
SHOWN_TEXT = 60


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(epilog="Example: grape init s3://team/pools/math/ --model Qwen/Qwen2.5-7B > config.yaml")(init)
    app.command(epilog="Example: grape rejects config.yaml --reason 'broken JSON'")(rejects)
    app.command(epilog="Example: grape rows s3://team/datasets/math-sft@v0003 --source teacher --limit 5")(rows)


def init(
    pool: Annotated[str, typer.Argument(help="A file, folder or glob of candidates, or prompts.", metavar="POOL")],
    model: Annotated[str, typer.Option("--model", help="The model to be trained: hub id or folder.", metavar="M")],
    name: Annotated[str | None, typer.Option("--name", help="The dataset's name; default: the pool's.")] = None,
    gather: Annotated[
        list[str] | None,
        typer.Option("--gather", help="The pool is prompts: a model that samples their candidates; may be repeated."),
    ] = None,
    sets: SetOption = None,
    endpoint: EndpointOption = None,
) -> None:
    """Look at a pool and print a commented config that fits it. It runs as it is, unless a question in it is open."""
    from grape_service.estimate.proposal import proposed_config

    with events_told():
        text = proposed_config(pool, model, name, storage_options(endpoint), sets, gather)
    sys.stdout.write(text)


def rejects(
    source: Annotated[str, typer.Argument(help="A dataset version, or a config that was run.", metavar="REF|CONFIG")],
    reason: Annotated[str | None, typer.Option("--reason", help="Only rows with this reason.")] = None,
    limit: LimitOption = 20,
    sets: SetOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the rows of a pool that were not used: reason, file, line and how they begin."""
    from grape_service.release.rejects import read_rejects, rejects_of_config, rejects_of_release

    if Path(source).suffix in (".yaml", ".yml") or Path(source).is_file():
        place = rejects_of_config(config_of(source, sets))
    elif sets:
        raise UserError(f"--set overrides a key of a config, and {source} is a release: leave it out")
    else:
        from grape_service.release.load import load

        place = rejects_of_release(load(source, storage_options(endpoint)))
    found = read_rejects(place, reason, limit)
    if as_json:
        print_json(found)
        return
    print_table("by reason", ["reason", "rows"], [(name, f"{n:,}") for name, n in found["by_reason"].items()])
    shown: list[dict[str, Any]] = found["rows"]
    cells = [
        [row["reason"], f"{row['file']}:{row['row'] + 1}", short(row["text"] or "", SHOWN_TEXT), row["detail"]]
        for row in shown
    ]
    print_table(f"{len(shown):,} of {found['total']:,} rows", ["reason", "file:line", "begins", "detail"], cells)
    say(f"all of them are in {found['table']}")


def rows(
    reference: ReferenceArgument,
    source: Annotated[str | None, typer.Option("--source", help="Only rows of this source.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Only prompts whose id begins so, or that have these words.")
    ] = None,
    limit: LimitOption = 20,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows of a release: ids, source, score, and how prompt and response begin."""
    from grape_service.release.load import load_training_set
    from grape_service.release.some_rows import some_rows

    found = some_rows(load_training_set(reference, storage_options(endpoint)), source, prompt, limit)
    if as_json:
        print_json(found)
        return
    cells = [
        [
            row["prompt_id"][:12],
            row["source"],
            "" if row["grape_score"] is None else f"{row['grape_score']:.3f}",
            short(row["prompt"], SHOWN_TEXT),
            short(row["response"], SHOWN_TEXT),
        ]
        for row in found["rows"]
    ]
    title = f"{len(cells):,} of {found['total']:,} rows"
    print_table(title, ["id", "source", "score", "prompt", "response"], cells)
