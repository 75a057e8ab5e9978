"""The `grape` command. The one place that reaches up to flows and workers, when a command needs them."""

from __future__ import annotations

import sys

import click

from grape_service.errors import StageError, UserError


def main() -> None:
    """Run a command; exit with 0, 1 (a stage failed), 2 (something the user can put right) or 130 (Ctrl-C)."""
    from grape_service.cli.app import app

    try:
        status = app(standalone_mode=False)
    except UserError as error:
        status = _fail(str(error), 2)
    except StageError as error:
        status = _fail(str(error), 1)
    except click.ClickException as error:
        error.show()
        status = 2
    except (KeyboardInterrupt, click.Abort):
        status = _fail("stopped; run the same command again to go on from here", 130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(sentence: str, status: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return status
