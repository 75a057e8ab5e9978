"""Kill everything at random moments, run again: nothing lost, nothing scored twice, the same release."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest

import grape_service
from grape_service.score.store import REPEAT_SUFFIX
from tests import tiny_models
from tests.flows.test_curate import wait_for_scores
from tests.jobs import Job, pool_rows, tiny_job

pytestmark = [pytest.mark.alone, pytest.mark.drill, pytest.mark.timeout(900)]

KILLS = 4


def released(reference: str) -> dict[tuple[str, str], dict[str, Any]]:
    rows = grape_service.load(reference).dataset.to_table().to_pylist()
    return {(row["prompt_id"], row["candidate_id"]): row for row in rows}


def stored_keys(job: Job) -> list[tuple[str, bytes]]:
    """Policy and key of every stored score; those of the control, which scores rows once more, are left out."""
    found = []
    for path in (job.folder / "datasets" / ".grape" / "scores").glob("*/b*/[0-9]*.parquet"):
        if path.parts[-3].endswith(REPEAT_SUFFIX):
            continue
        keys = pq.read_table(path, columns=["row_key"])["row_key"].to_pylist()
        found += [(path.parts[-3], key) for key in keys]
    return found


@dataclass
class Whole:
    """A job that nobody disturbed: how to make it again, what it released, how many scores it stored."""

    model: str
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    released: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    num_scores: int = 0

    @contextmanager
    def again(self, folder: Path, seconds: str = "0.1") -> Iterator[Job]:
        """The same job elsewhere, with an engine that takes `seconds` longer for each call."""
        with tiny_job(folder, self.model, self.rows, **self.settings) as job:
            job.environment = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine", "DRILL_SECONDS": seconds}
            yield job


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    model = tiny_models.make_model(folder / "model")
    settings: dict[str, Any] = {
        "behavior": {"model": model, "system_prompt": "Answer well.", "dtype": "float32"},
        "weights": {"method": "pear"},
        "workers": {"shard_tokens": 300, "partition_bytes": 4000},
    }
    whole = Whole(model, pool_rows(40), settings)
    with tiny_job(folder, model, whole.rows, **settings) as job:
        whole.released = released(job.run()["reference"])
        whole.num_scores = len(stored_keys(job))
    return whole


def assert_same(again: dict[tuple[str, str], dict[str, Any]], whole: Whole) -> None:
    """Rows scored again agree within the tolerance; so do the winners, where no other was as good."""
    undisturbed = whole.released
    unclear = {
        key for key, row in undisturbed.items() if row["grape_margin"] is not None and row["grape_margin"] <= 1e-4
    }
    assert set(again) - unclear == set(undisturbed) - unclear
    for key in set(undisturbed) & set(again):
        for name in ("target_logprobs", "behavior_logprobs"):
            np.testing.assert_allclose(again[key][name], undisturbed[key][name], atol=1e-4)
        np.testing.assert_allclose(again[key]["loss_weights"], undisturbed[key]["loss_weights"], rtol=1e-3)


def actors(job: Job) -> list[int]:
    """Pids of the job's scoring actors."""
    return [pid for pid, command in job.processes().items() if "ScoringActor" in command]


def test_an_actor_killed_in_a_shard_is_replaced(tmp_path: Path, whole: Whole) -> None:
    with whole.again(tmp_path, seconds="0.3") as job:
        process = job.start("run", str(job.config_path), "--json")
        wait_for_scores(job)
        (pid,) = actors(job)
        os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        assert "an engine died" in err
        keys = stored_keys(job)
        assert len(keys) == len(set(keys)) == whole.num_scores
        reference = orjson.loads(out)["reference"]
        events = grape_service.load(reference).manifest.statistics["events"]
        assert any("an engine died" in event["event"] for event in events)
        assert_same(released(reference), whole)
        assert job.wait_gone(15) == {}


def test_no_engine_outlives_its_driver(tmp_path: Path, whole: Whole) -> None:
    with whole.again(tmp_path, seconds="1") as job:
        process = job.start("run", str(job.config_path), "--json")
        wait_for_scores(job, files=1)
        assert actors(job)
        process.kill()  # the driver alone
        process.wait()
        deadline = time.monotonic() + 30
        while actors(job):
            assert time.monotonic() < deadline, "an engine is left 30 seconds after its driver died"
            time.sleep(0.2)


@pytest.mark.long
def test_killed_at_random_moments_the_release_is_the_same(tmp_path: Path, whole: Whole) -> None:
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    num_scores = whole.num_scores
    killed = 0
    with whole.again(tmp_path) as job:
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
        assert_same(released(outcome["reference"]), whole)
