"""Real engines with one thing going wrong, for drills; named by GRAPE_ENGINE_CLASS."""

from __future__ import annotations

import os
import time

import numpy as np
import numpy.typing as npt

from grape_service.ragged import TokenBatch
from workers.engines.transformers_engine import TransformersEngine


class SlowEngine(TransformersEngine):
    """Takes DRILL_SECONDS longer for each call."""

    def score(self, batch: TokenBatch, temperature: float = 1.0) -> npt.NDArray[np.float32]:
        time.sleep(float(os.environ["DRILL_SECONDS"]))
        return super().score(batch, temperature)
