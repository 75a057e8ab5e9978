"""PEAR (arXiv 2602.01058, section 3): importance weights for SFT that is to be followed by RL.

With pi_target the model to be trained and pi_behavior the one that wrote the response, for the tokens
t = 1..T with loss of one response, the turn end included:

    delta_t = clip(log pi_target(y_t) - log pi_behavior(y_t), lo, hi)

    sequence   log G_t = sum_{j=1..T} delta_j                                        the same for every t
    token      log G_t = (T - t) * log(gamma) + sum_{j=t+1..T} delta_j               the last token has weight 1
    block      log G_t = (T - e_k) * log(gamma) + sum_{j=e_k+1..T} delta_j
               t in block k = tokens (k-1)B+1 .. e_k, e_k = min(kB, T); B = 1 is the token level

    weight_t = exp(clip(log G_t, lo_w, hi_w))

`center: sequence` subtracts the response's mean log ratio before the first clip; `normalize` divides the
weights by their mean over the response or the dataset. The loss of a batch is
sum(weight_t * nll_t) / (number of tokens with loss), the weights without gradient.

N responses, L tokens with loss of all responses together. A log ratio of NaN is one that is not known
(a turn end that differs between the policies, or was not recorded): its delta is 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from grape_service.errors import UserError
from grape_service.methods.base import TokenWeights, WeightsKeys, WeightsMethod
from grape_service.rows.ragged import Int64s, segment_sums

if TYPE_CHECKING:
    from torch import Tensor


class PearKeys(WeightsKeys):
    """Keys of PEAR."""

    level: Literal["token", "block", "sequence"] = "token"
    """What one weight of PEAR is shared by."""
    gamma: float = Field(0.999, gt=0, le=1)
    """Discount of PEAR per token that is still to come."""
    ratio_clip: tuple[float, float] = (-0.08, 0.3)
    """Bounds of a token's log ratio in PEAR."""
    block_size: int = Field(4, ge=1)
    """Tokens per block, at PEAR's block level."""
    center: Literal["none", "sequence"] = "none"
    """sequence subtracts a response's mean log ratio before PEAR's clip."""

    @model_validator(mode="after")
    def _sensible_pear(self) -> PearKeys:
        if self.level == "sequence" and self.center != "none":
            raise ValueError("level sequence refuses center, which would erase its weights")
        if self.level == "sequence" and self.normalize == "sequence":
            raise ValueError("level sequence refuses normalize: sequence, which would erase its weights")
        return self


FIXED_POINT = 2.0**36
"""Sums over later tokens are made of int64 in units of 2**-36 (1.5e-11). They are exact, so a response's
weights do not depend on what stands beside it: the wrap-around of one running sum over all tokens
cancels in the difference that a response takes of it."""

CHUNK_TOKENS = 1 << 16
"""Tokens worked on at a time, so that the intermediate arrays stay in the processor's cache."""


def log_ratios(target: npt.NDArray, behavior: npt.NDArray) -> npt.NDArray[np.float64]:
    """log pi_target - log pi_behavior [L] in float64; NaN where `behavior` is NaN, that is not known.

    Raises ValueError where `target` is not finite or `behavior` infinite.
    """
    if not np.isfinite(target).all() or np.isinf(behavior).any():
        raise ValueError("weights need finite log-probabilities")
    return target.astype(np.float64) - behavior


def pear_weights(ratios: npt.NDArray[np.float64], offsets: Int64s, config: PearKeys) -> TokenWeights:
    """Weights of responses from their log ratios: [L], [N + 1] -> [L].

    `normalize: dataset` is left to the caller, who knows the dataset's mean. Raises UserError where the
    clips of `config` let a sum of log ratios or a weight grow out of all bounds.
    """
    num_rows = len(offsets) - 1
    weights = np.empty(int(offsets[-1]), dtype=np.float64)
    held = np.empty((4, num_rows), dtype=np.int64)
    row = 0
    while row < num_rows:
        end = max(row + 1, int(np.searchsorted(offsets, offsets[row] + CHUNK_TOKENS, side="right")) - 1)
        tokens = slice(offsets[row], offsets[end])
        held[:, row:end] = _weigh_chunk(ratios[tokens], offsets[row : end + 1] - offsets[row], config, weights[tokens])
        row = end
    return TokenWeights(weights, *held)


def _weigh_chunk(
    ratios: npt.NDArray[np.float64], offsets: Int64s, config: PearKeys, weights: npt.NDArray[np.float64]
) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    lengths = np.diff(offsets)
    low, high = config.ratio_clip
    unknown = np.isnan(ratios)
    any_unknown = bool(unknown.any())
    if config.center == "sequence":
        known = np.where(unknown, 0.0, ratios) if any_unknown else ratios
        means = segment_sums(known, offsets) / np.maximum(1, segment_sums(~unknown, offsets))
        ratios = ratios - np.repeat(means, lengths)
    below, above = ratios < low, ratios > high  # false for NaN
    delta = np.clip(ratios, low, high)
    if any_unknown:
        delta[unknown] = 0.0

    log_weights = _log_weights(delta, offsets, config)
    low_w, high_w = config.weight_clip
    below_w, above_w = log_weights < low_w, log_weights > high_w
    np.clip(log_weights, low_w, high_w, out=log_weights)
    with np.errstate(over="ignore"):
        np.exp(log_weights, out=weights)
    if len(weights) and not np.isfinite(weights.max()):
        raise UserError("a weight is not finite: give weights.weight_clip an upper bound such as 5")
    if config.normalize == "sequence":
        weights *= np.repeat(lengths / np.maximum(segment_sums(weights, offsets), np.finfo(float).tiny), lengths)
    return (
        segment_sums(below, offsets),
        segment_sums(above, offsets),
        segment_sums(below_w, offsets),
        segment_sums(above_w, offsets),
    )


def _log_weights(delta: npt.NDArray[np.float64], offsets: Int64s, config: PearKeys) -> npt.NDArray[np.float64]:
    """log G_t [L] from clipped log ratios [L]."""
    num_tokens, lengths = len(delta), np.diff(offsets)
    if num_tokens == 0:
        return np.zeros(0)
    largest = max(abs(float(delta.max())), abs(float(delta.min())))
    if largest * int(lengths.max()) * FIXED_POINT >= 2.0**62:
        raise UserError("a response's log ratios add up to more than 67 million: narrow weights.ratio_clip")
    delta *= FIXED_POINT
    units = np.rint(delta, out=delta).astype(np.int64)
    if config.level == "sequence":
        return np.repeat(segment_sums(units, offsets) / FIXED_POINT, lengths)

    running = np.cumsum(units, out=units)
    last = np.repeat(offsets[1:] - 1, lengths)  # of the response, for each token
    if config.level == "token" or config.block_size == 1:
        remaining = last - np.arange(num_tokens)  # T - t
        later = running[last] - running
    else:
        start = np.repeat(offsets[:-1], lengths)
        block = (np.arange(num_tokens) - start) // config.block_size
        block_end = np.minimum(start + (block + 1) * config.block_size - 1, last)  # e_k
        remaining = last - block_end  # T - e_k
        later = running[last] - running[block_end]
    return remaining * np.log(config.gamma) + later * (1 / FIXED_POINT)


def pear_weights_n(target_n: Tensor, behavior_n: Tensor, sequence_n: Tensor, config: PearKeys) -> Tensor:
    """PEAR weights [n], float32, without gradient (arXiv 2602.01058, section 3).

    `target_n`, `behavior_n`: log-probabilities; NaN in `behavior_n` is a ratio that is not known, whose delta is 0.
    `sequence_n`: the response of each token, ascending. All n tokens are tokens with loss.
    """
    import torch

    ratios_n = target_n.detach().double() - behavior_n.double()
    known_n = ~ratios_n.isnan()
    ratios_n = ratios_n.nan_to_num(0.0)
    _, row_n, lengths_s = torch.unique_consecutive(sequence_n, return_inverse=True, return_counts=True)
    num_rows = len(lengths_s)

    def row_sums_s(values_n: Tensor) -> Tensor:
        return torch.zeros(num_rows, dtype=torch.float64, device=values_n.device).index_add_(0, row_n, values_n)

    if config.center == "sequence":
        means_s = row_sums_s(ratios_n) / row_sums_s(known_n.double()).clamp(min=1)
        ratios_n = ratios_n - means_s[row_n]
    delta_n = ratios_n.clamp(*config.ratio_clip) * known_n

    ends_s = lengths_s.cumsum(0)
    last_n = (ends_s - 1)[row_n]
    running_n = delta_n.cumsum(0)
    if config.level == "sequence":
        log_weights_n = row_sums_s(delta_n)[row_n]
    else:
        start_n = (ends_s - lengths_s)[row_n]
        size = config.block_size if config.level == "block" else 1
        block_n = (torch.arange(len(delta_n), device=delta_n.device) - start_n) // size
        block_end_n = torch.minimum(start_n + (block_n + 1) * size - 1, last_n)
        log_gamma = torch.log(torch.tensor(config.gamma, dtype=torch.float64)).item()
        log_weights_n = (last_n - block_end_n).double() * log_gamma + running_n[last_n] - running_n[block_end_n]
    weights_n = log_weights_n.clamp(*config.weight_clip).exp()
    if config.normalize == "sequence":
        weights_n = weights_n * (lengths_s / row_sums_s(weights_n))[row_n]
    return weights_n.float()


METHOD = WeightsMethod(
    "pear", PearKeys, "arXiv 2602.01058, section 3", compare=pear_weights, online=pear_weights_n, is_default=True
)
