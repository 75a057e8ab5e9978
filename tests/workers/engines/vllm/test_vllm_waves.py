"""Waves of a race: a row's later tokens, scored alone, are those of the whole row, and its earlier ones come from the
prefix cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from grape_service.rows.ragged import TokenBatch

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")

import torch

from grape_service.rows.statistics import LOGPROB
from grape_service.select.race import Known, extend
from tests.workers.engines.vllm.reference import (
    engine_of,
    load_reference,
    random_ids,
    reference_scores,
    row,
    tiny_model,
)
from workers.scoring.race import Waves

pytestmark = pytest.mark.vllm


def test_waves_give_the_scores_of_whole_rows_and_read_no_block_twice(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    prompt = random_ids(1, 64)
    rows = [row(prompt, random_ids(10 + number, 150 + number)) for number in range(4)]
    batch = TokenBatch.from_rows(rows)
    with engine_of(folder, max_batch_tokens=256) as engine:
        assert engine.divides(batch.lengths).all()
        known = Known.of(batch.loss_offsets, [LOGPROB])
        waves = Waves(batch, lambda wave: {LOGPROB: engine.score(wave)}, lambda tokens: None)
        cached = []
        for end in (20, 70, 1000):
            target = np.minimum(known.total, end)
            before = engine.stats()["cached_tokens"]
            extend(known, np.arange(4), target, waves.more(np.arange(4), known.known, target))
            cached.append(engine.stats()["cached_tokens"] - before)
        assert engine.stats()["rescored_rows"] == 0
    assert known.whole.all()
    assert waves.tokens == batch.num_tokens, "each token is counted once"
    # The first scored position is that of the token before: 64 + 20 - 1 = 83 gives 2 whole blocks of 32, 133 gives 4.
    assert cached[1:] == [4 * 64, 4 * 128]
    with torch.inference_mode():
        expected = reference_scores(load_reference(folder), batch)
    assert np.abs(known.statistics[LOGPROB] - expected).max() < 1e-4
