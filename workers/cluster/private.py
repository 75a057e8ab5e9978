"""A Ray of our own with a Jobs API, for as long as it is needed.

It is a child process and not `ray.init`, which cannot choose the agent's port: a second Ray on a machine would
find that port taken and never take a job.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grape_service.errors import StageError

STARTUP_SECONDS = 120.0
SHUTDOWN_SECONDS = 20.0
TRIES = 3


@contextlib.contextmanager
def private_ray() -> Iterator[str]:
    """Address of the Jobs API of a Ray on this machine, which ends with the block. Raises StageError."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token":
        _ensure_token()
    scratch = tempfile.mkdtemp(prefix="grape-ray-")
    process: subprocess.Popen[bytes] | None = None
    try:
        for attempt in range(1, TRIES + 1):
            process, url = _start(scratch)
            if _wait_until_ready(process, url):
                break
            _end(process)
            if attempt == TRIES:
                log = (Path(scratch) / "start.log").read_text(errors="replace").strip().splitlines()
                raise StageError("Ray did not start on this machine; it says:\n" + "\n".join(log[-10:]))
        yield url
    finally:
        if process is not None:
            _end(process)
        shutil.rmtree(scratch, ignore_errors=True)


def _start(scratch: str) -> tuple[subprocess.Popen[bytes], str]:
    port, client_port = _free_ports(2)
    # Jobs hold a CPU each while Ray's own supervisors start, so there are more logical CPUs than cores.
    cores = len(os.sched_getaffinity(0))
    options: dict[str, Any] = {
        "port": 0,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": port,
        "dashboard-agent-listen-port": 0,
        "ray-client-server-port": client_port,
        "num-cpus": 2 * cores,
        "object-store-memory": 128 * 2**20,
        "temp-dir": scratch,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    with (Path(scratch) / "start.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--include-dashboard=true", *(f"--{name}={value}" for name, value in options.items())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
            preexec_fn=_end_with_parent,
        )
    return process, f"http://127.0.0.1:{port}"


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the one that started it is gone, killed included."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    os.setpgid(0, 0)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    """Whether Jobs are taken at `url` before the process ends or time is up."""
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + STARTUP_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(ConnectionError, RuntimeError):
            JobSubmissionClient(url).list_jobs()
            return True
        time.sleep(0.3)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End Ray: SIGTERM to the head, which ends its own, then SIGKILL to what is left of its process group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SHUTDOWN_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]


def _ensure_token() -> None:
    """Ray wants a token for its local clusters; write one where it looks for it, unless there is one."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), open(path, "x", opener=_for_owner) as file:
        file.write(secrets.token_hex(32))


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
