"""grape schema: the config as a JSON schema for editors, or as the page of docs/."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from grape_service.cli.output import print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: grape schema > grape.schema.json")(schema)


def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/config.md instead.")] = False,
) -> None:
    """Print the JSON schema of the config, with which an editor completes keys and marks mistakes.

    A config names it in its first line: # yaml-language-server: $schema=grape.schema.json
    """
    if markdown:
        from grape_service.config.document import config_page

        sys.stdout.write(config_page())
        return
    from grape_service.config.document import config_schema

    print_json(config_schema())
