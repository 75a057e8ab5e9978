"""Steps without their first tokens (arXiv 2604.06834): of each prompt's responses, the one that the target finds most
probable where it goes on, not where it begins something.

The first token of a step branches, so its probability is low, and a mean over the whole response rises with the length
of its steps, whatever they say. For a response y of T counted tokens to prompt x, F the first `skip` of each step

    steps = (1 / (T - |F|)) * sum_{t not in F} log pi_target(y_t | x, y_<t)

The largest wins. With `skip: 0` it is grape_score. A response of which no token is left has no number and never wins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from grape_service.methods.base import Float64s, SelectKeys, SelectMethod
from grape_service.methods.select.grape import grape_scores
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.statistics import LOGPROB
from grape_service.rows.steps import places_in_step


class StepsKeys(SelectKeys):
    """Keys of steps alone."""

    skip: int = Field(1, ge=0)
    """For steps: how many tokens at the beginning of each step do not count."""


def steps_scores(batch: MethodBatch, skip: int) -> Float64s:
    """The mean of each candidate [N], from `logprob` and the steps; NaN where no token is left."""
    assert batch.steps is not None, "this method cuts steps"
    counted = places_in_step(batch.steps, batch.offsets) >= skip
    return grape_scores(batch.statistics[LOGPROB].astype(np.float64), counted, batch.offsets)


def _score(batch: MethodBatch, config: Any) -> Float64s:
    return steps_scores(batch, config.skip)


METHOD = SelectMethod("steps", _score, (LOGPROB,), source="arXiv 2604.06834", keys=StepsKeys, cuts_steps=True)
