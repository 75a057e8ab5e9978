"""GRAPE (arXiv 2502.04194): of each prompt's responses, the one that the target policy finds most probable.

For a response y of T counted tokens to prompt x

    grape_score = (1/T) * sum_t log pi_target(y_t | x, y_<t)

The largest wins. log pi is at most 0, so a response of T counted tokens of which the first k are known reaches at most

    (1/T) * sum_{t<=k} log pi_target(y_t | x, y_<t)

Counted are the response's own tokens; the turn end that a template adds only with `count_turn_end`.
N candidates, L tokens with loss of all candidates together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from grape_service.methods.base import Float64s, SelectMethod
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import Int64s, segment_sums
from grape_service.rows.statistics import LOGPROB


def grape_scores(logprobs: npt.NDArray, counted: npt.NDArray[np.bool_], offsets: Int64s) -> Float64s:
    """Mean log-probability of each row's counted tokens: [L], [L], [N + 1] -> [N].

    NaN where no token counts or a counted log-probability is infinite or NaN: such a row never wins.
    """
    num_counted = segment_sums(counted, offsets)
    totals = segment_sums(np.where(counted, logprobs, 0).astype(np.float64), offsets)
    scores = np.full(len(totals), np.nan)
    np.divide(totals, num_counted, out=scores, where=num_counted > 0)
    scores[~np.isfinite(scores)] = np.nan
    return scores


def _score(batch: MethodBatch, _: object) -> Float64s:
    logprobs = batch.statistics[LOGPROB]
    return grape_scores(logprobs, np.ones(len(logprobs), dtype=bool), batch.offsets)


def grape_bounds(logprobs: npt.NDArray, offsets: Int64s, totals: Int64s) -> Float64s:
    """The most that `grape_scores` can be of rows of `totals` [N] counted tokens, from the first of them: flat [K],
    offsets [N + 1] -> [N].

    A sum of n float64 numbers of one sign is off by less than n units of the last place, in any order. That much of
    it is taken off, so that no score is larger than its bound.
    """
    sums = segment_sums(logprobs.astype(np.float64), offsets)
    return sums / totals * (1 - (totals + 4) * np.finfo(np.float64).eps)


def _bound(batch: MethodBatch, totals: Int64s) -> Float64s:
    return grape_bounds(batch.statistics[LOGPROB], batch.offsets, totals)


METHOD = SelectMethod("grape", _score, (LOGPROB,), source="arXiv 2502.04194", is_default=True, bound=_bound)
