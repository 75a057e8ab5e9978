"""A Ray cluster for the length of a run: a private one, or the one that this process is a job of."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray

from grape_service.config.schema import WorkersConfig

IN_CLUSTER = "GRAPE_IN_CLUSTER"
"""Set in the environment of a job that `grape submit` started: the run joins that job's cluster."""
CPUS_PER_CORE = 2
"""CPUs that a private Ray is told it has for each core: an actor that holds one leaves room for tasks."""
PRIVATE = "GRAPE_PRIVATE_RAY"
"""In the environment of every process of a private Ray: its scratch folder."""


@contextlib.contextmanager
def ray_for(workers: WorkersConfig) -> Iterator[None]:
    """Ray is up inside the block and gone after it.

    A private Ray never joins one that it finds.
    """
    if ray.is_initialized():
        yield
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    scratch = None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if os.environ.get(IN_CLUSTER):
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        else:
            scratch = os.environ[PRIVATE] = tempfile.mkdtemp(prefix="grape-ray-")
            ray.init(
                address="local",
                num_cpus=CPUS_PER_CORE * num_cores(workers),
                include_dashboard=False,
                log_to_driver=bool(os.environ.get("GRAPE_DEBUG")),
                logging_level=logging.ERROR,
                _temp_dir=scratch,
                object_store_memory=256 * 2**20,
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(import_path())}},
            )
        _restore(previous)
        yield
    finally:
        ray.shutdown()
        _restore(previous)
        if scratch:
            os.environ.pop(PRIVATE, None)
            _end_processes(scratch)
            shutil.rmtree(scratch, ignore_errors=True)


def _end_processes(scratch: str) -> None:
    """End what a private Ray leaves behind: agents that were still starting do not see for 40 s that it is gone."""
    for _ in range(3):  # one that ends may just have started another
        found = [one for one in psutil.process_iter() if one.pid != os.getpid() and _is_of(one, scratch)]
        _, left = psutil.wait_procs(found, timeout=2)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _is_of(process: psutil.Process, scratch: str) -> bool:
    """By its environment, over which an agent writes its title, or by the logs that it has open."""
    try:
        environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        marked = f"{PRIVATE}={scratch}".encode() in environment
        return marked or any(file.path.startswith(f"{scratch}/") for file in process.open_files())
    except (psutil.Error, OSError):  # gone, or somebody else's
        return False


def num_cores(workers: WorkersConfig) -> int:
    """Tasks that a private Ray runs at the same time."""
    return workers.cpus or len(os.sched_getaffinity(0))


def is_private() -> bool:
    """Whether this process's Ray is its own."""
    return not os.environ.get(IN_CLUSTER)


def num_slots(workers: WorkersConfig) -> int:
    """Tasks in flight at the same time: the private Ray's cores, or all of the cluster's CPUs."""
    if os.environ.get(IN_CLUSTER):
        return max(1, int(ray.cluster_resources().get("CPU", 1)))
    return num_cores(workers)


def node_gpus() -> list[int]:
    """GPUs of each node that has some: of those that are there and of those that the autoscaler may start."""
    there = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    config = ray._private.state.state.get_cluster_config()  # type: ignore[attr-defined]
    promised = []
    for group in config.node_group_configs if config is not None else ():
        promised += [int(group.resources.get("GPU", 0))] * max(1, group.max_count)  # -1: without a limit
    found = max(there, promised, key=sum)
    return [gpus for gpus in found if gpus]


def num_nodes() -> int:
    """Nodes that tasks can run on now."""
    return max(1, sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()))


def import_path() -> list[str]:
    """Where workers find this code: the folder of the packages first."""
    here = str(Path(__file__).resolve().parent.parent)
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return [here, *(entry for entry in given if entry != here)]


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        with contextlib.suppress(ValueError, TypeError):  # not in the main thread, or not set from Python
            signal.signal(number, handler)
