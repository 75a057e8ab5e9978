"""Weights methods that are functions of the target's statistics alone, by name: PEAR, which compares two policies, has
its own way (pear.py).

Each gives log weights [L]. All share what is done with them:

    weight_t = exp(clip(log weight_t, lo_w, hi_w))

and `normalize`, which divides the weights by their mean over the response or the dataset.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from grape_service.config.methods import WeightsConfig
from grape_service.errors import UserError
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import Int64s, segment_sums
from grape_service.weigh.entropy import entropy_log_weights
from grape_service.weigh.pear import TokenWeights
from grape_service.weigh.probability import probability_log_weights

OURS = {"probability": probability_log_weights, "entropy": entropy_log_weights}


def token_weights(batch: MethodBatch, config: WeightsConfig) -> TokenWeights:
    """Weights of the batch's tokens by `config.method`; `normalize: dataset` is left to the caller.

    Raises UserError where a user's own function gives no weights.
    """
    if len(batch) == 0:
        return clipped_weights(np.zeros(0), batch.offsets, config)
    own = config.own
    if own is None:
        return clipped_weights(OURS[config.method](batch, config), batch.offsets, config)
    with np.errstate(divide="ignore"):
        return clipped_weights(np.log(own(batch)), batch.offsets, config)


def clipped_weights(log_weights: npt.NDArray[np.float64], offsets: Int64s, config: WeightsConfig) -> TokenWeights:
    """Weights from log weights [L], which may be -inf."""
    low, high = config.weight_clip
    with np.errstate(over="ignore"):
        weights = np.exp(np.clip(log_weights, low, high))
    if not np.isfinite(weights).all():
        raise UserError("a weight is not finite: give weights.weight_clip an upper bound such as 5")
    if config.normalize == "sequence":
        lengths = np.diff(offsets)
        weights *= np.repeat(lengths / np.maximum(segment_sums(weights, offsets), np.finfo(float).tiny), lengths)
    none = np.zeros(len(offsets) - 1, dtype=np.int64)
    return TokenWeights(
        weights, none, none, segment_sums(log_weights < low, offsets), segment_sums(log_weights > high, offsets)
    )
