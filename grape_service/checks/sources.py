"""Sources that always or never win."""

from __future__ import annotations

from typing import Any

from grape_service.checks.findings import CheckCounts, result_of
from grape_service.checks.settings import Check


def check_sources(check: Check, select: dict[str, Any]) -> dict[str, Any]:
    """The check's result, from the statistics of selection."""
    settings = check.settings
    looked_at = 0
    touched: dict[str, str] = {}
    for name, present, wins in zip(select["names"], select["prompts_with"], select["wins"], strict=True):
        if present < settings["min_prompts"] or len(select["names"]) == 1:
            continue
        looked_at += 1
        if wins > settings["always"] * present or wins < settings["never"] * present:
            touched[name] = f"{name} wins {wins:,} of {present:,} prompts"
    counts = CheckCounts(looked_at, len(touched), 0.0, dict.fromkeys(touched.values(), 1))
    result = result_of(Check(check.name, check.action, {**settings, "max_share": 1.0}), counts, None)
    if touched:
        result["warning"] = f"Check sources: {'; '.join(list(touched.values())[:5])}."
    return result
