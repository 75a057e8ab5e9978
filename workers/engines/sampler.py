"""What a sampler is: prompts as token ids in, responses as token ids with the log-probability of each token out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from workers.engines.base import EngineDescription

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SampleSettings:
    """How responses are sampled; those of one call share it."""

    temperature: float
    top_p: float  # 1.0: all tokens
    top_k: int  # 0 or less: all tokens
    max_tokens: int
    stop_ids: tuple[int, ...]  # tokens that end a response, and are its last token
    stop_texts: tuple[str, ...] = ()  # texts that end a response, and are its end


@dataclass(frozen=True)
class SampleRequest:
    """One response that is wanted."""

    prompt_ids: npt.NDArray[np.int32]  # [P]
    seed: int  # below 2**63; the same prompt, settings and seed draw with the same random numbers


@dataclass(frozen=True)
class Sample:
    """One response as it was sampled."""

    ids: npt.NDArray[np.int32]  # [T], its stop token or text included
    logprobs: npt.NDArray[np.float32]  # [T] log p(token | tokens before it), before temperature and cuts
    finish_reason: FinishReason


class Sampler(Protocol):
    """Samples responses of one policy. Lives in one process and owns its device's memory."""

    @property
    def description(self) -> EngineDescription: ...

    def sample(self, requests: Sequence[SampleRequest], settings: SampleSettings) -> list[Sample]:
        """A response to each request, in their order.

        Raises UserError for a prompt that leaves no room for a response, OutOfMemory after which smaller calls may
        pass.
        """
        ...

    def stats(self) -> dict[str, float]:
        """Running counts since the start: prompt_tokens, sampled_tokens, tokens (both), seconds."""
        ...

    def close(self) -> None:
        """Free the device; the sampler cannot be used afterwards."""
        ...


def uniforms(seed: int, number: int) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1) that decide a response's tokens, [number]."""
    return np.random.Generator(np.random.Philox(key=seed)).random(number)
