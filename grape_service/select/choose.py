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
from grape_service.rows.ragged import Int64s, gather_rows
from grape_service.select.grape import Float64s, Ranking, order_within_prompts, places_within_groups, rank_candidates

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

    @classmethod
    def concatenate(cls, parts: list[Detail]) -> Detail:
        """Details of different prompts together."""
        scores = [part.turn_end_scores for part in parts if part.turn_end_scores is not None]
        return cls(
            pa.concat_arrays([part.prompt_ids for part in parts]),
            np.concatenate([part.counted_tokens for part in parts]),
            np.concatenate(scores) if scores else None,
            {name: np.concatenate([part.others[name] for part in parts]) for name in parts[0].others},
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
            sources=self.sources[rows],
            loss_tokens=self.loss_tokens[rows],
            scores=None if self.scores is None else self.scores[rows],
            failed=self.failed[rows],
            random=None if self.random is None else self.random[rows],
            method_scores=None if self.method_scores is None else self.method_scores[rows],
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
        return Choice(self.kept[rows], ranking, self.num_candidates[rows], self.left_out, self.passed_on, by_grape)


def choose(candidates: Candidates, select: SelectConfig) -> Choice:
    """Keep at most `select.keep` candidates per prompt, or as many as its `keep` says, in the order of the method.

    Ranks and margins are among all candidates of the prompt, also those that the token limits keep from
    winning. A prompt is left out when a candidate of it has failed, when none of its candidates may win,
    or when its best one that may win leads the next best by less than min_margin; one without a next
    best has nothing to lead and stays.
    """
    c = candidates
    num_candidates = np.bincount(c.prompts, minlength=c.num_prompts).astype(np.int32)[c.prompts]
    keys = c.oriented
    ranking = rank_candidates(c.prompts, keys, c.ties) if keys is not None else None
    by_grape = None
    if c.method_scores is not None and c.scores is not None:
        by_grape = rank_candidates(c.prompts, c.scores, c.ties)
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

    order, places = _order(c, select, eligible)
    kept = np.zeros(len(order), dtype=bool)
    most = select.usual_keep if c.keep is None else c.keep[c.prompts[order]]
    kept[order] = eligible[order] & ((places < most) | (select.method == "all"))
    passed_on = 0
    if select.max_source_share is not None:
        passed_on = _limit_source_share(c, select.max_source_share, order, eligible, kept, ranking)
        still = np.bincount(c.prompts[kept], minlength=c.num_prompts) > 0
        left_out[(left_out == KEPT) & ~still] = SOURCE_SHARE
    return Choice(kept, ranking, num_candidates, left_out, passed_on, by_grape)


def _eligible(c: Candidates, select: SelectConfig) -> npt.NDArray[np.bool_]:
    """Candidates [N] that may win."""
    eligible = np.ones(len(c.prompts), dtype=bool)
    if select.min_response_tokens is not None:
        eligible &= c.loss_tokens >= select.min_response_tokens
    if select.max_response_tokens is not None:
        eligible &= c.loss_tokens <= select.max_response_tokens
    if select.method.startswith("source:"):
        same = pc.fill_null(pc.equal(c.sources, select.method.removeprefix("source:")), False)
        eligible &= same.to_numpy(zero_copy_only=False)
    if c.oriented is not None:
        eligible &= np.isfinite(c.oriented)
    return eligible


def _order(c: Candidates, select: SelectConfig, eligible: npt.NDArray[np.bool_]) -> tuple[Int64s, Int64s]:
    """Rows by prompt, those that may win first, best first; and each one's place in its prompt."""
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
    order = within[np.lexsort((~eligible[within], c.prompts[within]))]  # stable
    return order, places_within_groups(c.prompts[order])


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
    prompt that may win, is of a source with room left, and is not kept already; where there is none, it
    is dropped. A win without a next best is the clearest. Rows without a source are a source together.
    Wins only ever move down their prompt's order, so this ends. It holds within each partition exactly,
    hence over all of them together.
    """
    assert c.random is not None, "max_source_share needs random keys"
    codes = _source_codes(c.sources)
    num_sources = int(codes.max()) + 1 if len(codes) else 0
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
