"""Models of Qwen2.5's shapes and batches of random tokens for the benchmarks on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from grape_service.rows.ragged import TokenBatch

SHAPES: dict[str, dict[str, Any]] = {
    # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
    "tiny": dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers"), (64, 128, 2), strict=True))
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
CANDIDATES = 8
WORKLOADS = {"200/400": (200, 400), "200/50": (200, 50), "1500/300": (1500, 300), "500/8000": (500, 8000)}
"""Median tokens of prompt and response."""
WORKLOAD_TOKENS = {"tiny": 6_000, "0.5b": 1_200_000, "1.5b": 600_000, "7b": 290_000}
"""About how many tokens a measurement takes, prompts counted for each candidate."""


def make_model(size: str, folder: Path) -> str:
    """config.json of Qwen2 shapes; the weights are made up by vLLM (load_format dummy)."""
    from transformers import Qwen2Config

    config = Qwen2Config(**SHAPES[size], max_position_embeddings=32768, architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(folder)
    return str(folder)


def make_batch(size: str, workload: str) -> TokenBatch:
    """Random tokens; lengths log-normal about the medians; a prompt's candidates next to each other."""
    generator = np.random.default_rng(0)
    prompt_median, response_median = WORKLOADS[workload]
    if size == "tiny":
        prompt_median, response_median = prompt_median // 4, max(4, response_median // 20)
    prompts = max(2, round(WORKLOAD_TOKENS[size] / (CANDIDATES * (prompt_median + response_median))))
    vocab = SHAPES[size]["vocab_size"]
    rows = []
    for _ in range(prompts):
        prompt = generator.integers(0, vocab, _length(generator, prompt_median)).tolist()
        for _ in range(CANDIDATES):
            response = generator.integers(0, vocab, _length(generator, response_median)).tolist()
            rows.append((prompt + response, [False] * len(prompt) + [True] * len(response)))
    return TokenBatch.from_rows(rows)


def _length(generator: np.random.Generator, median: int) -> int:
    return int(np.clip(median * np.exp(generator.normal(0, 0.4)), 2, 4 * median))


def last_token_only(batch: TokenBatch) -> TokenBatch:
    """The same sequences with just their last token to score: prefill and next to no head."""
    mask = np.zeros_like(batch.mask)
    mask[batch.offsets[1:] - 1] = True
    return TokenBatch(batch.input_ids, mask, batch.offsets, (batch.lengths - 1).astype(np.int32))


def useful_flops(size: str, batch: TokenBatch) -> float:
    """2 FLOP a weight, once for each distinct token (a prompt's once for all its candidates), and the output head
    for response tokens only. Attention's own products are not counted."""
    shape = SHAPES[size]
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    key_value = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    trunk = layers * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner)
    prompts = batch.prompt_lens[::CANDIDATES].sum()
    distinct = int(prompts) + int(batch.mask.sum())
    return 2.0 * trunk * distinct + 2.0 * hidden * shape["vocab_size"] * int(batch.mask.sum())
