"""Ray for the length of a run: a private one, or the cluster that this process is a job of.

Nothing starts before a stage has work for it: `need_ray` is what tasks and engines call first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grape_service.addresses import without_proxy
from grape_service.config.schema import WorkersConfig
from grape_service.errors import StageError
from workers.cluster.closed import refuse_open_code, refuse_open_ray
from workers.cluster.scratch import MARK, Scratch, end_leftovers, scratch_folder

IN_CLUSTER = "GRAPE_IN_CLUSTER"
"""Set in the environment of a job that `grape submit` started: the run joins that job's cluster."""
CPUS_PER_CORE = 2
"""CPUs that a private Ray is told it has for each core: an actor that holds one leaves room for tasks."""
START_SECONDS = 120.0
GRACE_SECONDS = 8.0
"""How long a run may take to see by itself that its Ray has ended."""
RAY_ENDED = "Ray ended in the middle of the run: run again; stored scores are reused"
STORE_BYTES = 256 * 2**20
OTHER_RAYS = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_REDIS_ADDRESS")
"""Variables of other Rays, which a private one is not to follow."""


@dataclass(frozen=True)
class PrivateRay:
    """A Ray on this machine that ends with the block that started it."""

    address: str
    jobs: str | None  # address of its Jobs API


@contextlib.contextmanager
def private_ray(num_cpus: int, with_jobs: bool = False) -> Iterator[PrivateRay]:
    """Start a Ray that listens on loopback alone and takes nobody's tasks but ours. Raises StageError.

    Everything of it lives in one scratch folder and is gone after the block; it never joins a Ray that it finds.
    """
    with starting_ray(num_cpus, with_jobs) as started:
        yield started()


@contextlib.contextmanager
def starting_ray(num_cpus: int, with_jobs: bool = False) -> Iterator[Callable[[], PrivateRay]]:
    """A private Ray that starts beside whatever the block does first; the function waits until it is there."""
    for left in end_leftovers():
        logging.getLogger(__name__).info("ended what a run that was killed had left in %s", left)
    with scratch_folder() as scratch, _environment(scratch), contextlib.ExitStack() as following:
        asked = {
            "folder": scratch.ray_folder,
            "num_cpus": num_cpus,
            "dashboard_port": _free_port() if with_jobs else None,
            "object_store_bytes": STORE_BYTES,
        }
        head = _start_head(scratch, asked)

        def started() -> PrivateRay:
            found = _wait_for(head, scratch)
            following.enter_context(_ours_alone())
            return PrivateRay(**found)

        try:
            yield started
        finally:
            _heads.pop(scratch.path, None)


def _start_head(scratch: Scratch, asked: dict[str, Any]) -> subprocess.Popen[bytes]:
    """The head process, which begins to start Ray."""
    with Path(scratch.path, "head.log").open("wb") as log:
        head = subprocess.Popen(
            [sys.executable, "-m", "workers.cluster.head"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, MARK: scratch.path, "PYTHONPATH": os.pathsep.join(import_path())},
            start_new_session=True,  # Ctrl-C in a terminal is for the run alone, which ends its Ray itself
        )
    assert head.stdin is not None  # it stays open until the end
    with contextlib.suppress(BrokenPipeError):
        head.stdin.write(json.dumps(asked).encode() + b"\n")
        head.stdin.flush()
    return head


def _wait_for(head: subprocess.Popen[bytes], scratch: Scratch) -> dict[str, Any]:
    """Wait until the head says where Ray is, and watch it from then on."""
    assert head.stdout is not None
    ready, _, _ = select.select([head.stdout], [], [], START_SECONDS)
    line = head.stdout.readline() if ready else b""
    if not line:
        lines = Path(scratch.path, "head.log").read_text(errors="replace").strip().splitlines()
        why = lines[-1] if lines else f"it did not answer within {START_SECONDS:.0f} s"
        raise StageError(f"Ray does not start on this machine: {why}")
    found: dict[str, Any] = json.loads(line)
    _heads[scratch.path] = head
    threading.Thread(target=_watch, args=(scratch.path, head), daemon=True, name="ray-watch").start()
    return found


def _watch(scratch_path: str, head: subprocess.Popen[bytes]) -> None:
    """Where the private Ray has ended in the middle of the run, and the run hangs in one of its calls: end the run."""
    head.wait()
    time.sleep(GRACE_SECONDS)
    if _heads.get(scratch_path) is head:
        for end in on_ray_ended:
            end()


on_ray_ended: list[Callable[[], None]] = []
"""What ends this process where its Ray has ended: the command line sets it, a program that calls us may not want it."""


_heads: dict[str, subprocess.Popen[bytes]] = {}


@contextlib.contextmanager
def _environment(scratch: Scratch) -> Iterator[None]:
    """The variables under which this process and its children find their Ray and nobody else's."""
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": scratch.token_path,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",  # we would wait for these for ever where one is killed as it starts
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TMPDIR": scratch.ray_folder,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as on macOS: a loopback address stays one
        **without_proxy(),
    }
    before = {name: os.environ.get(name) for name in (*ours, *OTHER_RAYS)}
    for name in OTHER_RAYS:
        os.environ.pop(name, None)
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _ours_alone() -> Iterator[None]:
    """Inside the block this process follows the Ray of its environment, as the loopback address says."""
    _read_token_again()
    from ray._private import ray_constants

    joins_others, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = joins_others


def _read_token_again() -> None:
    """Ray keeps the authentication mode and the token that it read first: have it read those of its environment."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class _Wanted:
    """A Ray that a run may need, and that is started when it does."""

    def __init__(self, workers: WorkersConfig):
        self.workers = workers
        self.started = contextlib.ExitStack()
        self.coming: Callable[[], PrivateRay] | None = None

    def begin(self) -> None:
        """Let a private Ray start beside what this process does."""
        if is_private() and self.coming is None:
            logical_cpus = CPUS_PER_CORE * num_cores(self.workers)
            self.coming = self.started.enter_context(starting_ray(logical_cpus))

    def start(self) -> None:
        """Join the job's cluster, or start a private Ray and connect to it."""
        self.begin()
        import ray

        handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        debug = bool(os.environ.get("GRAPE_DEBUG"))
        try:
            address = "auto" if self.coming is None else self.coming().address
            self.started.callback(_restore, handlers)
            self.started.callback(ray.shutdown)
            try:
                ray.init(address=address, log_to_driver=debug, logging_level=logging.ERROR)
            except Exception as error:
                if _a_head_ends():
                    raise StageError(RAY_ENDED) from error
                raise
            refuse_open_ray()
        finally:
            _restore(handlers)

    def end(self) -> None:
        """Nothing of a private Ray is left after this."""
        self.started.close()


_wanted: list[_Wanted] = []


@contextlib.contextmanager
def ray_for(workers: WorkersConfig) -> Iterator[None]:
    """Ray starts inside the block as soon as something needs it, and is gone after the block."""
    if not is_private():
        refuse_open_code()
    wanted = _Wanted(workers)
    _wanted.append(wanted)
    try:
        yield
    finally:
        _wanted.remove(wanted)
        wanted.end()


def begin_ray() -> None:
    """Let the private Ray of `ray_for` start beside what comes before a stage needs it."""
    if not ray_is_up():
        _wanted[-1].begin()


def need_ray() -> None:
    """Start the Ray of `ray_for`, unless Ray is up."""
    import ray

    if not ray.is_initialized():
        assert _wanted, "tasks and engines run inside ray_for"
        _wanted[-1].start()


def check_ray_is_alive() -> None:
    """Raises StageError where the private Ray of this process is gone: its head ends when one of its processes does."""
    if any(head.poll() is not None for head in _heads.values()):
        raise StageError(RAY_ENDED)


def _a_head_ends() -> bool:
    """Whether the private Ray of this process is gone, or is about to be: its head looks once a second."""
    deadline = time.monotonic() + GRACE_SECONDS
    while all(head.poll() is None for head in _heads.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return any(head.poll() is not None for head in _heads.values())


def wait(references: list[Any], num_returns: int, timeout: float) -> list[Any]:
    """The references whose results are there, after `timeout` seconds at most; a signal's exception comes as it is.

    Ray's own wait turns what a signal handler raises, such as Prefect's end of a cancelled run, into a SystemError.
    """
    import ray

    try:
        return ray.wait(references, num_returns=num_returns, timeout=timeout)[0]
    except SystemError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def ray_is_up() -> bool:
    """Whether this process is connected to a Ray; imports none."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def num_cores(workers: WorkersConfig) -> int:
    """Tasks that a private Ray runs at the same time."""
    return workers.cpus or usable_cores()


def usable_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_private() -> bool:
    """Whether this process's Ray is its own."""
    return not os.environ.get(IN_CLUSTER)


def num_slots(workers: WorkersConfig) -> int:
    """Tasks in flight at the same time: the private Ray's cores, or all of the cluster's CPUs."""
    if os.environ.get(IN_CLUSTER):
        import ray

        need_ray()
        return max(1, int(ray.cluster_resources().get("CPU", 1)))
    return num_cores(workers)


def node_gpus() -> list[int]:
    """GPUs of each node that has some: of those that are there and of those that the autoscaler may start."""
    import ray

    need_ray()
    there = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    config = ray._private.state.state.get_cluster_config()  # type: ignore[attr-defined]
    promised = []
    for group in config.node_group_configs if config is not None else ():
        promised += [int(group.resources.get("GPU", 0))] * max(1, group.max_count)  # -1: without a limit
    found = max(there, promised, key=sum)
    return [gpus for gpus in found if gpus]


def num_nodes() -> int:
    """Nodes that tasks can run on now."""
    import ray

    need_ray()
    return max(1, sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()))


def import_path() -> list[str]:
    """Where other processes find this code: the folder of the packages first."""
    here = str(Path(__file__).resolve().parents[2])
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return [here, *(entry for entry in given if entry != here)]


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        with contextlib.suppress(ValueError, TypeError):  # not in the main thread, or not set from Python
            signal.signal(number, handler)
