"""Statistics of a token: what one forward pass of a policy says of each token with loss.

With p the policy's distribution at the token's place, y the token and z the logits:

    logprob         log p(y), nats
    entropy         -sum_v p(v) log p(v) over the whole vocabulary, nats
    rank            1 + number of tokens v with z(v) > z(y), at most MAX_RANK
    top20_entropy   entropy of the TOP most probable tokens, renormalised among themselves, nats
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

LOGPROB, ENTROPY, RANK, TOP20_ENTROPY = "logprob", "entropy", "rank", "top20_entropy"

STATISTICS = (LOGPROB, ENTROPY, RANK, TOP20_ENTROPY)
"""All of them, in the order in which they are stored and released."""

MAX_RANK = 65_535
"""Ranks beyond this are this."""

TOP = 20
"""Tokens that top20_entropy is made of."""

RANGES = {LOGPROB: (-np.inf, 0.0), ENTROPY: (0.0, np.inf), RANK: (1.0, MAX_RANK), TOP20_ENTROPY: (0.0, np.inf)}
"""Smallest and largest value of each."""


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Each of `names` once, log-probabilities with them, in the order of STATISTICS."""
    wanted = {LOGPROB, *names}
    return tuple(name for name in STATISTICS if name in wanted)


def beside_logprob(names: Iterable[str]) -> tuple[str, ...]:
    """`ordered` without the log-probabilities, which are always made."""
    return ordered(names)[1:]
