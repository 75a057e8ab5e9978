"""Statistics of rows out of score files: what a file holds, several files in one, and what a reader is given."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from grape_service.rows.ragged import Int64s, gather_rows, offsets_from_lengths


@dataclass(frozen=True)
class Lists:
    """Values of M rows."""

    lengths: Int64s  # [M]
    values: npt.NDArray[np.float32]  # flat


@dataclass(frozen=True)
class Found:
    """What a file holds of the rows that are looked for."""

    rows: Int64s  # [M] places among the unique keys
    lists: dict[str, Lists]  # by statistic

    @classmethod
    def concatenate(cls, parts: list[Found], names: tuple[str, ...]) -> Found:
        none = Found(np.zeros(0, dtype=np.int64), dict.fromkeys(names, NO_LISTS))
        parts = [none, *parts]
        lists = {
            name: Lists(
                np.concatenate([part.lists[name].lengths for part in parts]),
                np.concatenate([part.lists[name].values for part in parts]),
            )
            for name in names
        }
        return cls(np.concatenate([part.rows for part in parts]), lists)


NO_LISTS = Lists(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))


class Collector:
    """Collects one statistic of N unique rows, file after file: what comes first stays."""

    def __init__(self, num_rows: int):
        self.found = np.zeros(num_rows, dtype=bool)
        self.starts, self.lengths = np.zeros((2, num_rows), dtype=np.int64)
        self.values: list[npt.NDArray[np.float32]] = []
        self.num_values = 0

    def add(self, found_rows: Int64s, lists: Lists) -> None:
        """The rows of a file."""
        fresh, offsets = ~self.found[found_rows], offsets_from_lengths(lists.lengths)
        # Of equal rows within a file the first wins too: np.unique gives the first place of each.
        rows, places = np.unique(found_rows[fresh], return_index=True)
        places = np.flatnonzero(fresh)[places]
        taken = lists.values[gather_rows(offsets[places], lists.lengths[places])]
        self.found[rows] = True
        self.lengths[rows] = lists.lengths[places]
        self.starts[rows] = self.num_values + offsets_from_lengths(lists.lengths[places])[:-1]
        self.num_values += len(taken)
        self.values.append(taken)

    def table(self, inverse: Int64s) -> ScoreTable:
        """What was collected, of each of N keys by its place among the unique ones (`inverse` [N])."""
        flat = np.concatenate(self.values) if self.values else NO_LISTS.values
        return ScoreTable(self.found[inverse], self.starts[inverse], self.lengths[inverse], flat)


@dataclass(frozen=True)
class ScoreTable:
    """Scores of N rows, in the order in which they were asked for."""

    found: npt.NDArray[np.bool_]  # [N]
    starts: Int64s  # [N] into values
    lengths: Int64s  # [N]; 0 where not found
    values: npt.NDArray[np.float32]

    def take(self, rows: Int64s) -> npt.NDArray[np.float32]:
        """Flat scores of rows, one row after the other; nothing for a row that was not found."""
        return self.values[gather_rows(self.starts[rows], self.lengths[rows])]

    def of_rows(self, rows: Int64s) -> ScoreTable:
        """Those of some rows, in that order."""
        return replace(self, found=self.found[rows], starts=self.starts[rows], lengths=self.lengths[rows])

    def finite(self) -> npt.NDArray[np.bool_]:
        """Rows [N] that were found and whose scores are all finite."""
        bad = np.concatenate([[0], np.cumsum(~np.isfinite(self.values))])
        return self.found & (bad[self.starts + self.lengths] == bad[self.starts])
