"""A race on an engine: the waves of some rows, each a batch of rows that end where the wave ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from grape_service.rows.ragged import Int64s, TokenBatch, gather_rows, offsets_from_lengths
from grape_service.select.race import Known, SourceResults, extend, race
from grape_service.select.race_rows import RacedRows
from workers.engines.base import invalid_rows

Scores = dict[str, npt.NDArray[np.float32]]
"""Statistics by name, one value per token with loss."""


@dataclass
class Waves:
    """Rows [U] that are scored a part at a time. A batch has each row up to where the wave ends, and loss on its new
    tokens alone, so that an engine's prefix cache may serve the others."""

    batch: TokenBatch  # the whole rows
    score: Callable[[TokenBatch], Scores]
    done: Callable[[int], None]  # told of tokens that are through the engine
    reasons: dict[int, str] = field(default_factory=dict)
    """Why rows have failed."""
    tokens: int = 0
    """That are through the engine: of a row up to the last one that is known."""

    def __post_init__(self) -> None:
        self._places = np.flatnonzero(self.batch.mask)  # [L] of the tokens with loss, in the flat ids
        self._loss_offsets = self.batch.loss_offsets

    def more(self, rows: Int64s, begins: Int64s, ends: Int64s) -> Scores:
        """Statistics of the tokens with loss from `begins` to `ends` of rows [M]: see `select.race.More`."""
        wave = self._wave(rows, begins, ends)
        scores = self.score(wave)
        bad = invalid_rows(scores, wave)
        offsets = wave.loss_offsets
        for place, reason in bad.items():
            self.reasons[int(rows[place])] = reason
            for values in scores.values():
                values[offsets[place] : offsets[place + 1]] = np.nan
        read = int((self._read(rows, ends) - self._read(rows, begins)).sum())
        self.tokens += read
        self.done(read)
        return scores

    def left(self, progress: Known) -> Int64s:
        """Tokens of each row [U] behind the last one that is known."""
        return self.batch.lengths - self._read(np.arange(len(self.batch)), progress.known)

    def _read(self, rows: Int64s, known: Int64s) -> Int64s:
        """Tokens of rows [M] up to the last one that is known; 0 where none is."""
        last = self._places[np.maximum(self._loss_offsets[rows] + known - 1, 0)]
        return np.where(known > 0, last + 1 - self.batch.offsets[rows], 0)

    def _wave(self, rows: Int64s, begins: Int64s, ends: Int64s) -> TokenBatch:
        lengths = self._read(rows, ends)
        offsets = offsets_from_lengths(lengths)
        ids = self.batch.input_ids[gather_rows(self.batch.offsets[:-1][rows], lengths)]
        wanted = self._places[gather_rows(self._loss_offsets[:-1][rows] + begins, ends - begins)]
        mask = np.zeros(len(ids), dtype=bool)
        mask[wanted + np.repeat(offsets[:-1] - self.batch.offsets[:-1][rows], ends - begins)] = True
        return TokenBatch(ids, mask, offsets, self.batch.prompt_lens[rows])


@dataclass
class Ends:
    """Where a race stopped its rows [U]."""

    known: Int64s
    reach: npt.NDArray[np.float64]


def race_slices(
    rows: RacedRows, waves: Waves, slices: Iterator[tuple[int, int]], ends: Ends
) -> Iterator[tuple[int, int]]:
    """Race the rows slice by slice, each on its own, and then score what it stopped of prompts that are audited; notes
    in `ends` where it stopped them. Gives every slice once it has ended."""
    results = SourceResults()
    for start, stop in slices:
        part = replace(rows.part(start, stop), estimates=True)

        def more(places: Int64s, begins: Int64s, ends: Int64s, start: int = start) -> Scores:
            return waves.more(places + start, begins, ends)

        standing = race(part.contest, part.progress, part.stand, more, results, doubling=rows.race.risk > 0)
        known, total = part.progress.known, part.progress.total
        ends.known[start:stop], ends.reach[start:stop] = known, standing.reach
        left = np.flatnonzero(part.audited() & (known < total) & ~part.progress.failed)
        if len(left):
            extend(part.progress, left, total, more(left, known[left], total[left]))
        yield start, stop


def score_rest(progress: Known, waves: Waves, slices: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Score what is not known of the rows, slice by slice; gives every slice once it has ended."""
    for start, stop in slices:
        rows = np.flatnonzero(~progress.whole[start:stop]) + start
        if len(rows):
            target = progress.total
            extend(progress, rows, target, waves.more(rows, progress.known[rows], target[rows]))
        yield start, stop
