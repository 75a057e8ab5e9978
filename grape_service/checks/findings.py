"""What a check says: rows with a reason each, and counts that add up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

import pyarrow as pa

from grape_service.config.checks import Check
from grape_service.rows.columns import FINDING
from grape_service.rows.counts import Counts


@dataclass
class CheckCounts(Counts):
    """Rows that a check looked at and found fault with."""

    rows: int = 0
    found: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Flagged:
    """Places of rows in a table, each with a reason and a detail."""

    rows: list[int]
    reasons: list[str]
    details: list[str | None]

    def table(self, name: str, looked_at: pa.Table) -> pa.Table:
        """As FINDING rows of `looked_at`, which has prompt_id and candidate_id."""
        places = pa.array(self.rows, type=pa.int64())
        columns = [looked_at[key].combine_chunks().take(places) for key in ("prompt_id", "candidate_id")]
        return pa.table(
            [pa.array([name] * len(self.rows), pa.string()), *columns, self.reasons, self.details], schema=FINDING
        )

    def counts(self, rows: int, seconds: float) -> CheckCounts:
        """Counts of `rows` rows looked at; a row counts once, however many reasons it has."""
        reasons: dict[str, int] = {}
        for reason in self.reasons:
            reasons[reason] = reasons.get(reason, 0) + 1
        return CheckCounts(rows, len(set(self.rows)), seconds, dict(sorted(reasons.items())))


class CheckResult(TypedDict):
    """A check's line in the manifest and the report."""

    name: str
    action: str
    scope: str
    rows: int  # that were looked at
    found: int  # of them, flagged
    reasons: dict[str, int]
    rows_per_second: int | None
    warning: str | None  # None where the share that is flagged is small enough
    change: str  # what to do about it
    table: NotRequired[str]  # the folder of the flagged rows


def result_of(check: Check, counts: CheckCounts) -> CheckResult:
    """What a check found."""
    share = counts.found / counts.rows if counts.rows else 0.0
    warning = None
    if share > check.max_share:
        worst = max(counts.reasons, key=lambda reason: counts.reasons[reason])
        looked_at = check.scope
        warning = (
            f"Check {check.name.replace('_', ' ')}: {counts.found:,} of {counts.rows:,} {looked_at} ({share:.1%}) "
            f"are flagged, most often: {worst}."
        )
    return {
        "name": check.name,
        "action": check.action,
        "scope": check.scope,
        "rows": counts.rows,
        "found": counts.found,
        "reasons": counts.reasons,
        "rows_per_second": round(counts.rows / counts.seconds) if counts.seconds else None,
        "warning": warning,
        "change": check.advice,
    }
