"""What scores are held against: transformers in float32, one sequence at a time, log-softmax in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grape_service.config.policy import PolicyConfig
from grape_service.rows.ragged import TokenBatch
from tests import tiny_models
from workers.engines.vllm.engine import VllmEngine

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""vLLM's CPU attention needs heads of 32 or a multiple of it."""

Row = tuple[list[int], list[bool]]


def tiny_model(folder: Any, arch: str = "llama", **over: Any) -> str:
    """A random model with heads that vLLM's CPU attention has."""
    sizes = dict(SIZES)
    if arch == "gpt2":
        del sizes["num_key_value_heads"], sizes["head_dim"]
    return tiny_models.make_model(folder, arch=arch, **{**sizes, **over})


@contextmanager
def engine_of(
    folder: str, max_batch_tokens: int = 256, adapter: str | None = None, tensor_parallel: int = 1, **engine_args: Any
) -> Iterator[VllmEngine]:
    """A float32 engine, closed at the end of the block."""
    policy = PolicyConfig(
        model=folder,
        dtype="float32",
        adapter=adapter,
        tensor_parallel=tensor_parallel,
        engine_args={"kv_cache_memory_bytes": 64 * 2**20, **engine_args},
    )
    engine = VllmEngine(policy, folder, max_batch_tokens=max_batch_tokens)
    try:
        yield engine
    finally:
        engine.close()


def load_reference(folder: str, adapter: str | None = None) -> torch.nn.Module:
    """The same model in transformers; eager attention, because SDPA leaves out Gemma 2's soft cap."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


@torch.no_grad()
def reference_scores(model: torch.nn.Module, batch: TokenBatch, temperature: float = 1.0) -> npt.NDArray[np.float32]:
    """log p of each token with loss, flat, in the batch's order."""
    scores = []
    for row in range(len(batch)):
        place = slice(batch.offsets[row], batch.offsets[row + 1])
        ids = torch.from_numpy(batch.input_ids[place].astype(np.int64))
        targets = torch.from_numpy(np.flatnonzero(batch.mask[place]))
        logprobs = torch.log_softmax(model(ids[None]).logits[0, targets - 1].double() / temperature, dim=-1)
        scores.append(logprobs.gather(1, ids[targets][:, None]).squeeze(1))
    return torch.cat(scores).float().numpy()


def assert_exact(engine: VllmEngine, model: torch.nn.Module, rows: list[Row], temperature: float = 1.0) -> None:
    """Every token with loss within 1e-4 of transformers."""
    batch = TokenBatch.from_rows(rows)
    scores = engine.score(batch, temperature)
    expected = reference_scores(model, batch, temperature)
    assert scores.dtype == np.float32
    assert scores.shape == expected.shape
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


def random_ids(seed: int, count: int, vocab: int = 500) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def row(prompt: list[int], response: list[int]) -> Row:
    """A sequence of which the response has loss."""
    return prompt + response, [False] * len(prompt) + [True] * len(response)
