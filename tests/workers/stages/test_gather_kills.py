"""A whole job that gathers, killed with all its processes at drawn moments: the rows of one that was left alone."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.release.catalog import read_catalog
from grape_service.release.load import load
from grape_service.release.verify import verify
from grape_service.storage.storage import Storage
from tests.jobs import Job, tiny_job
from tests.tiny_models import make_model

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(3000)]

KILLS = 10
PROMPTS, SAMPLES = 12, 3


def job_in(folder: Path, model: str) -> Any:
    """A tiny job with prompts alone, which samples under two policies and weighs what it keeps."""
    rows = [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(PROMPTS)]
    policy = {"model": model, "engine": "transformers", "dtype": "float32"}
    other = {**policy, "samples": SAMPLES, "sampling": {"temperature": 0.7, "max_tokens": 12}}
    return tiny_job(
        folder,
        model,
        rows,
        pool={"path": str(folder / "pool"), "max_reject_share": 1.0, "truncated": "keep"},
        gather={
            "policies": {"self": {**policy, "samples": SAMPLES}, "other": other},
            "sampling": {"max_tokens": 12},
            "verify": {"method": "regex", "pattern": "[0-9]"},
            "release": "sampled",
        },
        weights={"method": "pear"},
        workers={"replicas": 1, "shard_tokens": 40},
    )


def stored(folder: Path) -> list[dict[str, Any]]:
    """Every stored sample of both policies, also one that is there twice."""
    workspace = Storage(str(folder / "datasets" / ".grape"))
    files = [info.path for info in workspace.list("gathered") if not info.path.startswith("gathered/pools/")]
    rows = [row for path in files for row in pq.read_table(workspace.full(path)).to_pylist()]
    return sorted(rows, key=lambda row: (row["sample_key"], row["seed"]))


def released(folder: Path, name: str) -> pa.Table:
    """The rows of the one version of a dataset."""
    output = Storage(str(folder / "datasets"))
    (entry,) = read_catalog(output, name)
    release = load(f"{output.root}/{name}@{entry.version}")
    assert verify(release) == []
    order = [("prompt_id", "ascending"), ("source", "ascending")]
    return release.to_table().sort_by([*order, ("sample", "ascending")] if name == "sampled" else order)


def attempt(job: Job, seconds: float) -> bool:
    """One `grape run`, killed after some seconds if it has not ended by then; whether it was killed."""
    return job.run_or_kill(seconds, "run", str(job.config_path), "--json")


def test_a_gathering_job_that_is_killed_leaves_the_same_rows(tmp_path: Path) -> None:
    model, dice = make_model(tmp_path / "model"), random.Random(0)
    calm = tmp_path / "calm"
    begun = time.monotonic()
    with job_in(calm, model) as job:
        assert not attempt(job, 900)
    seconds = time.monotonic() - begun
    samples, candidates, rows = stored(calm), released(calm, "sampled"), released(calm, "tiny")
    assert len(samples) == candidates.num_rows == 2 * PROMPTS * SAMPLES
    killed = jobs = 0
    while killed < KILLS:
        folder = tmp_path / f"rough-{jobs}"
        with job_in(folder, model) as job:
            while attempt(job, dice.uniform(0.1, 0.9) * seconds if killed < KILLS else 900):
                killed += 1
        jobs += 1
        assert stored(folder) == samples, f"after {killed} kills"
        assert released(folder, "sampled").equals(candidates), f"after {killed} kills"
        assert released(folder, "tiny").equals(rows), f"after {killed} kills"
    print(f"{killed} kills in {jobs} jobs, each of {seconds:.0f} s without one")
