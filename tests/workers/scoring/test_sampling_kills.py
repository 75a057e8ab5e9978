"""A replica that samples is killed 30 times, at every kind of step: the same rows, none twice and none lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from grape_service.storage.storage import Storage
from tests import tiny_models
from tests.sampling_kills import PROMPTS, SAMPLES

pytestmark = pytest.mark.timeout(600)

KILLS = 30


def sampled(model: str, folder: Path, kills: int) -> tuple[int, list[dict[str, Any]]]:
    """How many attempts were killed, and every stored sample."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.sampling_kills", model, str(folder), str(kills)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    files = [info.path for info in Storage(str(folder)).list("gathered")]  # what a writer left behind is none
    return int(done.stdout.split()[-1]), [row for file in files for row in pq.read_table(folder / file).to_pylist()]


def test_thirty_kills_leave_the_same_rows(tmp_path: Path) -> None:
    model = tiny_models.make_model(tmp_path / "model")
    none, calm = sampled(model, tmp_path / "calm", 0)
    killed, rough = sampled(model, tmp_path / "rough", KILLS)
    assert (none, killed) == (0, KILLS)
    assert len(calm) == len(rough) == PROMPTS * SAMPLES
    ordered = [sorted(rows, key=lambda row: row["sample_key"]) for rows in (calm, rough)]
    assert ordered[0] == ordered[1]
    assert len({row["sample_key"] for row in rough}) == PROMPTS * SAMPLES
