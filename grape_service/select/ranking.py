"""Where each candidate stands among those of its prompt: by score, the largest first, then by id.

N candidates of whole prompts, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from grape_service.methods.base import Float64s
from grape_service.rows.ragged import Int64s


@dataclass(frozen=True)
class Ranking:
    """Where each candidate stands among those of its prompt, all [N] in the order of the input."""

    rank: npt.NDArray[np.int32]
    """1 is best; 0 without a score."""
    margin: Float64s
    """Score minus that of the next best distinct response after it; NaN where there is none."""
    at_least: npt.NDArray[np.bool_]
    """The margin is to what a candidate that was stopped could have reached at most: it may be larger."""

    def take(self, rows: slice) -> Ranking:
        """Of some of the candidates."""
        return replace(self, rank=self.rank[rows], margin=self.margin[rows], at_least=self.at_least[rows])


def rank_candidates(
    prompts: Int64s,
    scores: Float64s,
    ties: Int64s,
    responses: Int64s | None = None,
    reach: Float64s | None = None,
) -> Ranking:
    """Rank candidates within their prompts by (score, largest first; tie, smallest first).

    `prompts` [N] holds a number from 0 for each prompt, in any order; `scores` [N] is NaN where there is
    none; `ties` [N] are the places of the candidates in the order of their ids; candidates of a prompt with one
    number in `responses` [N] have the same response, and lead the next one that is another; None: all differ.
    `reach` [N] is the most that a candidate without a score can have, NaN where that is not known: it stands there in
    the order, without a rank.
    """
    stopped = np.isnan(scores) & ~np.isnan(reach) if reach is not None else np.zeros(len(scores), dtype=bool)
    values = np.where(stopped, reach, scores) if reach is not None else scores
    order = order_within_prompts(prompts, -values, ties)
    sorted_prompts, sorted_scores = prompts[order], values[order]
    num_rows = len(order)
    place = places_within_groups(sorted_prompts)

    margin = np.full(num_rows, np.nan)
    begins = np.ones(num_rows, dtype=bool)  # a stretch of candidates with the same response
    if responses is not None:
        begins[1:] = (sorted_prompts[1:] != sorted_prompts[:-1]) | (responses[order][1:] != responses[order][:-1])
    starts = np.append(np.flatnonzero(begins), num_rows)
    following = starts[np.cumsum(begins)]  # where the next stretch begins
    leads = np.flatnonzero(following < num_rows)
    leads = leads[sorted_prompts[leads] == sorted_prompts[following[leads]]]
    margin[order[leads]] = sorted_scores[leads] - sorted_scores[following[leads]]  # NaN if either is
    at_least = np.zeros(num_rows, dtype=bool)
    at_least[order[leads]] = stopped[order[following[leads]]]
    margin[stopped], at_least[stopped] = np.nan, False

    rank = np.zeros(num_rows, dtype=np.int32)
    rank[order] = np.where(np.isnan(sorted_scores) | stopped[order], 0, place + 1)
    return Ranking(rank, margin, at_least)


def order_within_prompts(prompts: Int64s, keys: npt.NDArray, ties: Int64s) -> Int64s:
    """Rows [N] sorted by prompt, then key (smallest first, NaN last), then tie."""
    return np.lexsort((ties, keys, prompts))


def pair_numbers(first: Int64s, second: Int64s) -> Int64s:
    """A number from 0 for each pair of `first` and `second` [N]: equal where both are, whatever their size."""
    order = np.lexsort((second, first))
    differs = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
    numbers = np.zeros(len(order), dtype=np.int64)
    numbers[order[1:]] = np.cumsum(differs)
    return numbers


def distinct_places(prompts: Int64s, responses: Int64s | None) -> tuple[npt.NDArray[np.bool_], Int64s]:
    """Of rows [N], prompt after prompt and best first: which are the first of their prompt with their response, and how
    many other responses of their prompt come before each of those."""
    within = places_within_groups(prompts)
    if responses is None:
        return np.ones(len(prompts), dtype=bool), within
    first = np.zeros(len(prompts), dtype=bool)
    first[np.unique(pair_numbers(prompts, responses), return_index=True)[1]] = True
    before = np.cumsum(first) - first
    return first, before - np.repeat(before[within == 0], np.diff(np.append(np.flatnonzero(within == 0), len(prompts))))


def places_within_groups(sorted_groups: Int64s) -> Int64s:
    """0, 1, 2, ... within each run of equal values of a sorted array [N]."""
    num_rows = len(sorted_groups)
    first = np.ones(num_rows, dtype=bool)
    first[1:] = sorted_groups[1:] != sorted_groups[:-1]
    starts = np.flatnonzero(first)
    return np.arange(num_rows) - np.repeat(starts, np.diff(np.append(starts, num_rows)))
