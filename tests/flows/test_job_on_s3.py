"""The whole job on a real S3 server: pool, workspace and output there; the server killed in the middle."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import grape_service
from grape_service.storage.storage import Storage
from tests import tiny_models
from tests.jobs import Job, pool_rows, tiny_job, write_jsonl
from tests.seaweed import BUCKET, SeaweedServer

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]


def on_s3(job: Job, base: str, rows: int) -> None:
    """Move a job's pool, workspace and output to `base`."""
    local = write_jsonl(job.folder / "rows.jsonl", pool_rows(rows))
    Storage(base).write("pool/pool.jsonl", local.read_bytes())
    job.config["pool"] = {"path": f"{base}/pool"}
    job.config["output"] = {"path": f"{base}/datasets"}
    job.config["workspace"] = f"{base}/workspace"


def test_the_job_on_s3_and_weights_later(tmp_path: Path, s3_url: str, s3_server: SeaweedServer) -> None:
    model = tiny_models.make_model(tmp_path / "model")
    with tiny_job(tmp_path, model) as job:
        on_s3(job, s3_url, 12)
        first = job.run()
        assert (first["rows"], first["scored"]) == (12, 48)
        release = grape_service.load(first["reference"])
        assert set(release.dataset.to_table()["weight_source"].to_pylist()) == {"uniform"}

        job.config["weights"] = {"method": "pear"}
        job.config["behavior"] = {"model": model, "system_prompt": "Answer well.", "dtype": "float32"}
        done = job.grape("weigh", first["reference"], "--config", str(job.config_path), "--json")
        assert done.returncode == 0, done.stderr
        weighed = grape_service.load(f"{s3_url}/datasets/tiny@latest")
        assert weighed.version == "v0002"
        assert weighed.manifest.parents.release == first["reference"]
        rows = weighed.dataset.to_table().to_pylist()
        assert {row["weight_source"] for row in rows} == {"pear"}
        same = {row["candidate_id"]: row for row in release.dataset.to_table().to_pylist()}
        assert all(row["input_ids"] == same[row["candidate_id"]]["input_ids"] for row in rows)
        assert all(row["target_logprobs"] == same[row["candidate_id"]]["target_logprobs"] for row in rows)

        page = weighed.storage.read(f"{weighed.folder}/report.html").decode()
        assert page.count("<article>") == 9
        assert (
            page.count('<section class="candidate kept"') == page.count('<section class="candidate') == 9
        )  # no losers
        assert 'data-2="1.0"' in page  # a token's weight

        whole = job.run()  # the same choices and weights, made in one go: the same rows, scored already
        assert whole["scored"] == 0
        direct = {
            row["candidate_id"]: row for row in grape_service.load(whole["reference"]).dataset.to_table().to_pylist()
        }
        for row in rows:
            assert row["loss_weights"] == direct[row["candidate_id"]]["loss_weights"]

    secret = s3_server.environment["AWS_SECRET_ACCESS_KEY"].encode()
    storage = Storage(s3_url)
    texts = [info.path for info in storage.list() if info.path.endswith((".json", ".md", ".html"))]
    assert texts
    assert not [path for path in texts if secret in storage.read(path)]


def test_the_server_is_killed_and_restarted_in_the_middle_of_a_run(
    tmp_path: Path, restartable_s3: SeaweedServer
) -> None:
    model = tiny_models.make_model(tmp_path / "model")
    base = f"s3://{BUCKET}/killed"
    with tiny_job(tmp_path, model) as job:
        on_s3(job, base, 20)
        job.environment = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine", "DRILL_SECONDS": "0.5"}
        process = job.start("run", str(job.config_path), "--json")
        storage = Storage(base)
        deadline = time.monotonic() + 120
        while not [i for i in storage.list("workspace/scores") if i.path.endswith(".parquet")]:
            assert time.monotonic() < deadline, "no scores were stored"
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.3)
        restartable_s3.kill()
        time.sleep(4)
        restartable_s3.start()
        _, err = process.communicate(timeout=240)
        print(f"the run ended with {process.returncode}")
        if process.returncode != 0:
            assert "Traceback" not in err
            assert process.returncode == 1
            assert err.strip().splitlines()[-1].startswith("error: ")
        job.environment = {}
        again = job.run()
        release = grape_service.load(again["reference"])
        assert release.row_count == 20
        assert again["failed"] == 0
