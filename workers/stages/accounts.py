"""What a stage gives adds up with what it was given: checked between all stages, and here alone."""

from __future__ import annotations

from collections.abc import Sequence

from grape_service.config.gather import VerifyConfig
from grape_service.errors import StageError
from grape_service.gather.candidates import GatherCounts
from grape_service.prepare.result import Prepared
from grape_service.release.manifest import FileEntry
from grape_service.rows.counts import check_sum
from grape_service.select.counts import SelectCounts
from grape_service.weigh.counts import WeighCounts
from workers.scoring.work import ScoreTotals


def check_gathered(name: str, counts: GatherCounts, failed: int, verify: VerifyConfig) -> None:
    """Every sample that a policy was asked for is there, or among the `failed` ones, and each has its verdict."""
    missing = counts.wanted - counts.samples
    if missing > failed:
        raise StageError(
            f"gather.policies.{name}: {missing:,} of {counts.wanted:,} samples are not there, and {failed:,} failures "
            "were reported: run again, which makes what is missing"
        )
    if verify.method != "none":
        said = {"right": counts.right, "wrong": counts.wrong, "unknown": counts.unknown}
        check_sum(f"gather.policies.{name}: samples", counts.samples, said)


def check_scored(stage: str, rows: int, totals: ScoreTotals) -> None:
    """Every row was scored, had its scores, was stopped by a race, or has failed."""
    found = {"scored": totals.rows, "scored before": totals.reused, "stopped": totals.stopped, "failed": totals.failed}
    check_sum(f"{stage}: rows", rows, found)


def check_selected(prepared: Prepared, counts: SelectCounts) -> None:
    """Every prepared row was looked at, with each statistic that it needs or a failure that was counted, and is kept
    or left out for a reason."""
    check_sum("prepared rows", prepared.rows, {"seen by select": counts.candidates})
    check_sum("prepared prompts", prepared.prompts, {"seen by select": counts.prompts})
    check_sum("select: rows", counts.candidates, {"kept": counts.kept_rows, **counts.rows_left_out})
    check_sum("select: prompts", counts.prompts, {"kept": counts.kept_prompts, **counts.prompts_left_out})
    if counts.unexplained_failures:
        raise StageError(
            f"select: {counts.unexplained_failures:,} rows lack a score or another statistic, and no failure was "
            "reported for them: nothing is published; run again, which looks at every row and scores what is missing"
        )
    if counts.not_finite:
        raise StageError(
            f"select: the stored scores of {counts.not_finite:,} rows are not finite, so their files were damaged or "
            "written by another program: move the policy's folder out of the workspace's scores and run again"
        )


def check_weighed(kept_rows: int, counts: WeighCounts, totals: Sequence[ScoreTotals]) -> None:
    """Every kept row is weighed or left out for a reason; a row that lacks a score is one whose failure was counted."""
    check_sum("kept rows", kept_rows, {"seen by weigh": counts.rows_in})
    check_sum(
        "weigh: rows",
        counts.rows_in,
        {
            "weighed": counts.weighed_rows,
            "of weight 1": counts.uniform_rows,
            "without a behavior": counts.dropped_rows,
            "of prompts with a failed row": counts.rows_of_failed_prompts,
        },
    )
    unscored, failed = sum(counts.failed_rows.values()), sum(total.failed for total in totals)
    if unscored > failed:
        raise StageError(
            f"weigh: {unscored:,} rows lack a score, and {failed:,} failures were reported: nothing is published; run "
            "again, which looks at every row and scores what is missing"
        )


def check_released(rows: int, entries: Sequence[FileEntry]) -> None:
    """Every weighed row is in a data file."""
    check_sum("weighed rows", rows, {"in data files": sum(entry.rows for entry in entries)})
