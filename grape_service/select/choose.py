"""Which candidates of a prompt are kept: pure functions on arrays of whole prompts.

N candidates in any order; the same candidates in another order, or dealt to other files, give the same
choice: equal candidates are told apart by candidate_id, then by row key.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.methods import SelectConfig
from grape_service.methods.base import Float64s
from grape_service.rows.ragged import Int64s, gather_rows
from grape_service.select.limits import within_token_limits
from grape_service.select.ranking import (
    Ranking,
    distinct_places,
    order_within_prompts,
    pair_numbers,
    places_within_groups,
    rank_candidates,
)

KEPT, FAILED_CANDIDATE, NO_ELIGIBLE, SMALL_MARGIN, SOURCE_SHARE, FEW_CANDIDATES = range(6)
LEFT_OUT_REASONS = (
    *("", "failed candidate", "no eligible candidate", "margin below min_margin", "source share"),
    "fewer distinct responses than min_candidates",
)
"""Why a prompt is left out, by the numbers above."""


@dataclass(frozen=True)
class Detail:
    """What a report wants to know of N candidates beside what selection looks at."""

    prompt_ids: pa.Array  # [num_prompts]
    counted_tokens: Int64s  # [N], tokens that count in the score
    turn_end_scores: Float64s | None  # [N], grape_score if the turn end counted (or did not, where it does)
    others: dict[str, Float64s] = field(default_factory=dict)  # other methods' scores [N], the largest wins
    num_steps: Int64s | None = None  # [N], of the response; None where none was cut, -1 where a prompt was not drawn

    @classmethod
    def concatenate(cls, parts: list[Detail]) -> Detail:
        """Details of different prompts together."""
        scores = [part.turn_end_scores for part in parts if part.turn_end_scores is not None]
        return cls(
            pa.concat_arrays([part.prompt_ids for part in parts]),
            np.concatenate([part.counted_tokens for part in parts]),
            np.concatenate(scores) if scores else None,
            {name: np.concatenate([part.others[name] for part in parts]) for name in parts[0].others},
            np.concatenate([part.num_steps for part in parts if part.num_steps is not None])
            if parts[0].num_steps is not None
            else None,
        )


@dataclass(frozen=True)
class Candidates:
    """What selection looks at: N candidates of whole prompts."""

    prompts: Int64s  # [N], a number from 0 for each prompt
    num_prompts: int
    ties: Int64s  # [N], order of (candidate_id, row_key) within a prompt
    sources: pa.Array  # [N], strings, null where there is none
    loss_tokens: Int64s  # [N]
    scores: Float64s | None  # [N], NaN where there is none; None: the method needs none
    failed: npt.NDArray[np.bool_]  # [N], has no score although one is needed
    random: npt.NDArray[np.uint64] | None = None  # [N], from random_keys; for method random and max_source_share
    detail: Detail | None = None  # for an observer
    distinct: Int64s | None = None  # [num_prompts], distinct responses; for min_candidates
    keep: Int64s | None = None  # [num_prompts], candidates to keep; None: select.keep of each
    method_scores: Float64s | None = None  # [N], of the method that chooses, where that is not GRAPE; NaN where none
    smallest_wins: bool = False  # of method_scores
    responses: Int64s | None = None  # [N], one number for candidates of a prompt with one response; None: all differ
    reach: Float64s | None = None  # [N], the most that a candidate that was stopped can have; NaN for the others
    audit_reach: Float64s | None = None
    """[N] Of audited prompts: the same where the race stopped, infinite where it did not; NaN of the others."""

    @property
    def stopped(self) -> npt.NDArray[np.bool_]:
        """Candidates [N] that were stopped: they have no score, and cannot be kept."""
        return np.zeros(len(self.prompts), dtype=bool) if self.reach is None else ~np.isnan(self.reach)

    @property
    def oriented(self) -> Float64s | None:
        """What the candidates are ranked by [N], the largest first; None where nothing was scored."""
        if self.method_scores is None:
            return self.scores
        return -self.method_scores if self.smallest_wins else self.method_scores

    def slice(self, start: int, stop: int) -> Candidates:
        """The rows from start to stop; their prompts keep their numbers."""
        rows = slice(start, stop)
        return replace(
            self,
            prompts=self.prompts[rows],
            ties=self.ties[rows],
            responses=None if self.responses is None else self.responses[rows],
            sources=self.sources[rows],
            loss_tokens=self.loss_tokens[rows],
            scores=None if self.scores is None else self.scores[rows],
            failed=self.failed[rows],
            random=None if self.random is None else self.random[rows],
            method_scores=None if self.method_scores is None else self.method_scores[rows],
            reach=None if self.reach is None else self.reach[rows],
            audit_reach=None if self.audit_reach is None else self.audit_reach[rows],
            detail=None,
        )

    @classmethod
    def concatenate(cls, parts: list[Candidates]) -> Candidates:
        """Candidates of different prompts together."""
        starts = np.cumsum([0, *(part.num_prompts for part in parts)])
        first = parts[0]
        return cls(
            np.concatenate([part.prompts + start for part, start in zip(parts, starts, strict=False)]),
            int(starts[-1]),
            np.concatenate([part.ties for part in parts]),
            pa.concat_arrays([part.sources for part in parts]),
            np.concatenate([part.loss_tokens for part in parts]),
            None if first.scores is None else np.concatenate([part.scores for part in parts]),
            np.concatenate([part.failed for part in parts]),
            None if first.random is None else np.concatenate([part.random for part in parts]),
            None if first.detail is None else Detail.concatenate([part.detail for part in parts if part.detail]),
            distinct=None if first.distinct is None else np.concatenate([part.distinct for part in parts]),
            keep=None if first.keep is None else np.concatenate([part.keep for part in parts]),
            method_scores=None
            if first.method_scores is None
            else np.concatenate([part.method_scores for part in parts]),
            smallest_wins=first.smallest_wins,
            responses=None if first.responses is None else np.concatenate([part.responses for part in parts]),
            reach=None if first.reach is None else np.concatenate([part.reach for part in parts]),
            audit_reach=None if first.audit_reach is None else np.concatenate([part.audit_reach for part in parts]),
        )


@dataclass(frozen=True)
class Choice:
    """What was chosen among N candidates."""

    kept: npt.NDArray[np.bool_]  # [N]
    ranking: Ranking | None  # by the method, else by grape_score; None where nothing was scored
    num_candidates: npt.NDArray[np.int32]  # [N], of the row's prompt
    left_out: npt.NDArray[np.int8]  # [num_prompts], KEPT or why not
    passed_on: int = 0  # wins that max_source_share passed to another source
    grape_ranking: Ranking | None = None  # by grape_score, where that is not `ranking`

    def slice(self, start: int, stop: int) -> Choice:
        """The rows from start to stop; `left_out` stays as it is."""
        rows = slice(start, stop)
        ranking = self.ranking and self.ranking.take(rows)
        by_grape = self.grape_ranking and self.grape_ranking.take(rows)
        return replace(
            self,
            kept=self.kept[rows],
            ranking=ranking,
            num_candidates=self.num_candidates[rows],
            grape_ranking=by_grape,
        )


def choose(candidates: Candidates, select: SelectConfig) -> Choice:
    """Keep at most `select.keep` distinct responses per prompt, or as many as its `keep` says, in the method's order.

    Ranks and margins are among all candidates of the prompt, also those that the token limits keep from
    winning; those that were stopped stand where they could be at most. A prompt is left out when a candidate
    of it has failed, when none of its candidates may win, or when its best one that may win leads the next
    best by less than min_margin; one without a next best has nothing to lead and stays.
    """
    c = candidates
    num_candidates = np.bincount(c.prompts, minlength=c.num_prompts).astype(np.int32)[c.prompts]
    keys = c.oriented
    ranking = rank_candidates(c.prompts, keys, c.ties, c.responses, c.reach) if keys is not None else None
    by_grape = None
    if c.method_scores is not None and c.scores is not None:
        by_grape = _without_stopped(c, rank_candidates(c.prompts, c.scores, c.ties, c.responses))
    eligible = _eligible(c, select)

    left_out = np.full(c.num_prompts, NO_ELIGIBLE, dtype=np.int8)
    left_out[c.prompts[eligible]] = KEPT
    if ranking is not None and select.min_margin is not None:
        rows = np.flatnonzero(eligible)
        rows = rows[np.lexsort((ranking.rank[rows], c.prompts[rows]))]
        best = rows[places_within_groups(c.prompts[rows]) == 0]
        left_out[c.prompts[best[ranking.margin[best] < select.min_margin]]] = SMALL_MARGIN
    if select.min_candidates is not None:
        assert c.distinct is not None, "min_candidates needs the number of distinct responses"
        left_out[c.distinct < select.min_candidates] = FEW_CANDIDATES
    left_out[c.prompts[c.failed]] = FAILED_CANDIDATE
    eligible &= left_out[c.prompts] == KEPT

    order = _order(c, select, eligible)
    is_first, places = distinct_places(c.prompts[order], c.responses[order] if c.responses is not None else None)
    kept = np.zeros(len(order), dtype=bool)
    most = select.usual_keep if c.keep is None else c.keep[c.prompts[order]]
    kept[order] = eligible[order] & ((is_first & (places < most)) | (select.method == "all"))
    passed_on = 0
    if select.max_source_share is not None:
        passed_on = _limit_source_share(c, select.max_source_share, order, eligible, kept, ranking)
        still = np.bincount(c.prompts[kept], minlength=c.num_prompts) > 0
        left_out[(left_out == KEPT) & ~still] = SOURCE_SHARE
    return Choice(kept, ranking, num_candidates, left_out, passed_on, by_grape)


def without(c: Candidates, gone: npt.NDArray[np.bool_]) -> Candidates:
    """Candidates of which some [N], with an `audit_reach`, count as stopped."""
    assert c.scores is not None
    assert c.audit_reach is not None
    reach = np.where(gone, c.audit_reach, np.nan if c.reach is None else c.reach)
    own = None if c.method_scores is None else np.where(gone, np.nan, c.method_scores)
    return replace(c, scores=np.where(gone, np.nan, c.scores), reach=reach, method_scores=own)


def _without_stopped(c: Candidates, ranking: Ranking) -> Ranking:
    """A ranking by scores that candidates which were stopped by another method's may have: nothing of their prompts."""
    unknown = (np.bincount(c.prompts[c.stopped], minlength=c.num_prompts) > 0)[c.prompts]
    margin = np.where(unknown, np.nan, ranking.margin)
    return replace(ranking, rank=np.where(unknown, 0, ranking.rank).astype(np.int32), margin=margin)


def _eligible(c: Candidates, select: SelectConfig) -> npt.NDArray[np.bool_]:
    """Candidates [N] that may win."""
    eligible = within_token_limits(c.loss_tokens, select)
    if select.method.startswith("source:"):
        same = pc.fill_null(pc.equal(c.sources, select.method.removeprefix("source:")), False)
        eligible &= same.to_numpy(zero_copy_only=False)
    if c.oriented is not None:
        eligible &= np.isfinite(c.oriented)
    return eligible


def _order(c: Candidates, select: SelectConfig, eligible: npt.NDArray[np.bool_]) -> Int64s:
    """Rows by prompt, those that may win first, best first."""
    keys: npt.NDArray
    if not select.is_unscored:
        assert c.oriented is not None, f"method {select.method} needs scores"
        keys = -c.oriented
    elif select.method == "random":
        assert c.random is not None, "method random needs random keys"
        keys = c.random
    elif select.method == "longest":
        keys = -c.loss_tokens
    elif select.method == "shortest":
        keys = c.loss_tokens
    else:
        keys = np.zeros(len(c.prompts))
    within = order_within_prompts(c.prompts, keys, c.ties)
    return within[np.lexsort((~eligible[within], c.prompts[within]))]  # stable


def _limit_source_share(
    c: Candidates,
    share: float,
    order: Int64s,
    eligible: npt.NDArray[np.bool_],
    kept: npt.NDArray[np.bool_],
    ranking: Ranking | None,
) -> int:
    """Change `kept` until no source has more than `share` of the kept rows; gives how many wins were passed on.

    Again and again, the source that is most over its share loses its least clear wins: those with the
    smallest margin, then in the order of their random keys. Each passes to the next best candidate of its
    prompt that may win, is of a source with room left, and whose response is not kept already; where there is
    none, it is dropped. A win without a next best is the clearest. Rows without a source are a source together.
    Wins only ever move down their prompt's order, so this ends. It holds within each partition exactly,
    hence over all of them together.
    """
    assert c.random is not None, "max_source_share needs random keys"
    codes = _source_codes(c.sources)
    num_sources = int(codes.max()) + 1 if len(codes) else 0
    same = None if c.responses is None else pair_numbers(c.prompts, c.responses)
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    # Where a prompt's candidates that may win end in `order`.
    starts = np.searchsorted(c.prompts[order], np.arange(c.num_prompts))
    ends = starts + np.bincount(c.prompts[eligible], minlength=c.num_prompts)
    margins = np.full(len(order), np.inf)
    if ranking is not None:
        margins = np.where(np.isnan(ranking.margin), np.inf, ranking.margin)

    passed_on = 0
    while kept.any():
        counts = np.bincount(codes[kept], minlength=num_sources)
        most = int(np.floor(share * counts.sum() + 1e-9))
        source = int(np.argmax(counts))
        excess = int(counts[source]) - most
        if excess <= 0:
            break
        losing = np.flatnonzero(kept & (codes == source))
        losing = losing[np.lexsort((c.random[losing], margins[losing]))]
        _, first_of_prompt = np.unique(c.prompts[losing], return_index=True)
        losing = losing[np.sort(first_of_prompt)][:excess]

        after = position[losing] + 1
        lengths = np.maximum(0, ends[c.prompts[losing]] - after)
        heirs = order[gather_rows(after, lengths)]
        losers = np.repeat(np.arange(len(losing)), lengths)
        room = np.maximum(0, most - counts)
        open_to = ~kept[heirs] & (codes[heirs] != source) & (room[codes[heirs]] > 0)
        open_to &= ~_is_kept_beside(same, kept, losing, heirs)
        with_heir, first_heir = np.unique(losers[open_to], return_index=True)
        heirs = heirs[open_to][first_heir]

        dropped = np.setdiff1d(np.arange(len(losing)), with_heir)
        # Of those that want the same source, the least clear go first, as many as it has room for.
        by_source = np.argsort(codes[heirs], kind="stable")
        fits = np.empty(len(heirs), dtype=bool)
        fits[by_source] = places_within_groups(codes[heirs][by_source]) < room[codes[heirs][by_source]]
        kept[losing[dropped]] = False
        kept[losing[with_heir[fits]]] = False
        kept[heirs[fits]] = True
        passed_on += int(fits.sum())
    return passed_on


def _is_kept_beside(
    same: Int64s | None, kept: npt.NDArray[np.bool_], losing: Int64s, rows: Int64s
) -> npt.NDArray[np.bool_]:
    """Which of some rows have the response of a kept row of their prompt, one of those that are `losing` apart; `same`
    [N] is one number for candidates of a prompt with one response; None: all differ."""
    if same is None:
        return np.zeros(len(rows), dtype=bool)
    stays = kept.copy()
    stays[losing] = False
    return np.isin(same[rows], same[stays])


def _source_codes(sources: pa.Array) -> Int64s:
    """A number for each source [N], in the order of their names; one more for rows without."""
    encoded = sources.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    place = np.empty(len(names) + 1, dtype=np.int64)
    place[sorted(range(len(names)), key=lambda index: names[index])] = np.arange(len(names))
    place[-1] = len(names)
    indices = encoded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
    return place[indices.astype(np.int64)]


def random_keys(seed: int, prompt_ids: pa.Array, candidate_ids: pa.Array) -> npt.NDArray[np.uint64]:
    """A number for each candidate [N] that depends on nothing but the seed and its ids."""
    salt = seed.to_bytes(16, "little", signed=True)

    def number(prompt_id: str, candidate_id: str) -> bytes:
        prompt = prompt_id.encode()
        text = len(prompt).to_bytes(8, "little") + prompt + candidate_id.encode()
        return hashlib.blake2b(text, digest_size=8, salt=salt).digest()

    digests = map(number, prompt_ids.to_pylist(), candidate_ids.to_pylist())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
