"""The weigh stage: from the kept rows of a partition and the scores of their policies to weights.

PEAR compares two policies; other methods take the target's statistics alone.

The behavior policy renders the prompt in its own way, so its scores belong to other rows: a file says
which. Both policies score the same response tokens, one value for each token with loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.config.methods import WeightsConfig
from grape_service.config.schema import Config
from grape_service.methods.base import TokenWeights
from grape_service.methods.weights.pear import log_ratios
from grape_service.rows.columns import BEHAVIOR_KNOWN, NO_SOURCE, TARGET_FIELDS, WEIGHED_COLUMNS
from grape_service.rows.ragged import (
    Int64s,
    gather_rows,
    list_offsets_and_values,
    offsets_from_lengths,
    segment_sums,
)
from grape_service.rows.statistics import LOGPROB
from grape_service.score.tables import ScoreTable
from grape_service.storage.parquet import array_of, open_parquet, read_row_groups, write_parquet
from grape_service.storage.storage import Storage
from grape_service.weigh.batch import WeighBatch, compared_weights, method_batch, token_weights
from grape_service.weigh.behavior import (
    BEHAVIOR_READS,
    NOT_ASKED,
    RECORDED,
    RowBehaviors,
    refuse_missing,
    row_behaviors,
)
from grape_service.weigh.counts import WeighCounts
from grape_service.weigh.lookup import (
    BehaviorScores,
    PartitionScores,
    Stores,
    find_behavior_rows,
    read_columns,
    read_scores,
)
from grape_service.weigh.totals import WeightTotals, totals_by_group

SAME_LOGPROB = 0.02
"""Log-probabilities that differ by less are one policy's, scored by two engines in half precision."""

REPEAT_PARTITION = "b"
"""The one partition of repeated scorings: they are few."""


@dataclass(frozen=True)
class WeightBatch:
    """Weights of some rows, for a report."""

    sources: pa.Array  # [N]
    offsets: Int64s  # [N + 1]
    weights: npt.NDArray[np.float64]  # [L], before `normalize: dataset`
    ratios: npt.NDArray[np.float64]  # [L] log pi_target - log pi_behavior, NaN where it is not known


class WeighObserver(Protocol):
    """Sees the weights that are made, so that a report need not read them again."""

    def add_weights(self, batch: WeightBatch) -> None: ...


@dataclass(frozen=True)
class WeighContext:
    """What weigh is given for all partitions."""

    storage: Storage
    config: Config
    stores: Stores


@dataclass(frozen=True)
class WeighPartition:
    """A partition that weigh works on."""

    name: str
    kept_path: str
    behavior_rows: Sequence[Sequence[str]]
    """For each behavior policy the files with the rows that it scored; see BehaviorScores."""
    out_path: str


def weigh_partition(
    context: WeighContext, partition: WeighPartition, observer: WeighObserver | None = None
) -> WeighCounts:
    """Write the kept rows of a partition with their weights to its `out_path`, in the same order: WEIGHED_COLUMNS are
    added, BEHAVIOR_KNOWN where some behavior is not known, and the target's statistics where it scored them now.

    A prompt of which a row could not be scored is left out whole. Raises UserError for rows without a behavior where
    `missing` is error, StageError where scores do not fit their rows.
    """
    storage, config, stores = context.storage, context.config, context.stores
    assert config.weights is not None, "weighing needs weights"
    weights, behavior = config.weights, config.compared_behavior
    assert behavior is not None or not weights.needs_behavior, "PEAR needs a behavior"
    missing = behavior.missing if behavior is not None else None
    counts = WeighCounts()
    with open_parquet(storage, partition.kept_path) as file:
        kept_schema = file.schema_arrow.remove_metadata()
    target_columns = {LOGPROB: "target_logprobs"}
    target_columns |= {name: item.name for name, item in TARGET_FIELDS.items() if item.name in kept_schema.names}
    light_columns = BEHAVIOR_READS if stores.target is not None else [*BEHAVIOR_READS, *target_columns.values()]
    light = read_columns(storage, [partition.kept_path], pa.schema([kept_schema.field(name) for name in light_columns]))
    keys = array_of(light, "row_key")
    behaviors = row_behaviors(light, behavior) if behavior is not None else RowBehaviors.not_asked(light)
    behavior_rows, behaviors = find_behavior_rows(
        storage,
        keys,
        behaviors,
        list(map(BehaviorScores, stores.behaviors, partition.behavior_rows)),
        behavior.min_coverage if behavior is not None else 0.0,
        counts.aligned,
    )
    counts.missing = behaviors.census()
    if missing == "error":
        refuse_missing(counts.missing)

    scores = read_scores(stores, partition.name, keys, behaviors, behavior_rows, tuple(target_columns))
    says_known = behavior is not None and _has_unknown(light, behaviors, scores)
    kept = _rows_to_keep(light, behaviors, scores, missing == "drop", counts, list(target_columns.values()))
    del light
    repeat = None
    if stores.repeat is not None:
        repeat = stores.repeat.read_statistics(REPEAT_PARTITION, keys, weights.statistics)
    own = weights.own
    columns = own.columns if own is not None else ()
    added = WEIGHED_COLUMNS if behavior is not None else WEIGHED_COLUMNS[1:]
    added = [*added, BEHAVIOR_KNOWN] if says_known else added

    def weighed_tables() -> Iterator[pa.Table]:
        row = 0
        for table in read_row_groups(storage, partition.kept_path):
            rows = np.flatnonzero(kept[row : row + table.num_rows])
            batch = WeighBatch(table.take(rows), rows + row, behaviors, scores, target_columns)
            if behavior is not None:
                result = compared_weights(batch.ratios, batch.weighed_offsets, weights)
            else:
                result = token_weights(
                    method_batch(batch.table, batch.offsets, batch.target, weights.statistics, columns), weights
                )
            if len(batch.weighed_rows):
                _count_weights(counts, batch, result, weights)
                if observer is not None:
                    observer.add_weights(
                        WeightBatch(batch.sources, batch.weighed_offsets, result.weights, batch.ratios)
                    )
            if repeat is not None and behavior is not None:
                _count_repeat(counts, batch, repeat[LOGPROB], rows + row, weights)
            elif repeat is not None:
                _count_both_scorings(counts, batch, result, repeat, rows + row, weights, columns)
            yield batch.output(result, added, weights.method)
            row += table.num_rows

    write_parquet(storage, partition.out_path, pa.schema([*kept_schema, *added]), weighed_tables())
    return counts


def _has_unknown(light: pa.Table, behaviors: RowBehaviors, scores: PartitionScores) -> bool:
    """Whether there are rows with a behavior of which a token's log-probability is not known."""
    if scores.turn_end_differs.any() or scores.behavior.has_unknown:
        return True
    recorded = array_of(light, "recorded_logprobs").filter(pa.array(behaviors.policy == RECORDED))
    return bool(np.isnan(list_offsets_and_values(recorded)[1]).any())


def _rows_to_keep(
    light: pa.Table,
    behaviors: RowBehaviors,
    scores: PartitionScores,
    drop_missing: bool,
    counts: WeighCounts,
    target_columns: list[str],
) -> npt.NDArray[np.bool_]:
    """Rows [N] that are in the output; counts the others."""
    missing = behaviors.missing()
    if scores.target is not None:
        target_usable = np.logical_and.reduce([values.usable for values in scores.target.values()])
    else:
        valid = [array_of(light, name).is_valid().to_numpy(zero_copy_only=False) for name in target_columns]
        target_usable = np.logical_and.reduce(valid)
    no_target = ~missing & ~np.where(behaviors.temperature == 1, target_usable, scores.tempered.usable)
    no_behavior = (behaviors.policy >= 0) & (behaviors.policy != NOT_ASKED) & ~scores.behavior.usable & ~no_target
    for reason, rows in (("not scored by the target", no_target), ("not scored by its behavior policy", no_behavior)):
        if rows.any():
            counts.failed_rows[reason] = int(rows.sum())

    encoded = array_of(light, "prompt_id").dictionary_encode()
    prompts, num_prompts = encoded.indices.to_numpy().astype(np.int64), len(encoded.dictionary)
    failed_prompts = np.zeros(num_prompts, dtype=bool)
    failed_prompts[prompts[no_target | no_behavior]] = True
    failed = failed_prompts[prompts]
    dropped = missing & ~failed & drop_missing
    kept = ~failed & ~dropped

    counts.rows_in, counts.prompts_in = len(prompts), num_prompts
    counts.rows, counts.prompts = int(kept.sum()), len(np.unique(prompts[kept]))
    counts.failed_prompts, counts.rows_of_failed_prompts = int(failed_prompts.sum()), int(failed.sum())
    counts.dropped_rows = int(dropped.sum())
    counts.uniform_rows = int((kept & missing).sum())
    counts.weighed_rows = int((kept & ~missing).sum())
    return kept


def _count_weights(counts: WeighCounts, batch: WeighBatch, result: TokenWeights, weights: WeightsConfig) -> None:
    encoded = batch.sources.fill_null(NO_SOURCE).dictionary_encode()
    names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
    for name, totals in zip(names, totals_by_group(result, batch.weighed_offsets, codes, len(names)), strict=True):
        counts.sources[name] = counts.sources.get(name, WeightTotals()) + totals
    if not weights.needs_behavior:
        return
    counts.unknown_tokens += int(np.isnan(batch.ratios).sum())
    _count_recorded(counts, batch, names, codes)
    exact = compared_weights(np.zeros(len(batch.ratios)), batch.weighed_offsets, weights)
    counts.self_weights += _totals(exact, batch.weighed_offsets)


def _count_recorded(counts: WeighCounts, batch: WeighBatch, names: list[str], codes: Int64s) -> None:
    """How many numbers that are said to be processed are the target's own before the temperature."""
    target = batch.target[LOGPROB][batch.weighed_tokens]
    behavior = batch.behavior[batch.weighed_tokens]
    lengths = batch.lengths[batch.weighed_rows]
    tempered = np.repeat(batch.tempered[batch.weighed_rows], lengths) & ~np.isnan(behavior)
    if not tempered.any():
        return
    sources = np.repeat(codes, lengths)
    same = tempered & (np.abs(target - behavior) <= SAME_LOGPROB) & (np.abs(target - batch.compared) > SAME_LOGPROB)
    for place, name in enumerate(names):
        of_source = sources == place
        if (tempered & of_source).any():
            for number, into in ((tempered, counts.recorded_tokens), (same, counts.recorded_same)):
                into[name] = into.get(name, 0) + int((number & of_source).sum())


def _count_repeat(
    counts: WeighCounts, batch: WeighBatch, repeat: ScoreTable, rows: Int64s, weights: WeightsConfig
) -> None:
    """The weights of the target against its second scoring; `rows` [N] are the batch's places in `repeat`."""
    there = np.flatnonzero(_scored_twice(batch, {LOGPROB: repeat}, rows))
    if not len(there):
        return
    first = batch.target[LOGPROB][gather_rows(batch.offsets[there], batch.lengths[there])]
    ratios = log_ratios(first, repeat.take(rows[there]))
    counts.noise_squares += float(np.square(ratios).sum())
    offsets = offsets_from_lengths(batch.lengths[there])
    counts.self_weights_repeat += _totals(compared_weights(ratios, offsets, weights), offsets)


def _count_both_scorings(
    counts: WeighCounts,
    batch: WeighBatch,
    first: TokenWeights,
    repeat: dict[str, ScoreTable],
    rows: Int64s,
    weights: WeightsConfig,
    columns: Sequence[str],
) -> None:
    """The weights `first` of the rows that were scored again, and those of the second scoring; `rows` [N] are the
    batch's places in `repeat`."""
    there = np.flatnonzero(_scored_twice(batch, repeat, rows))
    if not len(there):
        return
    offsets = offsets_from_lengths(batch.lengths[there])
    tokens = gather_rows(batch.offsets[there], batch.lengths[there])
    second = {name: table.take(rows[there]) for name, table in repeat.items()}
    difference = batch.target[LOGPROB][tokens].astype(np.float64) - second[LOGPROB]
    counts.noise_squares += float(np.square(difference).sum())
    held = TokenWeights(first.weights[tokens], *(of[there] for of in first.held()))
    counts.self_weights += _totals(held, offsets)
    table = batch.table.take(pa.array(there))
    result = token_weights(method_batch(table, offsets, second, weights.statistics, columns), weights)
    counts.self_weights_repeat += _totals(result, offsets)


def _scored_twice(batch: WeighBatch, repeat: dict[str, ScoreTable], rows: Int64s) -> npt.NDArray[np.bool_]:
    """Rows [N] with usable values of both scorings."""
    usable = np.ones(len(rows), dtype=bool)
    for name, table in repeat.items():
        usable &= segment_sums(~np.isfinite(batch.target[name]), batch.offsets) == 0
        usable &= table.finite()[rows] & (table.lengths[rows] == batch.lengths)
    return usable


def _totals(result: TokenWeights, offsets: Int64s) -> WeightTotals:
    return totals_by_group(result, offsets, np.zeros(len(offsets) - 1, dtype=np.int64), 1)[0]
