"""Every statistic of the transformers engine against float64 loops over a plain forward's logits."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from grape_service.config.policy import PolicyConfig
from grape_service.rows.ragged import TokenBatch
from grape_service.rows.statistics import STATISTICS
from tests.tiny_models import make_model
from workers.engines.base import invalid_rows
from workers.engines.transformers.engine import TransformersEngine

VOCAB = 512


def batch_of(seed: int = 0) -> TokenBatch:
    """Prompts with responses of several lengths, some with a common beginning."""
    random = np.random.default_rng(seed)
    rows = []
    for prompt_len in (1, 9, 32):
        prompt = random.integers(0, VOCAB, prompt_len).tolist()
        for length in (1, 7, 20):
            rows.append((prompt + random.integers(0, VOCAB, length).tolist(), [False] * prompt_len + [True] * length))
    return TokenBatch.from_rows(rows)


def assert_statistics(found: dict[str, np.ndarray], model: Any, batch: TokenBatch, temperature: float = 1.0) -> None:
    """Within 1e-4 of loops in Python's float64; ranks equal where no neighbour's logit is within 1e-4."""
    place = 0
    for begin, end in pairwise(batch.offsets):
        ids = torch.from_numpy(batch.input_ids[begin:end].astype(np.int64))
        with torch.inference_mode():
            logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
        for token in np.flatnonzero(batch.mask[begin:end]):
            row, target = logits[token - 1].tolist(), int(ids[token])
            heated = [value / temperature for value in row]
            log_sum = math.log(math.fsum(math.exp(value) for value in heated))
            entropy = -math.fsum(math.exp(value - log_sum) * (value - log_sum) for value in heated)
            best = sorted(heated, reverse=True)[:20]
            top_sum = math.log(math.fsum(math.exp(value) for value in best))
            top = -math.fsum(math.exp(value - top_sum) * (value - top_sum) for value in best)
            assert found["logprob"][place] == pytest.approx(heated[target] - log_sum, abs=1e-4)
            assert found["entropy"][place] == pytest.approx(entropy, abs=1e-4)
            assert found["top20_entropy"][place] == pytest.approx(top, abs=1e-4)
            low = 1 + sum(value > row[target] + 1e-4 for value in row)
            high = sum(value >= row[target] - 1e-4 for value in row)
            assert low <= found["rank"][place] <= high
            place += 1
    assert place == len(found["rank"])


@pytest.mark.parametrize(("arch", "over"), [("llama", {}), ("gemma2", {"final_logit_softcapping": 3.0}), ("mamba", {})])
def test_statistics_against_float64_loops(arch: str, over: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path, arch=arch, **over)
    engine = TransformersEngine(PolicyConfig(model=folder, dtype="float32"), folder, 64, 16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = batch_of()
    found = engine.score_statistics(batch, ["top20_entropy", "rank", "entropy"])
    assert tuple(found) == STATISTICS
    assert not invalid_rows(found, batch)
    assert all(values.dtype == np.float32 for values in found.values())
    assert_statistics(found, model, batch)
    assert_statistics(engine.score_statistics(batch, STATISTICS, 0.5), model, batch, 0.5)
    np.testing.assert_allclose(found["logprob"], engine.score(batch), rtol=0, atol=1e-5)
    assert list(engine.score_statistics(batch, ["rank"])) == ["logprob", "rank"]


def test_what_may_not_be_stored_is_named() -> None:
    batch = TokenBatch.from_rows([([1, 2, 3], [False, True, True]), ([1, 2], [False, True]), ([4, 5], [False, True])])
    good = {"logprob": np.array([-1, -2, -3, 0], np.float32), "entropy": np.array([0, 1, 2, 3], np.float32)}
    assert invalid_rows(good, batch) == {}
    bad = {
        "logprob": np.array([-1, 0.5, -3, -4], np.float32),
        "entropy": np.array([np.nan, 1, np.nan, 3], np.float32),
        "rank": np.array([1, 2, 3, 0], np.float32),
    }
    assert invalid_rows(bad, batch) == {0: "log-probability above 0", 1: "entropy missing", 2: "rank out of its range"}
