"""Rank-Surprisal Ratio (arXiv 2601.14249): of each prompt's responses, the one that is surprising yet well ranked.

For a response y of T counted tokens to prompt x, r_t the rank of y_t among all tokens of the target there

    rsr = sum_t min(r_t, 100) / sum_t -log pi_target(y_t | x, y_<t)

The smallest wins: its tokens are near the top of the target's list although their probabilities are low.
"""

from __future__ import annotations

import numpy as np

from grape_service.methods.base import Float64s, SelectMethod
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import segment_sums
from grape_service.rows.statistics import LOGPROB, RANK

MAX_RANK = 100
"""Ranks beyond this count as this."""

LEAST_SURPRISAL = 1e-6
"""Nats of a whole response; less, where the target is certain of every token, counts as this."""


def rsr_scores(batch: MethodBatch) -> Float64s:
    """The ratio of each candidate [N], from `logprob` and `rank`."""
    ranks = segment_sums(np.minimum(batch.statistics[RANK], MAX_RANK), batch.offsets)
    surprisal = -segment_sums(batch.statistics[LOGPROB].astype(np.float64), batch.offsets)
    return ranks / np.maximum(surprisal, LEAST_SURPRISAL)


def _score(batch: MethodBatch, _: object) -> Float64s:
    return rsr_scores(batch)


METHOD = SelectMethod("rsr", _score, (LOGPROB, RANK), better="smallest", source="arXiv 2601.14249")
