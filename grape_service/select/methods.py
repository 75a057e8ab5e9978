"""Select methods by name: what each makes of a candidate's statistics, and whether its largest or smallest wins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.config.methods import SELECT_STATISTICS, SelectConfig
from grape_service.errors import StageError
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import Int64s, offsets_from_lengths, segment_sums
from grape_service.rows.statistics import LOGPROB, RANK, ordered
from grape_service.score.store import ScoreTable
from grape_service.select.grape import Float64s, grape_scores
from grape_service.select.rsr import rsr_scores
from grape_service.select.surprise import surprise_scores
from grape_service.storage.parquet import array_of


@dataclass(frozen=True)
class SelectMethod:
    """A method that gives each candidate a number."""

    name: str
    score: Callable[[MethodBatch], Float64s]
    statistics: tuple[str, ...]  # that its batch holds
    columns: tuple[str, ...]  # the pool's, that its batch holds
    better: Literal["largest", "smallest"]

    def oriented(self, scores: Float64s) -> Float64s:
        """Scores such that the largest wins."""
        return -scores if self.better == "smallest" else scores


def _grape(batch: MethodBatch) -> Float64s:
    logprobs = batch.statistics[LOGPROB]
    return grape_scores(logprobs, np.ones(len(logprobs), dtype=bool), batch.offsets)


OURS = {
    "grape": SelectMethod("grape", _grape, ordered(SELECT_STATISTICS["grape"]), (), "largest"),
    "rsr": SelectMethod("rsr", rsr_scores, ordered(SELECT_STATISTICS["rsr"]), (), "smallest"),
    "surprise": SelectMethod("surprise", surprise_scores, ordered(SELECT_STATISTICS["surprise"]), (), "largest"),
}


def select_method(select: SelectConfig) -> SelectMethod | None:
    """The method that scores candidates; None where it needs no score. Raises UserError where a user's is gone."""
    if select.is_unscored:
        return None
    own = select.own
    if own is None:
        return OURS[select.method]
    return SelectMethod(own.name, own, own.statistics, own.columns, own.better)


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of the tokens of N candidates, flat [L] by name, 0 where there are none."""

    values: dict[str, npt.NDArray[np.float32]]
    offsets: Int64s  # [N + 1]
    usable: npt.NDArray[np.bool_]  # [N]: all of them are there and finite


def token_statistics(
    tables: Mapping[str, ScoreTable],
    finite: Mapping[str, npt.NDArray[np.bool_]],
    rows: Int64s,
    loss_tokens: Int64s,
    row_keys: pa.Array,
) -> TokenStatistics:
    """What `tables` hold of `rows` [N], their places in them, with `loss_tokens` [N] each; `finite` is each table's.

    Raises StageError where a stored value does not fit its row.
    """
    usable = np.ones(len(rows), dtype=bool)
    values = {}
    for name, table in tables.items():
        found = table.found[rows]
        wrong = found & (table.lengths[rows] != loss_tokens)
        if wrong.any():
            key = row_keys[int(np.flatnonzero(wrong)[0])].as_py().hex()
            raise StageError(f"the stored score of row {key} does not have one value for each of its tokens with loss")
        usable &= finite[name][rows]
        flat = np.zeros(int(loss_tokens.sum()), dtype=np.float32)
        flat[np.repeat(found, loss_tokens)] = table.take(rows)
        values[name] = flat
    return TokenStatistics(values, offsets_from_lengths(loss_tokens), usable)


def method_scores(
    method: SelectMethod, table: pa.Table, tokens: TokenStatistics, counted: npt.NDArray[np.bool_]
) -> Float64s:
    """The method's number for each row [N] of a table of whole prompts; `counted` [L] are the tokens that count.

    NaN where a statistic is missing or no token counts. `table` has prompt_id, candidate_id and the method's columns.
    """
    num_counted = segment_sums(counted, tokens.offsets)
    there = tokens.usable & (num_counted > 0)
    scores = np.full(table.num_rows, np.nan)
    rows = np.flatnonzero(there)
    if len(rows):
        taken = counted & np.repeat(there, np.diff(tokens.offsets))
        statistics = {
            name: tokens.values[name][taken].astype(np.int64 if name == RANK else np.float32)
            for name in method.statistics
        }
        light = table.select(["prompt_id", "candidate_id", *method.columns]).take(pa.array(rows))
        prompt_ids = array_of(light, "prompt_id")
        scores[rows] = method.score(
            MethodBatch(
                prompt_ids.dictionary_encode().indices.to_numpy().astype(np.int64),
                prompt_ids,
                array_of(light, "candidate_id"),
                offsets_from_lengths(num_counted[rows]),
                statistics,
                {name: array_of(light, name) for name in method.columns},
            )
        )
    return scores
