"""The `grape` command. The one place that reaches up to flows and workers, when a command needs them."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

import typer

from grape_service.errors import StageError, UserError

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""A mistake in the command line. Newer typers bring a click of their own, older ones import it."""


def main() -> None:
    """Run a command; exit with 0, 1 (a stage failed), 2 (a user error) or 130 (Ctrl-C)."""
    from grape_service.cli.app import app
    from grape_service.cli.completion import rejoin_words

    rejoin_words()
    try:
        status = app(prog_name="grape", standalone_mode=False)
    except UserError as error:
        status = _fail(str(error), 2)
    except StageError as error:
        status = _fail(str(error), 1)
    except ClickException as error:
        status = _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        _fail("stopped; run the same command again to resume", status)
        _leave(INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _leave(status: int) -> None:
    """End this process without taking Python apart, in which Ray crashes where it was stopped while it started."""
    atexit._run_exitfuncs()  # Prefect's server and Ray end here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _usage(error: Any) -> int:
    """What is wrong with a command line in one sentence; the help where there is nothing but `grape`."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    path = error.ctx.command_path if getattr(error, "ctx", None) is not None else "grape"
    return _fail(f"{error.format_message().strip().rstrip('.')}; see `{path} --help`", 2)


def _fail(sentence: str, status: int) -> int:
    from grape_service.display import visible

    print(f"error: {visible(sentence)}", file=sys.stderr)
    return status
