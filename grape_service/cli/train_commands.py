"""grape train and grape export: from a release to trained models."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grape_service.addresses import moving_checkpoint
from grape_service.cli.failing import at_interrupt
from grape_service.cli.output import (
    EndpointOption,
    JsonOption,
    QuietOption,
    ReferenceArgument,
    SetOption,
    VerboseOption,
    config_of,
    print_json,
    say,
    use_prefect,
    write_error_line,
)
from grape_service.errors import UserError
from grape_service.json_types import JsonObject

if TYPE_CHECKING:
    from grape_service.config.training import TrainConfig
    from workers.training.records import Record

GOES_ON = (
    "no longer followed: a job that runs elsewhere goes on; the same command follows it, and ends it with --cancel"
)
"""What Ctrl-C says of jobs that do not end with this process."""


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(epilog="Example: grape train s3://team/datasets/math-sft@latest --config config.yaml")(train)
    app.command(epilog="Example: grape export s3://team/datasets/math-sft@latest --to trl out/")(export)


def train(
    reference: ReferenceArgument,
    config: Annotated[str, typer.Option("--config", help="The config with a train section.")],
    again: Annotated[
        str | None, typer.Option("--key", help="Another word makes another run of the same request.")
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Show where the run is, and start nothing.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="End the run, which another process follows.")] = False,
    sets: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Start the SFT job on a release, then the RL job on its checkpoint; the run is recorded beside the release."""
    from workers.stages import train as runs

    settings = config_of(config, sets)
    if settings.train is None:
        raise UserError(f"{config} has no train section: add train: {{sft: {{...}}}}")
    if settings.train.rounds > 1:
        raise UserError(
            f"train.rounds is {settings.train.rounds}, and each round makes a release, which `grape run` does: train "
            "on this one with --set train.rounds=1"
        )
    ray_address, options = settings.workers.ray_address, settings.storage
    # An adapter is no whole model, and the newest checkpoint is another by now: the release says what is trained.
    asked = settings.target
    is_of_release = asked.adapter is not None or moving_checkpoint(asked.model) is not None
    target: tuple[str | None, str | None] = (None, None) if is_of_release else (asked.model, asked.revision)
    deployments = deployments_for(settings.train)
    if status:
        record = runs.read(reference, settings.train, options, again, *target, deployments=deployments)
    elif cancel:
        record = runs.cancel(reference, settings.train, ray_address, options, again, *target, deployments=deployments)
    else:
        from workers.gate import train_gated
        from workers.pipeline import gather_alone

        if ray_address != "auto" or {job.kind for job in settings.train.jobs.values()} & {"webhook", "deployment"}:
            at_interrupt(GOES_ON)
        tell = (lambda line: None) if quiet else write_error_line

        def start(reference: str, jobs: TrainConfig, ray_address: str, options: JsonObject) -> Record:
            return runs.train(reference, jobs, ray_address, options, again, tell, deployments, *target)

        record = train_gated(settings, settings.train, reference, start, gather_alone)
    print_json(record) if as_json else show_training(record)


def deployments_for(config: TrainConfig) -> Any:
    """What starts the Prefect deployments among the jobs; None without any."""
    if all(job.kind != "deployment" for job in config.jobs.values()):
        return None
    use_prefect()
    from flows.deployments import PrefectDeployments

    return PrefectDeployments()


def show_training(record: Record) -> None:
    """Each stage's state, checkpoint and log."""
    for stage, state in record["stages"].items():
        error = (state.get("error") or "").partition("\n")[0]
        say(f"{stage:<9} {state['state']}  {state.get('checkpoint') or error}".rstrip())
        for note in state.get("notes") or []:
            say(f"  note    {note}")
        if state.get("log"):
            say(f"  log     {state['log']}")
        for name, figure in (state.get("gate") or {}).items():
            say(f"  gate    {name} {figure:.4g}")
    say(f"training  {record['id']}, {record['state']}")


def export(
    reference: ReferenceArgument,
    folder: Annotated[str, typer.Argument(help="Where the files go; of hub a repository, owner/name.", metavar="DIR")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="trl, verl, ms-swift, llamafactory, llamafactory-v1, megatron-bridge, tinker, axolotl, openrlhf, "
            "jsonl or hub.",
        ),
    ],
    drop_weights: Annotated[bool, typer.Option("--drop-weights", help="Export without the loss weights.")] = False,
    eval_share: Annotated[
        float, typer.Option("--eval-share", help="Share of the prompts that goes to a file of its own.")
    ] = 0.0,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a release in the form that a trainer reads, or upload it to the Hugging Face Hub."""
    from grape_service.exports import export as write
    from grape_service.release.load import load, load_training_set

    options = {"endpoint_url": endpoint} if endpoint else {}
    if to == "hub":
        from grape_service.exports.hub import export_to_hub

        if drop_weights or eval_share:
            raise UserError("--to hub uploads a version as it is: leave --drop-weights and --eval-share out")
        uploaded = export_to_hub(load(reference, options), folder, write_error_line)
        if as_json:
            print_json(asdict(uploaded))
            return
        for line in uploaded.lines:
            say(line)
        return
    summary = write(load_training_set(reference, options), to, folder, drop_weights, eval_share, write_error_line)
    if as_json:
        print_json(asdict(summary))
        return
    for line in summary.lines:
        say(line)
