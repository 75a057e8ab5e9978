"""Statistics of a run that add up over partitions: fixed size, whole numbers, so any order gives the same.

Sums of fractions are kept in whole units of 2**-12 (scores, logarithms of lengths) or 2**-16 (weights).
S sources (the largest by name, then all others together), N candidates, L tokens with loss.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from grape_service.methods import SELECT
from grape_service.report.facts import SelectReport, WeightsReport
from grape_service.report.sums import (
    UNIT,
    Examples,
    Moments,
    Statistics,
    source_codes,
)
from grape_service.rows.ragged import Int64s
from grape_service.select.choose import KEPT, Candidates, Choice
from grape_service.weigh.partition import WeightBatch

WEIGHT_UNIT = 2.0**16

SCORE_EDGES = np.linspace(-8.0, 0.0, 81)
MARGIN_EDGES = np.concatenate([[0.0], np.logspace(-4, 1, 51)])
LENGTH_EDGES = 2.0 ** np.arange(0, 18.5, 0.5)
WEIGHT_EDGES = np.linspace(-5.05, 3.05, 82)  # log10; a weight of 1 is in the middle of its bin
FINE = 5
"""Bins by position in one of WEIGHT_EDGES, so that quantiles of weights are known to 5%."""
FINE_WEIGHT_EDGES = np.linspace(-5.05, 3.05, 81 * FINE + 1)
RATIO_EDGES = np.linspace(-4.0, 4.0, 401)
NUM_POSITIONS = 20
METHODS = ("mean", "steps", "rsr")
"""Rules that a report lays beside each other where their statistics are there; mean is GRAPE."""
LENGTH_MATCH = 1.25
"""A length-matched choice is among candidates at most this factor away from their prompt's median length."""


def _histogram(values: npt.NDArray, edges: npt.NDArray[np.float64]) -> Int64s:
    """The bin [N] of each value; those outside are in the first or the last."""
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)


def _table(codes: Int64s, bins: Int64s, num_codes: int, num_bins: int) -> Int64s:
    return np.bincount(codes * num_bins + bins, minlength=num_codes * num_bins).reshape(num_codes, num_bins)


@dataclass
class SelectStatistics(Statistics):
    """What selection saw and chose. A SelectObserver."""

    candidates: Int64s  # [S]
    kept: Int64s  # [S]
    prompts_with: Int64s  # [S] kept prompts with two scored candidates or more, one of this source
    wins: Int64s  # [S] of those, the prompts whose first choice is of this source
    beats: Int64s  # [S, S] candidates of source j that lost to a first choice of source i
    scores: Int64s  # [S, bins of SCORE_EDGES]
    score_sum: Int64s  # [S] units
    margins: Int64s  # [S, bins of MARGIN_EDGES], by the winner's source
    lengths: Int64s  # [bins of LENGTH_EDGES] of all candidates
    kept_lengths: Int64s  # [bins of LENGTH_EDGES]
    length_scores: Int64s  # [bins of LENGTH_EDGES, bins of SCORE_EDGES]
    stopped: Int64s  # [S] candidates that a race stopped: they have no score
    winner_tokens: int = 0  # of first choices of contested prompts
    rival_tokens: int = 0  # of the other candidates of those prompts, their mean in each, in units
    stepped: int = 0  # contested prompts whose responses were cut into steps
    winner_step: int = 0  # tokens a step of their first choices, in units
    rival_step: int = 0  # of the other candidates of those prompts, their mean in each, in units
    contested: int = 0  # kept prompts with two candidates or more that are scored or were stopped
    compared: int = 0  # of those, the ones of which no candidate was stopped: other rules choose in them alone
    at_least: int = 0  # of them, the ones whose margin is to a candidate that was stopped: it is not among the margins
    compared_steps: int = 0  # of them, the ones that were cut into steps: rules by steps choose in them alone
    chance: int = 0  # expected agreement of a random choice, in units
    agree: dict[str, int] = field(default_factory=dict)  # another rule -> compared prompts where its choice is kept
    picked: dict[str, Int64s] = field(
        default_factory=dict
    )  # another rule -> [S] compared prompts by its choice's source
    picked_tokens: dict[str, int] = field(default_factory=dict)  # another rule -> tokens of its choices
    overlap: dict[str, int] = field(default_factory=dict)  # two rules -> compared prompts in which both choose one
    overall: Moments = field(default_factory=Moments)  # log2 length, score
    within: Moments = field(default_factory=Moments)  # the same, less the prompt's means
    examples: Examples = field(default_factory=Examples)

    @classmethod
    def empty(cls, names: list[str]) -> SelectStatistics:
        """Of nothing."""
        s, scores, lengths = len(names), len(SCORE_EDGES) - 1, len(LENGTH_EDGES) - 1

        def zeros(*shape: int) -> Int64s:
            return np.zeros(shape, dtype=np.int64)

        return cls(
            names,
            candidates=zeros(s),
            kept=zeros(s),
            prompts_with=zeros(s),
            wins=zeros(s),
            beats=zeros(s, s),
            scores=zeros(s, scores),
            score_sum=zeros(s),
            margins=zeros(s, len(MARGIN_EDGES) - 1),
            lengths=zeros(lengths),
            kept_lengths=zeros(lengths),
            length_scores=zeros(lengths, scores),
            stopped=zeros(s),
        )

    def to_json(self) -> SelectReport:
        """Plain numbers, and the figures that follow from the sums."""
        return {
            "names": self.names,
            "candidates": self.candidates.tolist(),
            "kept": self.kept.tolist(),
            "prompts_with": self.prompts_with.tolist(),
            "wins": self.wins.tolist(),
            "beats": self.beats.tolist(),
            "scores": self.scores.tolist(),
            "score_mean": (self.score_sum / UNIT / np.maximum(1, self.scores.sum(axis=1))).tolist(),
            "margins": self.margins.tolist(),
            "lengths": self.lengths.tolist(),
            "kept_lengths": self.kept_lengths.tolist(),
            "length_scores": self.length_scores.tolist(),
            "stopped": self.stopped.tolist(),
            "contested": self.contested,
            "compared": self.compared,
            "compared_steps": self.compared_steps,
            "at_least": self.at_least,
            "stepped": self.stepped,
            "winner_tokens": self.winner_tokens / max(1, self.contested),
            "rival_tokens": self.rival_tokens / UNIT / max(1, self.contested),
            "winner_step_tokens": self.winner_step / UNIT / self.stepped if self.stepped else None,
            "rival_step_tokens": self.rival_step / UNIT / self.stepped if self.stepped else None,
            "chance": self.chance / UNIT / max(1, self.compared),
            "agree": self.agree,
            "picked": {rule: sources.tolist() for rule, sources in self.picked.items()},
            "picked_tokens": self.picked_tokens,
            "overlap": self.overlap,
            "overall": self.overall.correlation(),
            "within": self.within.correlation(),
            "examples": self.examples.chosen,
        }

    def add_candidates(self, candidates: Candidates, choice: Choice) -> None:
        """Whole prompts, a prompt's rows next to each other."""
        detail = candidates.detail
        assert detail is not None, "a report needs the details of candidates"
        if len(candidates.prompts) == 0:
            return
        codes = source_codes(candidates.sources, self.names)
        num_sources = len(self.names)
        self.candidates += np.bincount(codes, minlength=num_sources)
        self.kept += np.bincount(codes[choice.kept], minlength=num_sources)
        length_bins = _histogram(detail.counted_tokens, LENGTH_EDGES)
        self.lengths += np.bincount(length_bins, minlength=len(self.lengths))
        self.kept_lengths += np.bincount(length_bins[choice.kept], minlength=len(self.lengths))
        chosen_prompts = np.flatnonzero(choice.left_out == KEPT)
        self.examples.offer_random(detail.prompt_ids, chosen_prompts)
        if candidates.scores is not None and choice.ranking is not None:
            self._add_scores(candidates, choice, codes, length_bins)

    def _add_scores(self, c: Candidates, choice: Choice, all_codes: Int64s, length_bins: Int64s) -> None:
        detail = c.detail
        assert detail is not None
        assert c.scores is not None
        assert choice.ranking is not None
        stopped = c.stopped
        finite = np.isfinite(c.scores) & ~stopped
        scored = np.flatnonzero(finite)
        scores, prompts, codes, lengths = c.scores[scored], c.prompts[scored], all_codes[scored], length_bins[scored]
        tokens = detail.counted_tokens[scored]
        bins = _histogram(scores, SCORE_EDGES)
        num_sources, num_bins = len(self.names), len(SCORE_EDGES) - 1
        self.scores += _table(codes, bins, num_sources, num_bins)
        units = np.rint(np.clip(scores, -64, 0) * UNIT)
        self.score_sum += np.bincount(codes, weights=units, minlength=num_sources).astype(np.int64)
        self.length_scores += _table(lengths, bins, len(self.lengths), num_bins)
        log_tokens = np.log2(np.maximum(1, tokens))
        self.overall += Moments.of(log_tokens, scores)
        if stopped.any():
            scored = np.flatnonzero(finite | stopped)
            scores, prompts, codes = c.scores[scored], c.prompts[scored], all_codes[scored]
            tokens = detail.counted_tokens[scored]
            log_tokens = np.log2(np.maximum(1, tokens))
            self.stopped += np.bincount(all_codes[stopped], minlength=num_sources)
        if len(scored) == 0:
            return

        # Prompts with something to choose from, each with its first choice.
        starts = np.flatnonzero(np.concatenate([[True], prompts[1:] != prompts[:-1]]))
        sizes = np.diff(np.append(starts, len(prompts)))
        group = np.repeat(np.arange(len(starts)), sizes)
        means = [np.repeat(np.add.reduceat(v, starts) / sizes, sizes) for v in (log_tokens, scores)]
        whole = np.add.reduceat(stopped[scored].astype(np.int64), starts) == 0
        many = np.repeat((sizes > 1) & whole, sizes)
        self.within += Moments.of((log_tokens - means[0])[many], (scores - means[1])[many])
        kept = choice.kept[scored]
        rank = np.where(kept, choice.ranking.rank[scored], np.iinfo(np.int32).max)
        best = np.minimum.reduceat(rank, starts)
        contested = (sizes > 1) & (best < np.iinfo(np.int32).max)
        first = kept & (rank == best[group]) & contested[group]
        rows, group_winner = np.flatnonzero(first), np.zeros(len(starts), dtype=np.int64)
        group_winner[group[rows]] = codes[rows]
        present = np.zeros((len(starts), num_sources), dtype=bool)
        present[group, codes] = True
        self.prompts_with += present[contested].sum(axis=0)
        self.wins += np.bincount(codes[rows], minlength=num_sources)
        losers = contested[group] & ~kept
        self.beats += _table(group_winner[group[losers]], codes[losers], num_sources, num_sources)
        margins = choice.ranking.margin[scored[rows]]
        at_least = choice.ranking.at_least[scored[rows]]
        self.at_least += int(at_least.sum())
        known = np.isfinite(margins) & ~at_least
        self.margins += _table(
            codes[rows[known]], _histogram(margins[known], MARGIN_EDGES), num_sources, len(MARGIN_EDGES) - 1
        )
        self.contested += len(rows)
        self.winner_tokens += int(tokens[rows].sum())
        totals = np.add.reduceat(tokens, starts)[group[rows]]
        rivals = (totals - tokens[rows]) / (sizes[group[rows]] - 1)
        self.rival_tokens += int(np.rint(rivals * UNIT).sum())
        if detail.num_steps is not None:
            num_steps = detail.num_steps[scored]
            a_step = tokens / np.maximum(1, num_steps)
            rows_cut = rows[num_steps[rows] >= 0]
            of_rows = group[rows_cut]
            others = (np.add.reduceat(a_step, starts)[of_rows] - a_step[rows_cut]) / (sizes[of_rows] - 1)
            self.stepped += len(rows_cut)
            self.winner_step += int(np.rint(a_step[rows_cut] * UNIT).sum())
            self.rival_step += int(np.rint(others * UNIT).sum())
        num_kept = np.add.reduceat(kept.astype(np.int64), starts)
        compared = contested & whole
        self.compared += int(compared.sum())
        self.chance += int(np.rint(num_kept[compared] / sizes[compared] * UNIT).sum())
        self._add_alternatives(c, scored, starts, group, compared, kept, scores, tokens, codes)
        numbers = prompts[rows[known]]
        self.examples.offer("closest", margins[known], detail.prompt_ids, numbers)
        self.examples.offer("clearest", -margins[known], detail.prompt_ids, numbers)

    def _add_alternatives(
        self,
        c: Candidates,
        scored: Int64s,
        starts: Int64s,
        group: Int64s,
        compared: npt.NDArray[np.bool_],
        kept: npt.NDArray[np.bool_],
        scores: npt.NDArray[np.float64],
        tokens: Int64s,
        codes: Int64s,
    ) -> None:
        """How often what another rule would choose first is among what was kept, of prompts whose candidates all have
        scores."""
        detail = c.detail
        assert detail is not None
        median = _medians(tokens, group, starts)[group]
        matched = (tokens <= median * LENGTH_MATCH) & (tokens * LENGTH_MATCH >= median)
        keys = {
            "mean": np.nan_to_num(scores, nan=-np.inf),
            "sum": np.nan_to_num(scores * tokens, nan=-np.inf),
            "length-matched": np.where(matched & ~np.isnan(scores), scores, -np.inf),
            "longest": tokens.astype(np.float64),
            "shortest": -tokens.astype(np.float64),
        }
        for name, values in detail.others.items():
            keys[name] = np.nan_to_num(values[scored], nan=-np.inf)
        if detail.turn_end_scores is not None:
            keys["turn end the other way"] = np.nan_to_num(detail.turn_end_scores[scored], nan=-np.inf)
        ties = c.ties[scored]
        choices = {}
        cut = compared
        if detail.num_steps is not None:
            cut = compared & (detail.num_steps[scored][starts] >= 0)
            self.compared_steps += int(cut.sum())
        for name, key in keys.items():
            best = np.maximum.reduceat(key, starts)
            tied = np.where(key == best[group], ties, np.iinfo(np.int64).max)
            winner = tied == np.minimum.reduceat(tied, starts)[group]
            is_cut = name in SELECT and SELECT[name].cuts_steps
            found = winner & (cut if is_cut else compared)[group]
            if name in METHODS:
                choices[name] = found
            by_source = np.bincount(codes[found], minlength=len(self.names))
            self.agree[name] = self.agree.get(name, 0) + int((found & kept).sum())
            self.picked[name] = self.picked.get(name, 0) + by_source
            self.picked_tokens[name] = self.picked_tokens.get(name, 0) + int(tokens[found].sum())
        for left, right in itertools.combinations(sorted(choices), 2):
            both = f"{left}|{right}"
            self.overlap[both] = self.overlap.get(both, 0) + int((choices[left] & choices[right]).sum())


def _medians(values: Int64s, group: Int64s, starts: Int64s) -> npt.NDArray[np.float64]:
    """Lower median of each group of adjacent rows."""
    ordered = values[np.lexsort((values, group))]
    sizes = np.diff(np.append(starts, len(values)))
    return ordered[starts + (sizes - 1) // 2].astype(np.float64)


@dataclass
class WeighStatistics(Statistics):
    """Weights of tokens, before `normalize: dataset`. A WeighObserver."""

    weights: Int64s  # [S, bins of WEIGHT_EDGES] log10
    ratios: Int64s  # [bins of RATIO_EDGES] known log ratios
    positions: Int64s  # [NUM_POSITIONS, bins of FINE_WEIGHT_EDGES] by relative position in the response
    position_sum: list[int]  # [NUM_POSITIONS] units of 2**-16

    @classmethod
    def empty(cls, names: list[str]) -> WeighStatistics:
        """Of nothing."""
        bins = len(WEIGHT_EDGES) - 1
        return cls(
            names,
            np.zeros((len(names), bins), dtype=np.int64),
            np.zeros(len(RATIO_EDGES) - 1, dtype=np.int64),
            np.zeros((NUM_POSITIONS, bins * FINE), dtype=np.int64),
            [0] * NUM_POSITIONS,
        )

    def __add__(self, other: Self) -> Self:
        summed = [a + b for a, b in zip(self.position_sum, other.position_sum, strict=True)]
        return type(self)(
            self.names,
            self.weights + other.weights,
            self.ratios + other.ratios,
            self.positions + other.positions,
            summed,
        )

    def to_json(self) -> WeightsReport:
        """Plain numbers; mean, quantiles and share of the weight by position."""
        counts = np.maximum(1, self.positions.sum(axis=1))
        sums = np.array([value / WEIGHT_UNIT for value in self.position_sum])
        total = sums.sum()
        return {
            "names": self.names,
            "weights": self.weights.tolist(),
            "ratios": self.ratios.tolist(),
            "position_mean": (sums / counts).tolist(),
            "position_q10": self._position_quantiles(0.1),
            "position_q50": self._position_quantiles(0.5),
            "position_q90": self._position_quantiles(0.9),
            "last_tenth": float(sums[-NUM_POSITIONS // 10 :].sum() / total) if total else None,
        }

    def _position_quantiles(self, share: float) -> list[float | None]:
        logs = [quantile(row, FINE_WEIGHT_EDGES, share) for row in self.positions]
        return [None if log is None else 10**log for log in logs]

    def add_weights(self, batch: WeightBatch) -> None:
        """Weights [L] of responses [N]."""
        lengths = np.diff(batch.offsets)
        codes = np.repeat(source_codes(batch.sources, self.names), lengths)
        place = np.arange(int(batch.offsets[-1])) - np.repeat(batch.offsets[:-1], lengths)
        position = place * NUM_POSITIONS // np.maximum(1, np.repeat(lengths, lengths))
        step = FINE_WEIGHT_EDGES[1] - FINE_WEIGHT_EDGES[0]
        num_bins = len(FINE_WEIGHT_EDGES) - 1
        logs = np.log10(np.maximum(batch.weights, 10.0 ** FINE_WEIGHT_EDGES[0]))
        bins = np.clip((logs - FINE_WEIGHT_EDGES[0]) / step, 0, num_bins - 1).astype(np.int64)
        self.weights += _table(codes, bins // FINE, len(self.names), num_bins // FINE)
        self.positions += _table(position, bins, NUM_POSITIONS, num_bins)
        units = np.rint(np.minimum(batch.weights, 2.0**20) * WEIGHT_UNIT)
        sums = np.bincount(position, weights=units, minlength=NUM_POSITIONS)
        self.position_sum = [total + int(value) for total, value in zip(self.position_sum, sums, strict=True)]
        known = batch.ratios[~np.isnan(batch.ratios)]
        ratio_bins = (np.clip(known, RATIO_EDGES[0], RATIO_EDGES[-1]) - RATIO_EDGES[0]) / (
            RATIO_EDGES[1] - RATIO_EDGES[0]
        )
        last = len(self.ratios) - 1
        self.ratios += np.bincount(np.minimum(ratio_bins.astype(np.int64), last), minlength=last + 1)


def quantile(row: npt.ArrayLike, edges: npt.NDArray[np.float64], share: float) -> float | None:
    """The value at or below which are `share` > 0 of a histogram's values, between the edges of its bin; None of
    nothing."""
    counts = np.asarray(row, dtype=np.int64)
    sums = np.cumsum(counts)
    if not sums[-1]:
        return None
    place = int(np.searchsorted(sums, share * sums[-1]))
    part = (share * sums[-1] - (sums[place] - counts[place])) / counts[place]
    return float(edges[place] + part * (edges[place + 1] - edges[place]))
