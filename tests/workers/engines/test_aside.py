"""Engines in a process beside a command, which has not imported torch yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import tiny_models

PROGRAM = """
import os, signal, sys
from grape_service.config.policy import PolicyConfig
from grape_service.errors import StageError, UserError
from grape_service.rows.ragged import TokenBatch
from workers.engines.aside import Engines

folder = sys.argv[1]
policy = PolicyConfig(model=folder, engine="transformers", dtype="float32")
batch = TokenBatch.from_rows([([1, 2, 3, 4], [False, True, True, True]), ([1, 2, 9], [False, True, True])])
engines = Engines([policy])
first, other = engines.ask(policy, folder, batch, 0.5), engines.ask(policy, folder, batch, 1.0)
warmer = other()
beside = first()
assert engines._beside is not None
assert (warmer != beside).any()
try:
    engines.ask(policy.model_copy(update={"adapter": "/none"}), folder, batch, 1.0)()
    raise AssertionError
except (UserError, StageError) as error:
    print(error)
os.kill(engines._beside[0].pid, signal.SIGKILL)
try:
    engines.ask(policy, folder, batch, 0.5)()
    raise AssertionError
except StageError as error:
    print(error)
engines.close()
here = Engines([policy])
assert here._beside is None
assert (here.ask(policy, folder, batch, 0.5)() == beside).all()
here.close()
"""


def test_an_engine_beside_scores_as_one_here(tmp_path: Path) -> None:
    folder = tiny_models.make_model(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "/none" in first
    assert second == f"the engine of {folder} ended with status -9: its memory may not suffice"
