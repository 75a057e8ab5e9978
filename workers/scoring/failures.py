"""Rows that could not be scored: on record, counted, and too many of them.

runs/<run_id>/failures/<policy_id>/<partition>/<unit>.parquet       columns.FAILURE
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from grape_service.display import counted
from grape_service.errors import StageError
from grape_service.rows.columns import FAILURE
from grape_service.score.store import ScoreStore
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from workers.run import Run
from workers.scoring.metrics import ScoringMetrics
from workers.scoring.rows import read_unit
from workers.scoring.work import ScoreTotals, Unit


class FailureLimit:
    """Records the rows of units that failed too often as they fail, and stops a run that can no longer succeed."""

    def __init__(self, run: Run, share: float, rows: int, noun: str = "row", done: str = "scored"):
        """At most `share` of `rows` may fail; `noun` and `done`: what a row is, and what was to be done with it."""
        self.run, self.share, self.rows = run, share, rows
        self.noun, self.done = noun, done
        self.recorded = 0  # units

    def look(self, totals: ScoreTotals) -> None:
        """Write failed units to the failures table and count their rows. Raises StageError above the limit."""
        for work, reason in totals.failed_units[self.recorded :]:
            self.recorded += 1
            self.run.event(f"{_named(work.unit)} failed its last attempt and is skipped: {reason}")
            failed, scored = record_failed_unit(self.run.workspace, self.run.run_id, work.store_id, work.unit, reason)
            ScoringMetrics(self.run.name, work.store_id, gpus=0).add("grape_failures", failed)
            totals.failed += failed
            totals.reused += scored
        if totals.failed > self.share * self.rows:
            raise StageError(
                f"{totals.failed:,} of {counted(self.rows, self.noun)} could not be {self.done}, more than "
                f"workers.max_failed_share {self.share:g} allows: the run stops and nothing is published; run again to "
                "try them once more, or see the failures folder of the run"
            )


def _named(unit: Unit) -> str:
    return f"shard {unit.path}" if unit.last is None else f"row {unit.first} of shard {unit.path}"


def record_failed_unit(storage: Storage, run_id: str, store_id: str, unit: Unit, reason: str) -> tuple[int, int]:
    """Record the rows of a unit that still have no score; how many, and how many have one from an earlier attempt."""
    rows = read_unit(storage, unit, ["row_key", "prompt_id", "candidate_id"])
    missing = ScoreStore(storage, store_id).missing(unit.partition, rows["row_key"], unit.statistics)
    failed = rows.take(pa.array(np.flatnonzero(missing)))
    if failed.num_rows:
        write_failures(storage, run_id, store_id, unit, failed, [reason] * failed.num_rows)
    return failed.num_rows, rows.num_rows - failed.num_rows


def write_failures(
    workspace: Storage, run_id: str, policy_id: str, unit: Unit, rows: pa.Table, reasons: list[str]
) -> None:
    """Record rows that could not be scored, with the reason for each: see `failure_files`."""
    table = pa.table(
        {
            "row_key": rows["row_key"],
            "prompt_id": rows["prompt_id"],
            "candidate_id": rows["candidate_id"],
            "policy": pa.array([policy_id] * rows.num_rows, pa.string()),
            "reason": pa.array(reasons, pa.string()),
        }
    ).cast(FAILURE)
    name = unit.path.removesuffix(".parquet").replace("/", "-")[-80:]
    part = "" if unit.last is None else f"-{unit.first}-{unit.last}"
    path = f"{_failures_folder(run_id, policy_id)}/{unit.partition}/{name}{part}.parquet"
    write_parquet(workspace, path, FAILURE, table.to_batches())


def failure_files(workspace: Storage, run_id: str, policy_id: str) -> dict[str, list[str]]:
    """The files of rows that a run could not score under a policy, by partition: one listing."""
    found: dict[str, list[str]] = {}
    for info in workspace.list(_failures_folder(run_id, policy_id)):
        found.setdefault(info.path.split("/")[-2], []).append(info.path)
    return found


def _failures_folder(run_id: str, policy_id: str) -> str:
    return f"runs/{run_id}/failures/{policy_id}"
