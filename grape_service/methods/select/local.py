"""Local log-probability (arXiv 2510.03988): of each prompt's responses, the one whose every step follows for the target
from what stands right before it.

For a response of K steps to prompt x, w_k the end of what precedes step k in the response (`window`), s_k its T_k
counted tokens

    local = (1/K) * sum_k (1/T_k) * sum_{t in s_k} log pi_target(y_t | x, w_k, the tokens of s_k before t)

The largest wins. Each step with its window is a row of its own to the engines: see score/windows.py.
"""

from __future__ import annotations

import numpy as np

from grape_service.methods.base import Float64s, SelectKeys, SelectMethod, Window
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import segment_sums
from grape_service.rows.statistics import LOGPROB
from grape_service.rows.steps import is_step_start


class LocalKeys(SelectKeys):
    """Keys of local alone."""

    window: Window = Window(steps=1)
    """For local: what of the response stands before each step when it is scored, {steps: n} or {tokens: n}."""


def local_scores(batch: MethodBatch) -> Float64s:
    """The mean over steps of each candidate [N], from what the target says of each token in its step's window."""
    assert batch.steps is not None, "this method cuts steps"
    assert batch.local_logprobs is not None, "this method scores windows"
    bounds = np.append(np.flatnonzero(is_step_start(batch.steps, batch.offsets)), len(batch.steps))
    means = segment_sums(batch.local_logprobs.astype(np.float64), bounds) / np.diff(bounds)
    steps_of = np.searchsorted(bounds, batch.offsets)
    return segment_sums(means, steps_of) / np.diff(steps_of)


def _score(batch: MethodBatch, _: object) -> Float64s:
    return local_scores(batch)


METHOD = SelectMethod(
    "local",
    _score,
    (LOGPROB,),
    source="arXiv 2510.03988",
    keys=LocalKeys,
    cuts_steps=True,
    scores_windows=True,
)
