"""The pages of a folder: all datasets, one of them, what changed between two versions, runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from typing import Any

from fastapi import APIRouter, Response

from grape_service.release.rounds import all_rounds
from grape_service.ui.changes import Changes
from grape_service.ui.folder import READERS, Folder
from grape_service.ui.guard import READS
from grape_service.ui.render import Place, page
from grape_service.ui.runs import run_record, runs_of

LISTED = 50
"""Datasets, or versions of one, of one page."""
MAX_AGE = 60.0
"""Seconds for which what was read of a dataset is good enough to search and sort more than a page of them."""
SORTS: dict[str, Callable[[Any], Any]] = {
    "name": lambda s: s.name,
    "version": lambda s: s.num_versions,
    "rows": lambda s: s.rows,
    "target": lambda s: s.made_by.target,
    "method": lambda s: s.made_by.method,
    "pool": lambda s: s.made_by.pool,
    "created": lambda s: s.created,
    "warnings": lambda s: s.warnings or 0,
}


class FolderPages:
    """Each method is a page; its parameters are those of the address."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self.changes = Changes(folder)

    def router(self) -> APIRouter:
        """The pages by their addresses."""
        router = APIRouter()
        for path, function in (
            ("/", self.catalog),
            ("/runs", self.runs),
            ("/runs/{run_id}", self.run),
            ("/compare/{name}", self.compare),
            ("/datasets/{name}", self.dataset),
        ):
            router.add_api_route(path, function, methods=list(READS))
        return router

    def catalog(self, q: str = "", sort: str = "", order: str = "", start: Place = 0) -> Response:
        folder = self.folder
        names, words = folder.names(), q.lower().split()
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

    def runs(self) -> Response:
        alive, ended, problem = runs_of(self.folder)
        with ThreadPoolExecutor(READERS) as pool:
            records = list(pool.map(partial(run_record, self.folder), ended))
        return page("runs", folder=self.folder, alive=alive, ended=records, problem=problem)

    def run(self, run_id: str) -> Response:
        return page("run", folder=self.folder, run=run_record(self.folder, run_id))

    def compare(self, name: str, a: str = "", b: str = "", all: bool = False) -> Response:
        found = self.changes.between(name, a, b, whole=all)
        return page("compare", folder=self.folder, name=name, **found)

    def dataset(self, name: str, start: Place = 0) -> Response:
        entries = self.folder.versions(name)
        tags, problems = self.folder.tags(name)
        names: dict[str, list[str]] = {}
        for tag in tags:
            names.setdefault(tag.version, []).append(tag.name)
        pairs = list(zip(entries, [*entries[1:], None], strict=True))[start : start + LISTED]
        return page(
            "dataset",
            folder=self.folder,
            name=name,
            entries=entries,
            shown=pairs,  # each with the version before it
            start=start,
            listed=LISTED,
            tags=tags,
            names=names,
            problems=problems,
            jobs=[job for job in reversed(all_rounds(self.folder.storage, name)) if job.rounds],
        )


def _text_of(summary: Any) -> str:
    made_by = summary.made_by
    return " ".join([summary.name, summary.version, *summary.tags, *astuple(made_by)]).lower()
