"""Real engines with one thing going wrong, for drills; named by GRAPE_ENGINE_CLASS."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from benchmarks.constant_engine import ConstantEngine
from grape_service.config.policy import PolicyConfig
from grape_service.rows.ragged import TokenBatch
from workers.engines.base import OutOfMemory
from workers.engines.transformers.engine import TransformersEngine


class SlowEngine(TransformersEngine):
    """Takes DRILL_SECONDS longer for each call, which its statistics count."""

    def score_statistics(
        self, batch: TokenBatch, names: Sequence[str], temperature: float = 1.0
    ) -> dict[str, npt.NDArray[np.float32]]:
        seconds = float(os.environ["DRILL_SECONDS"])
        time.sleep(seconds)
        self._stats["seconds"] += seconds
        return super().score_statistics(batch, names, temperature)


class TogetherEngine(SlowEngine):
    """As slow, from a moment on at which DRILL_ENGINES of them are in a call, the canary's not counted.

    A file in DRILL_FOLDER for each that is so far, named by its process id.
    """

    is_canary = True

    def score_statistics(
        self, batch: TokenBatch, names: Sequence[str], temperature: float = 1.0
    ) -> dict[str, npt.NDArray[np.float32]]:
        folder = Path(os.environ["DRILL_FOLDER"])
        if not self.is_canary:
            (folder / str(os.getpid())).touch()
            while len(list(folder.iterdir())) < int(os.environ["DRILL_ENGINES"]):
                time.sleep(0.1)
        self.is_canary = False
        return super().score_statistics(batch, names, temperature)


class DrillEngine(ConstantEngine):
    """Does what the JSON file DRILL_FILE says at each call, with statistics or without; values are those of the
    constant engine.

    Keys: seconds (a call takes), slow_factor (of the first engine that was started), fail_token (a batch with this
    token id raises), fail_once (a call raises, once for each value), oom_above (tokens: a larger batch runs out of
    memory), die_once (the process ends in a call, once for each value), hang_token (the first batch with this
    token id takes an hour), missing_token (rows with this token id get no score).
    """

    def __init__(self, policy: PolicyConfig, folder: str):
        super().__init__(policy, folder)
        self.path = Path(os.environ["DRILL_FILE"])
        self.is_first = self._once(f"first-{self._drill().get('name')}")
        self.budget = 4096

    @property
    def max_batch_tokens(self) -> int:  # type: ignore[override]
        return self.budget

    def _drill(self) -> dict[str, Any]:
        return orjson.loads(self.path.read_bytes())

    def _once(self, name: str) -> bool:
        try:
            self.path.with_name(name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def score(self, batch: TokenBatch, temperature: float = 1.0) -> npt.NDArray[np.float32]:
        drill = self._drill()
        time.sleep(drill.get("seconds", 0) * (drill.get("slow_factor", 1) if self.is_first else 1))
        if "die_once" in drill and self._once(f"died-{drill['die_once']}"):
            os._exit(1)
        if drill.get("hang_token") in batch.input_ids.tolist() and self._once(f"hung-{drill['name']}"):
            time.sleep(3600)
        if "fail_once" in drill and self._once(f"failed-{drill['fail_once']}"):
            raise RuntimeError("this call failed")
        if drill.get("fail_token") in batch.input_ids.tolist():
            raise RuntimeError("this batch always fails")
        if "oom_above" in drill and self.budget > drill["oom_above"]:
            self.budget //= 2
            raise OutOfMemory(f"no room for {self.budget * 2} tokens")
        scores = super().score(batch, temperature)
        if "missing_token" in drill:
            hit = batch.input_ids == drill["missing_token"]
            rows = np.unique(np.searchsorted(batch.offsets, np.flatnonzero(hit), side="right") - 1)
            for row in rows:
                scores[batch.loss_offsets[row] : batch.loss_offsets[row + 1]] = np.nan
        return scores
