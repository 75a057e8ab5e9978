"""Exactness against transformers, the prefix cache on and steps so small that they cut prompts and responses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from grape_service.methods.base import Window
from grape_service.rows.ragged import TokenBatch, list_array
from grape_service.score.windows import windows_of

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")

import torch

from tests.workers.engines.vllm.reference import (
    assert_exact,
    engine_of,
    load_reference,
    random_ids,
    reference_scores,
    row,
    tiny_model,
)
from workers.engines.vllm.engine import VllmEngine

pytestmark = pytest.mark.vllm

STEP = 48
"""Tokens of a step: more than a cache block (32), fewer than most rows, so that chunks begin and end anywhere."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder: str) -> torch.nn.Module:
    return load_reference(folder)


@pytest.fixture(scope="module")
def engine(folder: str) -> Iterator[VllmEngine]:
    with engine_of(folder, max_batch_tokens=STEP) as engine:
        yield engine


def test_takes_the_scoring_head(engine: VllmEngine) -> None:
    assert engine.description.path == "head"
    assert engine.description.engine == "vllm"


@pytest.mark.parametrize("response", [1, 2, 37])
def test_every_prompt_length(engine: VllmEngine, model: torch.nn.Module, response: int) -> None:
    rows = [row(random_ids(length, length), random_ids(1000 + length, response)) for length in range(1, 71)]
    assert_exact(engine, model, rows)


def test_candidates_with_a_common_beginning_of_every_length(engine: VllmEngine, model: torch.nn.Module) -> None:
    """Their prompts end at, before and after the end of a cache block; so do their common beginnings."""
    rows = []
    for prompt_length in (31, 32, 33, 64, 65):
        prompt = random_ids(5000 + prompt_length, prompt_length)
        beginning = random_ids(7, 16)
        for common in range(16):
            rows.append(row(prompt, beginning[:common] + random_ids(100 * prompt_length + common, 24)))
    hits = engine.stats()["cached_tokens"]
    assert_exact(engine, model, rows)
    # Of 16 candidates 15 find the prompt's whole blocks that end before its last token.
    expected = sum(15 * ((length - 1) // 32 * 32) for length in (31, 32, 33, 64, 65))
    assert engine.stats()["cached_tokens"] - hits == expected
    assert engine.stats()["rescored_rows"] == 0


def test_the_same_row_twice_and_in_later_calls(engine: VllmEngine, model: torch.nn.Module) -> None:
    same = row(random_ids(1, 64), random_ids(2, 64))
    assert_exact(engine, model, [same, same])
    assert_exact(engine, model, [same])


def test_one_row_begins_another(engine: VllmEngine, model: torch.nn.Module) -> None:
    prompt, response = random_ids(3, 32), random_ids(4, 96)
    assert_exact(engine, model, [row(prompt, response), row(prompt, response[:32]), row(prompt, response[:33])])


def test_masks_with_several_spans(engine: VllmEngine, model: torch.nn.Module) -> None:
    rows = []
    for seed in range(12):
        ids = random_ids(seed % 3, 130)  # equal ids under different masks
        rng = np.random.default_rng(100 + seed)
        mask = np.repeat(rng.random(26) < 0.4, 5)
        mask[0] = False
        mask[int(rng.integers(1, 130))] = True
        rows.append((ids, mask.tolist()))
    assert_exact(engine, model, rows)


def test_rows_that_fill_the_models_length(engine: VllmEngine, model: torch.nn.Module) -> None:
    assert_exact(engine, model, [row(random_ids(5, 500), random_ids(6, 12)), row(random_ids(5, 1), random_ids(6, 511))])


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_temperature_divides_the_logits(engine: VllmEngine, model: torch.nn.Module, temperature: float) -> None:
    rows = [row(random_ids(8, 40), random_ids(9 + n, 30)) for n in range(3)]
    assert_exact(engine, model, rows, temperature)


def test_calls_from_several_threads_share_steps(engine: VllmEngine, model: torch.nn.Module) -> None:
    batches = [
        TokenBatch.from_rows([row(random_ids(call, 50), random_ids(50 + n, 20)) for n in range(6)]) for call in range(4)
    ]
    temperatures = [1.0, 0.5, 1.0, 2.0]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(engine.score, batches, temperatures))
    for batch, temperature, scores in zip(batches, temperatures, answers, strict=True):
        np.testing.assert_allclose(scores, reference_scores(model, batch, temperature), rtol=0, atol=1e-4)


def test_a_large_call_in_the_batchs_order(engine: VllmEngine, model: torch.nn.Module) -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(1, 60))
    assert_exact(engine, model, [row(random_ids(n % 5, 1 + n % 5), random_ids(n, int(n))) for n in lengths])


def test_long_prompts_leave_no_step_half_empty(
    engine: VllmEngine, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose prompt is cached add few tokens to a step: enough of them have to wait in vLLM."""
    counts = []
    step = engine._core.step
    monkeypatch.setattr(engine._core, "step", lambda: counts.append(1) or step())
    prompt = random_ids(11, 321)  # ten blocks and a token
    assert_exact(engine, model, [row(prompt, random_ids(20 + n, 7)) for n in range(48)])
    # Once the prompt is cached a row adds 8 tokens, so a step of 48 takes six.
    assert len(counts) <= 321 // STEP + 48 // 6 + 3


def test_no_rows(engine: VllmEngine) -> None:
    empty = TokenBatch(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), np.zeros(0, np.int32))
    assert engine.score(empty).shape == (0,)


@pytest.mark.parametrize("window", [Window(steps=1), Window(steps=3), Window(tokens=5)])
def test_windows_of_responses(engine: VllmEngine, model: torch.nn.Module, window: Window) -> None:
    """Rows that share a prompt, and then hold stretches from the middle of a response, beside the whole response."""
    prompt, random = random_ids(7, 40), np.random.default_rng(7)
    rows, steps = [], []
    for candidate in range(3):
        lengths = random.integers(1, 9, 6)
        rows.append(row(prompt, random_ids(100 + candidate, int(lengths.sum()))))
        steps.append(np.repeat(np.arange(len(lengths)), lengths))
    whole = TokenBatch.from_rows(rows)
    table = pa.table(
        {
            "input_ids": list_array(whole.offsets, whole.input_ids, pa.int32()),
            "loss_mask": list_array(whole.offsets, whole.mask.astype(np.uint8), pa.uint8()),
            "prompt_len": pa.array(whole.prompt_lens, pa.int32()),
        }
    )
    windows = windows_of(table, np.concatenate(steps), window)
    ids, mask, offsets, _ = windows.sequences(slice(0, len(windows)))
    sequences = [(ids[a:b].tolist(), (mask[a:b] > 0).tolist()) for a, b in pairwise(offsets.tolist())]
    assert len(sequences) == 18
    assert_exact(engine, model, [*rows, *sequences])


@pytest.mark.usefixtures("folder")
def test_a_hole_is_scored_again_without_the_cache(
    folder: str, model: torch.nn.Module, engine: VllmEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """With vLLM's own scheduler cache hits cover scored positions: the engine has to notice each one."""
    engine.close()  # one engine a process at a time; this is the module's last test
    prompt = random_ids(1, 32)
    rows = [row(prompt, random_ids(2, 40)), row(prompt, random_ids(2, 40)), row(prompt, random_ids(3, 9))]
    with (
        caplog.at_level(logging.WARNING),
        engine_of(folder, max_batch_tokens=512, scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler") as plain,
    ):
        assert_exact(plain, model, rows)
        assert plain.stats()["rescored_rows"] == 2
    assert "holes" in caplog.text
