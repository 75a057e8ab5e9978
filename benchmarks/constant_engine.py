"""An engine that answers at once: what is left is the pipeline's own time. For benchmarks alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from grape_service.config.policy import PolicyConfig
from grape_service.rows.ragged import Int64s, TokenBatch
from grape_service.rows.statistics import ENTROPY, LOGPROB, RANK, TOP20_ENTROPY, ordered
from workers.engines.base import EngineDescription


class ConstantEngine:
    """Scores that depend on the token ids alone, made in constant time a token."""

    def __init__(self, policy: PolicyConfig, folder: str):
        self.description = EngineDescription(
            engine="constant",
            version="1",
            model=policy.model,
            dtype=policy.dtype,
            quantization=policy.quantization,
            path="constant",
            device="cpu",
        )
        self.tokens = 0

    @property
    def max_batch_tokens(self) -> int:
        return 2**20

    def score(self, batch: TokenBatch, temperature: float = 1.0) -> npt.NDArray[np.float32]:
        """A number between -4 and 0 from each token and the one before it."""
        self.tokens += batch.num_tokens
        previous = np.roll(batch.input_ids, 1)
        mixed = (batch.input_ids.astype(np.int64) * 2654435761 + previous * 40503) % 4096
        return (-mixed / np.float32(1024.0 * temperature)).astype(np.float32)[batch.mask]

    def score_statistics(
        self, batch: TokenBatch, names: Sequence[str], temperature: float = 1.0
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Statistics that fit their log-probabilities: ranks from 1, entropies from 0."""
        logprobs = self.score(batch, temperature)
        made = {
            LOGPROB: logprobs,
            RANK: np.floor(1 - 16 * logprobs),
            ENTROPY: -logprobs / 2,
            TOP20_ENTROPY: -logprobs / 4,
        }
        return {name: made[name].astype(np.float32) for name in ordered(names)}

    def divides(self, lengths: Int64s) -> npt.NDArray[np.bool_]:
        """All rows."""
        return np.ones(len(lengths), dtype=bool)

    def stats(self) -> dict[str, float]:
        return {"tokens": float(self.tokens), "cached_tokens": 0.0, "seconds": 0.0}

    def close(self) -> None:
        pass
