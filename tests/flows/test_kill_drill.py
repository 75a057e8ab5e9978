"""Kill everything at random moments, run again: nothing lost, nothing scored twice, the same release."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import grape_service
from tests import tiny_models
from tests.jobs import Job, pool_rows, tiny_job

pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]

KILLS = 4


def released(reference: str) -> dict[tuple[str, str], dict[str, Any]]:
    rows = grape_service.load(reference).dataset.to_table().to_pylist()
    return {(row["prompt_id"], row["candidate_id"]): row for row in rows}


def stored_keys(job: Job) -> list[tuple[str, bytes]]:
    found = []
    for path in (job.folder / "datasets" / ".grape" / "scores").glob("*/b*/[0-9]*.parquet"):
        keys = pq.read_table(path, columns=["row_key"])["row_key"].to_pylist()
        found += [(path.parts[-3], key) for key in keys]
    return found


def test_killed_at_random_moments_the_release_is_the_same(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    model = tiny_models.make_model(tmp_path / "model")
    rows = pool_rows(40)
    settings: dict[str, Any] = {
        "behavior": {"model": model, "system_prompt": "Answer well.", "dtype": "float32"},
        "weights": {"method": "pear"},
        "workers": {"shard_tokens": 300, "partition_bytes": 4000},
    }
    with tiny_job(tmp_path / "whole", model, rows, **settings) as job:
        undisturbed = released(job.run()["reference"])
        num_scores = len(stored_keys(job))

    killed = 0
    with tiny_job(tmp_path / "killed", model, rows, **settings) as job:
        job.environment = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine", "DRILL_SECONDS": "0.1"}
        for number in range(KILLS):
            before = len(stored_keys(job))
            process = job.start("run", str(job.config_path), "--json")
            # The first kill is at any time, the others after some more scores, where most of the time is spent.
            enough = before + (0 if number == 0 else moments.randrange(1, num_scores // 3))
            deadline = time.monotonic() + 60
            while process.poll() is None and len(stored_keys(job)) < enough and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(moments.uniform(0, 10 if number == 0 else 1))
            processes = job.kill_all()
            process.wait()
            killed += process.returncode == -9
            print(f"kill {number}: {processes} processes, {before} -> {len(stored_keys(job))} of {num_scores} scores")
            assert job.processes() == {}
        after_kills = len(stored_keys(job))
        job.environment = {}
        outcome = job.run()
        keys = stored_keys(job)
        print(f"seed {seed}: {killed} kills, {after_kills} scores survived, {outcome['scored']} were made at the end")
        assert killed >= 2
        assert len(keys) == len(set(keys)) == num_scores
        assert outcome["scored"] == num_scores - after_kills
        assert job.wait_gone(15) == {}
        again = released(outcome["reference"])

    unclear = {
        key for key, row in undisturbed.items() if row["grape_margin"] is not None and row["grape_margin"] <= 1e-4
    }
    assert set(again) - unclear == set(undisturbed) - unclear
    for key in set(undisturbed) & set(again):
        for name in ("target_logprobs", "behavior_logprobs"):
            np.testing.assert_allclose(again[key][name], undisturbed[key][name], atol=1e-4)
        np.testing.assert_allclose(again[key]["loss_weights"], undisturbed[key]["loss_weights"], rtol=1e-3)
