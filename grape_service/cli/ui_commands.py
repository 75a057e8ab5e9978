"""grape ui: a page of all datasets, in a browser."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from grape_service.cli.dataset_commands import OptionalPathArgument
from grape_service.cli.last_folder import folder_or_last
from grape_service.cli.output import EndpointOption, say, storage_options
from grape_service.errors import UserError, best_effort
from grape_service.loopback import LOOPBACK

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
    host: Annotated[
        str, typer.Option("--host", help="Where to listen; elsewhere than on loopback a token is asked for.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8765,
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="The workspace of its runs; default: .grape in the folder.")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    endpoint: EndpointOption = None,
) -> None:
    """Show all datasets of a folder in a browser: versions, what changed, rows, what was left out, runs. Reads only.

    The token for other hosts is GRAPE_UI_TOKEN of the environment, or a new one that is printed.
    """
    import uvicorn

    from grape_service.ui.app import create_app
    from grape_service.ui.folder import Folder

    folder = Folder(folder_or_last(path, "grape ui"), storage_options(endpoint), workspace)
    token = None if host in LOOPBACK else os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    listener = _listener(host, port)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listener.getsockname()[1]}/"
    shown = f"{address}?token={token}" if token and not os.environ.get(TOKEN) else address
    say(f"{folder.address} is shown at {shown}")
    say("Ctrl-C ends it")
    if open_it:
        typer.launch(shown)
    threading.Thread(target=_read_ahead, args=(folder,), daemon=True).start()
    config = uvicorn.Config(create_app(folder, token), log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])


def _read_ahead(folder: Folder) -> None:
    """Read what the first page shows, then one after the other what searching and sorting look at, while nobody has
    asked for it yet: connections, manifests and tags are kept."""
    from grape_service.ui.app import LISTED, MAX_AGE

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
