"""The score stage with vLLM in a Ray actor: its worker process is killed, then the actor; nothing lost or doubled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")

import psutil

from grape_service.config.loading import parse_config
from grape_service.progress.reporter import Silent, set_reporter
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import TokenBatch, list_array
from grape_service.score.shards import Shards
from grape_service.score.store import ScoreStore
from grape_service.storage.parquet import write_parquet
from tests.workers.engines.vllm.reference import load_reference, random_ids, reference_scores, row, tiny_model
from workers.cluster.ray import ray_for
from workers.run import Run, new_run
from workers.scoring.engines import engines_of
from workers.scoring.replicas import Replicas
from workers.scoring.rows import COLUMNS
from workers.stages.score import Scoring, score_shards

pytestmark = pytest.mark.vllm

NUM_SHARDS = 16


def keys_of(batch: TokenBatch) -> Any:
    return row_keys(batch.input_ids, batch.mask.astype(np.uint8), batch.offsets)


def make_shards(run: Run) -> Iterator[TokenBatch]:
    """Shards of four candidates of a prompt, as prepare writes them."""
    schema = pa.schema([SHARD.field(name) for name in COLUMNS])
    for number in range(NUM_SHARDS):
        prompt = random_ids(number, 40)
        batch = TokenBatch.from_rows([row(prompt, random_ids(100 * number + n, 20 + n)) for n in range(4)])
        columns = {
            "row_key": keys_of(batch),
            "prompt_id": pa.array([f"prompt-{number}"] * len(batch)),
            "candidate_id": pa.array([str(place) for place in range(len(batch))]),
            "input_ids": list_array(batch.offsets, batch.input_ids, pa.int32()),
            "loss_mask": list_array(batch.offsets, batch.mask.astype(np.uint8), pa.uint8()),
            "prompt_len": pa.array([40] * len(batch), pa.int32()),
        }
        path = f"shards/shard-{number:05d}.parquet"
        write_parquet(run.workspace, path, schema, [pa.table(columns, schema=schema)])
        yield batch


class Killer(Silent):
    """Kills a worker process of the engine's when two shards are scored, and the actor of the next when four are."""

    def __init__(self, replicas: Replicas, store: ScoreStore):
        super().__init__()
        self.replicas, self.store = replicas, store
        self.victims = ["worker", "actor"]
        self.last_pid = 0

    def advance(self, stage: str, amount: int) -> None:
        (replica,) = self.replicas.replicas
        pid = int(replica.description["pid"])
        num_files = len(self.store.partition_files("b"))
        if self.victims and replica.is_ready and pid != self.last_pid and num_files >= 6 - 2 * len(self.victims):
            actor = psutil.Process(pid)
            workers = [one for one in actor.children(recursive=True) if "resource_tracker" not in str(one.cmdline())]
            assert len(workers) >= 2
            (workers[-1] if self.victims.pop(0) == "worker" else actor).kill()
            self.last_pid = pid


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_a_killed_worker_and_a_killed_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPE_ENGINE_CLASS", "tests.workers.engines.vllm.slow_engine:SlowVllmEngine")
    folder = tiny_model(tmp_path / "model", num_key_value_heads=2)
    target = {"model": folder, "dtype": "float32", "tensor_parallel": 2}
    config = parse_config(
        {
            "name": "drill",
            "pool": {"path": "unused"},
            "target": {**target, "engine_args": {"kv_cache_memory_bytes": 64 * 2**20}},
            "output": {"path": str(tmp_path / "out")},
            "workers": {"replicas": 1},
        }
    )
    before = set(psutil.Process().children(recursive=True))
    seen: set[psutil.Process] = set()
    with ray_for(config.workers), new_run(config) as run:
        batches = list(make_shards(run))
        tokens = sum(batch.num_tokens for batch in batches)
        shards = [Shards("shards", "b", len(batches), sum(map(len, batches)), tokens)]
        store = ScoreStore(run.workspace, run.policy_id(config.target))
        with engines_of(run) as engines:
            killer = Killer(engines.of(config.target, NUM_SHARDS), store)
            set_reporter(killer)
            try:
                totals = score_shards(run, engines, Scoring(config.target, "score"), shards)
            finally:
                set_reporter(Silent())
            seen = set(psutil.Process().children(recursive=True)) - before
        assert not killer.victims
        assert totals.failed == 0
        told = [event["event"] for event in run.events.kept]
        assert any("failed, attempt 1 of 3" in text for text in told), told
        assert any("an engine died" in text for text in told), told

    # As if nobody had been killed: every row once, within the tolerance.
    files = [pq.read_table(run.workspace.full(path)) for path in store.partition_files("b")]
    assert sum(table.num_rows for table in files) == 4 * NUM_SHARDS
    found = store.read("b", pa.concat_arrays([keys_of(batch) for batch in batches]))
    assert found.found.all()
    model = load_reference(folder)
    expected = np.concatenate([reference_scores(model, batch) for batch in batches])
    np.testing.assert_allclose(found.take(np.arange(4 * NUM_SHARDS)), expected, rtol=0, atol=1e-4)

    (engine,) = run.engines
    assert (engine["engine"], engine["path"], engine["extra"]["tensor_parallel"]) == ("vllm", "head", 2)
    assert engine["stats"]["tokens_per_second"] > 0
    assert engine["stats"]["gpu_seconds"] == 0
    assert 0 < engine["stats"]["cache_hit_rate"] < 1
    _, alive = psutil.wait_procs(seen, timeout=30)
    assert not alive
