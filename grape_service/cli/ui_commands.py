"""grape ui: a page of all datasets, in a browser."""

from __future__ import annotations

import contextlib
import html
import logging
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grape_service.addresses import LOOPBACK
from grape_service.cli.dataset_commands import OptionalPathArgument
from grape_service.cli.last_folder import folder_or_last
from grape_service.cli.output import EndpointOption, say, storage_options
from grape_service.errors import UserError, best_effort

if TYPE_CHECKING:
    from grape_service.ui.folder import Folder

READ_AHEAD = 2000
"""Datasets that are read before somebody asks for them."""
TOKEN = "GRAPE_UI_TOKEN"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: grape ui s3://team/datasets")(ui)


def ui(
    path: OptionalPathArgument = None,
    host: Annotated[str, typer.Option("--host", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8765,
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="The workspace of its runs; default: .grape in the folder.")
    ] = None,
    root_path: Annotated[
        str, typer.Option("--root-path", help="What a proxy puts before each path, if it sends no X-Forwarded-Prefix.")
    ] = "",
    no_token: Annotated[
        bool,
        typer.Option("--no-token", help="On loopback: let every user and program of this machine read all of it."),
    ] = False,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    endpoint: EndpointOption = None,
) -> None:
    """Show all datasets of a folder in a browser: versions, what changed, rows, what was left out, runs. Reads only.

    Whoever has the token may look: that of GRAPE_UI_TOKEN, or a new one in the address that is printed.
    """
    import uvicorn

    from grape_service.ui.app import create_app
    from grape_service.ui.folder import Folder
    from grape_service.ui.guard import check_root_path, check_token

    folder = Folder(folder_or_last(path, "grape ui"), storage_options(endpoint), workspace)
    root_path = check_root_path(root_path)
    own = os.environ.get(TOKEN)
    token = None if no_token else check_token(own) if own else secrets.token_urlsafe(24)
    if no_token and host not in LOOPBACK:
        raise UserError(f"--no-token is for loopback: on {host} everybody could read {folder.address}; leave one away")
    listener = _listener(host, port)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listener.getsockname()[1]}{root_path}/"
    shown = f"{address}?token={token}" if token and not own else address
    say(f"{folder.address} is shown at {shown}")
    if no_token:
        say("Without a token: every user and program of this machine can read it, with your credentials")
    say("Ctrl-C ends it")
    _log_to_standard_error()
    threading.Thread(target=_read_ahead, args=(folder,), daemon=True).start()
    app = create_app(folder, token, root_path)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    with _opened(shown) if open_it else contextlib.nullcontext():
        uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _opened(address: str) -> Iterator[None]:
    """Open an address in the browser by a file that only this user can read: others see the arguments of a browser."""
    with tempfile.TemporaryDirectory(prefix="grape-ui-") as folder:  # 0700
        file = Path(folder) / "open.html"
        quoted = html.escape(address)
        file.write_text(f'<meta http-equiv="refresh" content="0; url={quoted}"><a href="{quoted}">grape ui</a>')
        typer.launch(str(file))
        yield


def _log_to_standard_error() -> None:
    """Who asked for what, without tokens, a line each."""
    from grape_service.ui import guard

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    guard.log.addHandler(handler)
    guard.log.setLevel(logging.INFO)
    guard.log.propagate = False


def _read_ahead(folder: Folder) -> None:
    """Read what the first page shows, then one after the other what searching and sorting look at, while nobody has
    asked for it yet: connections, manifests and tags are kept."""
    from grape_service.ui.folder_pages import LISTED, MAX_AGE

    with best_effort("read ahead"):
        names = folder.names()
        folder.summaries(names[:LISTED])
        for name in names[LISTED:READ_AHEAD]:
            folder.summaries([name], MAX_AGE)


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError where it cannot."""
    try:
        kind, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(kind, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        return listener
    except OSError as error:
        raise UserError(f"nothing can listen on {host}:{port} ({error.strerror}): choose another --port") from None
