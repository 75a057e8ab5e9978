"""Rows of a pool that were not used, from the tables that prepare wrote: for `grape rejects`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.prepare.plan import FOLDER
from grape_service.release.load import Release
from grape_service.rows.candidate import Row
from grape_service.storage.parquet import read_row_groups
from grape_service.storage.storage import Storage
from grape_service.storage.workspace import open_workspace

COLUMNS = ["file", "row", "reason", "detail", "prompt_id", "candidate_id", "text"]


@dataclass(frozen=True)
class RejectTables:
    """Where the reject tables of a prepared pool are."""

    workspace: Storage
    folder: str


def rejects_of_release(release: Release) -> RejectTables:
    """The tables of the pool that a release was made from. Raises UserError where they are gone."""
    parents = release.manifest.parents
    if not parents.workspace or not parents.prepare_id:
        raise UserError(f"{release.reference} does not say which pool it was made from")
    workspace = open_workspace(parents.workspace, release.storage.options)
    folder = f"{FOLDER}/{parents.prepare_id}"
    if not workspace.exists(f"{folder}/plan.json"):
        raise UserError(
            f"the workspace of {release.reference} no longer holds its rejects: run `grape score` with its config "
            "to have them there again"
        )
    return RejectTables(workspace, f"{folder}/rejects")


def rejects_of_config(config: Config) -> RejectTables:
    """The tables of the last time that a config's pool was prepared. Raises UserError where it was not."""
    workspace = open_workspace(config.workspace_path, config.storage)
    paths = [f"{FOLDER}/{name}/plan.json" for name in workspace.folders(FOLDER)]
    plans = [workspace.info(path) for path in paths if workspace.exists(path)]
    for info in sorted(plans, key=lambda info: info.modified, reverse=True):
        if workspace.read_json(info.path)["pool"] == config.pool.address:
            return RejectTables(workspace, f"{info.path.removesuffix('/plan.json')}/rejects")
    raise UserError(
        f"the pool '{config.pool.address}' has no rejects in {workspace.root} yet: they are found by `grape run` (or "
        "`grape score`); before it, `grape check` tells why rows of a sample cannot be used"
    )


def read_rejects(tables: RejectTables, reason: str | None, limit: int) -> dict[str, Any]:
    """Counts by reason, how many have `reason`, the first `limit` of those and the address of the tables."""
    by_reason: dict[str, int] = {}
    rows: list[Row] = []
    for info in sorted(tables.workspace.list(tables.folder), key=lambda info: info.path):
        for table in read_row_groups(tables.workspace, info.path, COLUMNS):
            for item in pc.value_counts(table["reason"]).to_pylist():
                by_reason[item["values"]] = by_reason.get(item["values"], 0) + item["counts"]
            if len(rows) < limit:
                wanted = table if reason is None else table.filter(pc.equal(table["reason"], reason))
                rows += wanted.slice(0, limit - len(rows)).to_pylist()
    if reason is not None and reason not in by_reason:
        known = ", ".join(f"'{name}'" for name in by_reason) or "none at all"
        raise UserError(f"no row was rejected with the reason '{reason}'; there are {known}")
    ordered = sorted(by_reason, key=lambda name: (-by_reason[name], name))
    return {
        "by_reason": {name: by_reason[name] for name in ordered},
        "total": sum(by_reason.values()) if reason is None else by_reason[reason],
        "rows": rows,
        "table": tables.workspace.url(tables.folder),
    }
