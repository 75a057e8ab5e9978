"""Weights of rows by a method, of ours or a user's: of the target's statistics, or of two policies compared."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from grape_service.config.methods import WeightsConfig
from grape_service.methods.base import TokenWeights, clipped_weights
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import Int64s


def token_weights(batch: MethodBatch, config: WeightsConfig) -> TokenWeights:
    """Weights of the batch's tokens by a method that needs no behavior; `normalize: dataset` is left to the caller.

    Raises UserError where a user's own function gives no weights.
    """
    if len(batch) == 0:
        return clipped_weights(np.zeros(0), batch.offsets, config)
    own = config.own
    if own is not None:
        with np.errstate(divide="ignore"):
            return clipped_weights(np.log(own(batch)), batch.offsets, config)
    assert config.ours is not None
    assert config.ours.log_weights is not None, f"{config.method} compares two policies"
    return clipped_weights(config.ours.log_weights(batch, config), batch.offsets, config)


def compared_weights(ratios: npt.NDArray[np.float64], offsets: Int64s, config: WeightsConfig) -> TokenWeights:
    """Weights of responses from log ratios [L] of target and behavior, by a method that compares the two."""
    assert config.ours is not None
    assert config.ours.compare is not None, f"{config.method} compares no policies"
    return config.ours.compare(ratios, offsets, config)
