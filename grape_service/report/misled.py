"""Where GRAPE's mean over the whole response misleads: steps, the target's own family, long traces of teachers."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from grape_service.display import short
from grape_service.methods import SELECT
from grape_service.report.facts import Facts, SelectReport
from grape_service.report.families import families_of, is_same_model
from grape_service.report.warning import MIN_PROMPTS, ReportWarning, compared_prompts, share
from grape_service.rows.statistics import LOGPROB

LONG_TOKENS = 1024
"""Responses of at least so many tokens in the median are long traces."""
STEP_RATIO = 1.25
"""Winners whose steps are longer than their rivals' by this factor, or shorter, are told of."""
BEYOND = 0.1
"""How much more of the kept rows than of the candidates the target's own family has where that is told of."""


def misled(facts: Facts, select: SelectReport) -> list[ReportWarning]:
    """Warnings of a choice by grape, from the report's statistics of select."""
    if select["contested"] < MIN_PROMPTS or (facts["config"].get("select") or {}).get("method", "grape") != "grape":
        return []
    return [*_steps(select), *_long_traces(select)]


def _steps(select: SelectReport) -> list[ReportWarning]:
    winner, rival = select.get("winner_step_tokens"), select.get("rival_step_tokens")
    if not winner or not rival or 1 / STEP_RATIO <= winner / rival <= STEP_RATIO:
        return []
    kind = "longer" if winner > rival else "shorter"
    return [
        ReportWarning(
            f"Winners have {kind} steps than their rivals: {winner:.0f} tokens a step against {rival:.0f}."
            f"{_other(select)}",
            "The first token of a step is improbable whatever it says, so a mean over tokens goes with the length of "
            "steps: compare with select.method: steps, which leaves those tokens out and scores nothing again.",
        )
    ]


def _other(select: SelectReport) -> str:
    """How many of the choices `steps` makes too, in a sentence."""
    same = (select.get("agree") or {}).get("steps")
    compared = compared_prompts(select, "steps")
    return (
        "" if same is None or not compared else f" Without the first tokens of steps {share(same, compared):.0%} stay."
    )


def _long_traces(select: SelectReport) -> list[ReportWarning]:
    from grape_service.report.statistics import LENGTH_EDGES, quantile

    teachers = [name for name, number in zip(select["names"], select["prompts_with"], strict=True) if number]
    median = quantile(select["lengths"], np.asarray(LENGTH_EDGES), 0.5)
    if len(teachers) < 2 or median is None or median < LONG_TOKENS:
        return []
    return [
        ReportWarning(
            f"{len(teachers)} sources compete with long responses ({median:,.0f} tokens in the median): a mean over "
            "the whole response then tells of style and step length more than of what the target can learn.",
            "Compare with select.method: steps, local (each step with a short window before it) or rsr, and limit each "
            "source with select.max_source_share.",
        )
    ]


def kin(facts: Facts) -> tuple[dict[str, int], dict[str, int], set[str]]:
    """(kept, candidates) rows by source of the target's own family: by the names of source and policy, or by what the
    release says of its policy's tokenizer and architecture; and how they are of it, in words."""
    config, select = facts["config"], facts["counts"].get("select") or {}
    target = str((config.get("target") or {}).get("model") or "")
    writers = (config.get("behavior") or {}).get("sources") or {}
    told = facts["statistics"].get("kin") or {}
    families, kept, candidates, how = families_of(target), {}, {}, set()
    for source, counts in (select.get("sources") or {}).items():
        writer = writers.get(source)
        names = [source, str((writer.get("model") if isinstance(writer, dict) else None) or "")]
        reasons = set(told.get(source) or ())
        if target and any(is_same_model(name, target) or families & families_of(name) for name in names):
            reasons.add("name")
        if reasons:
            how |= reasons
            kept[source], candidates[source] = counts["kept"], counts["candidates"]
    return kept, candidates, how


def own_family(facts: Facts) -> list[ReportWarning]:
    """Where winners are of the target's own family beyond its share of the candidates."""
    select = facts["counts"].get("select") or {}
    kept, candidates, how = kin(facts)
    of_kept = share(sum(kept.values()), select.get("kept_rows", 0))
    of_all = share(sum(candidates.values()), sum(one["candidates"] for one in (select.get("sources") or {}).values()))
    if select.get("kept_prompts", 0) < MIN_PROMPTS or of_kept - of_all < BEYOND:
        return []
    named = ", ".join(short(name) for name in sorted(kept, key=lambda name: -kept[name])[:3])
    return [
        ReportWarning(
            f"The target's own family has {of_kept:.0%} of the kept rows and {of_all:.0%} of the candidates ({named}; "
            f"by {', '.join(sorted(how))}).",
            "The target finds its own kind of text probable, whether or not it is better: compare with "
            "select.method: steps, local or rsr, or set select.max_source_share.",
        )
    ]


class Overlap(TypedDict):
    """Two rules that are laid beside each other."""

    left: str
    right: str
    share: float  # of the prompts, those in which both choose the same candidate
    prompts: int


def overlaps(select: SelectReport) -> list[Overlap]:
    """A line for each two of the rules that are laid beside each other."""
    found: list[Overlap] = []
    for pair, same in sorted((select.get("overlap") or {}).items()):
        left, right = (("grape" if name == "mean" else name) for name in pair.split("|"))
        compared = compared_prompts(select, left, right)
        found.append({"left": left, "right": right, "share": share(same, compared), "prompts": compared})
    return found


def not_compared(select: SelectReport, method: str) -> list[tuple[str, str]]:
    """Methods of which nobody knows what they would choose, each with the scores that they lack; `method`: the one that
    chose."""
    found = []
    for name, one in SELECT.items():
        if name in ("grape", method) or name in select["agree"]:
            continue
        lacks = [statistic for statistic in one.statistics if statistic != LOGPROB]
        lacks += ["each step scored in its window"] if one.scores_windows else []
        if lacks:
            found.append((name, ", ".join(lacks)))
    return found
