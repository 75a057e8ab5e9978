"""Probability weights (after arXiv 2606.09396): a token counts by how probable the target finds it.

    weight_t = p_target(y_t | x, y_<t),   log weight_t = log pi_target(y_t | x, y_<t)

The paper takes the probability of a frozen model; here it is the target's, at step 0, so no new scoring is needed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from grape_service.config.methods import WeightsConfig
from grape_service.rows.method_batch import MethodBatch


def probability_log_weights(batch: MethodBatch, config: WeightsConfig) -> npt.NDArray[np.float64]:
    """Log weight of each token [L], before its clip."""
    return batch.statistics["logprob"].astype(np.float64)
