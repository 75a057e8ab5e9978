"""The embedded sampler: transformers' own `generate`, with a processor that draws each row with its own random numbers.

`generate` draws a batch from one generator, so that a response would depend on what stands beside it. Here the
processor chooses the token (inverse of the cumulative distribution, in float64, at a number that only the row's seed
decides), notes its log-probability under the model, and leaves `generate` no other choice.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from workers.engines.base import EngineDescription, OutOfMemory
from workers.engines.sampler import Sample, SampleRequest, SampleSettings, uniforms
from workers.engines.transformers.arguments import engine_args
from workers.engines.transformers.causal_model import (
    LengthDependentRope,
    device_of,
    is_out_of_memory,
    load_model,
)

CACHE_TOKENS = {"cpu": 16384, "cuda": 131072}
"""Tokens of all rows of a batch, prompts and responses together, at most."""


class TransformersSampler:
    """Implements workers.engines.sampler.Sampler."""

    def __init__(self, policy: PolicyConfig, folder: str, is_wrapped: bool = False, cache_tokens: int | None = None):
        """`folder` is the model's local folder; policy.adapter is a local folder too. Raises UserError."""
        device = device_of(engine_args(policy))
        if os.environ.get("OMP_NUM_THREADS", "").isdigit():
            torch.set_num_threads(max(int(os.environ["OMP_NUM_THREADS"]), 1))
        self._policy = policy
        self._folder = folder
        self._model: Any = load_model(policy, folder, device, is_wrapped)
        # What is sampled is the model's distribution: its files' own settings (a repetition penalty) are no part of it.
        self._model.generation_config = GenerationConfig()
        self._rope = LengthDependentRope(self._model)
        self._cache_tokens = cache_tokens or CACHE_TOKENS["cpu" if device.type == "cpu" else "cuda"]
        self._max_length = int(getattr(self._model.config.get_text_config(), "max_position_embeddings", 0) or 2**31)
        self._tokenizer: Any = None
        self._description = EngineDescription(
            engine="transformers",
            version=transformers.__version__,
            model=policy.model,
            dtype=policy.dtype,
            quantization=None,
            path="generate",
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            extra={"torch": torch.__version__},
        )
        self._stats = {"prompt_tokens": 0.0, "sampled_tokens": 0.0, "seconds": 0.0}

    @property
    def description(self) -> EngineDescription:
        return self._description

    def stats(self) -> dict[str, float]:
        return {**self._stats, "tokens": self._stats["prompt_tokens"] + self._stats["sampled_tokens"]}

    def close(self) -> None:
        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def sample(self, requests: Sequence[SampleRequest], settings: SampleSettings) -> list[Sample]:
        """See `Sampler.sample`. Prompts of similar length share a batch where none changes another's response."""
        started = time.monotonic()
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if longest >= self._max_length:
            raise UserError(
                f"a prompt of {longest} tokens leaves no room for a response: {self._policy.model} takes "
                f"{self._max_length}; set render.max_tokens"
            )
        samples: dict[int, Sample] = {}
        try:
            with torch.inference_mode():
                for places in self._batches(requests, settings.max_tokens):
                    found = self._sample_batch([requests[place] for place in places], settings)
                    samples.update(zip(places, found, strict=True))
                    self._stats["prompt_tokens"] += sum(len(requests[place].prompt_ids) for place in places)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            return [samples[place] for place in range(len(requests))]
        finally:
            self._stats["seconds"] += time.monotonic() - started
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._cache_tokens = max(self._cache_tokens // 2, 1)
        raise OutOfMemory(reason)

    def _batches(self, requests: Sequence[SampleRequest], max_tokens: int) -> Iterator[list[int]]:
        """Places of requests that are sampled together, the longest prompts first.

        Prompts with less room than `max_tokens`, and those whose rotary frequencies change while they are sampled,
        share a batch with their own length alone.
        """
        lengths = np.array([len(request.prompt_ids) for request in requests], dtype=np.int64)
        rooms = np.minimum(max_tokens, self._max_length - lengths)
        kinds = self._rope.kinds(lengths)
        alone = (rooms < max_tokens) | (kinds != self._rope.kinds(lengths + rooms))
        shared = list(zip(kinds.tolist(), np.where(alone, lengths, 0).tolist(), strict=True))
        batch: list[int] = []
        for place in sorted(range(len(requests)), key=lambda place: -lengths[place]):
            width = lengths[batch[0] if batch else place] + max_tokens
            if batch and (shared[place] != shared[batch[0]] or width * (len(batch) + 1) > self._cache_tokens):
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def _sample_batch(self, requests: Sequence[SampleRequest], settings: SampleSettings) -> list[Sample]:
        width = max(len(request.prompt_ids) for request in requests)
        max_tokens = min(settings.max_tokens, self._max_length - width)
        ids = np.zeros((len(requests), width), dtype=np.int64)
        attended = np.zeros_like(ids)
        for row, request in enumerate(requests):  # padded on the left: the last place is where a response begins
            ids[row, width - len(request.prompt_ids) :] = request.prompt_ids
            attended[row, width - len(request.prompt_ids) :] = 1
        device = self._model.device
        draw = _Draw(np.stack([uniforms(request.seed, max_tokens) for request in requests]), settings, device)
        stop = _Stop(
            settings, width, len(requests), self._decoder() if settings.stop_texts else None, count=self._count
        )
        self._rope.reset()
        generated = self._model.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(attended).to(device),
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_tokens,
                pad_token_id=0,
                eos_token_id=None,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        tokens = generated[:, width:].cpu().numpy().astype(np.int32)
        logprobs = torch.stack(draw.logprobs, dim=1).cpu().numpy()
        samples = []
        for row, length in enumerate(stop.lengths.tolist()):
            end = length or tokens.shape[1]
            samples.append(Sample(tokens[row, :end], logprobs[row, :end], "stop" if length else "length"))
        return samples

    def _count(self, tokens: int) -> None:
        self._stats["sampled_tokens"] += tokens

    def _decoder(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                self._folder, trust_remote_code=self._policy.trust_remote_code
            )
        return self._tokenizer


class _Draw(LogitsProcessor):
    """Chooses the next token of each row, notes its log-probability, and takes every other token away."""

    def __init__(self, numbers: npt.NDArray[np.float64], settings: SampleSettings, device: torch.device):
        """`numbers` [N, max_tokens] in [0, 1) decide the tokens of N rows."""
        self._numbers = torch.from_numpy(numbers)
        self._settings = settings
        self._device = device
        self.logprobs: list[torch.Tensor] = []  # of each step, [N] float32

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [N, V]: logits of the next token."""
        logits = scores.float()
        if self._settings.temperature == 0:
            chosen = logits.argmax(dim=-1)
        else:
            number = self._numbers[:, len(self.logprobs)].to(self._device)
            chosen = drawn(probabilities(logits, self._settings), number)
        self.logprobs.append(torch.log_softmax(logits, dim=-1).gather(1, chosen[:, None])[:, 0])
        only = torch.full_like(logits, -torch.inf)
        return only.scatter_(1, chosen[:, None], 0.0)


def probabilities(logits: torch.Tensor, settings: SampleSettings) -> torch.Tensor:
    """What is drawn from, float64 [N, V]: temperature, then top_k, then top_p (the fewest tokens that hold it)."""
    logits = logits.double() / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        lowest = logits.topk(settings.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    p = torch.softmax(logits, dim=-1)
    if settings.top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        p = p.scatter(1, order, ordered.masked_fill(before >= settings.top_p, 0.0))
        p = p / p.sum(dim=-1, keepdim=True)
    return p


def drawn(p: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The token of each row [N] at which the cumulative distribution of p [N, V] passes numbers [N] in [0, 1)."""
    cumulative = p.cumsum(dim=-1)
    wanted = (numbers * cumulative[:, -1])[:, None]
    place = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    return place.clamp(max=p.shape[-1] - 1)


class _Stop(StoppingCriteria):
    """Ends a row at one of its stop tokens or texts, and notes how long it was then.

    `count` is told after each step how many tokens of responses it made.
    """

    def __init__(
        self, settings: SampleSettings, prompt_width: int, rows: int, tokenizer: Any, count: Callable[[int], None]
    ):
        self._ids = torch.tensor(settings.stop_ids, dtype=torch.long)
        self._texts = settings.stop_texts
        self._width = prompt_width
        self._tokenizer = tokenizer
        self._tell_count = count
        self._tail = max((len(text.encode()) for text in settings.stop_texts), default=0) + 8
        self.lengths = np.zeros(rows, dtype=np.int64)  # 0 while a row goes on

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        length = input_ids.shape[1] - self._width
        last = input_ids[:, -1].cpu()
        ended = torch.isin(last, self._ids).numpy()
        if self._texts:
            begin = max(self._width, input_ids.shape[1] - self._tail)
            for row in np.flatnonzero(~ended & (self.lengths == 0)).tolist():
                text = self._tokenizer.decode(input_ids[row, begin:].tolist(), skip_special_tokens=False)
                ended[row] = any(stop in text for stop in self._texts)
        self._tell_count(int((self.lengths == 0).sum()))
        self.lengths[(self.lengths == 0) & ended] = length
        return torch.from_numpy(self.lengths > 0).to(input_ids.device)
