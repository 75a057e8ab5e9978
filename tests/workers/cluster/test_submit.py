"""`grape submit` on a real cluster of two processes, with a token; its worker is killed in the middle."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest

import grape_service
from grape_service.config.schema import Config
from grape_service.errors import UserError
from tests import tiny_models
from tests.flows.test_kill_drill import stored_keys
from tests.jobs import Job, pool_rows, tiny_job
from tests.prepared_pools import make_config
from tests.ray_cluster import RayCluster, ray_cluster
from workers.cluster.jobs import JobRequest, JobServer, LogBroken, job_server
from workers.cluster.submit import COMMANDS, JobForgotten, follow, for_cluster, job_of, outcome_in, submit
from workers.pipeline import Until
from workers.stages.provenance import resolved_config

pytestmark = [pytest.mark.alone, pytest.mark.timeout(900)]
WORKERS = {"shard_tokens": 400, "replicas": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_model(tmp_path_factory.mktemp("model"), arch="llama"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head and a worker."""
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as made:
        made.start_worker(num_cpus=4)
        yield made


@dataclass
class Whole:
    """The undisturbed job of this module and what it released."""

    job: Job
    outcome: dict[str, Any]
    rows: dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: str, cluster: RayCluster) -> Iterator[Whole]:
    with tiny_job(tmp_path_factory.mktemp("whole"), model, pool_rows(30), workers=WORKERS) as job:
        job.environment = cluster.environment
        outcome = submitted(job, cluster)
        yield Whole(job, outcome, released(outcome))


def submitted(job: Job, cluster: RayCluster, *options: str) -> dict[str, Any]:
    """`grape submit CONFIG --json`, which must succeed; its JSON object."""
    done = job.grape("submit", str(job.config_path), "--address", cluster.address, "--json", *options, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return orjson.loads(done.stdout)


def released(outcome: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    rows = grape_service.load(outcome["reference"]).dataset.to_table().to_pylist()
    return {(row["prompt_id"], row["candidate_id"]): row for row in rows}


def test_a_job_on_a_cluster_of_two_nodes(whole: Whole, cluster: RayCluster) -> None:
    job, outcome = whole.job, whole.outcome
    assert outcome["rows"] == len(whole.rows) == 30
    assert outcome["failed"] == 0
    assert {row["num_candidates"] for row in whole.rows.values()} == {4}

    listed = orjson.loads(job.grape("jobs", "list", "--address", cluster.address, "--json").stdout)["jobs"]
    assert listed[0]["id"] == outcome["job"]
    assert listed[0]["state"] == "succeeded"

    job.environment = {"RAY_AUTH_MODE": "disabled"}
    refused = job.grape("jobs", "list", "--address", cluster.address)
    assert refused.returncode == 2
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr

    # The same job through `grape run` and workers.ray_address: nothing is left to score.
    job.environment = cluster.environment
    job.config["workers"] = {**WORKERS, "ray_address": cluster.address}
    again = job.run(timeout=300)
    assert again["version"] == "v0001"
    assert not again["is_new"]
    assert again["scored"] == 0

    # `grape weigh` goes there too.
    job.config |= {"behavior": job.config["target"], "weights": {"method": "pear"}}
    done = job.grape("weigh", outcome["reference"], "--config", str(job.config_path), "--json", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    weighed = orjson.loads(done.stdout)
    assert (weighed["version"], weighed["rows"], weighed["scored"]) == ("v0002", 30, 0)
    assert f"on {cluster.address}" in done.stderr


def test_detached_stopped_and_failed_jobs(tmp_path: Path, model: str, cluster: RayCluster) -> None:
    with tiny_job(tmp_path, model, pool_rows(2)) as job:
        job.environment = cluster.environment
        detached = job.grape("submit", str(job.config_path), "--address", cluster.address, "--detach")
        assert detached.returncode == 0, detached.stderr
        name = detached.stdout.strip()
        stopped = job.grape("jobs", "stop", name, "--address", cluster.address)
        assert stopped.stdout.strip() == f"{name} cancelled"
        job.config["pool"]["path"] = str(tmp_path / "nothing")
        failed = job.grape("submit", str(job.config_path), "--address", cluster.address)
        assert failed.returncode == 2, failed.stderr[-2000:]
        assert "nothing" in failed.stderr.strip().splitlines()[-1]


def test_ctrl_c_leaves_a_job_that_is_followed(tmp_path: Path, model: str, cluster: RayCluster) -> None:
    with tiny_job(tmp_path, model, pool_rows(2)) as job:
        job.environment = cluster.environment
        following = job.start("submit", str(job.config_path), "--address", cluster.address)
        assert following.stderr is not None
        line = next(line for line in following.stderr if line.startswith("job "))
        name = line.split()[1].rstrip(";")
        following.send_signal(signal.SIGINT)
        _, told = following.communicate(timeout=60)
        assert following.returncode == 130
        last = told.strip().splitlines()[-1]
        assert last.startswith(f"error: no longer followed: the job {name} goes on"), told
        stopped = job.grape("jobs", "stop", name, "--address", cluster.address)
        assert stopped.stdout.split()[0] == name


LINES = """
import sys, time
for number in range(6):
    print(f"line {number}", flush=True)
    sys.stdout.write(f"torn {number} ...")
    sys.stdout.flush()
    time.sleep(0.7)
    print("mended", flush=True)
sys.exit(3)
"""


def test_a_log_is_fetched_as_it_grows(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    fetched: list[str] = []
    with job_server(cluster.address) as server:
        whole, parts = server.log, server.log_parts

        def breaks_once(job_id: str) -> Iterator[str]:
            yield from itertools.islice(parts(job_id), 1 if not fetched else None)
            if not fetched:
                raise LogBroken("the connection was cut")

        monkeypatch.setattr(server, "log", lambda job_id: fetched.append(job_id) or whole(job_id))
        monkeypatch.setattr(server, "log_parts", breaks_once)
        server.submit(JobRequest(id="lines", command=[server.python, "-c", LINES], environment={}))
        pieces: list[str] = []
        assert follow(server, "lines", pieces.append) == 3
        text = "".join(pieces)
        assert text == whole("lines")
        assert [text.count(f"line {number}\ntorn {number} ...mended\n") for number in range(6)] == [1] * 6
        assert len(fetched) == 2  # after the connection was cut, and at the end
        assert sum(map(bool, pieces)) > 3


@pytest.mark.drill
def test_a_node_lost_in_the_middle_costs_no_row(tmp_path: Path, model: str, cluster: RayCluster, whole: Whole) -> None:
    """The module's last test on the cluster: its worker is gone afterwards."""
    with tiny_job(tmp_path, model, pool_rows(30), workers=WORKERS) as job:
        folder = tmp_path / "begun"
        folder.mkdir()
        names = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:TogetherEngine", "DRILL_SECONDS": "1.5"}
        names |= {"DRILL_ENGINES": "2", "DRILL_FOLDER": str(folder)}
        job.environment = cluster.environment | names
        options = [part for name in names for part in ("--env", name)]
        process = job.start("submit", str(job.config_path), "--address", cluster.address, "--json", *options)
        worker = cluster.nodes[-1]
        deadline = time.monotonic() + 240
        while len(begun := list(folder.iterdir())) < 2:
            assert time.monotonic() < deadline, "two engines did not start"
            time.sleep(0.1)
        on_worker = [path.name for path in begun if os.getsid(int(path.name)) == worker.pid]
        time.sleep(0.5)
        cluster.kill_node(worker)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        assert len(on_worker) == 1  # one on each node
        assert "an engine died" in err
        outcome = orjson.loads(out)
        assert (outcome["rows"], outcome["failed"], outcome["scored"] + outcome["reused"]) == (30, 0, 120)
        rows = released(outcome)
        assert rows.keys() == whole.rows.keys()
        for key, row in rows.items():
            assert row["grape_score"] == pytest.approx(whole.rows[key]["grape_score"], abs=1e-4)
        assert len(set(stored_keys(job))) == len(stored_keys(job)) == 120
        manifest = grape_service.load(outcome["reference"]).manifest
        assert any("an engine died" in event["event"] for event in manifest.statistics["events"])
        assert not job.wait_gone(30)
        assert not scoring_processes(cluster, seconds=30)


def scoring_processes(cluster: RayCluster, seconds: float) -> list[str]:
    """Actors of the cluster that are still there after some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        titles = [Path(f"/proc/{pid}/cmdline") for pid in cluster.processes()]
        found = [title.read_text() for title in titles if title.exists()]
        found = [title for title in found if "ScoringActor" in title]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def test_local_paths_become_absolute_and_the_job_submits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = Config.model_validate(
        {
            "name": "x",
            "pool": {"path": "pool/"},
            "target": {"model": "model"},
            "behavior": {
                "sources": {
                    "a": {"model": "team/model"},
                    "b": {"column": "lp", "policy": {"model": "model"}},
                    "c": {"model": "team/model", "adapter": "model"},
                    "people": "none",
                }
            },
            "gather": {
                "policies": {"d": {"model": "model"}, "e": {"model": "team/model"}, "own": {"model": "model/@latest"}}
            },
            "train": {
                "sft": {"model": "model", "output": "trained"},
                "rl": {"prompts": {"path": "prompts/*.jsonl"}},
                "gate": {"pass_at": [1], "prompts": "prompts", "verify": {"method": "exact", "answer": "a"}},
            },
            "checks": {"contamination": {"action": "warn", "files": ["tests/a.jsonl", "s3://team/b.jsonl"]}},
            "output": {"path": "s3://team/datasets"},
            "workers": {"ray_address": "http://head:8265", "replicas": 3},
        }
    )
    values = for_cluster(config)
    assert values["pool"]["path"] == str(tmp_path / "pool")
    assert values["target"]["model"] == str(tmp_path / "model")
    sources, sampled, train = values["behavior"]["sources"], values["gather"]["policies"], values["train"]
    assert sources["a"]["model"] == sampled["e"]["model"] == "team/model"
    assert sampled["own"]["model"] == str(tmp_path / "model" / "@latest")
    here = str(tmp_path / "model")
    assert sources["b"]["policy"]["model"] == sources["c"]["adapter"] == sampled["d"]["model"] == here
    assert (train["sft"]["model"], train["sft"]["output"]) == (here, str(tmp_path / "trained"))
    assert train["rl"]["prompts"]["path"] == str(tmp_path / "prompts/*.jsonl")
    assert train["gate"]["prompts"] == str(tmp_path / "prompts")
    assert values["checks"]["contamination"]["files"] == [str(tmp_path / "tests/a.jsonl"), "s3://team/b.jsonl"]
    told = resolved_config(config)  # of the manifest
    assert told["gather"]["policies"]["d"]["model"] == told["behavior"]["sources"]["b"]["policy"]["model"] == here
    assert values["output"]["path"] == "s3://team/datasets"
    assert values["workers"] == {"ray_address": "auto", "replicas": 3}
    assert Config.model_validate(values).gather is not None


@pytest.mark.long
def test_a_gathering_job_on_a_cluster(tmp_path: Path, model: str, cluster: RayCluster) -> None:
    with tiny_job(tmp_path, model, [{"prompt": f"{n}+{n}?"} for n in range(3)], workers=WORKERS) as job:
        job.environment = cluster.environment
        job.config["workers"] = {**WORKERS, "ray_address": cluster.address}
        policy = {**job.config["target"], "engine": "transformers", "samples": 2}
        job.config["gather"] = {"policies": {"self": policy}, "sampling": {"max_tokens": 4}}
        done = job.grape("gather", str(job.config_path), "--json", timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        outcome = orjson.loads(done.stdout)
        assert (outcome["rows"], outcome["scored"]) == (6, 6)
        assert f"on {cluster.address}" in done.stderr


def test_there_is_a_command_for_each_stage_that_a_run_may_end_at() -> None:
    assert set(COMMANDS) == {*get_args(Until), "weigh"}


class Known(JobServer):
    """Jobs by id and their states, one after the other."""

    def __init__(self, **states: list[str | None]):
        super().__init__(None, "http://head:8265", None)
        self.states = states
        self.submitted: list[str] = []

    def submit(self, request: JobRequest) -> None:
        self.submitted.append(request.id)

    def state(self, job_id: str) -> str | None:
        states = self.states.get(job_id.rpartition("-")[2], [None])
        return states.pop(0) if len(states) > 1 else states[0]

    def log_parts(self, job_id: str) -> Iterator[str]:
        return iter(())


def test_another_try_of_a_run_has_the_job_of_the_one_before() -> None:
    config = make_config("pool.jsonl", output={"path": "/out"})
    ids = []
    with job_of("5d6f"):
        for states in ({}, {"1": ["running"]}, {"1": ["failed"], "2": ["succeeded"]}, {"1": ["cancelled"]}):
            ids.append(submit(config, Known(**states)).job_id)
        other = submit(config, Known(), command="select").job_id
        changed = submit(make_config("pool.jsonl", output={"path": "/other"}), Known()).job_id
    begin = ids[0].removesuffix("-1")
    assert begin.startswith(f"grape-{config.name}-5d6f-")
    assert ids == [f"{begin}-1", f"{begin}-1", f"{begin}-2", f"{begin}-2"]
    assert len({ids[0], other, changed}) == 3  # what is not the same job is not taken for it
    assert submit(config, Known()).job_id != submit(config, Known()).job_id


def test_a_head_that_was_started_again_is_told_from_one_that_never_knew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.cluster.submit.POLL_SECONDS", 0.0)
    with pytest.raises(UserError, match="knows no job"):
        follow(Known(), "x-1", lambda text: None)
    with pytest.raises(JobForgotten, match="was started again and no longer knows the job x-1"):
        follow(Known(**{"1": ["running", None]}), "x-1", lambda text: None)


def test_the_object_is_found_in_a_log() -> None:
    log = 'job x\n{\n  "other": 1\n}\nprepare: 1\n{\n  "reference": "r",\n  "rows": 3\n}\nbye\n'
    assert outcome_in(log) == {"reference": "r", "rows": 3}
    assert outcome_in("nothing\n}\n") is None
