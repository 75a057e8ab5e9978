"""A Prefect server with a password, the deployments of deploy/prefect.yaml and a worker, for tests and drills."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.jobs import ROOT, Job, pool_rows, tiny_job
from tests.ray_cluster import free_port

PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


PASSWORD = "grape:canary-8d1f"


class Service:
    """A Prefect server with a password, and a worker, of a job's own; both carry the job's mark."""

    def __init__(self, job: Job):
        self.job = job
        temporary = job.folder / "tmp"  # Prefect's runners share a folder in it, which may be another user's
        temporary.mkdir()
        port = free_port()
        self.api = f"http://127.0.0.1:{port}/api"
        job.environment |= {
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_API_AUTH_STRING": PASSWORD,
            "PREFECT_API_AUTH_STRING": PASSWORD,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "GRAPE_HOME": str(ROOT),
            "TMPDIR": str(temporary),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        }
        self.port = port
        self.client = httpx.Client(base_url=self.api, timeout=180, auth=tuple(PASSWORD.split(":")))
        self.start_server()

    def start_server(self) -> None:
        """Start it, with what it had stored, and wait until it answers."""
        self.server = self.start("server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        self.wait(self._healthy, 180, "the server does not start")

    def kill_server(self) -> None:
        """SIGKILL to it and its children, which are in its session."""
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()

    def start_worker(self) -> subprocess.Popen[bytes]:
        """A worker of the work pool."""
        return self.start("worker", "start", "--pool", "grape", "--type", "process", "--limit", "1")

    def _healthy(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """`prefect ARGUMENTS`, its output in a file."""
        log = (self.job.folder / f"prefect-{arguments[0]}.log").open("ab")
        return subprocess.Popen(
            [*PREFECT, *arguments], env=self.job.environ(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )

    def prefect(self, *arguments: str) -> None:
        """`prefect ARGUMENTS` to its end, which must be a good one."""
        done = subprocess.run(
            [*PREFECT, *arguments], env=self.job.environ(), cwd=ROOT, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def make_automations(self) -> str:
        """`python -m flows.automations`; what it says."""
        command = [sys.executable, "-m", "flows.automations"]
        done = subprocess.run(command, env=self.job.environ(), cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def process_of(self, run_id: str) -> int | None:
        """The pid of the process that has a flow run."""
        with_id = f"PREFECT__FLOW_RUN_ID={run_id}".encode()
        for pid, line in self.job.processes().items():
            with contextlib.suppress(OSError):
                if "prefect" in line and with_id in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return pid
        return None

    @staticmethod
    def wait(done: Any, seconds: float, what: str) -> Any:
        deadline = time.monotonic() + seconds
        while (value := done()) is None or value is False:
            assert time.monotonic() < deadline, what
            time.sleep(0.5)
        return value

    def deployment(self, name: str) -> dict[str, Any]:
        answer = self.client.get(f"/deployments/name/{name}")
        answer.raise_for_status()
        return answer.json()

    def run(self, name: str, **body: Any) -> str:
        """Ask for a run now; its id."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        answer = self.wait(lambda: self._unless_busy(path, body), 60, "the server is too busy")
        assert answer.status_code in (200, 201), answer.text
        return answer.json()["id"]

    def run_by_schedule(self, deployment_id: str) -> str:
        """Have a deployment run by itself once, in some seconds; the id of the run, which has begun."""
        soon = (datetime.now(UTC) + timedelta(seconds=8)).isoformat()
        # A server may look at a new schedule only a minute later: there is a next time soon then.
        schedule = {"schedule": {"interval": 60, "anchor_date": soon, "timezone": "UTC"}, "active": True}
        path = f"/deployments/{deployment_id}/schedules"
        answer = self.wait(lambda: self._unless_busy(path, [schedule]), 60, "the server is too busy")
        assert answer.status_code in (200, 201), answer.text
        of_deployment = {"deployments": {"id": {"any_": [deployment_id]}}}

        def begun() -> Any:
            found = self._unless_busy("/flow_runs/filter", of_deployment)
            runs = found.json() if found is not None else []
            return next((run["id"] for run in runs if run["auto_scheduled"] and run["state_type"] != "SCHEDULED"), None)

        run_id: str = self.wait(begun, 200, "no scheduled run begins")
        schedule_path = f"{path}/{answer.json()[0]['id']}"  # with the runs that it had to come
        self.wait(lambda: self.client.delete(schedule_path).status_code in (204, 404), 60, "the server is too busy")
        return run_id

    def _unless_busy(self, path: str, body: Any) -> httpx.Response | None:
        answer = self.client.post(path, json=body)
        return answer if answer.status_code != 503 else None

    def state(self, run_id: str) -> dict[str, Any]:
        return self.client.get(f"/flow_runs/{run_id}").json()

    def wait_final(self, run_id: str, seconds: float = 400) -> dict[str, Any]:
        return self.wait(
            lambda: (run := self.state(run_id))["state_type"] in FINAL and run, seconds, f"run {run_id} does not end"
        )

    def wait_final_after_crash(self, run_id: str, seconds: float) -> dict[str, Any]:
        """The run once it has ended otherwise than by a crash, after which it is started again."""
        ends = [state for state in FINAL if state != "CRASHED"]
        return self.wait(lambda: (run := self.state(run_id))["state_type"] in ends and run, seconds, "it does not end")

    def logs(self, run_id: str) -> list[str]:
        body = {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200}
        return [entry["message"] for entry in self.client.post("/logs/filter", json=body).json()]

    def artifacts(self, run_id: str) -> dict[str, dict[str, Any]]:
        body = {"artifacts": {"flow_run_id": {"any_": [run_id]}}, "limit": 100}
        found = self.client.post("/artifacts/filter", json=body).json()
        newest = {one["key"]: one for one in sorted(found, key=lambda one: one["created"])}
        # Prefect may hold one thing twice: after a request that was sent again, or a run that was tried again.
        assert all(one["type"] == newest[one["key"]]["type"] for one in found), "one key for two things"
        return newest


@contextmanager
def prefect_service(folder: Path, model: str, retry_delay: int = 3, **over: Any) -> Iterator[Service]:
    """A server with the deployments, for a tiny job's config with the keys `over`; no worker yet."""
    with tiny_job(folder, model, pool_rows(4), **over) as job:
        made = Service(job)
        made.prefect("work-pool", "create", "grape", "--type", "process")
        made.prefect("work-pool", "set-concurrency-limit", "grape", "1")
        values = yaml.safe_load((ROOT / "deploy" / "prefect.yaml").read_text())
        for deployment in values["deployments"]:
            environment = deployment["work_pool"]["job_variables"]["env"]
            environment["PREFECT_FLOWS_DEFAULT_RETRY_DELAY_SECONDS"] = str(retry_delay)
            deployment["schedules"] = []
            if "config" in deployment["parameters"]:
                deployment["parameters"]["config"] = job.config
        path = job.folder / "prefect.yaml"
        path.write_text(yaml.safe_dump(values))
        made.prefect("deploy", "--all", "--prefect-file", str(path))
        made.make_automations()
        yield made
