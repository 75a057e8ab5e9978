"""The pages of one version: what it is, its rows, what was left out, its files."""

from __future__ import annotations

import hashlib
import logging
import math
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from grape_service.errors import StageError, UserError
from grape_service.release.changes import since_of
from grape_service.release.load import Release
from grape_service.release.made_by import MadeBy
from grape_service.release.manifest import without_secrets
from grape_service.release.verify import verify
from grape_service.report.facts import facts_of_manifest
from grape_service.report.page import flow_of_rows, reasons_of
from grape_service.ui.folder import Folder, warnings_in
from grape_service.ui.guard import READS, REPORT_POLICY, root
from grape_service.ui.left_out import left_out
from grape_service.ui.lineage import drawing_of
from grape_service.ui.prompt import prompt_of_pool, prompt_of_row
from grape_service.ui.render import Place, card_html, page, yaml_text
from grape_service.ui.rows import PAGE_ROWS, SORTS, Filters, find_prompt, read_page, read_row, read_sorted

log = logging.getLogger(__name__)
VERIFIED_AT_ONCE = 64 * 2**20
"""Bytes of a version whose digests the page of its files computes without being asked."""


class VersionPages:
    """Each method is a page; `name` and `version`, which may be a tag, are those of the address."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def router(self) -> APIRouter:
        """The pages by their addresses."""
        router = APIRouter(prefix="/datasets/{name}/{version}")
        for path, function in (
            ("", self.overview),
            ("/rows", self.rows),
            ("/rows/{number}", self.row),
            ("/prompt", self.prompt),
            ("/left-out", self.left_out),
            ("/files", self.files),
            ("/card", self.card),
            ("/config", self.config),
            ("/report", self.report),
            ("/report.html", self.report_alone),
        ):
            router.add_api_route(path, function, methods=list(READS))
        return router

    def overview(self, name: str, version: str) -> Response:
        release = self.folder.release(name, version)
        if release.version != version:
            return RedirectResponse(_base(release), 307)
        facts = facts_of_manifest(release.manifest)
        made_by = MadeBy.of(release.manifest.config)
        try:
            flow, reasons = flow_of_rows(facts), reasons_of(facts)
        except (KeyError, TypeError, ValueError, AttributeError):
            flow, reasons = [("released", release.row_count)], []
        return self._page(
            "version",
            release,
            "overview",
            facts=facts,
            target=made_by.target,
            method=made_by.method + (f", keep {made_by.keep}" if made_by.keep else ""),
            pool=made_by.pool,
            flow=flow,
            reasons=reasons,
            since=since_of(release.manifest.counts),
            warnings=warnings_in(release.manifest),
            tags=self.folder.tags_of(name, release.version),
            drawing=_drawing(release),
        )

    def rows(
        self,
        name: str,
        version: str,
        start: Place = 0,
        source: str = "",
        text: str = "",
        min_weight: str = "",
        max_weight: str = "",
        min_margin: str = "",
        max_margin: str = "",
        sort: str = "",
        order: str = "",
    ) -> Response:
        release = self.folder.training_set(name, version)
        weights = {"min_weight": min_weight, "max_weight": max_weight}
        numbers = {**weights, "min_margin": min_margin, "max_margin": max_margin}
        filters = Filters(source, text, **{key: _number(key, value) for key, value in numbers.items()})
        down = order != "up"
        if sort in SORTS:
            found = read_sorted(release, filters, sort, down, start)
        else:
            sort, order = "", ""
            found = read_page(release, filters, start)
        asked = {"source": source, "text": text, **numbers, "sort": sort, "order": order}
        return self._page(
            "rows",
            release,
            "rows",
            found=found,
            asked={key: value for key, value in asked.items() if value},
            form=asked,
            sources=_sources_of(release),
            page_rows=PAGE_ROWS,
            filtered=filters.any,
            sort=sort,
            down=down,
        )

    def row(self, name: str, version: str, number: Place) -> Response:
        release = self.folder.training_set(name, version)
        wanted, siblings = read_row(release, number)
        found = prompt_of_row(self.folder, release, wanted, siblings)
        return self._page("row", release, "rows", row=wanted, number=number, prompt_id=wanted["prompt_id"], found=found)

    def prompt(self, name: str, version: str, id: str) -> Response:
        release = self.folder.training_set(name, version)
        number = find_prompt(release, id)
        if number is not None:
            return RedirectResponse(f"{_base(release)}/rows/{number}", 307)
        found = prompt_of_pool(self.folder, release, id)
        return self._page("row", release, "left out", row=None, number=None, prompt_id=id, found=found)

    def left_out(self, name: str, version: str) -> Response:
        release = self.folder.training_set(name, version)
        reasons, note = left_out(self.folder, release)
        return self._page("left_out", release, "left out", reasons=reasons, note=note)

    def files(self, name: str, version: str, verified: bool = False) -> Response:
        release = self.folder.release(name, version)
        wanted = verified or release.manifest.num_bytes <= VERIFIED_AT_ONCE
        problems = {problem.path: problem.problem for problem in verify(release)} if wanted else None
        return self._page("files", release, "files", problems=problems)

    def card(self, name: str, version: str) -> Response:
        release = self.folder.release(name, version)
        return self._page("card", release, "card", card=card_html(document(release, "README.md").decode()))

    def config(self, name: str, version: str) -> Response:
        release = self.folder.release(name, version)
        return self._page("config", release, "config", shown=yaml_text(without_secrets(release.manifest.config)))

    def report(self, name: str, version: str) -> Response:
        release = self.folder.release(name, version)
        document(release, "report.html")
        return self._page("report", release, "report")

    def report_alone(self, name: str, version: str) -> Response:
        data = document(self.folder.release(name, version), "report.html")
        return HTMLResponse(data, headers={"Content-Security-Policy": REPORT_POLICY})

    def _page(self, template: str, release: Release, tab: str, **values: Any) -> Response:
        return page(template, folder=self.folder, release=release, base=_base(release), tab=tab, **values)


def _base(release: Release) -> str:
    return f"{root()}/datasets/{release.name}/{release.version}"


def _drawing(release: Release) -> Any:
    try:
        return drawing_of(release)
    except (UserError, StageError, OSError) as error:
        log.warning("lineage of %s: %s", release.reference, error)
        return None


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
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise UserError(f"{key.replace('_', ' ')} is '{text}': write a number such as 0.5")
    return value
