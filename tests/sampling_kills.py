"""Samples units of prompts again and again, killed at a given step each time: what tests/workers/scoring runs.

    python -m tests.sampling_kills MODEL WORKSPACE KILLS

The model is loaded once; each attempt is a fork that ends itself with SIGKILL at its n-th step (before or after a call
of the sampler, before or after a file becomes visible), n going round from 1. The last one is left alone. Prints how
many attempts were killed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from grape_service.config.gather import SamplingConfig, VerifyConfig
from grape_service.config.policy import PolicyConfig
from grape_service.gather.missing import Sampling
from grape_service.gather.samples import sampler_id
from grape_service.models.files import policy_id, resolve_model, text_digests
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import list_array, offsets_from_lengths
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from workers.scoring.sampling import SamplingActor, SamplingSpec
from workers.scoring.work import Unit

PROMPTS, SAMPLES = 40, 2
STEPS = 7
COLUMNS = pa.schema([SHARD.field(name) for name in ("row_key", "prompt_id", "candidate_id", "input_ids")])


def units_of(storage: Storage) -> list[Unit]:
    """A unit a prompt; the same whenever they are written."""
    random = np.random.default_rng(0)
    units = []
    for number in range(PROMPTS):
        ids = random.integers(0, 500, size=5 + number % 4).astype(np.int32)
        offsets = offsets_from_lengths([len(ids)])
        name = [f"p{number:02d}"]
        keys = row_keys(ids, np.zeros(len(ids), np.uint8), offsets)
        columns = {"row_key": keys, "prompt_id": name, "candidate_id": name}
        path = f"prompts/b-{number:05d}.parquet"
        table = pa.table({**columns, "input_ids": list_array(offsets, ids, pa.int32())}).cast(COLUMNS)
        write_parquet(storage, path, COLUMNS, [table])
        units.append(Unit(path, "b", 1, SAMPLES, check=True))
    return units


def actor_of(model: str, storage: Storage) -> SamplingActor:
    policy = PolicyConfig.model_validate({"model": model, "engine": "transformers", "dtype": "float32"})
    files = resolve_model(policy, {})
    config = SamplingConfig(max_tokens=6)
    of_policy = policy_id(policy, files)
    sampling = Sampling(sampler_id(of_policy, config, (514,)), config, SAMPLES, (514,), VerifyConfig(), None)
    digests = text_digests(files.folder)
    spec: Any = SamplingSpec(policy, of_policy, storage, "kills", "exact", digests, sampling=sampling)
    actor = SamplingActor(spec)
    actor.start()
    return actor


def killed_at(step: int, function: Callable[..., Any], steps: list[int]) -> Callable[..., Any]:
    """The function, with a step before it and one after it; at the `step`-th the process is gone."""

    def count() -> None:
        steps[0] += 1
        if steps[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(*arguments: Any, **named: Any) -> Any:
        count()
        value = function(*arguments, **named)
        count()
        return value

    return counted


def attempt(actor: SamplingActor, units: list[Unit], step: int) -> None:
    """Sample what is missing; `step` 0 is never reached."""
    steps = [0]
    actor.engine.sample = killed_at(step, actor.engine.sample, steps)
    os.replace, os.link = killed_at(step, os.replace, steps), killed_at(step, os.link, steps)
    for call, unit in enumerate(units):
        actor.score(call, unit, actor.sampling.sampler)


def main(model: str, folder: str, kills: int) -> None:
    torch.set_num_threads(1)  # a fork has no other threads
    storage = Storage(folder)
    units, actor = units_of(storage), actor_of(model, storage)
    killed = 0
    for number in range(kills + 1):
        step = 1 + number % STEPS if number < kills else 0
        child = os.fork()
        if child == 0:
            attempt(actor, units, step)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    print(killed, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
