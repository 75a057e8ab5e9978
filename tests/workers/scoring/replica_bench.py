"""Replicas of engines that misbehave as a drill says, and shards of their own for them to score."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from grape_service.config.loading import parse_config
from grape_service.config.schema import Config
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import row_keys
from grape_service.score.shards import Shards
from grape_service.score.store import ScoreStore
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from workers.run import Run

_names = itertools.count()


@dataclass
class Bench:
    """A running Ray whose engines do what `drill` says."""

    folder: Path
    model: str

    def drill(self, **what: Any) -> None:
        (self.folder / "drill.json").write_bytes(orjson.dumps({"name": next(_names), **what}))

    def config(self, replicas: int) -> Config:
        return parse_config(
            {
                "name": "drill",
                "pool": {"path": "unused"},
                "target": {"model": self.model, "dtype": "float32"},
                "output": {"path": str(self.folder / f"out-{next(_names)}")},
                "workers": {"replicas": replicas},
            }
        )


def make_shards(storage: Storage, num_shards: int, rows: int = 4, tokens: int = 20) -> list[Shards]:
    """Shards of random token ids below 400; id 450 marks a row by hand."""
    random = np.random.default_rng(7)
    names = ("row_key", "prompt_id", "candidate_id", "source", "input_ids", "loss_mask", "prompt_len")
    schema = pa.schema([SHARD.field(name) for name in names])
    for number in range(num_shards):
        ids = random.integers(0, 400, size=rows * tokens).astype(np.int32)
        if number == 3:
            ids[tokens + 1] = 450  # the second row of the fourth shard
        mask = np.tile(np.arange(tokens) >= tokens // 2, rows).astype(np.uint8)
        offsets = np.arange(0, rows * tokens + 1, tokens)
        lists = pa.array(offsets.astype(np.int32))
        batch = pa.RecordBatch.from_arrays(
            [
                row_keys(ids, mask, offsets),
                pa.array([f"prompt-{number}"] * rows),
                pa.array([f"c{row}" for row in range(rows)]),
                pa.nulls(rows, pa.string()),
                pa.ListArray.from_arrays(lists, pa.array(ids)),
                pa.ListArray.from_arrays(lists, pa.array(mask)),
                pa.array([tokens // 2] * rows, pa.int32()),
            ],
            schema=schema,
        )
        path = f"shards/shard-{number:05d}.parquet"
        write_parquet(storage, path, schema, [batch])
    return [Shards("shards", "b", num_shards, rows * num_shards, rows * tokens * num_shards)]


def stored_keys(run: Run) -> list[bytes]:
    store = ScoreStore(run.workspace, run.policy_id(run.config.target))
    keys: list[bytes] = []
    for path in store.partition_files("b"):
        keys += pq.read_table(run.workspace.full(path), columns=["row_key"])["row_key"].to_pylist()
    return keys


def assert_each_once(run: Run, num_rows: int) -> None:
    keys = stored_keys(run)
    assert len(keys) == len(set(keys)) == num_rows
