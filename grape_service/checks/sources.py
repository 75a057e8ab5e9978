"""Sources that always or never win."""

from __future__ import annotations

from typing import TypedDict

import pyarrow as pa

from grape_service.checks.findings import CheckCounts, CheckResult, result_of
from grape_service.config.checks import Sources
from grape_service.display import short
from grape_service.rows.columns import FINDING


class SourceWins(TypedDict):
    """Of the statistics of selection, what the check looks at."""

    names: list[str]
    prompts_with: list[int]  # by source, kept prompts with a choice of which a candidate is of it
    wins: list[int]  # by source, those of them that it wins


def check_sources(check: Sources, select: SourceWins) -> tuple[CheckResult, pa.Table]:
    """The check's result, from the statistics of selection, and a finding for each flagged source."""
    looked_at = 0
    flagged: list[tuple[str, str]] = []  # reason, detail
    for name, present, wins in zip(select["names"], select["prompts_with"], select["wins"], strict=True):
        if present < check.min_prompts or len(select["names"]) == 1:
            continue
        looked_at += 1
        if wins > check.always * present or wins < check.never * present:
            reason = "always wins" if wins > check.always * present else "never wins"
            flagged.append((reason, f"{short(name)} wins {wins:,} of {present:,} prompts"))
    reasons = {reason: [r for r, _ in flagged].count(reason) for reason, _ in flagged}
    counts = CheckCounts(looked_at, len(flagged), 0.0, reasons)
    result = result_of(check, counts)
    if flagged:
        result["warning"] = f"Check sources: {'; '.join([detail for _, detail in flagged][:5])}."
    rows = [{"check": check.name, "reason": reason, "detail": detail} for reason, detail in flagged]
    return result, pa.Table.from_pylist(rows, schema=FINDING)
