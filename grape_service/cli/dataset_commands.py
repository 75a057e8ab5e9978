"""grape datasets: what there is in a folder of releases, and what one holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import filesize

from grape_service.cli.last_folder import folder_or_last
from grape_service.cli.output import (
    EndpointOption,
    JsonOption,
    ReferenceArgument,
    print_json,
    print_table,
    say,
    storage_options,
    user_name,
    write_error_line,
)
from grape_service.cli.report_commands import compare
from grape_service.errors import UserError

OptionalPathArgument = Annotated[
    str | None,
    typer.Argument(
        help="The output.path of configs, or <output.path>/<name> for one dataset; default: GRAPE_DATASETS, or the "
        "one that was used last.",
        metavar="[PATH]",
        show_default=False,
    ),
]
PathArgument = Annotated[
    str, typer.Argument(help="The output.path of configs, or <output.path>/<name> for one dataset.", metavar="PATH")
]

datasets = typer.Typer(help="Dataset versions: list, show, diff, tag, verify, gc.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(datasets, name="datasets")


@datasets.command("list", epilog="Example: grape datasets list s3://team/datasets")
def list_versions(
    path: OptionalPathArgument = None, endpoint: EndpointOption = None, as_json: JsonOption = False
) -> None:
    """Every version of every dataset in a folder, with its tags."""
    from grape_service.release.catalog import list_datasets, read_catalog
    from grape_service.release.tags import readable_tags
    from grape_service.storage.storage import Storage

    storage = Storage(folder_or_last(path, "grape datasets list"), storage_options(endpoint))
    names = list_datasets(storage)
    if not names and storage.folders("versions"):
        folder, _, name = storage.root.rpartition("/")
        storage, names = Storage(folder, storage_options(endpoint)), [name]
    if not names:
        raise UserError(f"there is no dataset in {storage.root}: give the output.path of your configs")
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    for name in names:
        tags: dict[str, list[str]] = {}
        readable, broken = readable_tags(storage, name)
        problems += broken
        for tag in readable:
            tags.setdefault(tag.version, []).append(tag.name)
        try:
            entries = read_catalog(storage, name)
        except UserError as error:  # one dataset that is damaged does not hide the others
            problems.append(str(error))
            continue
        for before, entry in zip([None, *entries], entries, strict=False):
            found.append(
                {
                    "name": name,
                    "version": entry.version,
                    "kind": entry.kind,
                    "tags": tags.get(entry.version, []),
                    "rows": entry.rows,
                    "tokens": entry.tokens,
                    "bytes": entry.num_bytes,
                    **asdict(entry.made_by),
                    "since": entry.since(before),
                    "created": entry.created,
                    "reference": f"{storage.root}/{name}@{entry.version}",
                }
            )
    if as_json:
        print_json({"path": storage.root, "versions": found, "problems": problems})
        return
    rows = [
        [
            e["name"],
            e["version"],
            ", ".join(e["tags"]),
            f"{e['rows']:,}",
            f"{e['tokens']:,}",
            e["kind"] if e["kind"] != "training" else e["method"] + (f", keep {e['keep']}" if e["keep"] else ""),
            e["target"].rstrip("/").rpartition("/")[2],
            e["pool"],
            e["since"],
            e["created"][:16].replace("T", " "),
        ]
        for e in found
    ]
    columns = ["dataset", "version", "tags", "rows", "tokens", "method", "target", "pool", "since the one before"]
    print_table(storage.root, [*columns, "created (UTC)"], rows)
    for problem in problems:
        write_error_line(f"warning: {problem}")


@datasets.command(epilog="Example: grape datasets show s3://team/datasets/math-sft@v0003 --lineage")
def show(
    reference: ReferenceArgument,
    lineage: Annotated[bool, typer.Option("--lineage", help="What it was made from, as a short tree.")] = False,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a version holds, and with --lineage what it was made from."""
    from grape_service.release.changes import since_of
    from grape_service.release.load import load

    release = load(reference, storage_options(endpoint))
    manifest = release.manifest
    if lineage:
        from grape_service.release.lineage import lineage_tree, short_lineage

        print_json(lineage_tree(release).to_json()) if as_json else say(short_lineage(release).render_text())
        return
    if as_json:
        print_json(
            {"reference": release.reference, "tags": release.tags(), "manifest": manifest.model_dump(mode="json")}
        )
        return
    say(f"{release.reference}  {', '.join(release.tags())}")
    say(f"{manifest.content}; created {manifest.created}")
    since = since_of(manifest.counts)
    if since is not None:
        say(f"since {since.version}: {since.sentence}")
    print_table("columns", ["column", "type"], [[column.name, column.type] for column in manifest.columns])
    print_table(
        "files",
        ["file", "rows", "size", "sha256"],
        [[f.path, f"{f.rows:,}", filesize.decimal(f.size), f.sha256[:16]] for f in manifest.files],
    )


@datasets.command(epilog="Example: grape datasets tag s3://team/datasets/math-sft@v0003 stable")
def tag(
    reference: ReferenceArgument,
    name: Annotated[str, typer.Argument(help="The tag to point to this version.")],
    expected: Annotated[str | None, typer.Option("--expected", help="Refuse unless the tag points there now.")] = None,
    endpoint: EndpointOption = None,
) -> None:
    """Point a tag to a version."""
    from grape_service.release.load import load
    from grape_service.release.tags import move_tag

    release = load(reference, storage_options(endpoint))
    move_tag(release.storage, release.name, name, release.version, who=user_name(), expected=expected)
    say(f"{name} -> {release.reference}")


@datasets.command(epilog="Example: grape datasets verify s3://team/datasets/math-sft@latest")
def verify(reference: ReferenceArgument, endpoint: EndpointOption = None, as_json: JsonOption = False) -> None:
    """Check the size and sha256 of every file of a version."""
    from grape_service.release.load import load
    from grape_service.release.verify import render_text
    from grape_service.release.verify import verify as problems_of

    release = load(reference, storage_options(endpoint))
    problems = problems_of(release)
    if as_json:
        print_json({"reference": release.reference, "problems": [problem.to_json() for problem in problems]})
    else:
        say(render_text(release, problems))
    if problems:
        number = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise UserError(f"{release.reference} is not what its manifest says: {number}")


datasets.command(
    "diff", epilog="Example: grape datasets diff s3://team/datasets/math-sft@v0002 s3://team/datasets/math-sft@v0003"
)(compare)


@datasets.command(epilog="Example: grape datasets gc s3://team/datasets --keep-days 30 --delete")
def gc(
    path: PathArgument,
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="The workspace; default: .grape beside it.")
    ] = None,
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0, help="Scores used by releases this young stay.")
    ] = 30,
    keep_versions: Annotated[int, typer.Option("--keep-versions", min=1, help="Untagged versions that stay.")] = 10,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it, only say what would go.")] = False,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find what nobody needs: unfinished and old untagged versions, unused scores, leftovers. A dry run by default."""
    from grape_service.release.gc import collect, render_text
    from grape_service.storage.storage import Storage
    from grape_service.storage.workspace import open_workspace

    options = storage_options(endpoint)
    output = Storage(path, options)
    place = open_workspace(workspace or f"{output.root}/.grape", options)
    found = collect(output, place, keep_days, keep_versions, dry_run=not delete, say=write_error_line)
    if as_json:
        print_json({"dry_run": not delete, "garbage": [item.to_json() for item in found]})
        return
    say(render_text(found, not delete))
