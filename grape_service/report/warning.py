"""A sentence for a reader of a report, and what it takes to say one."""

from __future__ import annotations

from dataclasses import dataclass

from grape_service.methods import SELECT
from grape_service.report.facts import SelectReport

MIN_PROMPTS = 20
"""Shares of fewer prompts say nothing."""


@dataclass(frozen=True)
class ReportWarning:
    """One finding."""

    text: str
    change: str


def share(part: float, whole: float) -> float:
    """part / whole; 0 of nothing."""
    return part / whole if whole else 0.0


def compared_prompts(select: SelectReport, *rules: str) -> int:
    """Prompts in which other rules choose: those that have a choice, of a race those without a stopped candidate, and
    where one of `rules` cuts steps those that were drawn for it."""
    compared = select.get("compared", select["contested"])
    cuts_steps = any(name in SELECT and SELECT[name].cuts_steps for name in rules)
    return int(select.get("compared_steps", compared) if cuts_steps else compared)
