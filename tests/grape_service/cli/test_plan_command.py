"""`grape plan` before and after a run: what it states, and the run's manifest with estimate against actual."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

import grape_service
from grape_service.cli.app import app
from tests import tiny_models
from tests.jobs import Job, pool_rows, tiny_job, write_jsonl

pytestmark = pytest.mark.timeout(600)


def _plan(job: Job, *options: str) -> str:
    done = CliRunner().invoke(app, ["plan", str(job.config_path), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def _plan_json(job: Job, *options: str) -> dict[str, Any]:
    return orjson.loads(_plan(job, "--json", *options))


def test_a_plan_a_run_and_a_plan_from_its_manifest(tmp_path: Path) -> None:
    model = str(tiny_models.make_model(tmp_path / "model", arch="llama"))
    policy = {"model": model, "dtype": "float32", "engine": "transformers"}
    with tiny_job(tmp_path, model, pool_rows(12), behavior=policy, weights={"method": "pear"}) as job:
        job.environment = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine", "DRILL_SECONDS": "0.4"}
        text = _plan(job, "--replicas", "4", "--price", "2.5", "--tokens-per-second", "0.5")
        assert "counted exactly" in text
        assert "GPU time" in text
        assert "of scoring with 4 replicas" in text
        assert "at 2.5 a GPU hour" in text
        planned = _plan_json(job, "--replicas", "4", "--price", "2.5", "--tokens-per-second", "0.5")
        tokens = planned["pool"]["tokens"]
        assert planned["exact"]
        assert planned["gpu_hours"] == pytest.approx(tokens / 0.5 / 3600)
        assert planned["wall_seconds"] == pytest.approx(tokens / 0.5 / 4)
        assert planned["cost"] == pytest.approx(2.5 * planned["gpu_hours"])
        assert "the table of measured figures" in _plan_json(job, "--device", "H100")["policies"][0]["origin"]
        planned = _plan_json(job, "--device", "cpu")  # the newest estimate is the one that the run is compared with

        outcome = job.run()
        statistics = grape_service.load(outcome["reference"]).manifest.statistics
        against = statistics["estimate"]
        assert against["estimate"]["pool"] == planned["pool"]
        assert against["actual"]["scored_tokens"] == tokens
        assert against["tokens_ratio"] == 1.0
        assert against["seconds_ratio"] > 1

        write_jsonl(tmp_path / "pool" / "later.jsonl", pool_rows(3, start=12))
        again = _plan_json(job)
        assert again["policies"][0]["origin"].startswith("measured on this machine: tiny@v0001")
        assert again["policies"][0]["device"] == "cpu"
        measured = against["actual"]["tokens_per_second"]
        assert again["policies"][0]["tokens_per_second"] == pytest.approx(measured, rel=0.01)


NOTEBOOK = """
import contextlib, sys
from grape_service.cli import main

def grape(*arguments):
    sys.argv = ["grape", *arguments]
    with contextlib.suppress(SystemExit):
        main()

grape("plan", "config.yaml", "--tokens-per-second", "9")
grape("check", "config.yaml")
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_scipy_available
assert is_scipy_available()
model, tokenizer = (kind.from_pretrained(MODEL) for kind in (AutoModelForCausalLM, AutoTokenizer))
print(tuple(model(**tokenizer("Hello.", return_tensors="pt")).logits.shape))
import grape_service
print(grape_service.run("config.yaml").reference)
import pandas
print(len(grape_service.load("datasets/tiny").to_pandas()))
"""


def test_what_a_notebook_does_after_a_plan_has_torch_and_all_else(tmp_path: Path) -> None:
    model = str(tiny_models.make_model(tmp_path / "model", arch="llama"))
    with tiny_job(tmp_path, model, pool_rows(4)) as job:
        job.environment = {"HF_HUB_OFFLINE": "1"}
        program = f"MODEL = {model!r}\n{NOTEBOOK}"
        command, folder = [sys.executable, "-c", program], job.config_path.parent
        done = subprocess.run(command, cwd=folder, env=job.environ(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-3:] == ["(1, 4, 520)", f"{tmp_path}/datasets/tiny@v0001", "4"]
