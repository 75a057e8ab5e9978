"""grape train and grape export: from a release to trained models."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from grape_service.cli.output import EndpointOption, JsonOption, ReferenceArgument, config_of, print_json, say
from grape_service.errors import UserError


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
    as_json: JsonOption = False,
) -> None:
    """Start the SFT job on a release, then the RL job on its checkpoint; the run is recorded beside the release."""
    from workers.trainers.jobs import train as run_training

    settings = config_of(config)
    if settings.train is None:
        raise UserError(f"{config} has no train section: add train: {{sft: {{...}}}}")
    record = run_training(
        reference,
        settings.train,
        settings.workers.ray_address,
        settings.storage,
        again,
        lambda line: print(line, file=sys.stderr),
    )
    if as_json:
        print_json(record)
        return
    for stage, state in record["stages"].items():
        say(f"{stage:<4} {state['state']}  {state.get('checkpoint') or ''}")
    say(f"run  {record['id']}")


def export(
    reference: ReferenceArgument,
    folder: Annotated[str, typer.Argument(help="Where the files go.", metavar="DIR")],
    to: Annotated[str, typer.Option("--to", help="trl, verl, llamafactory or jsonl.")],
    drop_weights: Annotated[
        bool, typer.Option("--drop-weights", help="Leave the loss weights out, and mean it.")
    ] = False,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a release in the form that a trainer reads."""
    from grape_service.exports import export as write
    from grape_service.releases.load import load

    options = {"endpoint_url": endpoint} if endpoint else {}
    summary = write(load(reference, options), to, folder, drop_weights)
    print_json(asdict(summary)) if as_json else say(summary.sentence)
