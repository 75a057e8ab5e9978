"""Sources that always or never win."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from grape_service.checks.findings import FINDING, CheckCounts, result_of
from grape_service.checks.settings import Check
from grape_service.report.text import short


def check_sources(check: Check, select: dict[str, Any]) -> tuple[dict[str, Any], pa.Table]:
    """The check's result, from the statistics of selection, and a finding for each source that is touched."""
    settings = check.settings
    looked_at = 0
    touched: list[tuple[str, str]] = []  # reason, detail
    for name, present, wins in zip(select["names"], select["prompts_with"], select["wins"], strict=True):
        if present < settings["min_prompts"] or len(select["names"]) == 1:
            continue
        looked_at += 1
        if wins > settings["always"] * present or wins < settings["never"] * present:
            reason = "always wins" if wins > settings["always"] * present else "never wins"
            touched.append((reason, f"{short(name)} wins {wins:,} of {present:,} prompts"))
    reasons = {reason: [r for r, _ in touched].count(reason) for reason, _ in touched}
    counts = CheckCounts(looked_at, len(touched), 0.0, reasons)
    result = result_of(Check(check.name, check.action, {**settings, "max_share": 1.0}), counts, None)
    if touched:
        result["warning"] = f"Check sources: {'; '.join([detail for _, detail in touched][:5])}."
    rows = [{"check": check.name, "reason": reason, "detail": detail} for reason, detail in touched]
    return result, pa.Table.from_pylist(rows, schema=FINDING)
