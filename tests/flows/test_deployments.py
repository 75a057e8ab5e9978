"""Deployments for real: a Prefect server, `prefect deploy`, a worker, runs that start, fail, and are cancelled."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest
from transformers import AutoTokenizer

from tests import tiny_models
from tests.flows.test_curate import num_scores, wait_for_scores
from tests.grape_service.test_webhooks import Receiver
from tests.jobs import Job, Terminal, pool_rows, write_jsonl
from tests.prefect_service import Service, prefect_service

pytestmark = [pytest.mark.alone, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_model(tmp_path_factory.mktemp("model"), arch="llama"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[Service]:
    with prefect_service(tmp_path_factory.mktemp("prefect"), model) as made:
        made.start_worker()
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


def test_who_does_not_say_who_they_are_gets_nothing(service: Service) -> None:
    stranger = httpx.Client(base_url=service.api, timeout=60)
    for path in ("flow_runs/filter", "block_documents/filter", "deployments/filter", "work_pools/filter"):
        assert stranger.post(path, json={}).status_code == 401, path
    assert stranger.get("health").status_code == 200
    for password in ("", "grape:wrong"):
        job = Job(service.job.folder, service.job.config, {**service.job.environment})
        job.environment["PREFECT_API_AUTH_STRING"] = password
        refused = job.grape("deploy", str(job.config_path), "--pool", "grape")
        assert refused.returncode == 2, refused.stderr
        assert refused.stderr.strip() == (
            f"error: the Prefect server at {service.api} refuses us: "
            "set PREFECT_API_AUTH_STRING to its PREFECT_SERVER_API_AUTH_STRING"
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
    assert made["warnings"] == []
    assert made["url"] == f"{service.api.removesuffix('/api')}/deployments/deployment/{made['id']}"
    deployment = service.deployment("curate/nightly")
    assert [one["schedule"]["cron"] for one in deployment["schedules"]] == ["0 4 * * 1"]
    assert deployment["parameters"]["config"]["notify"] == {"webhook": "***"}
    assert deployment["parameter_openapi_schema"]["definitions"]["PoolConfig"]["properties"]["path"]["description"]
    variable = deployment["job_variables"]["env"]["GRAPE_CONFIG_SECRETS"]
    assert variable == "{{ prefect.blocks.secret.grape-nightly }}"
    found = [one["name"] for one in service.client.post("/automations/filter", json={}).json()]
    assert sorted(found) == ["grape-lost-runs", "grape-never-started"]
    assert service.make_automations() == "changed: nothing\n"
    assert secret.encode() not in b"".join(path.read_bytes() for path in (service.job.folder / "prefect").glob("*.db*"))


def test_a_user_error_is_final(service: Service, tmp_path: Path) -> None:
    config = {**service.job.config, "name": "mistaken", "pool": {"path": str(tmp_path / "nowhere")}}
    run_id = service.run("score-pool/score-pool", parameters={"config": config})
    run = service.wait_final(run_id)
    assert (run["state_type"], run["run_count"]) == ("FAILED", 1)
    assert run["name"] == "mistaken"


@pytest.mark.long
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


@pytest.mark.long
def test_a_run_whose_process_is_killed_is_the_same_run_again(service: Service, tmp_path: Path) -> None:
    slow = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine", "DRILL_SECONDS": "1"}
    environment = service.deployment("curate/curate")["job_variables"]["env"]
    config = {**service.job.config, "name": "killed", "output": {"path": str(tmp_path / "datasets")}}
    parameters = {"config": config, "until": "select", "force": True}  # not those of the deployment
    run_id = service.run("curate/curate", parameters=parameters, job_variables={"env": {**environment, **slow}})
    before = service.state(run_id)["parameters"]
    wait_for_scores(Job(tmp_path, config), files=1, seconds=300)
    pid = service.process_of(run_id)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    service.wait(lambda: service.state(run_id)["run_count"] == 2, 300, "it is not started again")
    run = service.wait_final(run_id)
    assert run["state_type"] == "COMPLETED", "\n".join(service.logs(run_id))
    assert (run["parameters"], run["run_count"]) == (before, 2)
    assert not list((tmp_path / "datasets").rglob("manifest.json"))
    runs = service.client.post("/flow_runs/filter", json={"flow_runs": {"name": {"any_": ["killed"]}}}).json()
    assert [one["id"] for one in runs] == [run_id]


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
