"""GRAPE (arXiv 2502.04194): of each prompt's responses, the one that the target policy finds most probable.

For a response y of T counted tokens to prompt x

    grape_score = (1/T) * sum_t log pi_target(y_t | x, y_<t)

Counted are the response's own tokens; the turn end that a template adds only with `count_turn_end`.
N candidates, L tokens with loss of all candidates together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grape_service.rows.ragged import Int64s, segment_sums

Float64s = npt.NDArray[np.float64]


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


@dataclass(frozen=True)
class Ranking:
    """Where each candidate stands among those of its prompt, all [N] in the order of the input."""

    rank: npt.NDArray[np.int32]
    """1 is best; 0 without a score."""
    margin: Float64s
    """Score minus that of the next best after it; NaN where there is none."""
    num_candidates: npt.NDArray[np.int32]
    """Candidates of the prompt, those without a score included."""

    def take(self, rows: slice) -> Ranking:
        """Of some of the candidates."""
        return Ranking(self.rank[rows], self.margin[rows], self.num_candidates[rows])


def rank_candidates(prompts: Int64s, scores: Float64s, ties: Int64s) -> Ranking:
    """Rank candidates within their prompts by (score, largest first; tie, smallest first).

    `prompts` [N] holds a number from 0 for each prompt, in any order; `scores` [N] is NaN where there is
    none; `ties` [N] are the places of the candidates in the order of their ids.
    """
    order = order_within_prompts(prompts, -scores, ties)
    sorted_prompts, sorted_scores = prompts[order], scores[order]
    num_rows = len(order)
    place = places_within_groups(sorted_prompts)

    margin = np.full(num_rows, np.nan)
    has_next = np.zeros(num_rows, dtype=bool)
    has_next[:-1] = sorted_prompts[1:] == sorted_prompts[:-1]
    following = np.flatnonzero(has_next)
    margin[order[following]] = sorted_scores[following] - sorted_scores[following + 1]  # NaN if either is

    rank = np.zeros(num_rows, dtype=np.int32)
    rank[order] = np.where(np.isnan(sorted_scores), 0, place + 1)
    num_candidates = np.bincount(prompts)[prompts].astype(np.int32) if num_rows else np.zeros(0, dtype=np.int32)
    return Ranking(rank, margin, num_candidates)


def order_within_prompts(prompts: Int64s, keys: npt.NDArray, ties: Int64s) -> Int64s:
    """Rows [N] sorted by prompt, then key (smallest first, NaN last), then tie."""
    return np.lexsort((ties, keys, prompts))


def places_within_groups(sorted_groups: Int64s) -> Int64s:
    """0, 1, 2, ... within each run of equal values of a sorted array [N]."""
    num_rows = len(sorted_groups)
    first = np.ones(num_rows, dtype=bool)
    first[1:] = sorted_groups[1:] != sorted_groups[:-1]
    starts = np.flatnonzero(first)
    return np.arange(num_rows) - np.repeat(starts, np.diff(np.append(starts, num_rows)))
