"""Functions as Ray tasks, a few in flight at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray

from grape_service.config.schema import WorkersConfig
from grape_service.errors import StageError, UserError
from workers.cluster.ray import import_path, num_slots

T = TypeVar("T")

ENGINE_CPUS = 0.001
"""CPUs that an engine asks Ray for: a place on a node that has some, without a stage's task losing one to it."""
TASK_CPUS = 0.95
"""CPUs that a stage's task asks for: engines have room beside as many tasks as there are CPUs."""
TASK_RETRIES = 3


def run_tasks(
    function: Callable[..., T],
    arguments: Sequence[tuple[Any, ...]],
    workers: WorkersConfig,
    done: Callable[[int, T], None] | None = None,
    threads: int = 1,
) -> list[T]:
    """Run `function(*arguments[i])` as Ray tasks, a few in flight at a time; results in order.

    `done(i, result)` is called in the driver as each ends. A task that a lost process or node takes with it is
    run again by Ray, up to 3 times, on whatever node is left; an exception of the function itself ends the stage
    at once.
    """
    remote = ray.remote(num_cpus=TASK_CPUS, max_retries=TASK_RETRIES)(function).options(
        runtime_env={
            "env_vars": {
                "PYTHONPATH": os.pathsep.join(import_path()),
                "OMP_NUM_THREADS": str(threads),
                "RAYON_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": "true",
            }
        }
    )
    results: dict[int, T] = {}
    in_flight: dict[ray.ObjectRef, int] = {}
    queue = iter(range(len(arguments)))
    slots = num_slots(workers)
    try:
        while True:
            while len(in_flight) < slots and (index := next(queue, None)) is not None:
                in_flight[remote.remote(*arguments[index])] = index
            if not in_flight:
                return [results[index] for index in range(len(arguments))]
            ready, _ = ray.wait(list(in_flight), num_returns=1)
            index = in_flight.pop(ready[0])
            try:
                results[index] = ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                raise original(error) from None
            except ray.exceptions.RayError as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise StageError(f"a task was lost with its process {TASK_RETRIES + 1} times: {reason}") from error
            if done:
                done(index, results[index])
    finally:
        for reference in in_flight:
            ray.cancel(reference, force=True)


def original(error: ray.exceptions.RayTaskError) -> Exception:
    """The exception that a task raised, without Ray's wrapping when it is one of ours."""
    cause = error.cause
    if isinstance(cause, UserError | StageError):
        return type(cause)(*cause.args)
    return error
