"""What the target says of the windows of candidates, in the order in which selection reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.errors import StageError
from grape_service.methods.base import Window
from grape_service.models.vocabulary import Vocabulary
from grape_service.rows.ragged import Int64s, segment_sums
from grape_service.rows.steps import is_step_start
from grape_service.score.store import ScoreStore
from grape_service.score.tables import KeyIndex, ScoreTable
from grape_service.score.windows import windows_of
from grape_service.select.steps import token_steps


@dataclass(frozen=True)
class LocalTokens:
    """Of N candidates, what the target says of each of their tokens with loss [L] in the window of its step."""

    logprobs: npt.NDArray[np.float32]  # [L], 0 where there is none
    usable: npt.NDArray[np.bool_]  # [N]: all of them are there and finite
    explained: npt.NDArray[np.bool_]  # [N]: those that are not there have a failure that was reported


class WindowScores:
    """Scores of the windows of rows, taken table after table."""

    def __init__(self, store: ScoreStore, partition: str, keys: pa.Array, failures: KeyIndex | None):
        """`keys` [M] are those of all windows in order; `failures` the keys of rows whose failure was reported."""
        self._table: ScoreTable = store.read(partition, keys)
        self._finite = self._table.finite()
        reported = failures.places(keys) >= 0 if failures is not None else np.zeros(len(keys), dtype=bool)
        self._explained = self._table.found | reported
        self._taken = 0

    def take(self, steps: Int64s, offsets: Int64s) -> LocalTokens:
        """Of the next rows, by the steps [L] of their tokens and offsets [N + 1]. Raises StageError where a stored
        value does not fit its step."""
        starts = np.flatnonzero(is_step_start(steps, offsets))
        lengths = np.diff(np.append(starts, len(steps)))
        windows = np.arange(self._taken, self._taken + len(starts))
        self._taken += len(starts)
        found = self._table.found[windows]
        if (found & (self._table.lengths[windows] != lengths)).any():
            raise StageError("the stored score of a window does not have one value for each token of its step")
        logprobs = np.zeros(len(steps), dtype=np.float32)
        logprobs[np.repeat(found, lengths)] = self._table.take(windows)
        bounds = np.searchsorted(starts, offsets)
        missing = segment_sums(~self._finite[windows], bounds) > 0
        return LocalTokens(logprobs, ~missing, segment_sums(~self._explained[windows], bounds) == 0)


def window_keys(tables: Iterable[pa.Table], vocabulary: Vocabulary, step_end: str, window: Window) -> pa.Array:
    """The keys of the windows of tables with WINDOW_READS, in order."""
    found = [windows_of(table, token_steps(table, vocabulary, step_end), window).keys() for table in tables]
    return pa.concat_arrays(found) if found else pa.array([], pa.binary(16))
