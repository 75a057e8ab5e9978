"""Racing: which candidates of a prompt need no more scoring, and how far the others are scored next.

Scoring goes in waves: the first tokens of all candidates of a prompt, then all tokens of those that are most likely to
be kept, then more of the others, each about as far as it takes to tell. A row is stopped once the most that it can
reach is less than what the last kept candidate has for certain:

    reach(row) < keep-th largest score of the prompt's eligible candidates with different responses - min_margin

A row that could tie is not stopped, so that with certain reaches what is kept, its ranks and its order are those of a
scoring of all tokens.

N candidates of P whole prompts have U rows: candidates with the same tokens share one. L tokens with loss of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from grape_service.methods.base import Float64s
from grape_service.rows.ragged import Int64s, offsets_from_lengths
from grape_service.select.ranking import places_within_groups

Bools = npt.NDArray[np.bool_]

FIRST_SHARE, FIRST_LEAST, FIRST_MOST = 8, 8, 64
"""The first wave has a FIRST_SHARE-th of a row's tokens, within these bounds."""
GROWTH = 4
"""A wave adds at least a GROWTH-th of what is known of a row, and FIRST_LEAST tokens."""
TO_TELL = 1.02
"""A row is read as far as its tokens so far say that it takes to stop it, and this much further."""
PRIOR_TOKENS = 16
"""How many tokens of a row its source's other results are worth, in guessing what it will come to."""


@dataclass(frozen=True)
class Contest:
    """Who competes for what."""

    prompts: Int64s  # [N], a number from 0 for each prompt
    rows: Int64s  # [N], the row of each candidate
    eligible: Bools  # [N], may be kept
    sources: Int64s  # [N], a number from 0 for each source
    keep: Int64s  # [P], distinct responses that are kept at most
    lead: float = 0.0  # min_margin: what the first has to be ahead of all others


@dataclass
class Known:
    """What is known of the rows."""

    offsets: Int64s  # [U + 1] into the statistics
    statistics: dict[str, npt.NDArray[np.float32]]  # [L] each; what is not known is NaN
    known: Int64s  # [U], tokens with loss that have statistics: the first ones
    failed: Bools  # [U], a value could not be made
    undivided: Bools  # [U], its first tokens have other scores where it ends with them: all are scored in one wave

    @classmethod
    def of(cls, offsets: Int64s, names: Iterable[str]) -> Known:
        """Nothing known of rows with `offsets` [U + 1]; `names` are those of the statistics."""
        rows = len(offsets) - 1
        nothing = {name: np.full(int(offsets[-1]), np.nan, dtype=np.float32) for name in names}
        return cls(offsets, nothing, np.zeros(rows, dtype=np.int64), *np.zeros((2, rows), dtype=bool))

    def part(self, start: int, stop: int) -> Known:
        """The rows from start to stop; the arrays are the same memory."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return Known(
            self.offsets[start : stop + 1] - first,
            {name: array[first:last] for name, array in self.statistics.items()},
            self.known[start:stop],
            self.failed[start:stop],
            self.undivided[start:stop],
        )

    @property
    def total(self) -> Int64s:
        """Tokens with loss of each row [U]."""
        return np.diff(self.offsets)

    @property
    def whole(self) -> Bools:
        """Rows [U] whose tokens all have statistics."""
        return self.known == self.total

    def first_tokens(self, rows: Bools) -> dict[str, npt.NDArray[np.float32]]:
        """The statistics of some rows [U] that are known, one row after the other, by name."""
        taken = self.known_tokens() & np.repeat(rows, self.total)
        return {name: values[taken] for name, values in self.statistics.items()}

    def known_tokens(self) -> Bools:
        """Which tokens [L] have statistics."""
        place = np.arange(int(self.offsets[-1])) - np.repeat(self.offsets[:-1], self.total)
        return place < np.repeat(self.known, self.total)


@dataclass(frozen=True)
class Standing:
    """What the known tokens of the rows say."""

    scores: Float64s  # [U], NaN where not whole, and where no token counts
    reach: Float64s  # [U], the most that a score is taken to reach; not looked at where whole
    mean: Float64s  # [U], what a score would be if the other tokens were like the known ones; -inf where none is known


@dataclass
class SourceResults:
    """How the rows of each source compare with their prompts' other rows, in what was raced before."""

    sums: dict[int, float] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, sources: Int64s, leads: Float64s) -> None:
        """Candidates [M] by source, with what each is ahead of its prompt's mean."""
        for source, lead in zip(sources.tolist(), leads.tolist(), strict=True):
            self.sums[source] = self.sums.get(source, 0.0) + lead
            self.counts[source] = self.counts.get(source, 0) + 1

    def lead(self, sources: Int64s) -> Float64s:
        """What a candidate of each source [M] is ahead of its prompt's mean, about."""
        found = {source: self.sums[source] / (self.counts[source] + 1) for source in self.sums}
        return np.array([found.get(source, 0.0) for source in sources.tolist()])


def least_kept(contest: Contest, scores: Float64s) -> Float64s:
    """What the last kept candidate of each prompt [P] has for certain: the keep-th largest of the scores [U] of its
    eligible candidates, each response once; -inf where fewer have one."""
    there = contest.eligible & np.isfinite(scores[contest.rows])
    pairs = np.unique(np.stack([contest.prompts[there], contest.rows[there]], axis=1), axis=0)
    values = scores[pairs[:, 1]]
    order = np.lexsort((-values, pairs[:, 0]))
    prompts = pairs[order, 0]
    last = places_within_groups(prompts) == contest.keep[prompts] - 1
    least = np.full(len(contest.keep), -np.inf)
    least[prompts[last]] = values[order][last]
    return least


def still_running(contest: Contest, scores: Float64s, reach: Float64s, ended: Bools) -> Bools:
    """Rows [U] that some prompt cannot do without yet; those that have `ended` are whole or have failed."""
    least = least_kept(contest, scores) - contest.lead
    needed = ~ended[contest.rows] & ~(reach[contest.rows] < least[contest.prompts])
    running = np.zeros(len(scores), dtype=bool)
    running[contest.rows[needed]] = True
    return running


def next_known(
    contest: Contest,
    progress: Known,
    standing: Standing,
    running: Bools,
    results: SourceResults,
    doubling: bool = False,
) -> Int64s:
    """How many tokens of each row [U] are known after the next wave; what is known already where it is not scored.

    `doubling`: no row is read further than twice as far as it was, since it may be stopped well before what is certain.
    """
    known, total = progress.known, progress.total
    target = known.copy()
    prompts, rows = contest.prompts, contest.rows
    runs = running[rows]
    least = least_kept(contest, standing.scores) - contest.lead
    first = np.minimum(np.clip(total // FIRST_SHARE, FIRST_LEAST, FIRST_MOST), total)
    contested = _distinct_eligible(contest) > contest.keep
    begins = np.zeros(len(contest.keep), dtype=bool)
    begins[prompts[runs & (known[rows] < first[rows])]] = True

    _raise(target, rows, runs & ~contested[prompts], total)
    _raise(target, rows, runs & contested[prompts] & begins[prompts], first)
    undecided = runs & contested[prompts] & ~begins[prompts]
    favourites = _favourites(contest, standing, undecided & ~np.isfinite(least[prompts]), progress, results)
    _raise(target, rows, favourites, total)
    later = undecided & np.isfinite(least[prompts])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.maximum(least[prompts] / standing.reach[rows], 1.0)
        wanted = np.where(np.isfinite(ratio), np.ceil(known[rows] * ratio * TO_TELL), total[rows])
    if doubling:
        wanted = np.minimum(wanted, 2 * known[rows])
    wanted = np.maximum(wanted, known[rows] + np.maximum(known[rows] // GROWTH, FIRST_LEAST))
    np.maximum.at(target, rows[later], np.minimum(wanted, total[rows]).astype(np.int64)[later])
    return np.where(progress.undivided & (target > known), total, target)


def _raise(target: Int64s, rows: Int64s, where: Bools, to: Int64s) -> None:
    target[rows[where]] = np.maximum(target[rows[where]], to[rows[where]])


def _distinct_eligible(contest: Contest) -> Int64s:
    """Different responses of each prompt [P] that may be kept."""
    there = contest.eligible
    pairs = np.unique(np.stack([contest.prompts[there], contest.rows[there]], axis=1), axis=0)
    return np.bincount(pairs[:, 0], minlength=len(contest.keep))


def leads(contest: Contest, standing: Standing) -> Float64s:
    """What each candidate's mean [N] is ahead of that of its prompt's candidates; 0 where nothing is known of it."""
    means = standing.mean[contest.rows]
    there = np.isfinite(means)
    prompts, num_prompts = contest.prompts[there], len(contest.keep)
    sums = np.bincount(prompts, weights=means[there], minlength=num_prompts)
    of_prompt = sums / np.maximum(1, np.bincount(prompts, minlength=num_prompts))
    return np.where(there, means - of_prompt[contest.prompts], 0.0)


def _favourites(contest: Contest, standing: Standing, among: Bools, progress: Known, results: SourceResults) -> Bools:
    """Of candidates `among` [N] those that are most likely to be kept, as many distinct ones as their prompts lack.

    Its known tokens speak for a candidate, and what its source's others did, here and in what was raced before.
    """
    own = leads(contest, standing)
    here = SourceResults(dict(results.sums), dict(results.counts))
    here.add(contest.sources, own)
    tokens = progress.known[contest.rows]
    guess = (tokens * own + PRIOR_TOKENS * here.lead(contest.sources)) / (tokens + PRIOR_TOKENS)
    places = np.flatnonzero(among & contest.eligible)
    places = places[np.lexsort((contest.rows[places], -guess[places], contest.prompts[places]))]
    pairs = np.stack([contest.prompts[places], contest.rows[places]], axis=1)
    places = places[np.sort(np.unique(pairs, axis=0, return_index=True)[1])]
    there = contest.eligible & np.isfinite(standing.scores[contest.rows])
    have = np.unique(np.stack([contest.prompts[there], contest.rows[there]], axis=1), axis=0)
    lack = contest.keep - np.bincount(have[:, 0], minlength=len(contest.keep))
    chosen = np.zeros(len(contest.rows), dtype=bool)
    prompts = contest.prompts[places]
    chosen[places[places_within_groups(prompts) < lack[prompts]]] = True
    without = np.ones(len(contest.keep), dtype=bool)  # none is left that may be kept, so that none can be stopped
    without[contest.prompts[chosen]] = False
    return chosen | (among & without[contest.prompts])


More = Callable[[Int64s, Int64s, Int64s], Mapping[str, npt.NDArray[np.float32]]]
"""(rows [M], from, to) -> statistics of the tokens with loss from `from` to `to` of each row, flat, by name; a row of
which one could not be made has a value that is not finite."""


def race(
    contest: Contest,
    progress: Known,
    stand: Callable[[Known], Standing],
    more: More,
    results: SourceResults | None = None,
    doubling: bool = False,
) -> Standing:
    """Score in waves until no row is left that some prompt cannot do without: `progress` holds what is known then.

    What is known at first is not scored again. `stand` says what the known tokens come to.
    """
    results = results if results is not None else SourceResults()
    while True:
        standing = stand(progress)
        running = still_running(contest, standing.scores, standing.reach, progress.whole | progress.failed)
        if not running.any():
            results.add(contest.sources, leads(contest, standing))
            return standing
        target = next_known(contest, progress, standing, running, results, doubling)
        rows = np.flatnonzero(target > progress.known)
        extend(progress, rows, target, more(rows, progress.known[rows], target[rows]))


def extend(progress: Known, rows: Int64s, target: Int64s, values: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Note what a wave gave; a row with a value that is not finite has failed, and keeps what was known of it."""
    begins, lengths = progress.known[rows], target[rows] - progress.known[rows]
    offsets = offsets_from_lengths(lengths)
    good = np.ones(len(rows), dtype=bool)
    for array in values.values():
        bad = np.flatnonzero(~np.isfinite(array))
        good[np.searchsorted(offsets, bad, side="right") - 1] = False
    inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    places = np.repeat(progress.offsets[:-1][rows] + begins, lengths) + inside
    taken = np.repeat(good, lengths)
    for name, array in values.items():
        progress.statistics[name][places[taken]] = array[taken]
    progress.known[rows[good]] = target[rows[good]]
    progress.failed[rows[~good]] = True
