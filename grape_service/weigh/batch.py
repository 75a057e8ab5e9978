"""A batch of kept rows on its way to weights: what its policies say of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.config.methods import WeightsConfig
from grape_service.errors import UserError
from grape_service.methods.base import TokenWeights, clipped_weights
from grape_service.methods.weights.pear import log_ratios
from grape_service.rows.columns import BEHAVIOR_KNOWN, LOSS_TURN_END
from grape_service.rows.method_batch import MethodBatch
from grape_service.rows.ragged import (
    Int64s,
    gather_rows,
    list_array,
    list_offsets_and_values,
    offsets_from_lengths,
    segment_sums,
)
from grape_service.rows.statistics import LOGPROB, RANK, ordered
from grape_service.storage.parquet import array_of
from grape_service.weigh.behavior import (
    RECORDED,
    RowBehaviors,
)
from grape_service.weigh.lookup import (
    PartitionScores,
    check_lengths,
)

SMALLEST_WEIGHT = np.finfo(np.float32).tiny
"""Smaller numbers lose digits in float32."""

UNIFORM = "uniform"
"""weight_source of rows without weights of their own; of the others it is the method's name."""


class WeighBatch:
    """Rows on their way through: N rows, L tokens with loss; those that no behavior is missing of are weighed."""

    def __init__(
        self,
        table: pa.Table,
        rows: Int64s,
        behaviors: RowBehaviors,
        scores: PartitionScores,
        target_columns: dict[str, str],
    ):
        """`rows` [N] are the places of the table's rows in the partition, `target_columns` those of the target's
        statistics by name."""
        self.table = table
        token_offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
        self.lengths = segment_sums(mask > 0, token_offsets)
        self.offsets = offsets_from_lengths(self.lengths)
        self.keys = array_of(table, "row_key")
        self.target_columns = target_columns
        self.target = {name: self._unknown() for name in target_columns}
        self.target_usable: dict[str, npt.NDArray[np.bool_]] = {}
        for name, column in target_columns.items():
            if scores.target is not None:
                scores.target[name].fill(self.target[name], self.offsets, rows, self.keys)
                self.target_usable[name] = scores.target[name].usable[rows]
            else:
                self._put(self.target[name], array_of(table, column), np.arange(len(rows)))

        self.behavior = self._unknown()
        scores.behavior.fill(self.behavior, self.offsets, rows, self.keys, self.target[LOGPROB])
        differs = np.repeat(scores.turn_end_differs[rows], self.lengths)
        self.behavior[differs & (mask[mask > 0] == LOSS_TURN_END)] = np.nan
        recorded = np.flatnonzero(behaviors.policy[rows] == RECORDED)
        self._put(self.behavior, array_of(table, "recorded_logprobs"), recorded)

        self.tempered = behaviors.temperature[rows] != 1
        self.weighed_rows = np.flatnonzero(~behaviors.missing()[rows])
        self.weighed_tokens = gather_rows(self.offsets[self.weighed_rows], self.lengths[self.weighed_rows])
        self.weighed_offsets = offsets_from_lengths(self.lengths[self.weighed_rows])
        self.sources = array_of(table, "source").take(pa.array(self.weighed_rows))
        compared = self.target[LOGPROB].copy()  # at the temperature at which the response was sampled
        scores.tempered.fill(compared, self.offsets, rows, self.keys)
        self.compared = compared[self.weighed_tokens]
        self.ratios = log_ratios(self.compared, self.behavior[self.weighed_tokens])

    def _unknown(self) -> npt.NDArray[np.float32]:
        return np.full(int(self.offsets[-1]), np.nan, dtype=np.float32)

    def _put(self, flat: npt.NDArray[np.float32], column: pa.Array, rows: Int64s) -> None:
        """Put a list column's values of `rows` into their places in a flat array [L]; nothing where it is null."""
        rows = rows[column.is_valid().to_numpy(zero_copy_only=False)[rows]]
        offsets, values = list_offsets_and_values(column)
        lengths = np.diff(offsets)[rows]
        check_lengths(lengths, self.lengths[rows], self.keys, rows)
        flat[gather_rows(self.offsets[rows], lengths)] = values[gather_rows(offsets[rows], lengths)]

    def output(self, weighed: TokenWeights, added: list[pa.Field], method: str) -> pa.Table:
        """The table with the target's statistics, and of the columns `made` behavior_logprobs, weights, weight_source.

        Where the behavior's log-probability is not known, the target's stands in its place: a delta of 0.
        """
        table = self.table
        for name, usable in self.target_usable.items():
            column = lists_of(self.offsets, self.target[name], usable)
            place = table.column_names.index(self.target_columns[name])
            item = table.schema.field(place)
            table = table.set_column(place, item, column.cast(item.type))
        is_known = ~np.isnan(self.behavior)
        known = self.behavior[self.weighed_tokens]
        self.behavior[self.weighed_tokens] = np.where(np.isnan(known), self.compared, known)
        is_weighed = np.zeros(len(self.lengths), dtype=bool)
        is_weighed[self.weighed_rows] = True
        weights = np.ones(int(self.offsets[-1]), dtype=np.float32)
        weights[self.weighed_tokens] = weighed.weights
        if (weighed.weights[weights[self.weighed_tokens] < SMALLEST_WEIGHT] > 0).any():
            raise UserError(
                "a weight is smaller than a float32 holds: give weights.weight_clip a lower bound of -87 or more"
            )
        columns = {
            "behavior_logprobs": lists_of(self.offsets, self.behavior, is_weighed),
            "weights": list_array(self.offsets, weights, pa.float32()),
            "weight_source": pa.array([UNIFORM, method]).take(pa.array(is_weighed.astype(np.int8))),
            BEHAVIOR_KNOWN.name: lists_of(self.offsets, is_known, is_weighed),
        }
        for item in added:
            table = table.append_column(item, columns[item.name])
        return table


def method_batch(
    table: pa.Table,
    offsets: Int64s,
    values: dict[str, npt.NDArray[np.float32]],
    names: Sequence[str],
    columns: Sequence[str],
) -> MethodBatch:
    """Rows as a method takes them, with log-probabilities and the statistics `names` of `values` [L]."""
    prompt_ids = array_of(table, "prompt_id")
    return MethodBatch(
        prompt_ids.dictionary_encode().indices.to_numpy().astype(np.int64),
        prompt_ids,
        array_of(table, "candidate_id"),
        offsets,
        {name: values[name].astype(np.int64) if name == RANK else values[name] for name in ordered(names)},
        {name: array_of(table, name) for name in columns},
    )


def lists_of(offsets: Int64s, values: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> pa.ListArray:
    """A list column with nulls where not `valid` [N]."""
    lengths = np.where(valid, np.diff(offsets), 0)
    values = values[gather_rows(offsets[:-1], lengths)]
    return pa.ListArray.from_arrays(
        pa.array(offsets_from_lengths(lengths).astype(np.int32)), pa.array(values), mask=pa.array(~valid)
    )


def token_weights(batch: MethodBatch, config: WeightsConfig) -> TokenWeights:
    """Weights of the batch's tokens by a method that needs no behavior; `normalize: dataset` is left to the caller.

    Raises UserError where a user's own function gives no weights.
    """
    if len(batch) == 0:
        return clipped_weights(np.zeros(0), batch.offsets, config)
    own = config.own
    if own is not None:
        with np.errstate(divide="ignore"):
            return clipped_weights(np.log(own(batch)), batch.offsets, config)
    assert config.ours is not None
    assert config.ours.log_weights is not None, f"{config.method} compares two policies"
    return clipped_weights(config.ours.log_weights(batch, config), batch.offsets, config)


def compared_weights(ratios: npt.NDArray[np.float64], offsets: Int64s, config: WeightsConfig) -> TokenWeights:
    """Weights of responses from log ratios [L] of target and behavior, by a method that compares the two."""
    assert config.ours is not None
    assert config.ours.compare is not None, f"{config.method} compares no policies"
    return config.ours.compare(ratios, offsets, config)
