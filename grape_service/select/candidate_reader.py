"""Candidates out of shards and scores: what a choice looks at, and which of them have failed or were stopped."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.methods import SelectConfig
from grape_service.methods import SELECT
from grape_service.methods.select.grape import grape_scores
from grape_service.models.vocabulary import Vocabulary
from grape_service.rows.columns import (
    LOSS_TOKEN,
)
from grape_service.rows.keys import is_drawn
from grape_service.rows.ragged import Int64s, list_offsets_and_values, offsets_from_lengths, segment_sums
from grape_service.rows.statistics import LOGPROB
from grape_service.rows.steps import steps_of_rows
from grape_service.score.stopped import Stopped
from grape_service.score.tables import KeyIndex, ScoreTable
from grape_service.select.choose import Candidates, Detail, random_keys
from grape_service.select.counts import SelectCounts
from grape_service.select.limits import prompt_limits
from grape_service.select.methods import TokenStatistics, method_scores, select_method, token_statistics
from grape_service.select.race_rows import Race, RacedRows
from grape_service.select.steps import token_steps
from grape_service.select.windows import LocalTokens, WindowScores
from grape_service.storage.parquet import array_of


class CandidateReader:
    """Turns tables of whole prompts into Candidates, in the order of the rows that `scores` has."""

    def __init__(
        self,
        select: SelectConfig,
        scores: dict[str, ScoreTable] | None,
        failures: KeyIndex | None,
        vocabulary: Vocabulary | None,
        windows: WindowScores | None = None,
        race: Race | None = None,
        stopped: Stopped | None = None,
    ):
        self.select = select
        self.vocabulary = vocabulary
        self.windows = windows
        self.race, self.stopped = race, stopped
        self.method = select_method(select)
        self.scores = scores
        self.finite = {name: table.finite() for name, table in (scores or {}).items()}
        self.failures = failures
        self.row = 0
        self.last_prompt: pa.Scalar = None
        self.with_detail = False
        self.cut_share = 1.0  # of the prompts whose responses are cut into steps for a report

    def read(self, table: pa.Table, counts: SelectCounts) -> Candidates:
        """The next candidates; counts those that have failed."""
        prompt_ids = array_of(table, "prompt_id").dictionary_encode()
        row_keys = array_of(table, "row_key")
        first, last = table["prompt_id"][0], table["prompt_id"][-1]
        assert first != self.last_prompt, f"prompt {first} lies in two shards"
        self.last_prompt = last
        order = pc.sort_indices(
            table.select(["candidate_id", "row_key"]), [("candidate_id", "ascending"), ("row_key", "ascending")]
        )
        ties = np.empty(table.num_rows, dtype=np.int64)
        ties[order.to_numpy()] = np.arange(table.num_rows)
        offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
        loss_tokens = segment_sums(mask > 0, offsets)
        values, other, reach, failed = None, None, None, np.zeros(table.num_rows, dtype=bool)
        counts.loss_tokens += int(loss_tokens.sum())
        tokens = TokenStatistics({}, offsets_from_lengths(loss_tokens), ~failed)
        counted = mask[mask > 0] == LOSS_TOKEN
        if self.select.count_turn_end:
            counted = np.ones(len(counted), dtype=bool)
        steps = None
        if self.vocabulary is not None and self._needs_steps:
            steps = token_steps(table, self.vocabulary, self.select.step_end)
        local = self.windows.take(steps, tokens.offsets) if self.windows is not None and steps is not None else None
        if self.scores is not None:
            rows = np.arange(self.row, self.row + table.num_rows)
            tokens = token_statistics(self.scores, self.finite, rows, loss_tokens, row_keys)
            reach = self._reach(table, tokens)
            values, other, failed = self._scores(tokens, rows, row_keys, mask, counted, counts, reach, local)
            if reach is not None and self.stopped is not None:
                here = ~np.isnan(reach)
                counts.stopped_candidates += int(here.sum())
                counts.stopped_tokens += int((loss_tokens - self.stopped.known[rows])[here].sum())
        chosen_by, others = None, {}
        if self.method is not None and self.method.name != "grape":
            chosen_by = method_scores(self.method, table, tokens, counted, self.select, steps, local)
            has_number = np.ones(len(chosen_by), dtype=bool) if values is None else np.isfinite(values)
            counts.nothing_counted += int((has_number & np.isnan(chosen_by)).sum())
        detail = None
        if self.with_detail:
            if self.scores is not None:
                others = {
                    name: method.oriented(method_scores(method, table, tokens, counted, self.select, steps))
                    for name, method in SELECT.items()
                    if name not in ("grape", self.select.method)
                    and set(method.statistics) <= self.scores.keys()
                    and (steps is not None or not method.cuts_steps)
                    and not method.scores_windows
                }
            num_steps = steps_of_rows(steps, tokens.offsets) if steps is not None else None
            if steps is None and self.vocabulary is not None:
                others_by_steps, num_steps = self._drawn_steps(table, tokens, counted, loss_tokens)
                others |= others_by_steps if self.scores is not None else {}
            detail = Detail(prompt_ids.dictionary, segment_sums(counted, tokens.offsets), other, others, num_steps)
        random = None
        if self.select.method == "random" or self.select.max_source_share is not None:
            random = random_keys(self.select.seed, array_of(table, "prompt_id"), array_of(table, "candidate_id"))
        audit_reach = self._audit_reach(table)
        self.row += table.num_rows
        prompts = prompt_ids.indices.to_numpy().astype(np.int64)
        distinct, keep = prompt_limits(table, prompts, len(prompt_ids.dictionary), self.select)
        return Candidates(
            prompts=prompts,
            num_prompts=len(prompt_ids.dictionary),
            ties=ties,
            responses=row_keys.dictionary_encode().indices.to_numpy().astype(np.int64),
            sources=array_of(table, "source"),
            loss_tokens=loss_tokens,
            scores=values,
            failed=failed,
            random=random,
            detail=detail,
            distinct=distinct,
            keep=keep,
            method_scores=chosen_by,
            smallest_wins=self.method is not None and self.method.better == "smallest",
            reach=reach,
            audit_reach=audit_reach,
        )

    @property
    def _needs_steps(self) -> bool:
        """Whether the choice itself looks at the steps of every row."""
        return self.windows is not None or (self.method is not None and self.method.cuts_steps)

    def _drawn_steps(
        self, table: pa.Table, tokens: TokenStatistics, counted: npt.NDArray[np.bool_], loss_tokens: Int64s
    ) -> tuple[dict[str, npt.NDArray[np.float64]], Int64s]:
        """Of the candidates [N] of prompts that are drawn: what methods that cut steps make of them, and how many steps
        they have. NaN and -1 of the others."""
        assert self.vocabulary is not None, "steps are cut in what ids stand for"
        prompt_ids = array_of(table, "prompt_id").dictionary_encode()
        drawn = [is_drawn(one, self.cut_share, b"report steps") for one in prompt_ids.dictionary.to_pylist()]
        rows = np.flatnonzero(np.array(drawn, dtype=bool)[prompt_ids.indices.to_numpy()])
        num_steps = np.full(table.num_rows, -1, dtype=np.int64)
        methods = {name: method for name, method in SELECT.items() if method.cuts_steps and not method.scores_windows}
        scores = {name: np.full(table.num_rows, np.nan) for name in methods}
        if len(rows):
            here = np.zeros(table.num_rows, dtype=bool)
            here[rows] = True
            of_rows = np.repeat(here, loss_tokens)
            part = table.take(rows)
            values = {name: flat[of_rows] for name, flat in tokens.values.items()}
            some = TokenStatistics(values, offsets_from_lengths(loss_tokens[rows]), tokens.usable[rows])
            steps = token_steps(part, self.vocabulary, self.select.step_end)
            num_steps[rows] = steps_of_rows(steps, some.offsets)
            for name, method in methods.items():
                if set(method.statistics) <= tokens.values.keys():
                    found = method_scores(method, part, some, counted[of_rows], self.select, steps)
                    scores[name][rows] = method.oriented(found)
        return scores, num_steps

    def _reach(self, table: pa.Table, tokens: TokenStatistics) -> npt.NDArray[np.float64] | None:
        """The most that candidates [N] which were stopped can have; NaN for the others, and for those that could still
        be kept: they lack a score."""
        if self.race is None or self.stopped is None:
            return None
        here = RacedRows.of(self.race, table, tokens.values)
        rows = np.arange(self.row, self.row + table.num_rows)
        first = rows[np.unique(here.contest.rows, return_index=True)[1]]  # of each row with its own tokens
        assert self.scores is not None
        whole = {name: one.of_rows(first) for name, one in self.scores.items()}
        here = here.with_stored(whole, self.stopped.of_rows(first))
        settled = ~here.progress.whole & ~here.running()
        return np.where(settled, here.stand(here.progress).reach, np.nan)[here.contest.rows]

    def _audit_reach(self, table: pa.Table) -> npt.NDArray[np.float64] | None:
        """The most that candidates [N] of audited prompts were taken to reach where the race stopped them, infinite
        where it did not; NaN for candidates of other prompts."""
        if self.race is None or self.stopped is None or not self.race.audit:
            return None
        limits = self.stopped.limits.take(np.arange(self.row, self.row + table.num_rows))
        audited = np.array([self.race.audits(prompt_id) for prompt_id in table["prompt_id"].to_pylist()], dtype=bool)
        mine = (limits.method == self.race.score_name) & (limits.risk <= self.race.risk)
        return np.where(audited, np.where(mine, limits.reach, np.inf), np.nan)

    def _scores(
        self,
        tokens: TokenStatistics,
        rows: npt.NDArray[np.int64],
        row_keys: pa.Array,
        mask: npt.NDArray[np.uint8],
        counted: npt.NDArray[np.bool_],
        counts: SelectCounts,
        reach: npt.NDArray[np.float64] | None,
        local: LocalTokens | None,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None, npt.NDArray[np.bool_]]:
        """grape_score of each row, the same with the turn end the other way, and which rows have failed: those without
        one that were not stopped, as those with a `reach` were."""
        assert self.scores is not None
        logprobs, finite = tokens.values[LOGPROB], tokens.usable
        found = np.logical_and.reduce([table.found[rows] for table in self.scores.values()])
        usable = np.repeat(finite, np.diff(tokens.offsets))
        values = grape_scores(logprobs, usable & counted, tokens.offsets)
        other = None
        if self.with_detail:
            other_way = usable & (mask[mask > 0] == LOSS_TOKEN) if self.select.count_turn_end else usable
            other = grape_scores(logprobs, other_way, tokens.offsets)
        reported = self.failures.places(row_keys) >= 0 if self.failures is not None else np.zeros(len(rows), dtype=bool)
        failed = ~finite if reach is None else ~finite & np.isnan(reach)
        counts.unexplained_failures += int((failed & ~found & ~reported).sum())
        counts.not_finite += int((found & ~finite).sum())
        counts.nothing_counted += int((finite & np.isnan(values)).sum())
        if local is not None:
            counts.unexplained_failures += int((finite & ~local.explained).sum())
            failed |= ~local.usable
        counts.failed_candidates += int(failed.sum())
        return values, other, failed
