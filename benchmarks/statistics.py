"""What statistics cost beside log-probabilities: tokens/s of an engine, in turns in one process.

    python benchmarks/statistics.py MODEL [--engine transformers|vllm] [--rows 24] [--rounds 3]

Rows are random tokens, half of each with loss, four to a prompt. Each round scores them with log-probabilities alone,
with entropy and rank, and with the top-20 entropy too; the best round of each counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

import numpy as np
import orjson

from grape_service.config.policy import PolicyConfig
from grape_service.rows.ragged import TokenBatch

if __name__ == "statistics":  # another script of this folder, or what it imports, wants the standard library's module
    spec = importlib.util.spec_from_file_location("statistics", Path(os.__file__).with_name("statistics.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["statistics"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["statistics"])

SETS: dict[str, tuple[str, ...]] = {
    "logprob": (),
    "entropy, rank": ("entropy", "rank"),
    "entropy, rank, top20_entropy": ("entropy", "rank", "top20_entropy"),
}


def rows_of(vocab: int, num_rows: int, length: int) -> TokenBatch:
    """Rows of random tokens, four to a prompt."""
    random = np.random.default_rng(0)
    half = length // 2
    prompts = [random.integers(0, vocab, half).tolist() for _ in range((num_rows + 3) // 4)]
    rows = [prompts[row // 4] + random.integers(0, vocab, half).tolist() for row in range(num_rows)]
    return TokenBatch.from_rows([(row, [False] * half + [True] * half) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="count the process's CPU seconds: for a busy machine"
    )
    args = parser.parse_args()
    clock = time.process_time if args.cpu_seconds else time.monotonic
    policy = PolicyConfig(model=args.model, dtype="float32", engine=args.engine)
    if args.engine == "vllm":
        from workers.engines.vllm.engine import VllmEngine as Engine
    else:
        from workers.engines.transformers.engine import TransformersEngine as Engine
    engine = Engine(policy, args.model)
    config = orjson.loads((Path(args.model) / "config.json").read_bytes())
    batch = rows_of(int(config["vocab_size"]), args.rows, args.length)
    best = dict.fromkeys(SETS, float("inf"))
    engine.score(batch.take(np.arange(4)))
    for _ in range(args.rounds):
        for name, statistics in SETS.items():
            if args.engine == "vllm":
                engine.forget_cached_prompts()
            began = clock()
            engine.score_statistics(batch, statistics)
            best[name] = min(best[name], clock() - began)
    rates = {name: batch.num_tokens / seconds for name, seconds in best.items()}
    for name, rate in rates.items():
        print(f"{args.engine:12} {name:30} {rate:8.0f} tokens/s, {rate / rates['logprob'] - 1:+.1%}")
    engine.close()


if __name__ == "__main__":
    main()
