"""grape runs list, show, logs: what runs of a workspace do, or did."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grape_service.cli.dataset_commands import OptionalPathArgument
from grape_service.cli.last_folder import folder_or_last
from grape_service.cli.output import EndpointOption, JsonOption, print_json, print_table, say, storage_options
from grape_service.errors import UserError
from grape_service.progress.reporter import duration

if TYPE_CHECKING:
    from grape_service.release.rounds import Round
    from grape_service.ui.folder import Folder

runs = typer.Typer(help="Runs of a workspace: list, show, logs.", no_args_is_help=True)
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="The id of a run, as `grape runs list` has it.", show_default=False)
]
WorkspaceOption = Annotated[
    str | None, typer.Option("--workspace", help="Where the runs are; default: .grape in the folder of datasets.")
]
PathOption = Annotated[
    str | None, typer.Option("--path", help="The folder of datasets; default: the one that was used last.")
]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.add_typer(runs, name="runs")


def _folder(path: str | None, endpoint: str | None, workspace: str | None) -> Folder:
    from grape_service.ui.folder import Folder

    return Folder(folder_or_last(path, "grape runs list"), storage_options(endpoint), workspace)


@runs.command("list", epilog="Example: grape runs list s3://team/datasets")
def list_runs(
    path: OptionalPathArgument = None,
    workspace: WorkspaceOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Runs under way and the last ones that ended, newest first; and the rounds of jobs that have several."""
    from grape_service.release.rounds import all_rounds
    from grape_service.ui.runs import run_record, runs_of

    folder = _folder(path, endpoint, workspace)
    alive, ended, problem = runs_of(folder)
    found = [run_record(folder, run_id) for run_id in [*(run.run_id for run in alive), *ended]]
    jobs = [job for name in folder.names() for job in all_rounds(folder.storage, name)]
    if as_json:
        rounds = [job.to_json() for job in jobs]
        print_json({"path": folder.address, "runs": found, "rounds": rounds, "problem": problem})
        if problem:
            raise UserError(problem)
        return
    rows = [[run["run_id"], run.get("name", ""), run["state"], _took(run), run.get("error", "")] for run in found]
    print_table(folder.address, ["run", "dataset", "state", "took", "why"], rows)
    for job in jobs:
        why = f": {job.error}" if job.error else ""
        title = f"{job.name}, {len(job.rounds)} of {job.planned} rounds, {job.state_in_words()}{why}"
        columns = ["round", "version", "rows", "new or gone", "gate", "run", "target", "checkpoint"]
        print_table(title, columns, map(_cells, job.rounds))
    if problem:
        raise UserError(problem)


def _cells(one: Round) -> list[Any]:
    churn = "" if one.churn is None else f"{one.churn:.0%}"
    return [one.name, one.version, one.rows, churn, one.gate_text, one.run, one.target, one.checkpoint]


@runs.command(epilog="Example: grape runs show 20261129T101339-7fa820f0")
def show(
    run: RunArgument,
    path: PathOption = None,
    workspace: WorkspaceOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """A run's state, stage, seconds by stage, and why it ended."""
    from grape_service.ui.runs import run_record

    found = run_record(_folder(path, endpoint, workspace), run)
    if as_json:
        print_json(found)
        return
    say(f"{found['run_id']}  {found.get('name', '')}  {found['state']}  {_took(found)}")
    if found.get("stage"):
        say(f"{found['stage']}: {found.get('done', 0):,} of {found.get('total', 0):,} {found.get('unit', '')}")
    for stage, seconds in (found.get("stage_seconds") or {}).items():
        say(f"{stage}: {duration(seconds)}")
    if found.get("error"):
        say(f"error: {found['error']}")


@runs.command(epilog="Example: grape runs logs 20261129T101339-7fa820f0")
def logs(
    run: RunArgument, path: PathOption = None, workspace: WorkspaceOption = None, endpoint: EndpointOption = None
) -> None:
    """What happened in a run, a line each: retries, engines that died, warnings, how it ended, and its log files."""
    from grape_service.ui.runs import log_files, run_record

    folder = _folder(path, endpoint, workspace)
    found = run_record(folder, run)
    for event in found.get("events") or []:
        say(f"{event.get('time', '')} {event.get('event', '')}")
    if "ended" in found:
        ended = datetime.fromtimestamp(found["ended"], UTC).isoformat(timespec="seconds")
        say(f"{ended} {found['state']}{': ' + found['error'] if found.get('error') else ''}")
    for address, size in log_files(folder, run):
        say(f"log: {address} ({size:,} bytes)")


def _took(run: dict[str, Any]) -> str:
    """How long a run took, or has taken."""
    started, ended = run.get("started"), run.get("ended") or run.get("time")
    return duration(ended - started) if started and ended else ""
