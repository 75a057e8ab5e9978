"""What an engine is: token id sequences with loss masks in, one log-probability per token with loss out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from grape_service.rows.ragged import TokenBatch


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
    extra: dict[str, Any] = field(default_factory=dict)


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

    def stats(self) -> dict[str, float]:
        """Running counts since the start: tokens, cached_tokens, seconds."""
        ...

    def close(self) -> None:
        """Free the device; the engine cannot be used afterwards."""
        ...


def first_invalid_score(scores: npt.NDArray[np.float32], batch: TokenBatch) -> dict[int, str]:
    """Rows whose scores may not be stored, with the reason: not finite, or above 0.

    Raises AssertionError when `scores` is not as long as the batch's masks say.
    """
    assert scores.shape == (int(batch.mask.sum()),), "an engine must give one value per token with loss"
    bad = ~np.isfinite(scores) | (scores > 0)
    if not bad.any():
        return {}
    starts = batch.loss_offsets
    rows = np.searchsorted(starts, np.flatnonzero(bad), side="right") - 1
    reasons: dict[int, str] = {}
    for row in np.unique(rows):
        values = scores[starts[row] : starts[row + 1]]
        reasons[int(row)] = "log-probability above 0" if (values > 0).any() else "log-probability missing"
    return reasons
