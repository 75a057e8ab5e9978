"""Entropy weights (after arXiv 2601.02151): a token counts by how open the target finds its place.

With H20_t the entropy, in nats, of the target's 20 most probable tokens renormalised among themselves

    weight_t = (H20_t / scale)^alpha,   log weight_t = alpha * (log H20_t - log scale)

Implementations differ by the scale. log 20 = 3.0 (the default, scale 3) keeps weights between 0 and 1; others divide by
another constant, which multiplies all weights alike. A certain place has log weight -inf, which the clip holds.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from grape_service.methods.base import Float64s, WeightsKeys, WeightsMethod
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.statistics import TOP20_ENTROPY


class EntropyKeys(WeightsKeys):
    """Keys of entropy weights."""

    scale: float = Field(3.0, gt=0)
    """For entropy: the top-20 entropy, in nats, at which a token's weight is 1."""
    alpha: float = Field(1.0, gt=0)
    """For entropy: the power of the top-20 entropy."""


def entropy_log_weights(batch: MethodBatch, config: EntropyKeys) -> Float64s:
    """Log weight of each token [L], before its clip."""
    with np.errstate(divide="ignore"):
        return config.alpha * (np.log(batch.statistics[TOP20_ENTROPY].astype(np.float64)) - np.log(config.scale))


METHOD = WeightsMethod(
    "entropy", EntropyKeys, "after arXiv 2601.02151", statistics=(TOP20_ENTROPY,), log_weights=entropy_log_weights
)
