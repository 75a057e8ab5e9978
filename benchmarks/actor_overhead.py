"""How much of the bare engine's speed the score stage keeps: reading, writing and checking overlap with the engine.

    python benchmarks/actor_overhead.py [--seconds 60] [--rounds 3] [--engine transformers|vllm]

Scores the same shards on SmolLM2-135M in turns: in this process with nothing but the engine, then through the score
stage (an actor on a private Ray, scores stored), and so on, since a machine's speed changes from minute to minute.
Engine starts are not counted. The aim is 98%.
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
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import offsets_from_lengths
from grape_service.score.shards import Shards
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from workers.cluster.ray import ray_for
from workers.engines.base import Engine
from workers.engines.choose import load_engine
from workers.run import new_run
from workers.scoring.engines import engines_of
from workers.scoring.rows import prompt_slices, read_rows, token_batch
from workers.stages.score import Scoring, score_shards

CANDIDATES, PROMPT_TOKENS, RESPONSE_TOKENS = 8, 60, 60
COLUMNS = ("row_key", "prompt_id", "candidate_id", "source", "input_ids", "loss_mask", "prompt_len")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="about how long each way works, in all rounds")
    parser.add_argument("--rounds", type=int, default=3)
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
    engine = load_engine(config.target, config.target.model)
    bare(engine, storage, trial)
    seconds = bare(engine, storage, trial)
    shards = make_shards(storage, max(4, round(arguments.seconds / arguments.rounds / seconds)), "work")
    rounds = []
    with ray_for(config.workers), new_run(config) as run, engines_of(run) as engines:
        score_shards(run, engines, Scoring(config.target, "warm up", store_id="trial"), [trial])
        for number in range(arguments.rounds):
            alone = bare(engine, storage, shards)
            started = time.monotonic()
            totals = score_shards(run, engines, Scoring(config.target, "score", store_id=f"round-{number}"), [shards])
            assert totals.rows == shards.rows
            rounds.append((alone, time.monotonic() - started))
    engine.close()
    show(shards, rounds)


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


def bare(engine: Engine, storage: Storage, shards: Shards) -> float:
    """Seconds of the engine alone, on batches that are in memory already."""
    batches = [token_batch(read_rows(storage, path)) for path in shards.paths]
    started = time.monotonic()
    for batch in batches:
        for start, stop in prompt_slices(batch, 4 * engine.max_batch_tokens):
            engine.score(batch.take(np.arange(start, stop)))
    return time.monotonic() - started


def show(shards: Shards, rounds: list[tuple[float, float]]) -> None:
    """A line for each round and one for all of them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{shards.number} shards of {shards.tokens:,} tokens, {len(os.sched_getaffinity(0))} cores")
    for column in ("round", "bare engine, tokens/s", "score stage, tokens/s", "share"):
        table.add_column(column, justify="right")
    alone, staged = (sum(seconds) for seconds in zip(*rounds, strict=True))
    names = [*map(str, range(1, len(rounds) + 1)), "all"]
    sums = [*((shards.tokens, *seconds) for seconds in rounds), (shards.tokens * len(rounds), alone, staged)]
    for name, (tokens, of_engine, of_stage) in zip(names, sums, strict=True):
        rates = (f"{tokens / of_engine:,.0f}", f"{tokens / of_stage:,.0f}", f"{of_engine / of_stage:.1%}")
        table.add_row(name, *rates)
    Console().print(table)


if __name__ == "__main__":
    main()
