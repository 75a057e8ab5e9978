"""What a version left out: counts by stage and reason, and examples out of its workspace."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from grape_service.errors import StageError, UserError
from grape_service.release.load import Release
from grape_service.report.facts import facts_of_manifest
from grape_service.report.page import reasons_of
from grape_service.rows.candidate import Row
from grape_service.storage.parquet import open_parquet
from grape_service.storage.storage import Storage
from grape_service.storage.workspace import refuse_newer
from grape_service.ui.folder import Folder

EXAMPLES = 5
"""Rows shown for a reason."""
LOOK_SECONDS = 3.0
MAX_FILES = 64
"""Files of examples that are opened at most."""


@dataclass
class Reason:
    """Why rows were left out, and some of them."""

    stage: str
    reason: str
    rows: int | None  # None: not counted in the manifest
    examples: list[dict[str, Any]] = field(default_factory=list)


def left_out(folder: Folder, release: Release) -> tuple[list[Reason], str]:
    """Every reason with examples where they can be read, and a sentence about those that cannot; "" if all can."""
    try:
        found = [Reason(*row) for row in reasons_of(facts_of_manifest(release.manifest))]
    except (KeyError, TypeError, ValueError, AttributeError):
        return [], "the counts of the manifest are not those of a release that this program knows"
    parents = release.manifest.parents
    tables = [("prepare", f"prepared/{parents.prepare_id}/rejects")] if parents.prepare_id else []
    tables += [("score", f"runs/{parents.run_id}/failures")] if parents.run_id else []
    note = ""
    for stage, place in tables:
        for workspace in folder.workspaces:
            try:
                refuse_newer(workspace)
                _add_examples(workspace, place, stage, found)
            except UserError as error:
                note = str(error)
            except (StageError, pa.ArrowException, OSError) as error:
                note = f"the examples in {workspace.url(place)} cannot be read: {type(error).__name__}"
    if not note and not any(reason.examples for reason in found) and any(r.stage == "prepare" for r in found):
        known = f"; the run's was {parents.workspace}" if parents.workspace else ""
        note = f"there are no examples in the workspace {folder.workspaces[0].root}{known}"
    return found, note


def _add_examples(workspace: Storage, place: str, stage: str, found: list[Reason]) -> None:
    deadline = time.monotonic() + LOOK_SECONDS
    reasons = {reason.reason: reason for reason in found if reason.stage == stage}
    for info in workspace.list(place)[:MAX_FILES]:
        if not info.path.endswith(".parquet"):
            continue
        with open_parquet(workspace, info.path) as file:
            for batch in file.iter_batches(2048):
                for row in batch.to_pylist():
                    name = str(row.get("reason"))
                    if name not in reasons:
                        reasons[name] = Reason(stage, name, None)
                        found.append(reasons[name])
                    if len(reasons[name].examples) < EXAMPLES:
                        row.pop("row_key", None)
                        reasons[name].examples.append(with_line(row))
                full = all(len(reason.examples) >= EXAMPLES for reason in reasons.values())
                if full or time.monotonic() > deadline:
                    return


def with_line(row: Row) -> dict[str, Any]:
    """An example with the file and its line, counted from 1 as editors do, in one; others as they are."""
    if row.get("file") is None or row.get("row") is None:
        return row
    others = {name: value for name, value in row.items() if name not in ("file", "row")}
    return {"file:line": f"{row['file']}:{row['row'] + 1}", **others}
