"""Entropy weights (after arXiv 2601.02151): a token counts by how open the target finds its place.

With H20_t the entropy, in nats, of the target's 20 most probable tokens renormalised among themselves

    weight_t = (H20_t / scale)^alpha,   log weight_t = alpha * (log H20_t - log scale)

Implementations differ by the scale. log 20 = 3.0 (the default, scale 3) keeps weights between 0 and 1; others divide by
another constant, which multiplies all weights alike. A certain place has log weight -inf, which the clip holds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from grape_service.config.methods import WeightsConfig
from grape_service.rows.method_batch import MethodBatch


def entropy_log_weights(batch: MethodBatch, config: WeightsConfig) -> npt.NDArray[np.float64]:
    """Log weight of each token [L], before its clip."""
    with np.errstate(divide="ignore"):
        return config.alpha * (np.log(batch.statistics["top20_entropy"].astype(np.float64)) - np.log(config.scale))
