"""Too little memory: a cache that holds a few rows, and a step that does not fit."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grape_service.rows.ragged import TokenBatch

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")

import torch
from vllm.v1.core.sched.scheduler import Scheduler

from tests.workers.engines.vllm.reference import assert_exact, engine_of, load_reference, random_ids, row, tiny_model
from workers.engines.base import OutOfMemory
from workers.engines.vllm import head
from workers.engines.vllm.engine import VllmEngine

pytestmark = pytest.mark.vllm


def test_a_cache_too_small_for_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are admitted that do not fit together, and thrown out again half-way (preemption)."""
    folder = tiny_model(tmp_path)
    preempted = []
    preempt = Scheduler._preempt_request

    def counted(self: Scheduler, request: object, *args: object, **kwargs: object) -> None:
        preempted.append(request)
        preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    rows = [row(random_ids(n % 3, 70), random_ids(n, 300 + n)) for n in range(10)]
    with engine_of(
        folder,
        max_batch_tokens=200,
        kv_cache_memory_bytes=None,
        num_gpu_blocks_override=20,
        scheduler_reserve_full_isl=False,
        long_prefill_token_threshold=60,
    ) as engine:
        assert_exact(engine, load_reference(folder), rows)
        assert engine.stats()["cached_tokens"] > 0
    assert preempted


def test_out_of_memory_halves_the_steps_and_goes_on(tmp_path: Path) -> None:
    """The step fails after blocks were given out and before they were filled: none of them may be used later."""
    folder = tiny_model(tmp_path)
    reference = load_reference(folder)
    rows = [row(random_ids(n % 2, 70), random_ids(n, 40)) for n in range(8)]
    sizes: list[int] = []
    with engine_of(folder, max_batch_tokens=256) as engine:
        runner = model_runner(engine)
        for blocks in runner.kv_caches:
            blocks.fill_(1e3)  # a block that was never filled would show
        forward = runner.model.forward

        def too_large_at_first(*args: Any, **kwargs: Any) -> Any:
            sizes.append(len(kwargs["input_ids"]))
            if sizes[-1] > 130:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return forward(*args, **kwargs)

        runner.model.forward = too_large_at_first
        with pytest.raises(OutOfMemory, match="out of memory"):
            engine.score(TokenBatch.from_rows(rows))
        assert engine.stats()["out_of_memory"] == 1
        assert engine.max_batch_tokens == 128
        assert_exact(engine, reference, rows)
        assert max(sizes[1:]) <= 128
        assert engine.stats()["rescored_rows"] == 0


def test_prompt_logprobs_start_again_after_out_of_memory_and_hold_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a second engine does not fit beside what the frames of the failed step still hold."""
    folder = tiny_model(tmp_path)
    rows = [row(random_ids(n, 30), random_ids(n, 70)) for n in range(6)]
    monkeypatch.setattr(head, "PROMPT_LOGPROBS_TOKENS", 60)  # rows come in two pieces
    start, held = head.start_with_prompt_logprobs, []
    with engine_of(folder, max_batch_tokens=256, scoring_head=False) as engine:
        first = weakref.ref(model_runner(engine).model)

        def start_again(*args: Any) -> head.VllmCore:
            held.append(first())
            return start(*args)

        monkeypatch.setattr(head, "start_with_prompt_logprobs", start_again)
        model_runner(engine).sampler.compute_logprobs = no_memory
        with pytest.raises(OutOfMemory, match="out of memory"):
            engine.score(TokenBatch.from_rows(rows))
        assert engine.max_batch_tokens == 128
        assert_exact(engine, load_reference(folder), rows)
        assert held == [None]


def test_a_second_start_that_fails_is_said_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_start(*_: Any) -> None:
        raise ValueError("Free memory on device is less than desired")

    with engine_of(tiny_model(tmp_path), max_batch_tokens=256, scoring_head=False) as engine:
        model_runner(engine).sampler.compute_logprobs = no_memory
        monkeypatch.setattr(head, "start_with_prompt_logprobs", no_start)
        batch = TokenBatch.from_rows([row(random_ids(1, 30), random_ids(2, 70))])
        with pytest.raises(OutOfMemory, match="out of memory"):
            engine.score(batch)
        assert not engine.is_usable
        with pytest.raises(RuntimeError, match="the vLLM engine stopped: Free memory"):
            engine.score(batch)


def no_memory(logits: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.97 GiB")


def model_runner(engine: VllmEngine) -> Any:
    """vLLM's model runner, deep inside the engine."""
    return engine._core._engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def test_memory_for_scores_does_not_grow_with_the_response(tmp_path: Path) -> None:
    """Logits exist for one chunk of rows at a time, however many tokens have loss."""
    folder = tiny_model(tmp_path)
    model = load_reference(folder)
    largest = []
    with engine_of(folder, max_batch_tokens=512, head_chunk_bytes=4 * 544 * 40) as engine:
        pooler = model_runner(engine).model.pooler
        compute = pooler._compute_logits

        def measured(hidden_states: torch.Tensor) -> torch.Tensor:
            largest.append(len(hidden_states))
            return compute(hidden_states)

        pooler._compute_logits = measured
        assert_exact(engine, model, [row(random_ids(1, 9), random_ids(2, 500))])
        assert sum(largest) == 500
        assert max(largest) <= 42
    assert np.ptp(largest[:-1]) == 0
