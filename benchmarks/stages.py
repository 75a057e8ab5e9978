"""Rows/s and peak memory of select, weigh and the release's rows over made-up partitions, without a model.

python benchmarks/stages.py --rows 100000 --tokens 150
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from grape_service.config.schema import Config
from grape_service.release.rows import final_batches
from grape_service.rows.columns import LOSS_TURN_END, SHARD, release_schema
from grape_service.rows.ragged import list_array, offsets_from_lengths
from grape_service.score.store import ScoreStore
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from grape_service.weigh.lookup import Stores
from grape_service.weigh.partition import WeighContext, WeighPartition, weigh_partition

CANDIDATES_A_PROMPT = 8
SHARD_ROWS = 440


def make_partition(storage: Storage, store: ScoreStore, num_rows: int, mean_tokens: int) -> list[str]:
    """Shards and target scores; half of each row is the response. Recorded log-probabilities stand beside them."""
    generator = np.random.default_rng(0)
    shards = []
    for first in range(0, num_rows, SHARD_ROWS):
        rows = range(first, min(first + SHARD_ROWS, num_rows))
        lengths = generator.integers(mean_tokens // 2, mean_tokens * 3 // 2, len(rows))
        loss_lengths = np.maximum(2, lengths // 2)
        offsets, loss_offsets = offsets_from_lengths(lengths), offsets_from_lengths(loss_lengths)
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        mask = (place >= np.repeat(lengths - loss_lengths, lengths)).astype(np.uint8)
        mask[offsets[1:] - 1] = LOSS_TURN_END
        ids = generator.integers(0, 50_000, offsets[-1]).astype(np.int32)
        logprobs = -generator.exponential(1.0, loss_offsets[-1]).astype(np.float32)
        recorded = (logprobs + generator.normal(0, 0.1, len(logprobs))).astype(np.float32)
        keys = pa.array([hashlib.sha256(str(row).encode()).digest()[:16] for row in rows], type=pa.binary(16))
        text = "some words of an answer " * (mean_tokens // 12)
        messages = f'[{{"role":"user","content":"{text}"}},{{"role":"assistant","content":"{text}"}}]'
        columns = {
            "row_key": keys,
            "prompt_id": pa.array([f"prompt-{row // CANDIDATES_A_PROMPT:012}" for row in rows]),
            "candidate_id": pa.array([f"candidate-{row:012}" for row in rows]),
            "source": pa.array([f"source-{row % 5}" for row in rows]),
            "input_ids": list_array(offsets, ids, pa.int32()),
            "loss_mask": list_array(offsets, mask, pa.uint8()),
            "prompt_len": pa.array((lengths - loss_lengths).astype(np.int32)),
            "truncated": pa.array(np.zeros(len(rows), dtype=bool)),
            "messages": pa.array([messages] * len(rows)),
            "num_prompt_messages": pa.array(np.ones(len(rows), dtype=np.int32)),
            "tools": pa.nulls(len(rows), pa.string()),
            "recorded_logprobs": list_array(loss_offsets, recorded, pa.float32()),
            "sampling": pa.array(['{"temperature":1.0}'] * len(rows)),
        }
        path = f"shards/b/shard-{len(shards):05}.parquet"
        write_parquet(storage, path, SHARD, [pa.table(columns).cast(SHARD)])
        store.write("b", keys, loss_offsets, logprobs, {}, path)
        shards.append(path)
    return shards


def main() -> None:
    """Prints a line for each stage; keeps all rows, which is the most that weigh and release can have to do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=150)
    arguments = parser.parse_args()
    settings = {
        "name": "benchmark",
        "pool": {"path": "pool"},
        "target": {"model": "model"},
        "behavior": {"column": "behavior_logprobs"},
        "weights": {"method": "pear"},
        "output": {"path": "out"},
    }

    def config(**select: object) -> Config:
        return Config.model_validate({**settings, "select": select})

    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        store = ScoreStore(storage, "target")
        shards = make_partition(storage, store, arguments.rows, arguments.tokens)
        schema = release_schema([], [])

        def timed(name: str, work: Callable[[], object]) -> None:
            start, cpu_start = time.perf_counter(), time.process_time()
            work()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            rate = arguments.rows / seconds
            print(
                f"{name:28} {seconds:6.2f} s  {rate:9,.0f} rows/s  {arguments.rows / cpu_seconds:9,.0f} a CPU second"
                f"  peak so far {peak:.2f} GiB",
                flush=True,
            )

        def select(out: str, **choice: object) -> Callable[[], object]:
            context = SelectContext(storage, config(**choice), store, frozenset())
            return lambda: select_partition(context, SelectPartition("b", shards, out))

        timed("select, grape", select("best.parquet"))
        timed("select, max_source_share", select("share.parquet", max_source_share=0.21))
        timed("select, random", select("random.parquet", method="random"))
        timed("select, all rows kept", select("kept.parquet", keep=CANDIDATES_A_PROMPT))
        context = WeighContext(storage, config(), Stores(store))
        partition = WeighPartition("b", "kept.parquet", [], "weighed.parquet")
        timed("weigh", lambda: weigh_partition(context, partition))
        rows = final_batches(storage, "weighed.parquet", [], [])
        timed("rows of a release", lambda: write_parquet(storage, "part-00000.parquet", schema, rows))


if __name__ == "__main__":
    main()
