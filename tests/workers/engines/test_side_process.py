"""Models in a process beside a command, which has not imported torch, and in the command's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import tiny_models

PROGRAM = """
import json, os, signal, sys
if sys.argv[2] == "here":
    import transformers  # too late for a process beside
from grape_service.errors import StageError, UserError
from grape_service.models.imports import take_process
from workers.engines.side_process import ModelsInSideProcess

def echo(loaded, policy, text):
    return text

take_process()
models = ModelsInSideProcess()

from grape_service.config.loading import read_config
from grape_service.rows.ragged import TokenBatch

folder = sys.argv[1]
model = {"model": folder, "engine": "transformers", "dtype": "float32"}
config = read_config({
    "name": "x", "pool": {"path": "pool.jsonl"}, "target": model, "output": {"path": "out"},
    "behavior": {"sources": {"a": {"column": "behavior_logprobs", "recorded": "raw", "policy": model}}},
})
policy = config.target
batch = TokenBatch.from_rows([([1, 2, 3, 4], [False, True, True, True]), ([1, 2, 9], [False, True, True])])
models.begin(config)
weights = models.weights(policy, folder)
first, other = models.scores(policy, folder, batch, 0.5), models.scores(policy, folder, batch, 1.0)
warmer, colder = other().tolist(), first().tolist()

def error(ask):
    try:
        ask()()
    except (UserError, StageError) as error:
        return str(error)

long = "x" * 4_000_000  # more than a pipe holds, both ways
echoed = [models._ask(echo, policy, long) for _ in range(3)]
assert [answer() for answer in echoed] == [long] * 3

bad = policy.model_copy(update={"adapter": "/none"})
errors = [error(lambda: models.scores(bad, folder, batch, 1.0)), error(lambda: models.weights(policy, "/none"))]
has_torch = "torch" in sys.modules
if models._beside is not None:
    os.kill(models._beside.process.pid, signal.SIGKILL)
    errors += [error(lambda: models.scores(policy, folder, batch, 0.5)) for _ in range(2)]
models.close()
print(json.dumps({"rows": weights().embedding_rows, "scores": [warmer, colder], "torch": has_torch, "errors": errors}))
"""


def seen(folder: str, where: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, where],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_models_beside_are_as_those_here(tmp_path: Path) -> None:
    folder = tiny_models.make_model(tmp_path / "model")
    beside, here = seen(folder, "beside"), seen(folder, "here")
    assert not beside["torch"]
    assert here["torch"]
    assert beside["rows"] == here["rows"] > 0
    assert beside["scores"] == here["scores"]
    assert beside["scores"][0] != beside["scores"][1]
    bad_adapter, no_folder, killed, after = beside["errors"]
    assert "/none" in bad_adapter
    assert "/none" in no_folder
    assert here["errors"] == [bad_adapter, no_folder]
    assert killed == f"the process that loads {folder} ended with status -9: it may have run out of memory"
    assert after == killed
