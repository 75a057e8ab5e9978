"""A select method, of ours or a user's, on a table of candidates: its statistics in, one number a candidate out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.config.methods import SelectConfig
from grape_service.errors import StageError
from grape_service.methods import SELECT
from grape_service.methods.base import Float64s, SelectMethod
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import Int64s, list_offsets_and_values, offsets_from_lengths, segment_sums
from grape_service.rows.statistics import RANK
from grape_service.score.store import ScoreStore
from grape_service.score.tables import ScoreTable
from grape_service.select.steps import Tokenizer, token_steps
from grape_service.select.windows import LocalTokens, WindowScores, window_keys
from grape_service.storage.parquet import array_of


def select_method(select: SelectConfig) -> SelectMethod | None:
    """The method that scores candidates; None where it needs no score. Raises UserError where a user's is gone."""
    if select.is_unscored:
        return None
    own = select.own
    if own is None:
        return SELECT[select.method]
    return SelectMethod(own.name, lambda batch, _: own(batch), own.statistics, own.better, own.columns)


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


def stored_scores(
    method: SelectMethod | None,
    table: pa.Table,
    counted: npt.NDArray[np.bool_],
    select: SelectConfig,
    store: ScoreStore | None,
    partition: str,
    tokenizer: Tokenizer | None,
) -> tuple[TokenStatistics, Float64s]:
    """The tokens' statistics and the number of each row [N] of some rows of a partition, whole prompts of a shard with
    WINDOW_READS, read again from where they are stored: grape_score where `method` is None.

    NaN where nothing is stored. Raises UserError where the method cuts steps and the target is no longer there.
    """
    offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
    lengths = segment_sums(mask > 0, offsets)
    tokens = TokenStatistics({}, offsets_from_lengths(lengths), np.ones(table.num_rows, dtype=bool))
    if store is None and (method is None or method.statistics):
        return tokens, np.full(table.num_rows, np.nan)
    if store is not None:
        row_keys = array_of(table, "row_key")
        tables = store.read_statistics(partition, row_keys, select.statistics)
        finite = {name: one.finite() for name, one in tables.items()}
        tokens = token_statistics(tables, finite, np.arange(table.num_rows), lengths, row_keys)
    method = method or SELECT["grape"]
    steps, local = None, None
    if method.cuts_steps:
        assert tokenizer is not None, "this method cuts steps"
        vocabulary = tokenizer.vocabulary()
        steps = token_steps(table, vocabulary, select.step_end)
        if select.windows is not None:
            assert store is not None, "windows are scored"
            keys = window_keys([table], vocabulary, select.step_end, select.windows)
            local = WindowScores(store, partition, keys, None).take(steps, tokens.offsets)
    return tokens, method_scores(method, table, tokens, counted, select, steps, local)


def method_scores(
    method: SelectMethod,
    table: pa.Table,
    tokens: TokenStatistics,
    counted: npt.NDArray[np.bool_],
    select: SelectConfig,
    steps: Int64s | None = None,
    local: LocalTokens | None = None,
) -> Float64s:
    """The method's number for each row [N] of a table of whole prompts; `counted` [L] are the tokens that count.

    NaN where a statistic is missing or no token counts. `table` has prompt_id, candidate_id and the method's columns;
    `steps` [L] is that of `token_steps`, for a method that cuts steps; `local` is for one that scores windows.
    """
    assert steps is not None or not method.cuts_steps, "this method cuts steps"
    assert local is not None or not method.scores_windows, "this method scores windows"
    num_counted = segment_sums(counted, tokens.offsets)
    there = tokens.usable & (num_counted > 0)
    if local is not None:
        there &= local.usable
    scores = np.full(table.num_rows, np.nan)
    if there.any():
        scores[there] = method.score(_batch(method, table, tokens, counted, there, steps, local), select)
    return scores


def method_bounds(
    method: SelectMethod,
    table: pa.Table,
    tokens: TokenStatistics,
    counted: npt.NDArray[np.bool_],
    known: npt.NDArray[np.bool_],
) -> Float64s:
    """The most that the method's number can be for each row [N] of which only the tokens `known` [L] have statistics.

    Infinite where no token counts: nothing is known of such a row. For a method that has a bound.
    """
    assert method.bound is not None, f"method {method.name} has no bound"
    totals = segment_sums(counted, tokens.offsets)
    bounds = np.full(table.num_rows, np.inf)
    there = totals > 0
    if there.any():
        bounds[there] = method.bound(_batch(method, table, tokens, counted & known, there), totals[there])
    return bounds


def _batch(
    method: SelectMethod,
    table: pa.Table,
    tokens: TokenStatistics,
    taken: npt.NDArray[np.bool_],
    there: npt.NDArray[np.bool_],
    steps: Int64s | None = None,
    local: LocalTokens | None = None,
) -> MethodBatch:
    """The tokens `taken` [L] of the rows `there` [N]."""
    rows = np.flatnonzero(there)
    taken = taken & np.repeat(there, np.diff(tokens.offsets))
    statistics = {
        name: tokens.values[name][taken].astype(np.int64 if name == RANK else np.float32) for name in method.statistics
    }
    light = table.select(["prompt_id", "candidate_id", *method.columns]).take(pa.array(rows))
    prompt_ids = array_of(light, "prompt_id")
    return MethodBatch(
        prompt_ids.dictionary_encode().indices.to_numpy().astype(np.int64),
        prompt_ids,
        array_of(light, "candidate_id"),
        offsets_from_lengths(segment_sums(taken, tokens.offsets)[rows]),
        statistics,
        {name: array_of(light, name) for name in method.columns},
        steps[taken] if steps is not None and method.cuts_steps else None,
        local.logprobs[taken] if local is not None and method.scores_windows else None,
    )
