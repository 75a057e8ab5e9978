"""grape train and grape export: from a release to trained models."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grape_service.cli.output import (
    EndpointOption,
    JsonOption,
    ReferenceArgument,
    SetOption,
    config_of,
    print_json,
    say,
    use_prefect,
    write_error_line,
)
from grape_service.errors import UserError

if TYPE_CHECKING:
    from grape_service.config.training import TrainConfig


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
) -> None:
    """Start the SFT job on a release, then the RL job on its checkpoint; the run is recorded beside the release."""
    from workers.stages import train as runs

    settings = config_of(config, sets)
    if settings.train is None:
        raise UserError(f"{config} has no train section: add train: {{sft: {{...}}}}")
    ray_address, options = settings.workers.ray_address, settings.storage
    if status:
        record = runs.read(reference, settings.train, options, again)
    elif cancel:
        record = runs.cancel(reference, settings.train, ray_address, options, again)
    else:
        deployments = deployments_for(settings.train)
        target = None if settings.target.adapter else settings.target.model
        record = runs.train(
            reference, settings.train, ray_address, options, again, write_error_line, deployments, target
        )
    print_json(record) if as_json else show_training(record)


def deployments_for(config: TrainConfig) -> Any:
    """What starts the Prefect deployments among the jobs; None without any."""
    if all(job.kind != "deployment" for job in config.jobs.values()):
        return None
    use_prefect()
    from flows.deployments import PrefectDeployments

    return PrefectDeployments()


def show_training(record: dict[str, Any]) -> None:
    """Each stage's state, checkpoint and log."""
    for stage, state in record["stages"].items():
        error = (state.get("error") or "").partition("\n")[0]
        say(f"{stage:<9} {state['state']}  {state.get('checkpoint') or error}".rstrip())
        if state.get("log"):
            say(f"  log     {state['log']}")
    say(f"training  {record['id']}, {record['state']}")


def export(
    reference: ReferenceArgument,
    folder: Annotated[str, typer.Argument(help="Where the files go.", metavar="DIR")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="trl, verl, ms-swift, llamafactory, llamafactory-v1, megatron-bridge, tinker, axolotl, openrlhf "
            "or jsonl.",
        ),
    ],
    drop_weights: Annotated[bool, typer.Option("--drop-weights", help="Export without the loss weights.")] = False,
    eval_share: Annotated[
        float, typer.Option("--eval-share", help="Share of the prompts that goes to a file of its own.")
    ] = 0.0,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a release in the form that a trainer reads."""
    from grape_service.exports import export as write
    from grape_service.release.load import load

    options = {"endpoint_url": endpoint} if endpoint else {}
    summary = write(load(reference, options), to, folder, drop_weights, eval_share, write_error_line)
    if as_json:
        print_json(asdict(summary))
        return
    for line in summary.lines:
        say(line)
