"""Windows: each step of a response with the prompt and a short stretch of what precedes it, as a row of its own.

Of a row with prompt x and steps s_1 .. s_K, the window of step k holds x, the last `steps` steps before it (or the last
`tokens` tokens), and s_k, on which alone there is loss. The windows of a row, in order, have loss on each of its tokens
with loss once. A window is scored, stored and found by its own row key, like any row. M windows of N rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.methods.base import Window
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import Int64s, gather_rows, list_array, list_offsets_and_values, offsets_from_lengths
from grape_service.rows.steps import is_step_start
from grape_service.storage.parquet import array_of

WINDOW_READS = ["input_ids", "loss_mask", "prompt_len"]
"""The shard's columns that windows are made of."""

WINDOWS_FORMAT = 1
"""Raised when the same rows and settings come to give other windows."""

WINDOW = pa.schema(
    [SHARD.field(name) for name in ("row_key", "prompt_id", "candidate_id", "input_ids", "loss_mask", "prompt_len")]
)
"""A window as a row to score; its ids are those of the row that it is of."""

SLICE_TOKENS = 2**22
"""Tokens of windows that are made at a time."""


@dataclass(frozen=True)
class Windows:
    """Where the windows of some rows lie among their tokens."""

    ids: npt.NDArray[np.int32]  # [T] of the rows
    mask: npt.NDArray[np.uint8]  # [T]
    rows: Int64s  # [M] whose each is
    prompts: Int64s  # [M] where its row begins
    prompt_lens: Int64s  # [M]
    starts: Int64s  # [M] where what precedes the step begins
    begins: Int64s  # [M] where the step begins
    ends: Int64s  # [M]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Int64s:
        """Tokens of each [M]."""
        return self.prompt_lens + self.ends - self.starts

    def slices(self) -> Iterator[slice]:
        """Ranges of windows of about SLICE_TOKENS tokens."""
        ends = np.cumsum(self.lengths)
        first = 0
        while first < len(self):
            done = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + SLICE_TOKENS, side="right")))
            yield slice(first, last)
            first = last

    def sequences(self, part: slice) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], Int64s, Int64s]:
        """Ids, mask, offsets and the tokens before the first with loss of the windows of a range."""
        begins, ends, starts = self.begins[part], self.ends[part], self.starts[part]
        places = np.stack([self.prompts[part], starts], axis=1).ravel()
        index = gather_rows(places, np.stack([self.prompt_lens[part], ends - starts], axis=1).ravel())
        offsets, steps = offsets_from_lengths(self.lengths[part]), ends - begins
        mask = np.zeros(len(index), dtype=np.uint8)
        mask[gather_rows(offsets[1:] - steps, steps)] = self.mask[gather_rows(begins, steps)]
        return self.ids[index], mask, offsets, np.diff(offsets) - steps

    def keys(self) -> pa.Array:
        """Their row keys [M]."""
        found = [row_keys(*self.sequences(part)[:3]) for part in self.slices()]
        return pa.concat_arrays(found) if found else pa.array([], pa.binary(16))

    def distinct(self) -> Windows:
        """Each of those that are the same tokens once: candidates of a prompt may have steps in common."""
        keys = self.keys()
        first = np.sort(np.unique(np.asarray(pc.index_in(keys, keys.unique())), return_index=True)[1])
        rows, prompts, lens, *places = (
            values[first] for values in (self.rows, self.prompts, self.prompt_lens, self.starts, self.begins, self.ends)
        )
        return Windows(self.ids, self.mask, rows, prompts, lens, *places)

    def tables(self, rows: pa.Table) -> Iterator[pa.Table]:
        """The windows as WINDOW; `rows` are the rows that they are of."""
        for part in self.slices():
            ids, mask, offsets, before = self.sequences(part)
            taken = rows.select(["prompt_id", "candidate_id"]).take(pa.array(self.rows[part]))
            columns = {
                "row_key": row_keys(ids, mask, offsets),
                "prompt_id": taken["prompt_id"],
                "candidate_id": taken["candidate_id"],
                "input_ids": list_array(offsets, ids, pa.int32()),
                "loss_mask": list_array(offsets, mask, pa.uint8()),
                "prompt_len": pa.array(before.astype(np.int32)),
            }
            yield pa.table(columns).cast(WINDOW)


def windows_of(table: pa.Table, steps: Int64s, window: Window) -> Windows:
    """The windows of the rows [N] of a table with WINDOW_READS; `steps` [L] is the step of each token with loss."""
    offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
    _, ids = list_offsets_and_values(array_of(table, "input_ids"))
    prompt_lens = array_of(table, "prompt_len").to_numpy().astype(np.int64)
    places = np.flatnonzero(mask > 0)
    row_of = np.searchsorted(offsets, places, side="right") - 1
    loss_offsets = np.searchsorted(places, offsets)
    first = np.flatnonzero(is_step_start(steps, loss_offsets))
    rows, begins, numbers = row_of[first], places[first], steps[first]
    ends = places[np.append(first[1:], len(places))[: len(first)] - 1] + 1
    responses = offsets[rows] + prompt_lens[rows]
    if window.steps is not None:
        before = np.arange(len(first)) - window.steps
        starts = np.where(numbers >= window.steps, begins[np.maximum(before, 0)], responses)
    else:
        assert window.tokens is not None, "a window is of steps or of tokens"
        starts = np.maximum(begins - window.tokens, responses)
    return Windows(ids, mask, rows, offsets[rows], prompt_lens[rows], starts, begins, ends)
