"""The vLLM engine, slow enough to be killed in the middle of a shard; named by GRAPE_ENGINE_CLASS."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from grape_service.rows.ragged import TokenBatch
from workers.engines.vllm.engine import VllmEngine


class SlowVllmEngine(VllmEngine):
    """Takes half a second longer for each call."""

    def score_statistics(
        self, batch: TokenBatch, names: Sequence[str], temperature: float = 1.0
    ) -> dict[str, npt.NDArray[np.float32]]:
        time.sleep(0.5)
        return super().score_statistics(batch, names, temperature)
