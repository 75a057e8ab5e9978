"""The vLLM engine, slow enough to be killed in the middle of a shard; named by GRAPE_ENGINE_CLASS."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from grape_service.rows.ragged import TokenBatch
from workers.engines.vllm.engine import VllmEngine


class SlowVllmEngine(VllmEngine):
    """Takes half a second longer for each call."""

    def score(self, batch: TokenBatch, temperature: float = 1.0) -> npt.NDArray[np.float32]:
        time.sleep(0.5)
        return super().score(batch, temperature)
