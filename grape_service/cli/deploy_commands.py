"""grape deploy: a config as a scheduled deployment of Prefect's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from grape_service.cli.output import (
    ConfigArgument,
    JsonOption,
    SetOption,
    config_of,
    print_json,
    say,
    stdout_to_stderr,
    use_prefect,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: grape deploy config.yaml --pool grape --cron '0 4 * * 1'")(deploy)


def deploy(
    config: ConfigArgument,
    pool: Annotated[str, typer.Option("--pool", help="The work pool whose worker runs it.")],
    cron: Annotated[
        str | None, typer.Option("--cron", help="When: minute hour day month weekday. Without it, on demand.")
    ] = None,
    timezone: Annotated[str, typer.Option("--timezone", help="Of the schedule, such as Europe/Paris.")] = "UTC",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Register the whole job of a config as a deployment of Prefect's, on a schedule."""
    settings = config_of(config, overrides)
    use_prefect()
    with stdout_to_stderr():
        from flows.deploy import deploy as register_deployment

        deployed = register_deployment(settings, pool, cron, timezone)
    if as_json:
        print_json(asdict(deployed))
        return
    say(f"deployed  {deployed.name}, {f'{cron} {timezone}' if cron else 'without a schedule'}")
    if deployed.secret_block:
        say(f"secrets   in Prefect's secret block {deployed.secret_block}, not among its parameters")
    for warning in deployed.warnings:
        say(f"warning   {warning}")
    say(f"look at   {deployed.url}")
    say(f"run it    prefect deployment run '{deployed.name}'")
