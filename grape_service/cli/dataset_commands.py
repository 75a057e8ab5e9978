"""grape datasets: what there is in a folder of releases, and what one holds."""

from __future__ import annotations

from typing import Annotated

import typer

from grape_service.cli.output import (
    EndpointOption,
    JsonOption,
    ReferenceArgument,
    print_json,
    print_table,
    say,
    storage_options,
)

datasets = typer.Typer(help="Dataset versions: list, show, compare, tag, verify, clean up.", no_args_is_help=True)
PathArgument = Annotated[str, typer.Argument(help="The output.path of configs: a folder of datasets.", metavar="PATH")]
