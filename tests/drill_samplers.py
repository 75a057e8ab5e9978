"""Samplers that fail on purpose, for drills: named by GRAPE_SAMPLER_CLASS."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson

from grape_service.config.policy import PolicyConfig
from workers.engines.sampler import Sample, SampleRequest, SampleSettings
from workers.engines.transformers.sampler import TransformersSampler


class DiesOnce(TransformersSampler):
    """Its process dies in the second call, and the error of the fourth is told; GRAPE_DRILL_FOLDER remembers both."""

    def __init__(self, policy: PolicyConfig, folder: str):
        super().__init__(policy, folder)
        self.folder = Path(os.environ["GRAPE_DRILL_FOLDER"])

    def sample(self, requests: Sequence[SampleRequest], settings: SampleSettings) -> list[Sample]:
        call = len(list(self.folder.glob("call-*")))
        (self.folder / f"call-{call}").touch()
        if call == 1:
            os._exit(9)
        if call == 3:
            raise RuntimeError("device-side assert")
        return super().sample(requests, settings)


class SlowSampler(TransformersSampler):
    """Each token takes step_seconds of the JSON file DRILL_FILE."""

    def _count(self, tokens: int) -> None:
        super()._count(tokens)
        time.sleep(orjson.loads(Path(os.environ["DRILL_FILE"]).read_bytes()).get("step_seconds", 0))


class FailsOnText(TransformersSampler):
    """A prompt with the text GRAPE_DRILL_TEXT always fails."""

    def sample(self, requests: Sequence[SampleRequest], settings: SampleSettings) -> list[Sample]:
        if any(os.environ["GRAPE_DRILL_TEXT"] in self._decoder().decode(request.prompt_ids) for request in requests):
            raise RuntimeError("this prompt always fails")
        return super().sample(requests, settings)


class ShiftsNumbers(TransformersSampler):
    """Its log-probabilities are those of the token before."""

    def sample(self, requests: Sequence[SampleRequest], settings: SampleSettings) -> list[Sample]:
        made = super().sample(requests, settings)
        return [replace(sample, logprobs=np.roll(sample.logprobs, 1)) for sample in made]
