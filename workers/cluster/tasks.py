"""Functions as Ray tasks: more of them submitted than there are CPUs, results in order as they come."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

from grape_service.config.schema import WorkersConfig
from grape_service.errors import StageError, UserError
from grape_service.models.imports import collect_rarely
from grape_service.storage.options import wait_for_first_answer
from grape_service.storage.storage import Storage
from workers.cluster.closed import refuse_open_ray
from workers.cluster.ray import CPUS_PER_CORE, check_ray_is_alive, is_private, need_ray, num_slots, wait
from workers.logs import LogFile, current_logs

if TYPE_CHECKING:
    import ray

T = TypeVar("T")

ENGINE_CPUS = 0.001
"""CPUs that an engine asks Ray for: a place on a node that has some, without a stage's task losing one to it."""
TASK_CPUS = 0.95
"""CPUs that a stage's task asks for: engines have room beside as many tasks as there are CPUs."""
TASK_RETRIES = 3
WAITING_TASKS = 32
"""Tasks, at least, that wait for a CPU: an autoscaler sees them, and a CPU that is free has work at once."""
WAITING_RESULTS = 256
"""Results, at most, that wait for an earlier one."""
SLOTS_SECONDS = 2.0
"""How often it is asked how many CPUs a cluster has now."""
TOGETHER_BYTES = 32 * 2**20
MAX_TOGETHER = 64
"""Partitions so small that fewer than TOGETHER_BYTES come together share a task: its start would outweigh them."""
THREADS_TOGETHER = 8
"""Of those, so many at the same time: what each mostly does is wait for storage."""

Arguments = dict[str, Any]


def run_tasks(
    function: Callable[..., T],
    arguments: Iterable[Arguments],
    workers: WorkersConfig,
    shared: Arguments | None = None,
    done: Callable[[int], object] | None = None,
    threads: int = 1,
    together: int = 1,
) -> Iterator[T]:
    """Call `function(**shared, **one)` for each of `arguments` as Ray tasks; results in order, as they come.

    `shared` goes into the object store once, and each worker process reads it once. A task takes `together` calls.
    `done(number)` is called as calls end, in any order. A task that a lost process or node takes with it is run again
    by Ray, up to 3 times, on whatever node is left; an exception of the function itself ends the stage at once.
    Without arguments no Ray is needed.
    """
    queue = _groups(arguments, together)
    first = next(queue, None)
    if first is None:
        return
    queue = chain([first], queue)
    import ray

    need_ray()
    remote: Any = ray.remote(max_retries=TASK_RETRIES)(_calls).options(
        name=function.__name__,
        num_cpus=TASK_CPUS * (CPUS_PER_CORE if is_private() else 1),
    )
    held = [ray.put(shared or {})]
    in_flight: dict[ray.ObjectRef, tuple[int, int]] = {}  # -> place of the task, calls in it
    finished: dict[int, list[T]] = {}
    submitted = told = most = 0
    logs = current_logs()
    name = f"{next(logs.numbers):03d}-{function.__name__}" if logs is not None else ""
    looked = -SLOTS_SECONDS
    try:
        while True:
            if time.monotonic() - looked >= SLOTS_SECONDS:
                slots, looked = num_slots(workers), time.monotonic()
                most = slots + max(slots, WAITING_TASKS)
            while len(in_flight) < most and submitted - told < most + WAITING_RESULTS // together:
                group = next(queue, None)
                if group is None:
                    break
                log = (logs.storage, f"{logs.folder}/{name}-{submitted:05d}.log") if logs is not None else None
                in_flight[remote.remote(function, held, group, threads, log)] = submitted, len(group)
                submitted += 1
            if not in_flight:
                return
            check_ray_is_alive()
            ready = wait(list(in_flight), num_returns=1, timeout=SLOTS_SECONDS)
            for reference in ready:
                place, calls = in_flight.pop(reference)
                finished[place] = _results(reference)
                if done:
                    done(calls)
            while told in finished:
                yield from finished.pop(told)
                told += 1
    finally:
        for reference in in_flight:
            ray.cancel(reference, force=True)


def together(workers: WorkersConfig, number: int) -> int:
    """How many of so many partitions one task takes: several where they are small."""
    small = min(TOGETHER_BYTES // workers.partition_bytes, MAX_TOGETHER)
    return max(1, min(small, number // (4 * num_slots(workers))))


def _groups(arguments: Iterable[Arguments], size: int) -> Iterator[list[Arguments]]:
    waiting = iter(arguments)
    while group := list(islice(waiting, size)):
        yield group


def _calls(
    function: Callable[..., T],
    held: list[ray.ObjectRef],
    group: list[Arguments],
    threads: int,
    log: tuple[Storage, str] | None,
) -> list[T]:
    """The calls of one task, in a worker. Set here and not in a runtime environment, threads cost no new process."""
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    wait_for_first_answer()
    collect_rarely()
    refuse_open_ray()
    if log is None:
        return _results_of(function, held, group)
    file = LogFile(*log)
    with file.printed(), file.errors():
        return _results_of(function, held, group)


def _results_of(function: Callable[..., T], held: list[ray.ObjectRef], group: list[Arguments]) -> list[T]:
    shared = _shared(held[0])
    if len(group) == 1:
        return [function(**shared, **group[0])]
    with ThreadPoolExecutor(THREADS_TOGETHER) as pool:
        running = [pool.submit(function, **shared, **one) for one in group]
        try:
            return [one.result() for one in running]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@lru_cache(maxsize=1)
def _shared(reference: ray.ObjectRef) -> Arguments:
    """What all calls of a stage are given: unpacked once a process, whatever its size."""
    import ray

    found: Arguments = ray.get(reference)
    return found


def _results(reference: ray.ObjectRef) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise original(error) from None
    except ray.exceptions.RayError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StageError(f"a task was lost with its process {TASK_RETRIES + 1} times: {reason}") from error


def original(error: ray.exceptions.RayTaskError) -> Exception:
    """The exception that a task raised, without Ray's wrapping when it is one of ours."""
    cause = error.cause
    if isinstance(cause, UserError | StageError):
        return type(cause)(*cause.args)
    return error
