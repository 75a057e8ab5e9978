"""grape run, score, select: the job, or the job up to a stage."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from grape_service.cli.failing import fail
from grape_service.cli.last_folder import remember
from grape_service.cli.next_steps import grape_command, next_steps
from grape_service.cli.output import (
    ConfigArgument,
    JsonOption,
    QuietOption,
    ReferenceArgument,
    SetOption,
    VerboseOption,
    config_of,
    prefect_is_configured,
    print_json,
    print_table,
    say,
    stdout_to_stderr,
    tell,
    use_prefect,
)
from grape_service.cli.packages import refuse_hidden_packages
from grape_service.cli.train_commands import show_training
from grape_service.errors import StageError, UserError
from grape_service.storage.options import StorageOptions

if TYPE_CHECKING:
    from grape_service.config.training import TrainConfig

ForceOption = Annotated[bool, typer.Option("--force", help="Make a new version even if nothing changed.")]
SHOWN_ROWS = 12
"""Rows of the table at the end of a run."""


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(epilog="Example: grape run examples/quickstart/grape.yaml")(run)
    app.command(epilog="Example: grape gather config.yaml")(gather)
    app.command(epilog="Example: grape score config.yaml")(score)
    app.command(epilog="Example: grape select config.yaml --json")(select)
    app.command(epilog="Example: grape weigh s3://team/datasets/math-sft@v0003 --config weights.yaml")(weigh)


def run(
    config: ConfigArgument,
    force: ForceOption = False,
    sets: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Do the whole job: prepare, score, select, weigh, release (and train, if the config says so)."""
    outcome = run_until(config, until="release", force=force, sets=sets)
    remember(outcome.reference.rpartition("/")[0])
    warnings, table = ending_of(outcome)
    if as_json:
        print_json({**outcome.to_json(), "warnings": warnings, "rejects": table})
        return
    if quiet:
        say(outcome.reference)
        return
    show_outcome(outcome, warnings, table)
    first = first_prompt(outcome)
    has_train = outcome.training is not None
    for what, command in next_steps(outcome.reference, first, config, sets or (), has_train):
        say(f"{what:<9} {command}")
    if outcome.tags_moved:
        tell("note", outcome.unchanged().removeprefix("; "))


def ending_of(outcome: Any) -> tuple[list[dict[str, str]], str | None]:
    """The report's warnings, each with what to change, and where the rows are that were not used."""
    from grape_service.release.load import load
    from grape_service.release.rejects import rejects_of_release
    from grape_service.report.facts import facts_of_manifest
    from grape_service.report.notices import warnings_of

    release = load(outcome.reference, outcome.storage_options)
    warnings = [{"text": one.text, "change": one.change} for one in warnings_of(facts_of_manifest(release.manifest))]
    pool = release.manifest.counts.get("pool") or {}
    if not pool.get("rejected", 0) + pool.get("left_out", 0):
        return warnings, None
    try:
        tables = rejects_of_release(release)
    except UserError:  # the workspace of an unchanged version may be gone
        return warnings, None
    return warnings, tables.workspace.url(tables.folder)


def gather(
    config: ConfigArgument,
    sets: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Sample candidates for the pool's prompts, as the gather section says; nothing is scored."""
    if config_of(config, sets).gather is None:
        raise UserError("the config has no gather section: say who samples under gather.policies")
    outcome = run_until(config, until="gather", sets=sets)
    if as_json:
        print_json(outcome.to_json())
        return
    say(f"{outcome.rows:,} samples of {outcome.prompts:,} prompts: {outcome.scored:,} made now")
    found = sorted(outcome.counts.get("gather", {}).items())
    columns = ("samples", "right", "wrong", "unknown", "truncated")
    rows = [(name, *(f"{counts[column]:,}" for column in columns)) for name, counts in found]
    print_table("by policy", ["policy", "samples", "right", "wrong", "unknown", "cut"], rows)


def score(
    config: ConfigArgument,
    sets: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prepare the pool and score what has no score yet under the target policy."""
    outcome = run_until(config, until="score", sets=sets)
    if as_json:
        print_json(outcome.to_json())
        return
    say(
        f"{outcome.rows:,} rows of {outcome.prompts:,} prompts: "
        f"{outcome.scored:,} scored now, {outcome.reused:,} had scores, {outcome.failed:,} failed"
    )


def select(
    config: ConfigArgument,
    sets: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prepare, score and select; nothing is released."""
    outcome = run_until(config, until="select", sets=sets)
    if as_json:
        print_json(outcome.to_json())
        return
    say(f"{outcome.rows:,} rows of {outcome.prompts:,} prompts kept; {outcome.failed:,} failed")
    sources = outcome.counts.get("select", {}).get("sources", {})
    rows = [(source, f"{count['candidates']:,}", f"{count['kept']:,}") for source, count in sorted(sources.items())]
    print_table("by source", ["source", "candidates", "kept"], rows)


def weigh(
    reference: ReferenceArgument,
    config: Annotated[str, typer.Option("--config", help="The config with target, behavior and weights.")],
    force: ForceOption = False,
    sets: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make a new version with other weights from the rows of an existing release, scoring only what is missing."""
    settings = config_of(config, sets)
    refuse_hidden_packages()
    with prefect_or_direct() as with_prefect:
        if with_prefect:
            from flows.secrets import hidden, kept
            from flows.weigh import weigh_release

            with kept(settings):
                outcome = weigh_release(reference, hidden(settings), force=force)
        else:
            from workers.pipeline import reweigh

            outcome = reweigh(reference, settings, force=force)
    outcome.seconds = seconds_on_the_wall()
    if as_json:
        print_json(outcome.to_json())
        return
    if not quiet:
        say(outcome.sentence())
    say(f"{outcome.reference}" if quiet else f"release   {outcome.reference}")


def seconds_on_the_wall() -> float:
    """Seconds since this process started: with its imports, and with the start and the end of Ray."""
    import psutil

    return round(time.time() - psutil.Process().create_time(), 3)


def run_until(
    config_path: str,
    until: Literal["gather", "score", "select", "release"],
    force: bool = False,
    sets: list[str] | None = None,
) -> Any:
    """Run the job up to a stage in this process, as a Prefect flow where a Prefect API is configured."""
    config = config_of(config_path, sets)
    refuse_hidden_packages()
    with prefect_or_direct() as with_prefect:
        if with_prefect:
            from flows.curate import curate
            from flows.secrets import hidden, kept

            with kept(config):
                outcome = curate(hidden(config), until=until, force=force)
        else:
            from workers.pipeline import run_pipeline

            outcome = run_pipeline(config, until, force, train=train_directly)
    outcome.seconds = seconds_on_the_wall()
    return outcome


def train_directly(reference: str, config: TrainConfig, ray_address: str, storage: StorageOptions) -> Any:
    """The training jobs of a run without Prefect; their lines go where the run's progress goes."""
    from grape_service.cli.train_commands import deployments_for
    from grape_service.progress.reporter import reporter
    from workers.stages.train import train

    return train(reference, config, ray_address, storage, say=reporter().event, deployments=deployments_for(config))


@contextlib.contextmanager
def prefect_or_direct() -> Iterator[bool]:
    """Whether to run as a Prefect flow; progress is on standard error inside the block, faults are one sentence.

    Raises StageError where the Prefect server or Ray ends in the middle of a run.
    """
    from grape_service.progress.bars import shown
    from grape_service.storage.options import wait_for_first_answer
    from workers.cluster.ray import IN_CLUSTER, RAY_ENDED, on_ray_ended

    if os.environ.get(IN_CLUSTER):  # nobody sits before a terminal
        wait_for_first_answer()
    with_prefect = prefect_is_configured()
    if with_prefect:
        use_prefect()
    on_ray_ended[:] = [end_without_ray]
    try:
        with stdout_to_stderr(), shown():
            yield with_prefect
    except Exception as error:
        names = {kind.__name__ for kind in type(error).__mro__}  # Ray itself may not be imported
        if names & {"LocalRayletDiedError", "NodeDiedError"}:
            raise StageError(RAY_ENDED) from error
        if with_prefect and prefect_is_gone(error):
            raise StageError(
                f"the Prefect server does not answer ({str(error) or type(error).__name__}): "
                "run again once it does, or without PREFECT_API_URL; stored scores are reused"
            ) from error
        raise


def end_without_ray() -> None:
    """Ray has ended in the middle of a run, which waits for it in vain: say so, and leave."""
    from workers.cluster.ray import RAY_ENDED
    from workers.cluster.scratch import end_own

    end_own()
    os._exit(fail(RAY_ENDED, 1))


def prefect_is_gone(error: Exception) -> bool:
    """Whether `error` says that Prefect's API cannot be reached."""
    import httpx

    return isinstance(error, httpx.TransportError) or "Failed to reach API" in str(error)


def show_outcome(outcome: Any, warnings: list[dict[str, str]], rejects: str | None) -> None:
    """The table of choices, counts, warnings, the release's reference and its report."""
    from grape_service.release.load import load

    release = load(outcome.reference, outcome.storage_options)
    optional = [name for name in ("margin_at_least", "select_margin") if name in release.schema.names]
    columns = ["prompt_id", "messages", "source", "grape_score", "grape_margin", *optional]
    rows = []
    for row in release.dataset.head(SHOWN_ROWS, columns=columns).to_pylist():
        prompt = next((m["content"] for m in row["messages"] if m["role"] == "user"), row["messages"][0]["content"])
        cells = [row["prompt_id"][:8], short(prompt or ""), row["source"]]
        is_least = row.get("margin_at_least") and row.get("select_margin") is None  # of the method that chose
        rows.append([*cells, number(row["grape_score"]), f"{'≥ ' * bool(is_least)}{number(row['grape_margin'])}"])
    total = outcome.rows
    title = f"first {len(rows)} of {total:,} rows" if total > len(rows) else f"{total:,} rows"
    print_table(title, ["id", "prompt", "chosen source", "score", "margin"], rows)
    say("")
    for warning in warnings:
        tell("warning", f"{warning['text']} {warning['change']}")
    tell("done", outcome.sentence())
    if rejects is not None:
        say(f"rejects   {grape_command()} rejects {shlex.quote(outcome.reference)}")
    say(f"release   {outcome.reference}")
    say(f"report    {outcome.report}")
    for one in outcome.rounds:
        churn = "" if one["churn"] is None else f", {one['churn']:.0%} of the rows are new or gone"
        say(f"{one['name']:<9} {one['version']}, {one['rows']:,} rows{churn}; checkpoint {one['checkpoint']}")
    if outcome.training:
        show_training(outcome.training)


def first_prompt(outcome: Any) -> str | None:
    """The id of a prompt of a release; None where it has no rows."""
    from grape_service.release.load import load

    rows = load(outcome.reference, outcome.storage_options).dataset.head(1, columns=["prompt_id"]).to_pylist()
    return rows[0]["prompt_id"] if rows else None


def short(text: str, width: int = 60) -> str:
    """One line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def number(value: float | None) -> str:
    """Three decimals, or nothing."""
    return "" if value is None else f"{value:.3f}"
