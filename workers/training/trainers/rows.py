"""A release's rows on local disk for random access, split for evaluation and grouped into sequences.

Rows are streamed from the release into one Arrow file and memory-mapped, so memory does not grow
with the release. A group is what becomes one sequence of a batch: a row, or with packing several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from grape_service.errors import UserError
from grape_service.rows.columns import BEHAVIOR_KNOWN
from grape_service.rows.keys import in_eval_share
from grape_service.rows.ragged import Int64s

TRAINING_COLUMNS = ("prompt_id", "input_ids", "loss_mask", "loss_weights", "behavior_logprobs")
"""What is read of a release; behavior_known too where it has that."""

LOCAL_ROWS = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("loss_weights", pa.list_(pa.float32()), nullable=False),
        pa.field("behavior_logprobs", pa.list_(pa.float32())),
        pa.field("is_eval", pa.bool_(), nullable=False),
        pa.field("has_loss", pa.bool_(), nullable=False),  # whether a token has loss
        pa.field("has_weight", pa.bool_(), nullable=False),  # whether the weight of such a token is not 0
    ]
)

PACKING_WINDOW = 4096
"""Rows that are packed with one another; larger windows fill sequences better and mix rows less."""


@dataclass(frozen=True)
class Row:
    """One row: four arrays of the length of its tokens; behavior_logprobs None where there are none, NaN where a
    token's is not known."""

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    loss_weights: npt.NDArray[np.float32]
    behavior_logprobs: npt.NDArray[np.float32] | None


def write_local_rows(
    dataset: pads.Dataset, path: Path, eval_share: float, check: Callable[[pa.RecordBatch, int], None] | None = None
) -> None:
    """Stream a release's rows into an Arrow file; a prompt's rows are all for training or all for evaluation.

    `check` is called with each batch and the number of rows before it.
    """
    missing = [name for name in TRAINING_COLUMNS if name not in dataset.schema.names]
    if missing:
        raise UserError(f"the dataset has no column '{missing[0]}': training reads the columns of a release")
    known = [BEHAVIOR_KNOWN.name] if BEHAVIOR_KNOWN.name in dataset.schema.names else []
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    num_rows = 0
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, LOCAL_ROWS) as writer:
        for batch in dataset.to_batches(columns=[*TRAINING_COLUMNS, *known], batch_size=1024):
            if check is not None:
                check(batch, num_rows)
            num_rows += batch.num_rows
            is_eval = [in_eval_share(prompt_id, eval_share) for prompt_id in batch.column("prompt_id").to_pylist()]
            columns = {name: batch.column(name).cast(LOCAL_ROWS.field(name).type) for name in LOCAL_ROWS.names[:4]}
            if known:
                columns["behavior_logprobs"] = _where_known(columns["behavior_logprobs"], batch.column(known[0]))
            offsets = columns["input_ids"].offsets.to_numpy()
            mask = _values(columns["loss_mask"])
            has_loss = _any_in_row(mask, offsets)
            has_weight = _any_in_row(mask & (_values(columns["loss_weights"]) != 0), offsets)
            flags = [pa.array(column, pa.bool_()) for column in (is_eval, has_loss, has_weight)]
            writer.write_batch(pa.record_batch([*columns.values(), *flags], schema=LOCAL_ROWS))
    temporary.rename(path)


def _values(lists: pa.ListArray) -> npt.NDArray[Any]:
    """The values of all rows, one after the other."""
    return lists.flatten().to_numpy(zero_copy_only=False)


def _any_in_row(values: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Whether any value of each row is true; `offsets` [N + 1] say where rows begin."""
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    places = offsets - offsets[0]
    return totals[places[1:]] > totals[places[:-1]]


def _where_known(logprobs: pa.ListArray, known: pa.ListArray) -> pa.ListArray:
    """The log-probabilities with NaN where a number only fills a gap; rows without any stay null."""
    numbers, is_known = logprobs.flatten(), pc.fill_null(known.flatten(), False)
    if len(numbers) != len(is_known):
        raise UserError("behavior_known is not as long as behavior_logprobs: restore the release, or make another")
    values = pc.if_else(is_known, numbers, pa.scalar(np.nan, numbers.type))
    lengths = pc.fill_null(pc.list_value_length(logprobs), 0).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, values, type=logprobs.type, mask=logprobs.is_null())


class LocalRows:
    """Random access to a file of `write_local_rows`; every process maps the same file."""

    def __init__(self, path: Path):
        self.path = path
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        counts = [batch.num_rows for batch in self._batches]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        lengths = [np.diff(batch.column("input_ids").offsets.to_numpy()) for batch in self._batches]
        self.lengths: Int64s = np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)
        self.is_eval = self._flags("is_eval")
        self.has_loss = self._flags("has_loss")
        self.has_weight = self._flags("has_weight")

    def _flags(self, name: str) -> npt.NDArray[np.bool_]:
        found = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate([np.zeros(0, bool), *found])

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalRows, (self.path,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> Row:
        """The row at `index`."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch = self._batches[number].slice(index - int(self._starts[number]), 1)
        behavior = batch.column("behavior_logprobs")[0]
        return Row(
            input_ids=batch.column("input_ids")[0].values.to_numpy(),
            loss_mask=batch.column("loss_mask")[0].values.to_numpy(zero_copy_only=False),
            loss_weights=batch.column("loss_weights")[0].values.to_numpy(),
            behavior_logprobs=behavior.values.to_numpy() if behavior.is_valid else None,
        )

    def num_without_behavior(self, indices: Int64s) -> int:
        """How many of the rows at `indices` have no behavior_logprobs."""
        nulls = [batch.column("behavior_logprobs").is_null().to_numpy(zero_copy_only=False) for batch in self._batches]
        return int(np.concatenate([np.zeros(0, bool), *nulls])[indices].sum())


def single_groups(indices: Int64s) -> pa.ListArray:
    """A group of its own for each row."""
    return pa.ListArray.from_arrays(pa.array(np.arange(len(indices) + 1, dtype=np.int32)), pa.array(indices))


def packed_groups(indices: Int64s, lengths: Int64s, max_length: int, seed: int | None) -> pa.ListArray:
    """Groups of rows of at most `max_length` tokens together: best fit, longest rows first.

    Rows are dealt to windows in an order that `seed` shuffles (None: as they come). No row is longer than
    `max_length`; each is in exactly one group.
    """
    if seed is not None:
        indices = np.random.default_rng(seed).permutation(indices)
    values, sizes = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
    for start in range(0, len(indices), PACKING_WINDOW):
        groups = _best_fit(indices[start : start + PACKING_WINDOW], lengths, max_length)
        values.append(np.concatenate([np.asarray(group, dtype=np.int64) for group in groups]))
        sizes.append(np.asarray([len(group) for group in groups], dtype=np.int64))
    offsets = np.cumsum(np.concatenate(sizes)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values)))


def _best_fit(window: Int64s, lengths: Int64s, max_length: int) -> list[list[int]]:
    order = window[np.argsort(-lengths[window], kind="stable")]
    groups: list[list[int]] = []
    spaces = np.full(len(order), max_length, dtype=np.int64)  # tokens that are left in each group
    for row in order.tolist():
        length = int(lengths[row])
        open_spaces = spaces[: len(groups)]
        fits = np.flatnonzero(open_spaces >= length)
        best = int(fits[open_spaces[fits].argmin()]) if len(fits) else len(groups)
        if best == len(groups):
            groups.append([])
        groups[best].append(row)
        spaces[best] -= length
    return groups


def rounded_up(groups: pa.ListArray, multiple: int) -> pa.ListArray:
    """The groups and empty ones up to a multiple: every process gets as many batches, and no row counts twice."""
    num_empty = -len(groups) % multiple
    offsets = groups.offsets.to_numpy()
    offsets = np.concatenate([offsets, np.full(num_empty, offsets[-1], dtype=offsets.dtype)])
    return pa.ListArray.from_arrays(pa.array(offsets), groups.values)
