"""The web application: addresses, and what each page is given."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException

from grape_service.errors import StageError, UserError
from grape_service.release.manifest import without_secrets
from grape_service.release.verify import verify
from grape_service.report.page import facts_of_manifest, flow_of_rows, reasons_of
from grape_service.ui.changes import Changes
from grape_service.ui.folder import Folder, settings_of, warnings_in
from grape_service.ui.guard import REPORT_POLICY, Guard
from grape_service.ui.left_out import left_out
from grape_service.ui.lineage import drawing_of
from grape_service.ui.prompt import prompt_of_pool, prompt_of_row
from grape_service.ui.render import FILES, card_html, page, yaml_text
from grape_service.ui.rows import PAGE_ROWS, Filters, find_prompt, read_page, read_row
from grape_service.ui.runs import runs_of

log = logging.getLogger(__name__)
VERIFIED_AT_ONCE = 64 * 2**20
"""Bytes of a version whose digests the page of its files computes without being asked."""
LISTED = 50
"""Datasets of one page."""
MAX_AGE = 60.0
"""Seconds for which what was read of a dataset is good enough to search and sort more than a page of them."""
SORTS: dict[str, Callable[[Any], Any]] = {
    "name": lambda s: s.name,
    "version": lambda s: s.num_versions,
    "rows": lambda s: s.rows,
    "target": lambda s: s.target,
    "method": lambda s: s.method,
    "created": lambda s: s.created,
    "warnings": lambda s: s.warnings or 0,
}


def create_app(folder: Folder, token: str | None = None) -> FastAPI:
    """The pages of a folder of datasets; with a `token` for whoever has it, else for this machine alone."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=FILES / "static"))
    app.middleware("http")(Guard(token))
    changes = Changes(folder)

    @app.exception_handler(UserError)
    @app.exception_handler(StageError)
    def in_a_sentence(request: Request, error: Exception) -> Response:
        return page("problem", 404 if isinstance(error, UserError) else 502, sentence=str(error), folder=folder)

    @app.exception_handler(StarletteHTTPException)
    def no_such_page(request: Request, error: StarletteHTTPException) -> Response:
        return page("problem", error.status_code, sentence=f"there is no page {request.url.path}", folder=folder)

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s", request.url.path, exc_info=error)
        sentence = f"this page cannot be made ({type(error).__name__}); the terminal of `grape ui` says more"
        return page("problem", 500, sentence=sentence, folder=folder)

    @app.get("/")
    def catalog(q: str = "", sort: str = "", order: str = "", start: int = 0) -> Response:
        names, words, start = folder.names(), q.lower().split(), max(0, start)
        key = sort if sort in SORTS else "created" if len(names) <= LISTED else "name"
        down = order == "down" if order else key in ("created", "rows", "warnings", "version")
        if key == "name" and not words:  # those of the other pages are not read
            names = sorted(names, reverse=down)
            found, total = folder.summaries(names[start : start + LISTED]), len(names)
        else:
            max_age = MAX_AGE if len(names) > LISTED else 0.0
            every = [s for s in folder.summaries(names, max_age) if all(word in _text_of(s) for word in words)]
            every.sort(key=SORTS[key], reverse=down)
            found, total = every[start : start + LISTED], len(every)
            if max_age:
                found = folder.summaries([s.name for s in found])
        place: dict[str, Any] = {"shown": found, "total": total, "start": start, "listed": LISTED}
        return page("catalog", folder=folder, **place, q=q, sort=key, down=down)

    @app.get("/runs")
    def runs() -> Response:
        alive, ended, problem = runs_of(folder)
        return page("runs", folder=folder, alive=alive, ended=ended, problem=problem)

    @app.get("/compare/{name}")
    def compare(name: str, a: str = "", b: str = "", all: bool = False) -> Response:
        found = changes.between(name, a, b, whole=all)
        return page("compare", folder=folder, name=name, **found)

    @app.get("/datasets/{name}")
    def dataset(name: str) -> Response:
        entries = folder.versions(name)
        tags, problems = folder.tags(name)
        names: dict[str, list[str]] = {}
        for tag in tags:
            names.setdefault(tag.version, []).append(tag.name)
        return page("dataset", folder=folder, name=name, entries=entries, tags=tags, names=names, problems=problems)

    @app.get("/datasets/{name}/{version}")
    def version_page(name: str, version: str) -> Response:
        release = folder.release(name, version)
        if release.version != version:
            return RedirectResponse(f"/datasets/{name}/{release.version}", 307)
        facts = facts_of_manifest(release.manifest)
        target, method = settings_of(release.manifest)
        try:
            flow, reasons = flow_of_rows(facts), reasons_of(facts)
        except (KeyError, TypeError, ValueError, AttributeError):
            flow, reasons = [("released", release.row_count)], []
        try:
            drawing: Any = drawing_of(release)
        except (UserError, StageError, OSError) as error:
            log.warning("lineage of %s: %s", release.reference, error)
            drawing = None
        return page(
            "version",
            **about(release, "overview"),
            facts=facts,
            target=target,
            method=method,
            flow=flow,
            reasons=reasons,
            warnings=warnings_in(release.manifest),
            tags=folder.tags_of(name, release.version),
            drawing=drawing,
        )

    @app.get("/datasets/{name}/{version}/rows")
    def rows(
        name: str,
        version: str,
        start: int = 0,
        source: str = "",
        text: str = "",
        min_weight: str = "",
        max_weight: str = "",
        min_margin: str = "",
        max_margin: str = "",
    ) -> Response:
        release = folder.release(name, version)
        numbers = {
            "min_weight": min_weight,
            "max_weight": max_weight,
            "min_margin": min_margin,
            "max_margin": max_margin,
        }
        filters = Filters(source, text, **{key: _number(key, value) for key, value in numbers.items()})
        found = read_page(release, filters, max(0, start))
        asked = {"source": source, "text": text, **numbers}
        return page(
            "rows",
            **about(release, "rows"),
            found=found,
            asked={key: value for key, value in asked.items() if value},
            form=asked,
            sources=_sources_of(release),
            page_rows=PAGE_ROWS,
            filtered=filters.any,
        )

    @app.get("/datasets/{name}/{version}/rows/{number}")
    def row(name: str, version: str, number: int) -> Response:
        release = folder.release(name, version)
        wanted, siblings = read_row(release, number)
        found = prompt_of_row(folder, release, wanted, siblings)
        return page(
            "row", **about(release, "rows"), row=wanted, number=number, prompt_id=wanted["prompt_id"], found=found
        )

    @app.get("/datasets/{name}/{version}/prompt")
    def prompt(name: str, version: str, id: str) -> Response:
        release = folder.release(name, version)
        number = find_prompt(release, id)
        if number is not None:
            return RedirectResponse(f"/datasets/{name}/{release.version}/rows/{number}", 307)
        found = prompt_of_pool(folder, release, id)
        return page("row", **about(release, "left out"), row=None, number=None, prompt_id=id, found=found)

    @app.get("/datasets/{name}/{version}/left-out")
    def left_out_page(name: str, version: str) -> Response:
        release = folder.release(name, version)
        reasons, note = left_out(folder, release)
        return page("left_out", **about(release, "left out"), reasons=reasons, note=note)

    @app.get("/datasets/{name}/{version}/files")
    def files(name: str, version: str, verified: bool = False) -> Response:
        release = folder.release(name, version)
        wanted = verified or release.manifest.num_bytes <= VERIFIED_AT_ONCE
        problems = {problem.path: problem.problem for problem in verify(release)} if wanted else None
        return page("files", **about(release, "files"), problems=problems)

    @app.get("/datasets/{name}/{version}/card")
    def card(name: str, version: str) -> Response:
        release = folder.release(name, version)
        return page("card", **about(release, "card"), card=card_html(document(release, "README.md").decode()))

    @app.get("/datasets/{name}/{version}/config")
    def config(name: str, version: str) -> Response:
        release = folder.release(name, version)
        shown = yaml_text(without_secrets(release.manifest.config))
        return page("config", **about(release, "config"), shown=shown)

    @app.get("/datasets/{name}/{version}/report")
    def report(name: str, version: str) -> Response:
        release = folder.release(name, version)
        document(release, "report.html")
        return page("report", **about(release, "report"))

    @app.get("/datasets/{name}/{version}/report.html")
    def report_alone(name: str, version: str) -> Response:
        data = document(folder.release(name, version), "report.html")
        return HTMLResponse(data, headers={"Content-Security-Policy": REPORT_POLICY})

    def about(release: Any, tab: str) -> dict[str, Any]:
        base = f"/datasets/{release.name}/{release.version}"
        return {"folder": folder, "release": release, "base": base, "tab": tab}

    return app


def document(release: Any, name: str) -> bytes:
    """The card or the report of a version, if it is what the manifest says. Raises UserError."""
    entry = next((entry for entry in release.manifest.documents if entry.path == name), None)
    if entry is None:
        raise UserError(f"{release.reference} was published without {name}: see `grape report {release.reference}`")
    try:
        data: bytes = release.storage.read(f"{release.folder}/{name}")
    except FileNotFoundError as error:
        raise UserError(f"{release.path}/{name} is missing: see `grape datasets verify {release.reference}`") from error
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise UserError(f"{release.path}/{name} has other contents than its manifest says: it is not shown")
    return data


def _text_of(summary: Any) -> str:
    return " ".join([summary.name, summary.version, *summary.tags, summary.target, summary.method]).lower()


def _sources_of(release: Any) -> list[str]:
    """Names of the sources in the statistics of a release."""
    select = (release.manifest.statistics.get("report") or {}).get("select") or {}
    pool = (release.manifest.counts.get("pool") or {}).get("sources") or {}
    found = select.get("names") or pool
    return sorted(str(name) for name in found)[:200]


def _number(key: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{key.replace('_', ' ')} is '{text}': write a number such as 0.5") from None
