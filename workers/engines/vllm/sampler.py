"""The vLLM sampler: vLLM's own generation, of whose log-probabilities only those of the chosen tokens are kept.

One thread owns vLLM. `sample` may be called from several threads at once: their responses share the engine's steps, so
that the long end of one unit and the beginning of the next are sampled together.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from workers.engines.base import EngineDescription
from workers.engines.sampler import Sample, SampleRequest, SampleSettings
from workers.engines.vllm.engine import prepare_environment
from workers.engines.vllm.threaded import ThreadedVllm


@dataclass
class _Call:
    """One call of `sample` and what of its answer is there."""

    requests: Sequence[SampleRequest]
    settings: SampleSettings
    answer: Future[list[Sample]] = field(default_factory=Future)
    samples: dict[int, Sample] = field(default_factory=dict)


class VllmSampler(ThreadedVllm[_Call]):
    """Implements workers.engines.sampler.Sampler."""

    num_callers = 2
    """Threads that may be in `sample` at once."""

    def __init__(self, policy: PolicyConfig, folder: str, is_wrapped: bool = False) -> None:
        """Starts the engine with the model in `folder`. Raises UserError, OutOfMemory."""
        if is_wrapped:
            raise UserError(
                f"model '{policy.model}': the names of its weights have parts of a wrapper in them (such as "
                "_orig_mod.), which vLLM does not take: save it unwrapped, or use engine: transformers"
            )
        self._policy = policy
        self._folder = folder
        self._running: dict[str, tuple[_Call, int]] = {}  # by request id: the call and the place in it
        self._ids = itertools.count()
        self._prompt_tokens = self._sampled_tokens = self._cached_tokens = self._steps = 0
        self._seconds = 0.0
        super().__init__()

    @property
    def description(self) -> EngineDescription:
        return self._description

    def stats(self) -> dict[str, float]:
        return {
            "prompt_tokens": float(self._prompt_tokens),
            "sampled_tokens": float(self._sampled_tokens),
            "tokens": float(self._prompt_tokens + self._sampled_tokens),
            "cached_tokens": float(self._cached_tokens),
            "steps": float(self._steps),
            "seconds": self._seconds,
        }

    def sample(self, requests: Sequence[SampleRequest], settings: SampleSettings) -> list[Sample]:
        """See `Sampler.sample`."""
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if longest >= self._max_length:
            raise UserError(
                f"a prompt of {longest} tokens leaves no room for a response: {self._policy.model} takes "
                f"{self._max_length}; set render.max_tokens"
            )
        if not requests:
            return []
        samples: list[Sample] = self._answer(_Call(requests, settings))
        return samples

    # What follows runs in the engine's own thread.

    def _step(self) -> bool:
        if not self._take_calls():
            return False
        begun = time.monotonic()
        for output in self._engine.step():
            self._take(output)
        self._steps += 1
        self._seconds += time.monotonic() - begun
        return True

    def _shut_down(self) -> None:
        self._engine.engine_core.shutdown()

    def _start(self) -> None:
        prepare_environment()
        import torch
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        from workers.engines.vllm.head import load_adapter

        policy, cuda = self._policy, torch.cuda.is_available()
        given = {k: v for k, v in policy.engine_args.items() if k not in ("scoring_head", "head_chunk_bytes")}
        given.pop("max_batch_tokens", None)
        if policy.adapter is not None:
            rank = load_adapter(policy.adapter).rank
            given = {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length()), **given}
        settings: dict[str, Any] = {
            "model": self._folder,
            "dtype": policy.dtype,
            "quantization": policy.quantization,
            "tensor_parallel_size": policy.tensor_parallel,
            "distributed_executor_backend": "mp" if policy.tensor_parallel > 1 else "uni",
            "trust_remote_code": policy.trust_remote_code,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "generation_config": "vllm",  # not the model's own: a repetition penalty is another distribution
            **({} if cuda else {"block_size": 32, "enforce_eager": True}),
            **given,
            "logprobs_mode": "raw_logprobs",  # before temperature and cuts, as the store says of them
        }
        self._engine = LLMEngine.from_engine_args(EngineArgs(**settings), usage_context=UsageContext.LLM_CLASS)
        self._max_length = int(self._engine.model_config.max_model_len)
        self._lora = None
        if policy.adapter is not None:
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest("adapter", 1, policy.adapter)
        self._description = EngineDescription(
            engine="vllm",
            version=vllm.__version__,
            model=policy.model,
            dtype=policy.dtype,
            quantization=policy.quantization,
            path="generate",
            device=torch.cuda.get_device_name() if cuda else "cpu",
            extra={"adapter": policy.adapter, "tensor_parallel": policy.tensor_parallel},
        )

    def _take_calls(self) -> bool:
        """Hand what waits to vLLM; False when the engine is to close."""
        while True:
            try:
                call = self._inbox.get(block=not self._running)
            except queue.Empty:
                return True
            if call is None:
                return False
            for place, request in enumerate(call.requests):
                self._add(str(next(self._ids)), call, place, request)

    def _add(self, request_id: str, call: _Call, place: int, request: SampleRequest) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        settings = call.settings
        room = self._max_length - len(request.prompt_ids)
        params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=max(settings.top_k, 0),
            max_tokens=min(settings.max_tokens, room),
            seed=request.seed % 2**63,
            stop_token_ids=list(settings.stop_ids),
            ignore_eos=True,  # the stop tokens are given; a tokenizer's own may be another
            stop=list(settings.stop_texts) or None,
            include_stop_str_in_output=True,
            logprobs=0,
            detokenize=bool(settings.stop_texts),
            skip_special_tokens=False,  # a text to stop at may be one
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,  # not one for each step and response
        )
        self._running[request_id] = (call, place)
        prompt = TokensPrompt(prompt_token_ids=request.prompt_ids.tolist())
        self._engine.add_request(request_id, prompt, params, lora_request=self._lora)

    def _take(self, output: Any) -> None:
        call, place = self._running.pop(output.request_id)
        completion = output.outputs[0]
        ids = np.asarray(completion.token_ids, dtype=np.int32)
        flat = completion.logprobs  # of each token the chosen one's comes first
        logprobs = np.asarray(flat.logprobs, dtype=np.float32)[np.asarray(flat.start_indices)]
        chosen = np.asarray(flat.token_ids, dtype=np.int64)[np.asarray(flat.start_indices)]
        if len(logprobs) != len(ids) or (chosen != ids).any():
            raise RuntimeError("vLLM gave log-probabilities of other tokens than it sampled")
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a response with '{completion.finish_reason}'")
        call.samples[place] = Sample(ids, logprobs, completion.finish_reason)
        self._prompt_tokens += len(call.requests[place].prompt_ids)
        self._sampled_tokens += len(ids)
        self._cached_tokens += int(output.num_cached_tokens or 0)
        if len(call.samples) == len(call.requests):
            call.answer.set_result([call.samples[place] for place in range(len(call.requests))])
