"""Secrets of the environment are in nothing that a run leaves: files, objects, output, Prefect's database."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from pydantic import ValidationError

from grape_service.config.loading import parse_config
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.storage.storage import Storage
from tests import tiny_models
from tests.flows.test_job_on_s3 import on_s3
from tests.jobs import tiny_job
from tests.prefect_service import Service
from tests.ray_cluster import free_port
from tests.seaweed import SECRET, SeaweedServer

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

CANARIES = ("canary-webhook-key-5e1f", "canary-webhook-address-77ac", "canary-token-90bd", SECRET)


def test_no_secret_is_in_what_a_run_leaves(tmp_path: Path, s3_url: str, s3_server: SeaweedServer) -> None:
    model = tiny_models.make_model(tmp_path / "model")
    with tiny_job(tmp_path, model) as job:
        on_s3(job, s3_url, 3)
        address = f"http://127.0.0.1:{free_port()}/{CANARIES[1]}"  # nobody listens there, which is told
        job.config["notify"] = {"webhook": address}
        job.config["storage"] = {"endpoint_url": s3_server.endpoint}
        job.environment |= {
            "GRAPE_WEBHOOK_SECRET": CANARIES[0],
            "AWS_SESSION_TOKEN": "",
            "HF_TOKEN": CANARIES[2],
            "PREFECT_LOGGING_LEVEL": "DEBUG",
            "PREFECT_LOGGING_TO_API_ENABLED": "true",
        }
        Service(job)
        done = job.grape("run", str(job.config_path))
        assert done.returncode == 0, done.stderr[-3000:]
        assert "the run's end was not reported" in done.stderr
        found = [name for name in CANARIES if name in done.stdout + done.stderr]
        databases = list((tmp_path / "prefect").glob("*.db"))
        assert databases
        with sqlite3.connect(databases[0]) as database:
            assert database.execute("select count(*) from flow_run").fetchone()[0] >= 1
        left = [path for path in tmp_path.rglob("*") if path.is_file() and path != tmp_path / "config.yaml"]
        found += [str(path) for path in left for name in CANARIES if name.encode() in path.read_bytes()]
        storage = Storage(s3_url)
        objects = storage.list()
        assert any(info.path.endswith("config.json") for info in objects)
        found += [i.path for i in objects for name in CANARIES if name.encode() in storage.read(i.path)]
    assert found == []


def test_a_secret_in_the_config_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = {
        "name": "tiny",
        "pool": {"path": "pool"},
        "target": {"model": "model"},
        "output": {"path": "datasets"},
        "storage": {"client_kwargs": {"aws_session_token": CANARIES[2]}},
    }
    with pytest.raises(UserError, match="aws_session_token is a secret") as refused:
        parse_config(config)
    assert CANARIES[2] not in str(refused.value)
    with pytest.raises(ValidationError) as raw:  # as Prefect's log has it
        Config.model_validate(config)
    assert CANARIES[2] not in str(raw.value)
