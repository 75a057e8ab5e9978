"""The scoring head is made from any causal language model that vLLM has: several families, one test for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.workers.engines.vllm.reference import (
    SIZES,
    assert_exact,
    engine_of,
    load_reference,
    random_ids,
    row,
    tiny_model,
)

pytestmark = pytest.mark.vllm


def make(arch: str, folder: Path) -> str:
    """A tiny model of one of tests/tiny_models.py's architectures, or of two more: OPT, mixture-of-experts."""
    more: dict[str, dict[str, Any]] = {
        "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.2, "dropout": 0.0},
        "qwen3_moe": {
            **SIZES,
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "initializer_range": 0.2,
        },
    }
    if arch not in more:
        return tiny_model(folder, arch)
    config = AutoConfig.for_model(
        arch,
        **{
            "vocab_size": 512,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            **more[arch],
        },
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma", "gemma2", "mistral", "gpt2", "opt", "qwen3_moe"])
def test_architecture(tmp_path: Path, arch: str) -> None:
    folder = make(arch, tmp_path)
    rows = [row(random_ids(length, length), random_ids(n, 1 + 9 * n)) for length in (1, 32, 70) for n in range(4)]
    with engine_of(folder, max_batch_tokens=50) as engine:
        assert engine.description.path == "head"
        assert_exact(engine, load_reference(folder), rows)
        assert engine.stats()["cached_tokens"] > 0
