"""Deployments for real: a Prefect server, `prefect deploy`, a worker, runs that start, fail, and are cancelled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import yaml
from transformers import AutoTokenizer

from tests import tiny_models
from tests.flows.test_curate import num_scores, wait_for_scores
from tests.grape_service.test_webhooks import Receiver
from tests.jobs import ROOT, Job, Terminal, pool_rows, tiny_job, write_jsonl
from tests.ray_cluster import free_port

pytestmark = pytest.mark.timeout(1500)

PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


class Service:
    """A Prefect server and a worker of a job's own; both carry the job's mark."""

    def __init__(self, job: Job):
        self.job = job
        temporary = job.folder / "tmp"  # Prefect's runners share a folder in it, which may be another user's
        temporary.mkdir()
        port = free_port()
        self.api = f"http://127.0.0.1:{port}/api"
        job.environment |= {
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "GRAPE_HOME": str(ROOT),
            "TMPDIR": str(temporary),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        }
        self.client = httpx.Client(base_url=self.api, timeout=60)
        self.start("server", "start", "--host", "127.0.0.1", "--port", str(port))
        self.wait(self._healthy, 180, "the server does not start")

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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_model(tmp_path_factory.mktemp("model"), arch="llama"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Service]:
    with tiny_job(tmp_path_factory.mktemp("prefect"), model, pool_rows(4)) as job:
        made = Service(job)
        made.prefect("work-pool", "create", "grape", "--type", "process")
        made.prefect("work-pool", "set-concurrency-limit", "grape", "1")
        values = yaml.safe_load((ROOT / "deploy" / "prefect.yaml").read_text())
        for deployment in values["deployments"]:
            environment = deployment["work_pool"]["job_variables"]["env"]
            environment["PREFECT_FLOWS_DEFAULT_RETRY_DELAY_SECONDS"] = "3"
            deployment["schedules"] = []
            if "config" in deployment["parameters"]:
                deployment["parameters"]["config"] = job.config
        path = job.folder / "prefect.yaml"
        path.write_text(yaml.safe_dump(values))
        made.prefect("deploy", "--all", "--prefect-file", str(path))
        made.start("worker", "start", "--pool", "grape", "--type", "process", "--limit", "1")
        yield made


def test_a_scheduled_run_starts_by_itself_and_shows_what_it_did(service: Service) -> None:
    deployment = service.deployment("curate/curate")
    assert deployment["tags"] == ["grape", "release"]
    run_id = service.run_by_schedule(deployment["id"])
    run = service.wait_final(run_id)
    assert run["state_type"] == "COMPLETED", "\n".join(service.logs(run_id))
    artifacts = service.artifacts(run_id)
    assert artifacts["tiny-score-target"]["type"] == "progress"
    assert artifacts["tiny-score-target"]["data"] == 100.0
    assert "tokens/s" in artifacts["tiny-score-target"]["description"]
    assert artifacts["tiny-counts"]["type"] == "table"
    assert "scored now" in artifacts["tiny-counts"]["data"]
    assert "tiny@v0001" in artifacts["tiny-version"]["data"]
    assert "report.html" in artifacts["tiny-report"]["data"]
    assert "shard_tokens: 400" in artifacts["tiny-config"]["data"]
    service.wait(
        lambda: any("run=2" in line and "stage=score-target" in line for line in service.logs(run_id)),
        60,  # lines come in batches, on a busy machine after the run's end
        "no line of the score stage",
    )


def test_the_form_shows_every_key_and_refuses_bad_values(service: Service) -> None:
    deployment = service.deployment("curate/curate")
    schema = deployment["parameter_openapi_schema"]
    definitions = schema["definitions"]
    assert definitions["PoolConfig"]["properties"]["path"]["description"].startswith("File, folder or glob")
    bad = {**service.job.config, "select": {"keep": 0}}
    answer = service.client.post(
        f"/deployments/{deployment['id']}/create_flow_run", json={"parameters": {"config": bad}}
    )
    assert answer.status_code == 409, answer.text
    assert "keep" in answer.text or "minimum" in answer.text


def test_one_command_deploys_a_config(service: Service) -> None:
    secret = "https://hooks.example/canary-51c0"
    job = Job(service.job.folder / "one", {**service.job.config, "name": "nightly"}, service.job.environment)
    job.folder.mkdir()
    job.config["notify"] = {"webhook": secret}
    refused = job.grape("deploy", str(job.config_path), "--pool", "absent")
    assert refused.returncode == 2
    assert "there is no work pool 'absent'" in refused.stderr
    refused = job.grape("deploy", str(job.config_path), "--pool", "grape", "--cron", "at night")
    assert refused.returncode == 2
    assert "--cron 'at night'" in refused.stderr
    for cron in ("0 4 * * 2", "0 4 * * 1"):  # again replaces it
        done = job.grape("deploy", str(job.config_path), "--pool", "grape", "--cron", cron, "--json")
        assert done.returncode == 0, done.stderr
    made = orjson.loads(done.stdout)
    assert made["name"] == "curate/nightly"
    assert made["url"] == f"{service.api.removesuffix('/api')}/deployments/deployment/{made['id']}"
    deployment = service.deployment("curate/nightly")
    assert [one["schedule"]["cron"] for one in deployment["schedules"]] == ["0 4 * * 1"]
    assert deployment["parameters"]["config"]["notify"] == {"webhook": "***"}
    assert deployment["parameter_openapi_schema"]["definitions"]["PoolConfig"]["properties"]["path"]["description"]
    variable = deployment["job_variables"]["env"]["GRAPE_CONFIG_SECRETS"]
    assert variable == "{{ prefect.blocks.secret.grape-nightly }}"
    assert secret.encode() not in b"".join(path.read_bytes() for path in (service.job.folder / "prefect").glob("*.db*"))


def test_a_user_error_is_final(service: Service, tmp_path: Path) -> None:
    config = {**service.job.config, "name": "mistaken", "pool": {"path": str(tmp_path / "nowhere")}}
    run_id = service.run("score-pool/score-pool", parameters={"config": config})
    run = service.wait_final(run_id)
    assert (run["state_type"], run["run_count"]) == ("FAILED", 1)
    assert run["name"] == "mistaken"


def test_an_outage_is_tried_again(service: Service, tmp_path: Path, model: str) -> None:
    drill = tmp_path / "drill.json"
    receiver = Receiver()
    config = {
        **service.job.config,
        "name": "late",
        "output": {"path": str(tmp_path / "datasets")},
        "notify": {"webhook": receiver.url},
    }
    token = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<|im_start|>")
    drill.write_bytes(orjson.dumps({"name": "late", "fail_token": token}))
    environment = service.deployment("score-pool/score-pool")["job_variables"]["env"]
    environment |= {"GRAPE_ENGINE_CLASS": "tests.drill_engines:DrillEngine", "DRILL_FILE": str(drill)}
    run_id = service.run(
        "curate/curate", parameters={"config": config, "until": "release"}, job_variables={"env": environment}
    )
    service.wait(lambda: service.state(run_id)["state_name"] == "AwaitingRetry", 240, "it does not fail")
    drill.write_bytes(orjson.dumps({"name": "late"}))
    run = service.wait_final(run_id)
    assert run["state_type"] == "COMPLETED", "\n".join(service.logs(run_id))
    assert run["run_count"] >= 2
    receiver.server.shutdown()
    told = [orjson.loads(body)["event"] for _, body in receiver.got]
    assert told == ["completed"]  # and not one for each try


def test_ctrl_c_in_a_terminal_while_prefect_watches(service: Service, tmp_path: Path) -> None:
    job = Job(service.job.folder / "stopped", {**service.job.config, "name": "stopped"}, service.job.environment)
    job.folder.mkdir()
    terminal = Terminal(job, "run", str(job.config_path), "--json", "--set", f"output.path={tmp_path}")
    deadline = time.monotonic() + 120
    while not any("raylet" in line for line in job.processes().values()):
        assert time.monotonic() < deadline, "Ray does not start"
        terminal.read(0.05)
    started = time.monotonic()
    terminal.press_ctrl_c()
    status, text = terminal.wait(30)
    assert time.monotonic() - started < 8  # 5 on a quiet machine
    assert (status, text.count("error: "), "Traceback" in text) == (130, 1, False), text
    assert text.endswith("error: stopped; run the same command again to resume\n"), text
    assert job.wait_gone(1) == {}


def test_a_cancelled_run_is_gone_in_30_seconds_and_the_next_goes_on(service: Service, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pool" / "pool.jsonl", pool_rows(40))
    config = {
        **service.job.config,
        "name": "long",
        "pool": {"path": str(tmp_path / "pool")},
        "output": {"path": str(tmp_path / "datasets")},
    }
    slow = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine", "DRILL_SECONDS": "1"}
    environment = service.deployment("curate/curate")["job_variables"]["env"]
    before = set(service.job.processes())
    run_id = service.run("curate/curate", parameters={"config": config}, job_variables={"env": {**environment, **slow}})
    probe = Job(tmp_path, config)
    wait_for_scores(probe, files=1, seconds=300)
    service.client.post(f"/flow_runs/{run_id}/set_state", json={"state": {"type": "CANCELLING"}})
    started = time.monotonic()
    left: dict[int, str] = {}
    while time.monotonic() - started < 30:
        left = {pid: line for pid, line in service.job.processes().items() if pid not in before}
        if not left:
            break
        time.sleep(0.5)
    assert left == {}
    assert service.wait_final(run_id, 60)["state_name"] == "Cancelled"
    assert not [line for line in service.logs(run_id) if "Traceback" in line]
    stored = num_scores(probe)
    assert 0 < stored < 160
    next_id = service.run("curate/curate", parameters={"config": config})
    assert service.wait_final(next_id)["state_type"] == "COMPLETED", "\n".join(service.logs(next_id))
    counts = service.artifacts(next_id)["long-counts"]["data"]
    assert f'"scored now", "rows": {160 - stored}' in counts
    assert os.path.exists(tmp_path / "datasets" / "long" / "versions" / "v0001" / "manifest.json")
