"""The web application: its pages, and what is shown where one cannot be."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException

from grape_service.errors import StageError, UserError
from grape_service.ui.folder import Folder
from grape_service.ui.folder_pages import FolderPages
from grape_service.ui.guard import Guard
from grape_service.ui.render import FILES, page
from grape_service.ui.version_pages import VersionPages

log = logging.getLogger(__name__)


def create_app(folder: Folder, token: str | None = None, root_path: str = "") -> Guard:
    """The pages of a folder of datasets; with a `token` for whoever has it, else for this machine's own names alone.

    `root_path` is what a proxy in front puts before each path, if it does not say so in X-Forwarded-Prefix.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=FILES / "static"))
    app.include_router(FolderPages(folder).router())
    app.include_router(VersionPages(folder).router())
    _show_problems(app, folder)
    return Guard(app, token, root_path)


def _show_problems(app: FastAPI, folder: Folder) -> None:
    """Whatever goes wrong is a page with one sentence."""

    def problem(status: int, sentence: str) -> Response:
        return page("problem", status, sentence=sentence, folder=folder)

    @app.exception_handler(UserError)
    @app.exception_handler(StageError)
    def in_a_sentence(request: Request, error: Exception) -> Response:
        return problem(404 if isinstance(error, UserError) else 502, str(error))

    @app.exception_handler(RequestValidationError)
    def not_understood(request: Request, error: RequestValidationError) -> Response:
        return problem(422, _what_is_wrong(error.errors()[0]))

    @app.exception_handler(StarletteHTTPException)
    def no_such_page(request: Request, error: StarletteHTTPException) -> Response:
        return problem(error.status_code, f"there is no page {request.url.path}")

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s", request.url.path, exc_info=error)
        return problem(500, f"this page cannot be made ({type(error).__name__}); the terminal of `grape ui` says more")


def _what_is_wrong(error: Any) -> str:
    """A parameter of an address that is missing or is not what it should be."""
    name, given = error["loc"][-1], str(error.get("input"))[:60]
    if error["type"] == "missing":
        return f"this address needs '{name}': it ends with ?{name}=..."
    wanted = "true or false" if "bool" in error["type"] else "a whole number from 0 on"
    return f"'{name}' of this address is '{given}': write {wanted}"
