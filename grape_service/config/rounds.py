"""Rounds of training: what is done again under each checkpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from grape_service.config.base import Model

Again = Literal["again", "keep"]


class RefreshConfig(Model):
    """What each round after the first does under the checkpoint of the one before."""

    select: Again = "again"
    """again: all candidates are scored and the rows chosen anew; keep: the rows of the first round stay."""
    weights: Again = "again"
    """again: rows are weighed anew; keep: their weights stay, which needs select: keep where there are weights."""
    max_churn: float = Field(0.5, ge=0, le=1)
    """A round of which more than this share of the rows were not in the round before, or of whose rows more than this
    share are gone, stops before anything is trained on it."""
