"""Ray's Jobs API: on a cluster's address, or on a private Ray that lives as long as it is used."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from grape_service.config.schema import jobs_address
from grape_service.errors import StageError, UserError
from workers.cluster.closed import refuse_open_folders
from workers.cluster.ray import IN_CLUSTER, import_path, private_ray, usable_cores

PRIVATE = "private"
"""Address in a record of a Ray that ended with the process that started it."""

AGENT_SECONDS = 60.0
"""How long a head may take, after its start, until its agent takes jobs."""

ANSWER_SECONDS = 10.0
"""How long a head may take to answer the first question."""

NODE_SECONDS = 10.0
"""How long a head may take, after its start, until it tells of its first node."""

_STATES = {"SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "cancelled"}


class LogBroken(Exception):
    """The connection that a log comes through is gone; another may do."""


@dataclass(frozen=True)
class JobRequest:
    """One job, named by its id: submitting it again while it is known starts nothing."""

    id: str
    command: list[str]
    environment: dict[str, str]
    num_cpus: float | None = None
    num_gpus: int | None = None
    memory_bytes: int | None = None
    custom_resources: dict[str, float] = field(default_factory=dict)
    pip: list[str] = field(default_factory=list)
    working_dir: str | None = None


class JobServer:
    """Starts, follows and stops jobs."""

    def __init__(self, client: Any, address: str, num_gpus: int | None):
        self._client = client
        self.address = address
        self.num_gpus = num_gpus  # of a private Ray; None on a cluster
        self._started: set[str] = set()  # jobs that are known to have started

    @property
    def is_private(self) -> bool:
        return self.address == PRIVATE

    @property
    def python(self) -> str:
        """The interpreter of jobs: this one on this machine, the cluster's own elsewhere."""
        return sys.executable if self.is_private else "python"

    def submit(self, request: JobRequest) -> None:
        """Start a job; nothing happens if one of its id is known. Raises StageError if Ray refuses it, UserError if
        other users of this machine can write to the folders that Ray runs it from, or it does not take the job's
        working folder."""
        if self.state(request.id) is not None:
            return
        self.refuse_open_folders()
        environment = dict(request.environment)
        if self.is_private:
            environment.setdefault("PYTHONPATH", os.pathsep.join(import_path()))
        runtime: dict[str, Any] = {"env_vars": environment}
        if request.pip:
            runtime["pip"] = request.pip
        if request.working_dir:
            runtime["working_dir"] = request.working_dir
        deadline = time.monotonic() + AGENT_SECONDS
        while True:
            try:
                if self.state(request.id) is not None:
                    return
                self._client.submit_job(
                    entrypoint=shlex.join(request.command),
                    submission_id=request.id,
                    runtime_env=runtime,
                    entrypoint_num_cpus=request.num_cpus,
                    entrypoint_num_gpus=request.num_gpus,
                    entrypoint_memory=request.memory_bytes,
                    entrypoint_resources=request.custom_resources or None,
                    metadata={"grape_job": request.id},
                )
                return
            except ValueError as error:
                raise UserError(f"Ray does not take the job {request.id}: {_last_line(error)}") from error
            except (RuntimeError, OSError) as error:  # the head may be away, and may have taken it all the same
                is_away = isinstance(error, OSError) or "No available agent" in str(error)
                if not is_away and self.state(request.id) is not None:  # another was faster with the same job
                    return
                if not is_away or time.monotonic() > deadline:
                    raise StageError(f"Ray did not take the job {request.id}: {_last_line(error)}") from error
                time.sleep(1.0)

    def refuse_open_folders(self) -> tuple[int, int]:
        """Nodes of the cluster, and those whose folders were seen here; a job looks at those of its nodes itself.

        Raises UserError where other users of this machine can write to one.
        """
        deadline = time.monotonic() + NODE_SECONDS
        while not (sessions := self._sessions()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return len(sessions), sum(refuse_open_folders(session) for session in sessions)

    def _sessions(self) -> list[str]:
        """The session folder of each node."""
        answer = self._client._do_request("GET", "/nodes?view=summary")
        nodes = answer.json().get("data", {}).get("summary", []) if answer.status_code == 200 else []
        found = [node.get("raylet", {}) for node in nodes]
        return [node["sessionDir"] for node in found if node.get("sessionDir") and node.get("state") == "ALIVE"]

    def node_resources(self) -> list[dict[str, float]]:
        """What each node has, in Ray's names; none where an autoscaler may add another, or nothing is told of nodes."""
        try:
            nodes = self._client._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
            living = [node["raylet"] for node in nodes if node["raylet"].get("state") == "ALIVE"]
            return [] if self._grows() else [dict(node["resourcesTotal"]) for node in living]
        except (KeyError, TypeError, ValueError, OSError):
            return []

    def _grows(self) -> bool:
        """Whether nodes have types of an autoscaler's; without one each node is a type of its own, node_<id>."""
        status = self._client._do_request("GET", "/api/cluster_status").json()["data"].get("clusterStatus") or {}
        types = ((status.get("autoscalerReport") or {}).get("activeNodes") or {}).keys()
        return any(not name.startswith("node_") and name != "local.cluster.node" for name in types)

    def state(self, job_id: str) -> str | None:
        """running, succeeded, failed or cancelled; None if no such job is known."""
        try:
            status = self._client.get_job_status(job_id).value
        except RuntimeError as error:
            if "404" in str(error):
                return None
            raise
        return _STATES.get(status, "running")

    def waits_for(self, job_id: str) -> str | None:
        """What a job needs before it starts, in words; None once it has started, or if it is not known."""
        if job_id in self._started:
            return None
        try:
            info = self._client.get_job_info(job_id)
        except RuntimeError:
            return None
        if info.status.value != "PENDING":
            self._started.add(job_id)
            return None
        is_short = "resources" in (info.message or "") and "environment" not in info.message
        return "CPUs, GPUs or memory of the cluster" if is_short else "Ray to start it"

    def log_tail(self, job_id: str, lines: int = 30) -> str:
        """The last lines of a job's output, and Ray's own message where the job never ran."""
        log = self._client.get_job_logs(job_id).strip().splitlines()
        message = self._client.get_job_info(job_id).message or ""
        return "\n".join([*log[-lines:], message] if len(log) < 3 else log[-lines:])

    def log(self, job_id: str) -> str:
        """A job's whole output until now."""
        text: str = self._client.get_job_logs(job_id)
        return text

    def log_parts(self, job_id: str) -> Iterator[str]:
        """A job's output from its beginning, in parts as it grows, until the job has ended.

        Raises LogBroken where the connection breaks or the server has none that stays open.
        """
        import aiohttp

        parts = self._client.tail_job_logs(job_id)

        async def next_part() -> str | None:
            return await anext(parts, None)

        try:
            with asyncio.Runner() as runner:
                while (part := runner.run(next_part())) is not None:
                    yield part
        except (aiohttp.ClientError, RuntimeError, OSError) as error:
            raise LogBroken(f"the log of {job_id} cannot be followed: {error}") from error

    def message(self, job_id: str) -> str:
        """Ray's own word on how a job is or why it ended."""
        return " ".join((self._client.get_job_info(job_id).message or "Ray gives no reason").split())

    def exit_code(self, job_id: str) -> int | None:
        """What the job's process ended with; None while it runs or where it never ran."""
        code: int | None = self._client.get_job_info(job_id).driver_exit_code
        return code

    def jobs(self) -> list[dict[str, Any]]:
        """Every submitted job, newest first: id, state, started and ended in ms since 1970, message."""
        found = [job for job in self._client.list_jobs() if job.submission_id]
        found.sort(key=lambda job: job.start_time or 0, reverse=True)
        return [
            {
                "id": job.submission_id,
                "state": _STATES.get(job.status.value, "running"),
                "started": job.start_time,
                "ended": job.end_time,
                "message": job.message,
            }
            for job in found
        ]

    def stop(self, job_id: str) -> None:
        """End a job and wait until it has ended."""
        if self.state(job_id) == "running":
            self._client.stop_job(job_id)
        while self.state(job_id) == "running":
            time.sleep(0.5)


@contextlib.contextmanager
def job_server(address: str) -> Iterator[JobServer]:
    """The Jobs API at http://head:8265; 'auto': the cluster that this process is a job of, else a private Ray.

    Raises UserError when nobody answers at the address or the token is refused.
    """
    if address == "auto" and os.environ.get(IN_CLUSTER):
        address = _address_of_own_cluster()
    if address != "auto":
        try:
            address = jobs_address(address)
        except ValueError as error:
            raise UserError(str(error)) from None
        yield JobServer(_client(address), address, None)
        return
    # Jobs hold a CPU each while Ray's own supervisors start, so there are more logical CPUs than cores.
    with private_ray(2 * usable_cores(), with_jobs=True) as private:
        yield JobServer(_client(str(private.jobs)), PRIVATE, num_local_gpus())


def _address_of_own_cluster() -> str:
    """Address of the Jobs API of the cluster that this process is a job of."""
    import ray

    joined = not ray.is_initialized()
    if joined:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    try:
        url: str = ray._private.worker.global_worker.node.webui_url  # type: ignore[union-attr]
    finally:
        if joined:
            ray.shutdown()
    if not url:
        raise UserError("this cluster's head runs without a dashboard, and so without the Jobs API that training needs")
    return f"http://{url}"


def num_local_gpus() -> int:
    """GPUs of this machine that are visible."""
    import torch

    return torch.cuda.device_count()


def _client(address: str) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # It tells of each connection that ends; its level is set where it is imported.
    logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)
    _refuse_mute(address)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        text = str(error)
        if "401" in text or "403" in text or "authentication" in text.lower():
            raise UserError(
                f"{address} refuses the token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to its token file"
            ) from error
        raise UserError(f"no Ray answers at {address}: {_last_line(error)}") from error
    except (ValueError, KeyError, TypeError) as error:  # of an answer that is not Ray's
        raise UserError(
            f"{address} is not a Ray head: give the address of its dashboard, such as http://head:8265"
        ) from error


def _refuse_mute(address: str) -> None:
    """Raises UserError for a server that takes connections and says nothing: Ray's client waits for it for ever."""
    import requests

    try:
        requests.get(f"{address}/api/version", timeout=ANSWER_SECONDS)
    except requests.exceptions.ReadTimeout:
        raise UserError(
            f"{address} takes connections and has not answered for {ANSWER_SECONDS:.0f} seconds: "
            "give the address of a Ray head's dashboard, such as http://head:8265, or start that head again"
        ) from None
    except requests.exceptions.ConnectTimeout:
        raise UserError(
            f"no Ray answers at {address}: it takes no connection within {ANSWER_SECONDS:.0f} seconds"
        ) from None
    except requests.exceptions.RequestException:  # the client says why
        pass


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
