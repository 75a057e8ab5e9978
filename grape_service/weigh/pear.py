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

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grape_service.config.methods import WeightsConfig
from grape_service.errors import UserError
from grape_service.rows.counts import Counts
from grape_service.rows.ragged import Int64s, segment_sums

FIXED_POINT = 2.0**36
"""Sums over later tokens are made of int64 in units of 2**-36 (1.5e-11). They are exact, so a response's
weights do not depend on what stands beside it: the wrap-around of one running sum over all tokens
cancels in the difference that a response takes of it."""

CHUNK_TOKENS = 1 << 16
"""Tokens worked on at a time, so that the intermediate arrays stay in the processor's cache."""


@dataclass(frozen=True)
class TokenWeights:
    """Weights [L] in float64, and for each response [N] how many of its tokens each clip held."""

    weights: npt.NDArray[np.float64]
    ratio_low: Int64s
    ratio_high: Int64s
    weight_low: Int64s
    weight_high: Int64s

    def held(self) -> tuple[Int64s, Int64s, Int64s, Int64s]:
        """How many tokens each clip held, in the order of the fields."""
        return self.ratio_low, self.ratio_high, self.weight_low, self.weight_high


def log_ratios(target: npt.NDArray, behavior: npt.NDArray) -> npt.NDArray[np.float64]:
    """log pi_target - log pi_behavior [L] in float64; NaN where `behavior` is NaN, that is not known.

    Raises ValueError where `target` is not finite or `behavior` infinite.
    """
    if not np.isfinite(target).all() or np.isinf(behavior).any():
        raise ValueError("weights need finite log-probabilities")
    return target.astype(np.float64) - behavior


def pear_weights(ratios: npt.NDArray[np.float64], offsets: Int64s, config: WeightsConfig) -> TokenWeights:
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
    ratios: npt.NDArray[np.float64], offsets: Int64s, config: WeightsConfig, weights: npt.NDArray[np.float64]
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


def _log_weights(delta: npt.NDArray[np.float64], offsets: Int64s, config: WeightsConfig) -> npt.NDArray[np.float64]:
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


SUM_UNITS = 2**20
"""Sums of a row's weights are rounded to units of 1 / SUM_UNITS."""


@dataclass
class WeightTotals(Counts):
    """Sums over tokens with weights, from which every figure of a report follows; can be added."""

    rows: int = 0
    tokens: int = 0
    sum: float = 0.0
    sum_squares: float = 0.0
    ratio_low: int = 0
    ratio_high: int = 0
    weight_low: int = 0
    weight_high: int = 0

    @property
    def mean(self) -> float:
        """Mean weight; NaN of no tokens."""
        return self.sum / self.tokens if self.tokens else float("nan")

    @property
    def effective_share(self) -> float:
        """Effective sample size (sum w)^2 / (n * sum w^2), from 1/n to 1; NaN of no tokens."""
        return self.sum**2 / (self.tokens * self.sum_squares) if self.sum_squares else float("nan")

    def clip_shares(self) -> dict[str, float]:
        """Share of the tokens that each clip held."""
        names = ("ratio_low", "ratio_high", "weight_low", "weight_high")
        return {name: getattr(self, name) / self.tokens if self.tokens else float("nan") for name in names}

    def figures(self) -> dict[str, float]:
        """What a report shows of the sums."""
        return {"mean": self.mean, "effective_share": self.effective_share, **self.clip_shares()}


def totals_by_group(pear: TokenWeights, offsets: Int64s, groups: Int64s, num_groups: int) -> list[WeightTotals]:
    """WeightTotals of each group of responses; `groups` [N] holds a number from 0 for each."""
    lengths = np.diff(offsets)
    # Of whole units, up to 8 billion of them add up without an error: to the same sum in any order and any batches.
    row_sums = np.rint(segment_sums(pear.weights, offsets) * SUM_UNITS) / SUM_UNITS
    row_squares = segment_sums(pear.weights * pear.weights, offsets)

    def per_group(values: npt.NDArray) -> npt.NDArray:
        return np.bincount(groups, weights=values, minlength=num_groups)

    columns = [np.ones(len(lengths)), lengths, row_sums, row_squares]
    columns += [pear.ratio_low, pear.ratio_high, pear.weight_low, pear.weight_high]
    sums = np.stack([per_group(column) for column in columns], axis=1)
    return [
        WeightTotals(int(r), int(t), float(s), float(q), int(rl), int(rh), int(wl), int(wh))
        for r, t, s, q, rl, rh, wl, wh in sums
    ]
