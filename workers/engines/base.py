"""What an engine is: token id sequences with loss masks in, log-probabilities and other statistics of each token with
loss out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from grape_service.json_types import JsonObject
from grape_service.rows.ragged import Int64s, TokenBatch
from grape_service.rows.statistics import LOGPROB, RANGES


@dataclass(frozen=True)
class EngineDescription:
    """What a score file and the manifest say about the engine that made the scores."""

    engine: str  # vllm | transformers
    version: str  # of the library
    model: str
    dtype: str
    quantization: str | None
    path: str  # how scores are made: shared_prefix | head | prompt_logprobs
    device: str  # cpu, or the GPU's name
    extra: JsonObject = field(default_factory=dict)


class OutOfMemory(RuntimeError):
    """The engine ran out of memory on a batch; the same batch may pass with the halved token budget."""


class Engine(Protocol):
    """Scores sequences under one policy. Lives in one process and owns its device's memory."""

    @property
    def max_batch_tokens(self) -> int:
        """Tokens that are on the device at a time; halved by the engine itself before it raises OutOfMemory."""
        ...

    @property
    def description(self) -> EngineDescription: ...

    def score(self, batch: TokenBatch, temperature: float = 1.0) -> npt.NDArray[np.float32]:
        """log p(token | tokens before it) of each token with loss: flat [L], in the batch's order.

        Logits are divided by `temperature`; log-softmax is float32. A row whose score could not be made
        has NaN in all its places; nothing else is ever NaN. Raises OutOfMemory.
        """
        ...

    def score_statistics(
        self, batch: TokenBatch, names: Sequence[str], temperature: float = 1.0
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Statistics `names` (rows/statistics.py) of each token with loss, log-probabilities always with them: flat [L]
        each, in the batch's order, of the distribution at `temperature`.

        A row with a value that could not be made has NaN in all its places of all of them. Raises OutOfMemory.
        """
        ...

    def divides(self, lengths: Int64s) -> npt.NDArray[np.bool_]:
        """Which rows of `lengths` [N] have first tokens with the same scores where the row ends with them."""
        ...

    def stats(self) -> dict[str, float]:
        """Running counts since the start: tokens, cached_tokens, seconds."""
        ...

    def close(self) -> None:
        """Free the device; the engine cannot be used afterwards."""
        ...


def invalid_rows(statistics: Mapping[str, npt.NDArray[np.float32]], batch: TokenBatch) -> dict[int, str]:
    """Rows whose values may not be stored, with the reason: not finite, or out of the statistic's range.

    `statistics` by name hold log-probabilities at least. Raises AssertionError when one is not as long as the batch's
    masks say.
    """
    starts = batch.loss_offsets
    reasons: dict[int, str] = {}
    for name, values in statistics.items():
        assert values.shape == (int(starts[-1]),), "an engine must give one value per token with loss"
        low, high = RANGES[name]
        outside = (values < low) | (values > high)
        bad = outside | ~np.isfinite(values)
        for row in np.unique(np.searchsorted(starts, np.flatnonzero(bad), side="right") - 1).tolist():
            word, limit = ("log-probability", "above 0") if name == LOGPROB else (name, "out of its range")
            is_outside = outside[starts[row] : starts[row + 1]].any()
            reasons.setdefault(row, f"{word} {limit if is_outside else 'missing'}")
    return reasons
