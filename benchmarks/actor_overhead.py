"""How much of the bare engine's speed the score stage keeps: reading, writing and checking overlap with the engine.

    python benchmarks/actor_overhead.py [--seconds 60] [--engine transformers|vllm]

Scores the same shards twice in one run on SmolLM2-135M: in this process with nothing but the engine, then through the
score stage (an actor on a private Ray, scores stored). Engine start is not counted. The aim is 85%.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grape_service.config.loading import parse_config
from grape_service.config.schema import Config
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import offsets_from_lengths
from grape_service.score.shards import Shards
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from workers.cluster.ray import ray_for
from workers.engines.choose import load_engine
from workers.run import new_run
from workers.scoring.actor import prompt_slices, read_rows, token_batch
from workers.scoring.engines import engines_of
from workers.stages.score import score_shards

CANDIDATES, PROMPT_TOKENS, RESPONSE_TOKENS = 8, 60, 60
COLUMNS = ("row_key", "prompt_id", "candidate_id", "source", "input_ids", "loss_mask", "prompt_len")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="about how long each way works")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    arguments = parser.parse_args()
    # As the actor has it, and before torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tests.smollm2 import smollm2_folder

    config = parse_config(
        {
            "name": "overhead",
            "pool": {"path": "unused"},
            "target": {"model": str(smollm2_folder()), "dtype": "float32", "engine": arguments.engine},
            "output": {"path": tempfile.mkdtemp(prefix="grape-overhead-")},
            "workers": {"replicas": 1},
        }
    )
    storage = Storage(config.workspace_path)
    trial = make_shards(storage, 1, "trial")
    bare_tokens, bare_seconds = bare(config, storage, trial)
    tokens_per_shard = trial.tokens
    count = max(4, round(arguments.seconds * bare_tokens / bare_seconds / tokens_per_shard))
    shards = make_shards(storage, count, "work")
    bare_tokens, bare_seconds = bare(config, storage, shards)
    stage_tokens, stage_seconds = staged(config, shards)
    show(count, bare_tokens, bare_seconds, stage_tokens, stage_seconds)


def make_shards(storage: Storage, count: int, folder: str) -> Shards:
    """Shards of random token ids, 8 candidates per prompt; about 2,000 tokens each."""
    random = np.random.default_rng(len(folder))
    schema = pa.schema([SHARD.field(name) for name in COLUMNS])
    num_rows = num_tokens = 0
    for number in range(count):
        rows: list[np.ndarray] = []
        for _ in range(2):
            prompt = random.integers(100, 40_000, PROMPT_TOKENS)
            rows += [
                np.concatenate(
                    [prompt, random.integers(100, 40_000, int(random.integers(20, 2 * RESPONSE_TOKENS - 20)))]
                )
                for _ in range(CANDIDATES)
            ]
        offsets = offsets_from_lengths([len(row) for row in rows])
        ids = np.concatenate(rows).astype(np.int32)
        mask = np.concatenate([np.arange(len(row)) >= PROMPT_TOKENS for row in rows]).astype(np.uint8)
        lists = pa.array(offsets.astype(np.int32))
        columns = [
            row_keys(ids, mask, offsets),
            pa.array([f"{number}-{row // CANDIDATES}" for row in range(len(rows))]),
            pa.array([str(row) for row in range(len(rows))]),
            pa.nulls(len(rows), pa.string()),
            pa.ListArray.from_arrays(lists, pa.array(ids)),
            pa.ListArray.from_arrays(lists, pa.array(mask)),
            pa.array([PROMPT_TOKENS] * len(rows), pa.int32()),
        ]
        path = f"shards/{folder}/shard-{number:05d}.parquet"
        write_parquet(storage, path, schema, [pa.RecordBatch.from_arrays(columns, schema=schema)])
        num_rows, num_tokens = num_rows + len(rows), num_tokens + len(ids)
    return Shards(f"shards/{folder}", "b", count, num_rows, num_tokens)


def bare(config: Config, storage: Storage, shards: Shards) -> tuple[int, float]:
    """Tokens and seconds of the engine alone, on batches that are in memory already."""
    engine = load_engine(config.target, config.target.model)
    batches = [token_batch(read_rows(storage, path)) for path in shards.paths]
    engine.score(batches[0])
    started = time.monotonic()
    for batch in batches:
        for start, stop in prompt_slices(batch, 4 * engine.max_batch_tokens):
            engine.score(batch.take(np.arange(start, stop)))
    seconds = time.monotonic() - started
    engine.close()
    return shards.tokens, seconds


def staged(config: Config, shards: Shards) -> tuple[int, float]:
    """Tokens and seconds of the score stage, its engine started before."""
    with ray_for(config.workers), new_run(config) as run, engines_of(run) as engines:
        engines.of(config.target, shards.number)
        started = time.monotonic()
        totals = score_shards(run, engines, config.target, [shards], "score")
        assert totals.rows == shards.rows
        return shards.tokens, time.monotonic() - started


def show(shards: int, bare_tokens: int, bare_seconds: float, stage_tokens: int, stage_seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{shards} shards, {len(os.sched_getaffinity(0))} cores")
    for column in ("way", "tokens", "seconds", "tokens/s", "share"):
        table.add_column(column, justify="right")
    rate = bare_tokens / bare_seconds
    table.add_row("bare engine", f"{bare_tokens:,}", f"{bare_seconds:.1f}", f"{rate:,.0f}", "1.00")
    own = stage_tokens / stage_seconds
    table.add_row("score stage", f"{stage_tokens:,}", f"{stage_seconds:.1f}", f"{own:,.0f}", f"{own / rate:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
