"""Probability weights (after arXiv 2606.09396): a token counts by how probable the target finds it.

    weight_t = p_target(y_t | x, y_<t),   log weight_t = log pi_target(y_t | x, y_<t)

The paper takes the probability of a frozen model; here it is the target's, at step 0, so no new scoring is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from grape_service.methods.base import Float64s, WeightsKeys, WeightsMethod
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.statistics import LOGPROB

if TYPE_CHECKING:
    from torch import Tensor


def probability_log_weights(batch: MethodBatch, config: WeightsKeys) -> Float64s:
    """Log weight of each token [L], before its clip."""
    return batch.statistics[LOGPROB].astype(np.float64)


def probability_weights_n(target_n: Tensor, behavior_n: Tensor, sequence_n: Tensor, config: WeightsKeys) -> Tensor:
    """Weights [n], float32, without gradient: the probability of each token under the model that is trained, which
    makes nll the loss of DFT. `behavior_n` has no effect; shapes as in `pear_weights_n`."""
    import torch

    weights_n = target_n.detach().double().clamp(*config.weight_clip).exp()
    if config.normalize == "sequence":
        _, row_n, lengths_s = torch.unique_consecutive(sequence_n, return_inverse=True, return_counts=True)
        sums_s = torch.zeros(len(lengths_s), dtype=torch.float64, device=weights_n.device).index_add_(
            0, row_n, weights_n
        )
        weights_n = weights_n * (lengths_s / sums_s)[row_n]
    return weights_n.float()


METHOD = WeightsMethod(
    "probability",
    WeightsKeys,
    "after arXiv 2606.09396, with a frozen target",
    log_weights=probability_log_weights,
    online=probability_weights_n,
)
