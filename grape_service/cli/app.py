"""The command tree."""

from __future__ import annotations

from typing import Annotated

import typer

from grape_service.cli import (
    check_commands,
    cluster_commands,
    dataset_commands,
    deploy_commands,
    lineage_commands,
    plan_commands,
    pool_commands,
    report_commands,
    run_commands,
    runs_commands,
    schema_commands,
    train_commands,
    ui_commands,
)
from grape_service.version import __version__

app = typer.Typer(
    name="grape",
    help="Decide what a language model learns from: score a pool, select with GRAPE, weigh with PEAR, release.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def grape(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Decide what a language model learns from."""


pool_commands.register(app)
run_commands.register(app)
check_commands.register(app)
dataset_commands.register(app)
lineage_commands.register(app)
plan_commands.register(app)
cluster_commands.register(app)
train_commands.register(app)
deploy_commands.register(app)
report_commands.register(app)
runs_commands.register(app)
schema_commands.register(app)
ui_commands.register(app)
