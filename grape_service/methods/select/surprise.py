"""Surprise against expectation (the statistic of arXiv 2602.12222): of each prompt's responses, the one that surprises
the target least for how open its places are.

For a response y of T counted tokens to prompt x, H_t the entropy of the target's distribution at t

    surprise = (1/T) * sum_t (log pi_target(y_t | x, y_<t) + H_t)

Of a response that the target itself sampled, -log p is H_t on average, so it is about 0; the largest wins.
"""

from __future__ import annotations

import numpy as np

from grape_service.methods.base import Float64s, SelectMethod
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import segment_sums
from grape_service.rows.statistics import ENTROPY, LOGPROB


def surprise_scores(batch: MethodBatch) -> Float64s:
    """The mean of each candidate [N], from `logprob` and `entropy`."""
    terms = batch.statistics[LOGPROB].astype(np.float64) + batch.statistics[ENTROPY]
    return segment_sums(terms, batch.offsets) / np.diff(batch.offsets)


def _score(batch: MethodBatch, _: object) -> Float64s:
    return surprise_scores(batch)


METHOD = SelectMethod("surprise", _score, (LOGPROB, ENTROPY), source="the statistic of arXiv 2602.12222")
