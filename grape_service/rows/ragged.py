"""Flat (ragged) arrays: many sequences of different lengths as one array and its offsets.

Shape legend used over the project: N sequences, T tokens of all sequences together, L tokens with
loss of all sequences together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa


Int64s = npt.NDArray[np.int64]


def offsets_from_lengths(lengths: npt.ArrayLike) -> Int64s:
    """Lengths [N] -> offsets [N + 1]."""
    lengths = np.asarray(lengths, dtype=np.int64)
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def segment_sums(values: npt.NDArray, offsets: Int64s) -> npt.NDArray:
    """Sum of each row of flat `values` [L] -> [N]: float64, or int64 for booleans and integers.

    A row's sum depends on that row alone, bit for bit, whatever stands beside it. An empty row's is 0.
    """
    dtype = np.float64 if values.dtype.kind == "f" else np.int64
    sums = np.zeros(len(offsets) - 1, dtype=dtype)
    filled = np.diff(offsets) > 0
    if filled.any():
        sums[filled] = np.add.reduceat(values, offsets[:-1][filled], dtype=dtype)
    return sums


def gather_rows(starts: Int64s, lengths: Int64s) -> Int64s:
    """Index [sum(lengths)] that takes the rows at `starts` [N], each `lengths` [N] long, from a flat array."""
    offsets = offsets_from_lengths(lengths)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


def list_offsets_and_values(column: pa.ListArray) -> tuple[Int64s, npt.NDArray]:
    """Offsets [N + 1] from 0 and flat values of a list column without nulls; no copy of the values."""
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
    return offsets - offsets[0], values


def list_array(offsets: Int64s, values: npt.NDArray, value_type: pa.DataType) -> pa.ListArray:
    """Offsets [N + 1] and flat values -> a list column."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values, type=value_type))


@dataclass(frozen=True)
class TokenBatch:
    """Token id sequences with what of them to score: the input of every engine.

    `mask` is true on tokens with loss, aligned with the token that is predicted; the first token of a
    sequence never has loss. `prompt_lens[i]` is the number of tokens before the first token with loss:
    candidates of one prompt share at least that prefix and stand next to each other.
    """

    input_ids: npt.NDArray[np.int32]  # [T]
    mask: npt.NDArray[np.bool_]  # [T]
    offsets: Int64s  # [N + 1] into input_ids and mask
    prompt_lens: npt.NDArray[np.int32]  # [N]

    def __len__(self) -> int:
        return len(self.prompt_lens)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def lengths(self) -> Int64s:
        """Tokens per sequence [N]."""
        return np.diff(self.offsets)

    @property
    def loss_lengths(self) -> Int64s:
        """Tokens with loss per sequence [N]."""
        running = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int64)])
        return np.diff(running[self.offsets])

    @property
    def loss_offsets(self) -> Int64s:
        """Offsets [N + 1] into an array of one value for each token with loss [L]."""
        return offsets_from_lengths(self.loss_lengths)

    def take(self, rows: npt.ArrayLike) -> TokenBatch:
        """The sequences at `rows`, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        offsets = offsets_from_lengths(lengths)
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return TokenBatch(self.input_ids[index], self.mask[index], offsets, self.prompt_lens[rows])

    @classmethod
    def from_rows(cls, rows: list[tuple[list[int], list[bool]]]) -> TokenBatch:
        """From (input_ids, mask) pairs; each mask must have a token with loss, and not the first one."""
        for ids, mask in rows:
            if len(ids) != len(mask) or not any(mask) or mask[0]:
                raise ValueError("a row needs a mask of its length with loss after its first token")
        return cls(
            input_ids=np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in rows]),
            mask=np.concatenate([np.asarray(mask, dtype=bool) for _, mask in rows]),
            offsets=offsets_from_lengths([len(ids) for ids, _ in rows]),
            prompt_lens=np.asarray([mask.index(True) for _, mask in rows], dtype=np.int32),
        )
