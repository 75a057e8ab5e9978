"""What commands print: tables for people on standard output, or one JSON object alone."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.text import Text

from grape_service.addresses import is_http_address
from grape_service.cli import tables
from grape_service.cli.completion import complete_reference
from grape_service.display import visible
from grape_service.errors import UserError
from grape_service.progress.log_lines import PROGRESS
from grape_service.progress.reporter import Silent, set_reporter

if TYPE_CHECKING:
    from grape_service.config.schema import Config

ConfigArgument = Annotated[str, typer.Argument(help="The config file (YAML).", metavar="CONFIG")]
ReferenceArgument = Annotated[
    str,
    typer.Argument(
        help="A dataset version: <output.path>/<name>@<tag or version>.",
        metavar="REF",
        autocompletion=complete_reference,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Override a key of the config, such as select.keep=2; may be repeated.", metavar="KEY=VALUE"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _quiet(wanted: bool) -> bool:
    if wanted:
        os.environ[PROGRESS] = "none"
    return wanted


def _verbose(wanted: bool) -> bool:
    if wanted and is_quiet():
        raise UserError("--quiet and --verbose exclude one another: leave one away")
    if wanted:
        os.environ[DEBUG] = "1"
    return wanted


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return os.environ.get(PROGRESS) == "none"


QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", callback=_quiet, is_eager=True, help="No progress; the result in one line.")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", callback=_verbose, help="Show what tasks and engines print.")
]
EndpointOption = Annotated[
    str | None, typer.Option("--endpoint", help="Endpoint of the S3 server, where it is not Amazon's.", metavar="URL")
]


DEBUG = "GRAPE_DEBUG"
LABEL = 10
"""Characters before what a label is of."""


def console() -> Console:
    """Standard output, for people."""
    return Console(soft_wrap=False)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE, default=str))
    sys.stdout.flush()


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Inside the block, whatever libraries and child processes print to standard output goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on standard output; cells are shown as text, whatever they hold."""
    tables.print_table(console(), title, columns, rows)


def say(text: str) -> None:
    """A line for people, without markup."""
    console().print(Text(visible(text)), soft_wrap=True)


def tell(label: str, text: str) -> None:
    """A sentence after a label, its lines broken between words where a terminal shows it."""
    screen = console()
    if not screen.is_terminal:
        say(f"{label:<{LABEL}}{text}")
        return
    lines = tables.wrapped(visible(text), max(screen.width - LABEL - 1, 20)).split("\n")
    for place, line in enumerate(lines):
        screen.print(Text(f"{'' if place else label:<{LABEL}}{line}"), soft_wrap=True)


def write_error_line(line: str) -> None:
    """A line on standard error."""
    print(visible(line), file=sys.stderr)


class _Told(Silent):
    def event(self, text: str) -> None:
        write_error_line(text)


@contextlib.contextmanager
def events_told() -> Iterator[None]:
    """Inside the block, what is worth telling of work without a progress bar goes to standard error, a line each."""
    set_reporter(_Told())
    try:
        yield
    finally:
        set_reporter(Silent())


def write_file(path: Path, text: str) -> Path:
    """Write a file that an option names; its absolute path. Raises UserError where that is not possible."""
    path, file = open_file(path)
    try:
        with file:
            file.write(text.encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another file") from None
    return path


def open_file(path: Path) -> tuple[Path, IO[bytes]]:
    """A file that an option names, with its absolute path, opened to be written. Raises UserError where that is not
    possible."""
    path = Path(os.path.expanduser(path)).absolute()
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} into: create it or name another")
    try:
        return path, path.open("wb")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another file") from None


def storage_options(endpoint: str | None) -> dict[str, Any]:
    """Storage options of commands that take no config."""
    return {"endpoint_url": endpoint} if endpoint else {}


def config_of(path: str, overrides: Sequence[str] | None = None) -> Config:
    """The config of a command, with what `--set` says."""
    from grape_service.config.loading import load_config

    return load_config(path, overrides or ())


def prefect_is_configured() -> bool:
    """Whether a Prefect API is named by the environment, the active profile or a prefect.toml. Imports no Prefect."""
    if os.environ.get("PREFECT_API_URL"):
        return True
    home = os.environ.get("PREFECT_HOME") or "~/.prefect"
    profiles = _toml(Path(os.path.expanduser(os.environ.get("PREFECT_PROFILES_PATH") or f"{home}/profiles.toml")))
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
    profile = profiles.get("profiles", {}).get(active, {})
    project = _toml(Path("prefect.toml")).get("api", {})
    return bool(profile.get("PREFECT_API_URL") or project.get("url"))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):  # Prefect itself says what is wrong with it
        return {}


def use_prefect() -> None:
    """Before Prefect is imported: a flow in this process needs no server set up and prints nothing of its own.

    Raises UserError where PREFECT_API_URL is not a valid address, or not that of a Prefect server.
    """
    address = os.environ.get("PREFECT_API_URL")
    if address and not is_http_address(address):
        raise UserError(f"PREFECT_API_URL '{address}' is not a valid address: write http://host:4200/api")
    defaults = {
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for worker in ("EventsWorker", "APILogWorker"):  # they warn of what a run that ends leaves untold to its server
        logging.getLogger(worker).setLevel(logging.ERROR)
    from flows.server import refuse_other_server

    refuse_other_server()


def user_name() -> str:
    """Who runs this command, for the record; the number of a user that has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
