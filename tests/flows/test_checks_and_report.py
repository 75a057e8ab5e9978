"""The main job with checks: one that fails stops it before anything is published; the report tells what was found."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import grape_service
from tests import tiny_models
from tests.jobs import pool_rows, tiny_job

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]


def findings(folder: Path, check: str) -> list[dict[str, str]]:
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [row for row in rows if row["check"] == check]


def test_a_failed_check_publishes_nothing_and_a_warning_is_in_the_report(tmp_path: Path) -> None:
    model = tiny_models.make_model(tmp_path / "model", arch="llama")
    evaluation = tmp_path / "eval.txt"
    evaluation.write_text("What is 5 plus 5? Show how you got there.\n")
    contamination = {"action": "fail", "files": [str(evaluation)], "n": 8}
    checks = dict.fromkeys(("exact_duplicates", "near_duplicates", "sources", "untrusted_target"), "warn")
    workers = {"shard_tokens": 4000, "partition_bytes": 4000, "cpus": 2}
    with tiny_job(tmp_path, model, pool_rows(24), workers=workers) as job:
        job.config["checks"] = {**checks, "contamination": contamination}
        done = job.grape("run", str(job.config_path))
        assert done.returncode == 1
        assert "checks.contamination is set to fail" in done.stderr
        assert not list((tmp_path / "datasets").glob("tiny/versions/*/manifest.json"))
        (folder,) = (tmp_path / "datasets" / ".grape" / "checks").iterdir()
        assert [row["reason"] for row in findings(folder, "contamination")] == ["evaluation item in the prompt"]

        job.config["checks"]["contamination"] = {**contamination, "action": "warn"}
        outcome = job.run()
        assert outcome["scored"] == 0
        release = grape_service.load(outcome["reference"])
        results = {result["name"]: result for result in release.manifest.statistics["checks"]}
        assert results["contamination"]["found"] == 1
        assert results["untrusted_target"]["rows"] == 24
        flagged = findings(Path(results["untrusted_target"]["table"]), "untrusted_target")
        assert len(flagged) == results["untrusted_target"]["found"]
        # Random weights know nothing of a prompt: a response scores as high under another one.
        assert "cannot be trusted" in results["untrusted_target"]["warning"]
        page = release.storage.read(f"{release.folder}/report.html").decode()
        assert "1 of 24 kept rows" in page
        assert "Clearest choice" in page
        assert release.manifest.statistics["report"]["select"]["contested"] == 24
