"""Which tokens of a batch are computed once: rows with a common beginning become a group, groups a packed batch.

A packed batch is one long sequence without padding. Each group in it is its common prefix, once, and then each
row's own tokens (its suffix):

    prefix_0 | suffix of row a | suffix of row b | prefix_1 | suffix of row c | ...

Positions count from each row's own start. What may attend to what is the business of packed_attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grape_service.rows.ragged import Int64s, TokenBatch

MAX_GROUP_ROWS = 64


@dataclass(frozen=True)
class Group:
    """Rows of a batch that share their first `prefix_len` tokens, the shortest row first."""

    rows: Int64s
    prefix_len: int
    suffix_lens: Int64s

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return self.prefix_len + int(self.suffix_lens.sum())


@dataclass(frozen=True)
class PackedBatch:
    """Groups as one sequence of T tokens, with the L places of it that predict a token with loss."""

    groups: list[Group]
    input_ids: Int64s  # [T]
    position_ids: Int64s  # [T]
    hidden_index: Int64s  # [L] into T: the token before the one with loss
    target_ids: Int64s  # [L] the token with loss
    loss_index: Int64s  # [L] into the batch's flat array of log-probabilities

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


def common_prefix_lens(batch: TokenBatch) -> Int64s:
    """How many tokens each row shares with the next one at its beginning: [N - 1]."""
    ids, offsets = batch.input_ids, batch.offsets
    shared = np.empty(max(len(batch) - 1, 0), dtype=np.int64)
    for row in range(len(shared)):
        start, middle, end = offsets[row : row + 3]
        length = min(middle - start, end - middle)
        differs = ids[start : start + length] != ids[middle : middle + length]
        first = int(differs.argmax()) if length else 0
        shared[row] = first if length and differs[first] else length
    return shared


def group_rows(shared: Int64s, max_rows: int = MAX_GROUP_ROWS) -> list[tuple[int, int, int]]:
    """Cut adjacent rows into groups such that the most tokens are shared: (first row, end, prefix length) of each.

    `shared` [N - 1] is that of `common_prefix_lens`; a group of rows i..j shares min(shared[i..j-1]) tokens and
    saves (j - i) times as many. Dynamic programming over the last group's beginning, O(N * max_rows).
    """
    num_rows = len(shared) + 1
    best = np.zeros(num_rows + 1, dtype=np.int64)
    begins = np.zeros(num_rows + 1, dtype=np.int64)
    sizes = np.arange(max_rows, dtype=np.int64)
    for end in range(1, num_rows + 1):
        window = shared[max(end - max_rows, 0) : end - 1][::-1]
        prefix = np.concatenate([[0], np.minimum.accumulate(window)])
        saved = prefix * sizes[: len(prefix)] + best[end - len(prefix) : end][::-1]
        size = int(saved.argmax())
        best[end], begins[end] = saved[size], end - 1 - size
    groups: list[tuple[int, int, int]] = []
    end = num_rows
    while end > 0:
        begin = int(begins[end])
        groups.append((begin, end, int(shared[begin : end - 1].min()) if end - begin > 1 else 0))
        end = begin
    return groups[::-1]


def pack(
    batch: TokenBatch, max_tokens: int, kinds: Int64s | None = None, padded: bool = False
) -> Iterator[PackedBatch]:
    """Cut a batch into packed batches of at most `max_tokens`, the largest groups first; a row alone may be larger.

    Rows of different `kinds` [N] never stand in one packed batch; kinds come in ascending order. With `padded` every
    row is a group of its own, and counts as long as the longest of its packed batch.
    """
    if not len(batch):
        return
    kinds = np.zeros(len(batch), dtype=np.int64) if kinds is None else kinds
    shared = common_prefix_lens(batch) if not padded else np.zeros(len(batch) - 1, dtype=np.int64)
    shared[kinds[1:] != kinds[:-1]] = 0
    groups = [
        part
        for begin, end, prefix_len in group_rows(shared)
        for part in _split(np.arange(begin, end), prefix_len, batch.lengths, max_tokens)
    ]
    groups.sort(key=lambda group: (kinds[group.rows[0]], -group.num_tokens, group.rows[0]))
    places = _LossPlaces.of(batch)
    chosen: list[Group] = []
    tokens = 0
    for group in groups:
        tokens = (len(chosen) + 1) * chosen[0].num_tokens if padded and chosen else tokens + group.num_tokens
        if chosen and (tokens > max_tokens or kinds[chosen[0].rows[0]] != kinds[group.rows[0]]):
            yield _packed(batch, chosen, places)
            chosen, tokens = [], group.num_tokens
        chosen.append(group)
    yield _packed(batch, chosen, places)


def _split(rows: Int64s, prefix_len: int, lengths: Int64s, max_tokens: int) -> Iterator[Group]:
    """The rows of a group by length, cut where the tokens to compute would exceed `max_tokens`."""
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    suffix_lens = lengths[rows] - prefix_len
    begin, tokens = 0, prefix_len
    for place, suffix_len in enumerate(suffix_lens):
        if place > begin and tokens + suffix_len > max_tokens:
            yield Group(rows[begin:place], prefix_len, suffix_lens[begin:place])
            begin, tokens = place, prefix_len
        tokens += int(suffix_len)
    yield Group(rows[begin:], prefix_len, suffix_lens[begin:])


@dataclass(frozen=True)
class _LossPlaces:
    """For the tokens with loss of a batch, in order: their place in their row [L]; where each row's begin [N + 1]."""

    in_row: Int64s
    offsets: Int64s

    @classmethod
    def of(cls, batch: TokenBatch) -> _LossPlaces:
        flat = np.flatnonzero(batch.mask)
        return cls(flat - np.repeat(batch.offsets[:-1], batch.loss_lengths), batch.loss_offsets)


def _packed(batch: TokenBatch, groups: list[Group], places: _LossPlaces) -> PackedBatch:
    sources: list[npt.NDArray[np.int64]] = []
    positions: list[npt.NDArray[np.int64]] = []
    hidden: list[npt.NDArray[np.int64]] = []
    losses: list[npt.NDArray[np.int64]] = []
    targets: list[npt.NDArray[np.int64]] = []
    start = 0
    for group in groups:
        first = batch.offsets[group.rows[0]]
        sources.append(np.arange(first, first + group.prefix_len))
        positions.append(np.arange(group.prefix_len))
        suffix_start = start + group.prefix_len
        for row, suffix_len in zip(group.rows, group.suffix_lens, strict=True):
            row_start = batch.offsets[row]
            sources.append(np.arange(row_start + group.prefix_len, row_start + group.prefix_len + suffix_len))
            positions.append(np.arange(group.prefix_len, group.prefix_len + suffix_len))
            loss = np.arange(places.offsets[row], places.offsets[row + 1])
            before = places.in_row[loss] - 1
            hidden.append(np.where(before < group.prefix_len, start, suffix_start - group.prefix_len) + before)
            targets.append(batch.input_ids[row_start + before + 1].astype(np.int64))
            losses.append(loss)
            suffix_start += int(suffix_len)
        start = suffix_start
    return PackedBatch(
        groups=groups,
        input_ids=batch.input_ids[np.concatenate(sources)].astype(np.int64),
        position_ids=np.concatenate(positions),
        hidden_index=np.concatenate(hidden),
        target_ids=np.concatenate(targets),
        loss_index=np.concatenate(losses),
    )
