"""The vLLM engine: scores at the speed of vLLM's own prefill, through the scoring head of `vllm_head`.

One thread owns vLLM. `score` may be called from several threads at once: their sequences share the engine's
steps, so that the end of one shard and the beginning of the next fill the same step.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.rows.ragged import Int64s, TokenBatch
from grape_service.rows.statistics import LOGPROB, ordered
from workers.engines.base import EngineDescription, OutOfMemory
from workers.engines.vllm.available import model_architecture
from workers.engines.vllm.threaded import ThreadedVllm, out_of_memory

log = logging.getLogger(__name__)

DEFAULT_MAX_BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}
"""Tokens of a step by device; benchmarks/gpu_scoring.md says why."""

STEPS_AHEAD = 4
"""How many steps' tokens, cached prompts not counted, vLLM holds at most; the other rows of a call wait here."""

MIN_STEP_TOKENS = 64
"""What does not fit the memory in steps of this size will not fit it at all."""

PROMPT_LOGPROBS_COST = (
    "this computes the output head for prompt tokens too and each prompt once for every candidate: "
    "about 0.6 times the scoring head's speed for a 7B model on an H100"
)


@dataclass
class _Job:
    """One call of `score`: its rows, and what of its answer is still missing."""

    batch: TokenBatch
    temperature: float
    names: tuple[str, ...]  # of the statistics
    answer: Future[npt.NDArray[np.float32]] = field(default_factory=Future)  # [L, S]
    scores: npt.NDArray[np.float32] = field(init=False)
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.scores = np.full((int(self.batch.mask.sum()), len(self.names)), np.nan, dtype=np.float32)
        self.left = len(self.batch)
        self.loss_offsets = self.batch.loss_offsets

    def row(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """input_ids and mask of a sequence."""
        place = slice(self.batch.offsets[row], self.batch.offsets[row + 1])
        return self.batch.input_ids[place], self.batch.mask[place]

    def new_tokens(self, row: int) -> int:
        """Tokens behind the prompt: what the sequence adds to a step when its prompt is in the cache."""
        return int(self.batch.offsets[row + 1] - self.batch.offsets[row] - self.batch.prompt_lens[row])


class VllmEngine(ThreadedVllm[_Job]):
    """Scores sequences under one policy with vLLM; see `workers.engines.base.Engine`."""

    def __init__(
        self, policy: PolicyConfig, folder: str, max_batch_tokens: int | None = None, is_wrapped: bool = False
    ) -> None:
        """Starts the engine with the model in `folder`.

        `max_batch_tokens` is the number of tokens of one step; `is_wrapped` says that wrappers put parts of their own
        into the names of the weights, which are taken out. Raises UserError for an adapter or a setting
        that vLLM cannot take, OutOfMemory if not even an empty engine fits.
        """
        self._policy = policy
        self._folder = folder
        self._max_batch_tokens = max_batch_tokens
        self._is_wrapped = is_wrapped
        self._waiting: deque[tuple[_Job, int, bool]] = deque()  # job, row, whether the prefix cache may be read
        self._running: dict[str, tuple[_Job, int, bool]] = {}  # the same, by request id
        self._ids = itertools.count()
        self._held_tokens = 0
        self._tokens = self._cached = self._rescored = self._out_of_memory = 0
        self._seconds = 0.0
        super().__init__()

    @property
    def description(self) -> EngineDescription:
        return self._description

    def score(self, batch: TokenBatch, temperature: float = 1.0) -> npt.NDArray[np.float32]:
        """See `Engine.score`, and below."""
        return self.score_statistics(batch, (), temperature)[LOGPROB]

    def score_statistics(
        self, batch: TokenBatch, names: Sequence[str], temperature: float = 1.0
    ) -> dict[str, npt.NDArray[np.float32]]:
        """See `Engine.score_statistics`. A row that came back with holes is scored again without the prefix cache.

        Raises UserError for a row longer than the model takes, and for a temperature or a statistic where the path
        is prompt_logprobs. After OutOfMemory the engine's steps are half as large and it can be used again.
        """
        names = ordered(names)
        if len(batch) == 0:
            return {name: np.empty(0, dtype=np.float32) for name in names}
        if len(names) > 1 and self._description.path != "head":
            raise UserError(
                f"{names[1]} of {self._policy.model} cannot be made through vLLM's prompt_logprobs, which gives "
                "log-probabilities alone: use engine: transformers for it"
            )
        if temperature != 1.0 and self._description.path != "head":
            raise UserError(
                f"{self._policy.model} cannot be scored at temperature {temperature} through vLLM's prompt_logprobs: "
                "use engine: transformers for it"
            )
        longest = int(batch.lengths.max())
        if longest > self._core.max_row_tokens:
            raise UserError(
                f"a row of {longest} tokens is longer than the {self._core.max_row_tokens} tokens that "
                f"{self._policy.model} takes: set render.max_tokens to the model's length"
            )
        scores_LS = self._answer(_Job(batch, temperature, names))
        return {name: np.ascontiguousarray(scores_LS[:, place]) for place, name in enumerate(names)}

    num_callers = 2
    """Threads that may be in `score` at once: their rows share steps, so that none runs half empty."""

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of one step."""
        return self._step_tokens

    def divides(self, lengths: Int64s) -> npt.NDArray[np.bool_]:
        """See `Engine.divides`: all, as vLLM's rotary frequencies are those of the longest row that it takes."""
        return np.ones(len(lengths), dtype=bool)

    def forget_cached_prompts(self) -> None:
        """Empty the prefix cache between two measurements. Not while a call of `score` is running."""
        assert not self._waiting
        assert not self._running
        self._core.drop_requests([])

    def stats(self) -> dict[str, float]:
        return {
            "tokens": float(self._tokens),
            "cached_tokens": float(self._cached),
            "cache_hit_rate": self._cached / max(1, self._tokens),
            "seconds": self._seconds,
            "rescored_rows": float(self._rescored),
            "out_of_memory": float(self._out_of_memory),
        }

    # What follows runs in the engine's own thread.

    def _step(self) -> bool:
        if not self._take_jobs():
            return False
        begun = time.monotonic()
        try:
            self._fill()
            for ended in self._core.step():
                self._take_values(*ended)
        except Exception as error:
            self._give_up(error)
        self._seconds += time.monotonic() - begun
        return True

    def _shut_down(self) -> None:
        self._core.shut_down()

    def _start(self) -> None:
        """Make the engine: with the scoring head, or else through prompt_logprobs."""
        prepare_environment()
        import torch

        from workers.engines.vllm import head

        cuda = torch.cuda.is_available()
        architecture = model_architecture(self._folder)
        given = dict(self._policy.engine_args)
        head_options = {key: given.pop(key) for key in ("head_chunk_bytes",) if key in given}
        wanted = given.pop("scoring_head", True)
        budgets = [
            self._max_batch_tokens,
            given.pop("max_batch_tokens", None),
            given.pop("max_num_batched_tokens", None),
        ]
        budget = next((int(one) for one in budgets if one), DEFAULT_MAX_BATCH_TOKENS["cuda" if cuda else "cpu"])
        settings: dict[str, Any] = {
            "model": self._folder,
            "skip_tokenizer_init": True,
            "dtype": self._policy.dtype,
            "quantization": self._policy.quantization,
            "tensor_parallel_size": self._policy.tensor_parallel,
            "distributed_executor_backend": "mp" if self._policy.tensor_parallel > 1 else "uni",
            "trust_remote_code": self._policy.trust_remote_code,
            "max_num_batched_tokens": budget,
            "max_num_seqs": min(1024, budget),
            "enable_chunked_prefill": True,
            "enforce_eager": True,
            "disable_log_stats": True,
            # On a CPU vLLM's own choice of 128 would share no prompt that is shorter.
            **({} if cuda else {"block_size": 32}),
            **given,
        }
        adapter = self._policy.adapter
        head_options["is_wrapped"] = self._is_wrapped
        why_not = head.why_no_head(architecture) if wanted else "engine_args.scoring_head is off"
        if why_not is None:
            try:
                self._core = head.start_with_head(architecture, adapter, head_options, settings)
            except Exception as error:
                if isinstance(error, UserError) or out_of_memory(error):
                    raise
                if head.NOT_FINITE in str(error):  # said by a worker process
                    raise UserError(f"model '{self._policy.model}': its files hold {head.NOT_FINITE}") from None
                why_not = f"the scoring head did not start ({error})"
                head.free_device()
        if why_not is not None:
            if self._is_wrapped:
                raise UserError(
                    f"model '{self._policy.model}': the names of its weights have parts of a wrapper in them (such as "
                    "_orig_mod.), which vLLM's own loader does not take: save it unwrapped, or use engine: transformers"
                )
            log.warning(
                "scoring %s through prompt_logprobs because %s; %s", self._policy.model, why_not, PROMPT_LOGPROBS_COST
            )
            self._core = head.start_with_prompt_logprobs(adapter, settings)
        self._step_tokens = budget
        self._description = EngineDescription(
            engine="vllm",
            version=head.VERSION,
            model=self._policy.model,
            dtype=self._policy.dtype,
            quantization=self._policy.quantization or self._policy.quantised_by,
            path="head" if why_not is None else "prompt_logprobs",
            device=torch.cuda.get_device_name() if cuda else "cpu",
            extra={
                "torch": str(torch.__version__),
                "architecture": architecture,
                "adapter": adapter,
                "tensor_parallel": self._policy.tensor_parallel,
                "max_batch_tokens": self._step_tokens,
                **({} if why_not is None else {"why_not_head": why_not}),
            },
        )

    def _take_jobs(self) -> bool:
        """Wait for something to do; False when the engine is to close."""
        while True:
            try:
                job = self._inbox.get(block=not self._waiting and not self._running)
            except queue.Empty:
                return True
            if job is None:
                return False
            self._waiting.extend((job, row, True) for row in range(len(job.batch)))

    def _fill(self) -> None:
        """Hand rows to vLLM until it holds the tokens of a few steps."""
        while self._waiting and self._held_tokens < STEPS_AHEAD * self._step_tokens:
            job, row, use_cache = self._waiting.popleft()
            if job.answer.done():
                continue
            ids, mask = job.row(row)
            request_id = str(next(self._ids))
            self._running[request_id] = (job, row, use_cache)
            self._held_tokens += job.new_tokens(row)
            self._core.add(request_id, ids, mask, job.temperature, use_cache, job.names)

    def _take_values(self, request_id: str, values: npt.NDArray[np.float32], cached: int) -> None:
        job, row, use_cache = self._running.pop(request_id)
        ids, _ = job.row(row)
        self._held_tokens -= job.new_tokens(row)
        self._cached += cached
        place = slice(job.loss_offsets[row], job.loss_offsets[row + 1])
        if len(values) == place.stop - place.start and np.isfinite(values).all() and (values[:, 0] <= 0).all():
            job.scores[place] = values
        elif use_cache:
            log.warning("a row of %d tokens came back with holes; scoring it again without the prefix cache", len(ids))
            self._rescored += 1
            self._waiting.appendleft((job, row, False))
            return
        else:
            log.warning("a row of %d tokens came back with holes without the prefix cache too", len(ids))
        self._tokens += len(ids)
        job.left -= 1
        if job.left == 0:
            job.answer.set_result(job.scores)

    def _give_up(self, error: Exception) -> None:
        """Every call in flight fails with its step. Raises unless the engine goes on, as after most OutOfMemory."""
        jobs = {id(job): job for job, _, _ in (*self._waiting, *self._running.values())}
        running = list(self._running)
        self._waiting.clear()
        self._running.clear()
        self._held_tokens = 0
        traceback.clear_frames(error.__traceback__)  # they hold the model, its cache and what the step had made
        full = out_of_memory(error)
        if full is None or self._step_tokens // 2 < MIN_STEP_TOKENS:
            raise error
        self._out_of_memory += 1
        try:
            self._shrink(running)
        except Exception as second:
            log.warning("vLLM did not start again after it ran out of memory: %s", second)
            raise OutOfMemory(f"{second}, when vLLM was started again after: {full}".replace("\n", " ")) from second
        for job in jobs.values():
            job.answer.set_exception(full)

    def _shrink(self, running: list[str]) -> None:
        """After running out of memory: half as many tokens per step, and a clean cache."""
        self._step_tokens //= 2
        log.warning("vLLM ran out of memory; its steps now take %d tokens", self._step_tokens)
        if self._policy.tensor_parallel == 1 and self._core.has_head:
            self._core.drop_requests(running)
            self._core.set_step_tokens(self._step_tokens)
        else:  # worker processes are gone, or steps that were scheduled ahead are lost
            self._core.shut_down()
            self._max_batch_tokens = self._step_tokens
            self._start()


def prepare_environment() -> None:
    """Set what vLLM reads from the environment, where the user has not. Before vLLM is imported."""
    import torch

    defaults = {
        # The engine core runs in this process, so that nothing is left behind when it dies.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # Runner V2 takes no poolers but vLLM's own (0.26).
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
    if not torch.cuda.is_available():
        defaults |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCHDYNAMO_DISABLE": "1",
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
