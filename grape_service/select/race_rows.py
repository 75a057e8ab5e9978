"""A race on rows of shards: who competes, what is known of them, and what that comes to under the run's settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from grape_service.config.methods import RaceRisk, ScoreConfig, SelectConfig
from grape_service.errors import StageError
from grape_service.methods import SELECT
from grape_service.methods.base import Float64s, SelectMethod
from grape_service.rows.columns import LOSS_TOKEN
from grape_service.rows.keys import is_drawn
from grape_service.rows.ragged import Int64s, gather_rows, list_offsets_and_values, offsets_from_lengths, segment_sums
from grape_service.rows.statistics import LOGPROB, ordered
from grape_service.score.stopped import Limits, Stopped
from grape_service.score.tables import ScoreTable
from grape_service.select.limits import keep_column, prompt_limits, within_token_limits
from grape_service.select.methods import TokenStatistics, method_bounds, method_scores
from grape_service.select.race import Bools, Contest, Known, Standing, still_running
from grape_service.select.race_risk import likely_reach
from grape_service.storage.parquet import array_of


@dataclass(frozen=True)
class Race:
    """How the candidates of a run are raced."""

    select: SelectConfig
    risk: float = 0.0
    """How likely a stopped candidate may be to end better than the last one kept; 0: it cannot."""
    audit: float = 0.0
    """Share of prompts that are scored whole nevertheless."""

    @classmethod
    def of(cls, select: SelectConfig, score: ScoreConfig) -> Race | None:
        """That of a config; None where it scores every token."""
        if score.race == "off":
            return None
        settings = score.race if isinstance(score.race, RaceRisk) else None
        return cls(select, settings.risk, settings.audit) if settings is not None else cls(select)

    @property
    def method(self) -> SelectMethod:
        """Whose score is raced."""
        return SELECT[self.select.method]

    @property
    def score_name(self) -> str:
        """What is bounded: limits of one name are limits of the same score."""
        return f"{self.select.method}{', turn end counted' if self.select.count_turn_end else ''}"

    @property
    def columns(self) -> list[str]:
        """The shard's columns that it reads."""
        named = [keep_column(self.select), *self.method.columns]
        ours = ["row_key", "prompt_id", "candidate_id", "source", "loss_mask"]
        return list(dict.fromkeys([*ours, *(name for name in named if name is not None)]))

    def audits(self, prompt_id: str) -> bool:
        """Whether a prompt is scored whole: the same ones in each run, in every partition."""
        return is_drawn(prompt_id, self.audit, b"race audit")

    def reach(self, bounds: Float64s, limits: Limits) -> Float64s:
        """What scores [N] are taken to reach at most: their bounds, or what stored limits of the same score say at no
        larger risk."""
        same = limits.method == self.score_name
        return np.where(same & (limits.risk <= self.risk), np.fmin(bounds, limits.reach), bounds)


@dataclass(frozen=True)
class RacedRows:
    """Candidates [N] of whole prompts, their rows [U], and what is known of those. L tokens with loss of all rows."""

    race: Race
    names: tuple[str, ...]
    """The statistics that are made, log-probabilities first."""
    keys: pa.Array
    """[U]"""
    table: pa.Table
    """[U] Columns of `race.columns`, of the first candidate that a row has."""
    counted: Bools
    """[L] Tokens that count in a score."""
    contest: Contest
    prompt_ids: pa.Array
    """[P]"""
    progress: Known
    limits: Limits
    """[U] That are stored."""
    estimates: bool = False
    """Whether reaches are estimated, while a race with a risk is under way; what is stored of them is not changed."""

    @classmethod
    def of(cls, race: Race, table: pa.Table, names: Iterable[str]) -> RacedRows:
        """Of candidates with the columns of `race.columns`, nothing known of them; `names` as `rows.statistics.ordered`
        takes them."""
        select, names = race.select, ordered(names)
        keys = array_of(table, "row_key").dictionary_encode()
        row_of = keys.indices.to_numpy().astype(np.int64)  # [N]
        first = np.unique(row_of, return_index=True)[1]
        rows = table.select(race.columns).take(pa.array(first)).combine_chunks()
        mask_offsets, mask = list_offsets_and_values(array_of(rows, "loss_mask"))
        lengths = segment_sums(mask > 0, mask_offsets)
        counted = np.ones(int(lengths.sum()), bool) if select.count_turn_end else mask[mask > 0] == LOSS_TOKEN
        prompt_ids = array_of(table, "prompt_id").dictionary_encode()
        prompts = prompt_ids.indices.to_numpy().astype(np.int64)
        sources = array_of(table, "source").dictionary_encode().indices.fill_null(-1).to_numpy().astype(np.int64)
        contest = Contest(
            prompts,
            row_of,
            within_token_limits(lengths[row_of], select),
            sources,
            prompt_limits(table, prompts, len(prompt_ids.dictionary), select)[1],
            select.min_margin or 0.0,
        )
        progress = Known.of(offsets_from_lengths(lengths), names)
        limits = Limits.of_none(len(lengths))
        return cls(race, names, keys.dictionary, rows, counted, contest, prompt_ids.dictionary, progress, limits)

    def part(self, start: int, stop: int) -> RacedRows:
        """The rows from start to stop with their candidates; what becomes known of them becomes known here."""
        contest, tokens = self.contest, slice(*self.progress.offsets[[start, stop]].tolist())
        mine = (contest.rows >= start) & (contest.rows < stop)
        return replace(
            self,
            keys=self.keys[start:stop],
            table=self.table.slice(start, stop - start),
            counted=self.counted[tokens],
            contest=replace(
                contest,
                prompts=contest.prompts[mine],
                rows=contest.rows[mine] - start,
                eligible=contest.eligible[mine],
                sources=contest.sources[mine],
            ),
            progress=self.progress.part(start, stop),
            limits=self.limits.take(slice(start, stop)),
        )

    def with_stored(self, whole: Mapping[str, ScoreTable], stopped: Stopped) -> RacedRows:
        """With what is stored of the rows [U]; see `take_stored`."""
        take_stored(self.progress, self.keys, whole, stopped)
        return replace(self, limits=stopped.limits)

    def stand(self, progress: Known) -> Standing:
        """What the known tokens come to."""
        method, known = self.race.method, progress.known_tokens()
        values = {name: np.where(known, array, 0).astype(np.float32) for name, array in progress.statistics.items()}
        tokens = TokenStatistics(values, progress.offsets, progress.whole & ~progress.failed)
        scores = method_scores(method, self.table, tokens, self.counted, self.race.select)
        bounds = self.bounds(progress)
        totals = segment_sums(self.counted, progress.offsets)
        counted = segment_sums(self.counted & known, progress.offsets)
        mean = np.full(len(bounds), -np.inf)
        np.divide(bounds * totals, counted, out=mean, where=counted > 0)
        reach = self.race.reach(bounds, self.limits)
        if self.estimates and self.race.risk:
            taken = self.counted & known
            logprobs, offsets = progress.statistics[LOGPROB][taken], offsets_from_lengths(counted)
            reach = np.fmin(reach, likely_reach(logprobs, offsets, totals, bounds, self.race.risk))
        return Standing(method.oriented(scores), reach, mean)

    def bounds(self, progress: Known) -> Float64s:
        """What the scores of the rows [U] cannot exceed, by their known tokens."""
        known = progress.known_tokens()
        values = {name: np.where(known, array, 0).astype(np.float32) for name, array in progress.statistics.items()}
        tokens = TokenStatistics(values, progress.offsets, progress.whole)
        return method_bounds(self.race.method, self.table, tokens, self.counted, known)

    def limits_now(self, known: Int64s, reach: Float64s) -> Limits:
        """What the scores of the rows [U] can reach, to be stored: `reach`, by the first `known` [U] tokens."""
        bound = self.bounds(replace(self.progress, known=known))
        method = np.full(len(bound), self.race.score_name, dtype=object)
        return Limits(method, bound, reach, np.where(reach < bound, self.race.risk, 0.0))

    def running(self) -> Bools:
        """Rows [U] that are still to be scored further."""
        standing, ended = self.stand(self.progress), self.progress.whole | self.progress.failed
        return still_running(self.contest, standing.scores, standing.reach, ended) | (self.audited() & ~ended)

    def audited(self) -> Bools:
        """Rows [U] of prompts that are scored whole nevertheless."""
        rows = np.zeros(len(self.keys), dtype=bool)
        if self.race.audit:
            prompts = np.array([self.race.audits(prompt_id) for prompt_id in self.prompt_ids.to_pylist()])
            rows[self.contest.rows[prompts[self.contest.prompts]]] = True
        return rows

    def of_prompts(self, rows: Bools) -> Bools:
        """Candidates [N] of the prompts that any of some rows [U] is in."""
        wanted = np.zeros(len(self.prompt_ids), dtype=bool)
        wanted[self.contest.prompts[rows[self.contest.rows]]] = True
        return wanted[self.contest.prompts]


def take_stored(progress: Known, keys: pa.Array, whole: Mapping[str, ScoreTable] | None, stopped: Stopped) -> None:
    """Note what is stored of rows [U] with `keys`: whole scores, where they are given, and the first tokens of rows
    that were stopped. Raises StageError where a row has more values than tokens."""
    found = np.zeros(len(keys), dtype=bool)
    if whole is not None:
        found = np.logical_and.reduce([table.found for table in whole.values()])
        _take(progress, keys, whole, np.flatnonzero(found))
    _take(progress, keys, stopped.tables, np.flatnonzero(~found & (stopped.known > 0)))


def _take(progress: Known, keys: pa.Array, tables: Mapping[str, ScoreTable], rows: Int64s) -> None:
    for name, values in progress.statistics.items():
        lengths = tables[name].lengths[rows]
        wrong = np.flatnonzero(lengths > progress.total[rows])
        if len(wrong):
            key = keys[int(rows[wrong[0]])].as_py().hex()
            raise StageError(f"the stored score of row {key} has more values than the row has tokens with loss")
        values[gather_rows(progress.offsets[:-1][rows], lengths)] = tables[name].take(rows)
        progress.known[rows] = lengths
