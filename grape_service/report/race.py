"""What a race spared and, where it takes a risk, how often it keeps what scoring every token keeps."""

from __future__ import annotations

import math

from grape_service.config.methods import RaceRisk, ScoreConfig
from grape_service.json_types import JsonObject
from grape_service.select.counts import SelectCounts

NORMAL = 1.959963984540054
"""Two-sided 95% of the normal distribution."""


def wilson(found: int, number: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, of which `found` of `number` were seen; all of [0, 1] where none was."""
    if number == 0:
        return 0.0, 1.0
    share, weight = found / number, NORMAL**2 / number
    middle = (share + weight / 2) / (1 + weight)
    half = NORMAL * math.sqrt(share * (1 - share) / number + weight / number / 4) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def race_figures(score: ScoreConfig, counts: SelectCounts) -> JsonObject | None:
    """For the manifest, of counts of select; None where every token was scored.

    `same` is the share of audited prompts of which the race keeps the same candidates, `interval` Wilson's of 95%.
    """
    if score.race == "off":
        return None
    found: JsonObject = {
        "race": "exact" if isinstance(score.race, str) else "risk",
        "candidates": counts.candidates,
        "stopped": counts.stopped_candidates,
        "loss_tokens": counts.loss_tokens,
        "spared_loss_tokens": counts.stopped_tokens,
        "spared_share": counts.stopped_tokens / counts.loss_tokens if counts.loss_tokens else 0.0,
    }
    if isinstance(score.race, RaceRisk):
        same = counts.audited_same / counts.audited if counts.audited else None
        found |= {"risk": score.race.risk, "audit": score.race.audit, "audited": counts.audited, "same": same}
        found["interval"] = list(wilson(counts.audited_same, counts.audited)) if counts.audited else None
    return found
