"""What a select or weights method is given: flat arrays with offsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from grape_service.rows.ragged import Int64s

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class MethodBatch:
    """N candidates and the L tokens of theirs that count, row after row; no candidate is without one.

    For a select method they are the candidates of whole prompts, a prompt's next to each other, and the tokens those
    that count in a score; for a weights method kept rows and all tokens with loss.
    """

    prompts: Int64s
    """[N] A number for each prompt."""
    prompt_ids: pa.Array
    """[N]"""
    candidate_ids: pa.Array
    """[N]"""
    offsets: Int64s
    """[N + 1] Candidate i has the tokens offsets[i] to offsets[i + 1] of each statistic."""
    statistics: Mapping[str, npt.NDArray]
    """[L] each: those that the method declares, by name. float32; rank is int64."""
    columns: Mapping[str, pa.Array]
    """[N] each: the pool's columns that the method names."""
    steps: Int64s | None = None
    """[L] The step of each token in its response, from 0, for a select method that cuts steps."""
    local_logprobs: npt.NDArray[np.float32] | None = None
    """[L] log p of each token in the window of its step, for a select method that scores windows."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self, start: int, stop: int) -> MethodBatch:
        """The candidates from start to stop."""
        tokens = slice(int(self.offsets[start]), int(self.offsets[stop]))
        return MethodBatch(
            self.prompts[start:stop],
            self.prompt_ids[start:stop],
            self.candidate_ids[start:stop],
            self.offsets[start : stop + 1] - self.offsets[start],
            {name: values[tokens] for name, values in self.statistics.items()},
            {name: values[start:stop] for name, values in self.columns.items()},
            None if self.steps is None else self.steps[tokens],
            None if self.local_logprobs is None else self.local_logprobs[tokens],
        )

    def prompt_bounds(self) -> list[int]:
        """Where each prompt's candidates begin, and N."""
        changes = np.flatnonzero(self.prompts[1:] != self.prompts[:-1]) + 1
        return [0, *changes.tolist(), len(self)] if len(self) else [0]
