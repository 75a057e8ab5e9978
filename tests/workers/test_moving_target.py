"""A scheduled job whose target is the newest checkpoint of a training: each run selects for what was trained last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.estimate.finding import Finding
from grape_service.estimate.plan import make_plan
from grape_service.estimate.preflight import check
from grape_service.release.load import load
from tests import tiny_models
from tests.jobs import pool_rows, write_jsonl
from workers.engines.side_process import ModelsInSideProcess
from workers.pipeline import run_pipeline

pytestmark = [pytest.mark.long, pytest.mark.alone]


def values_for(folder: Path) -> dict[str, Any]:
    write_jsonl(folder / "pool" / "pool.jsonl", pool_rows(6))
    return {
        "name": "moves",
        "pool": {"path": str(folder / "pool")},
        "target": {"model": f"{folder}/training/@latest", "engine": "transformers", "dtype": "float32"},
        "output": {"path": str(folder / "out")},
        "workers": {"replicas": 1},
    }


def write_checkpoint(folder: Path, step: int) -> None:
    tiny_models.make_model(folder / "training" / f"checkpoint-{step}", seed=step)
    (folder / "training" / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def findings(config: Config) -> list[Finding]:
    models = ModelsInSideProcess()
    try:
        return [one for one in check(config, models) if isinstance(one, Finding)]
    finally:
        models.close()


def test_each_run_selects_for_the_newest_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPE_CACHE", str(tmp_path / "cache"))
    config = Config.model_validate(values_for(tmp_path))
    asked = config.target.model
    with pytest.raises(UserError, match="there is no checkpoint in"):
        run_pipeline(config)
    errors = [one for one in findings(config) if one.status == "error"]
    assert [one.what for one in errors] == ["checkpoint"]

    write_checkpoint(tmp_path, 1)
    first = run_pipeline(config)
    manifest = load(first.reference or "").manifest
    checkpoint = str(tmp_path / "training" / "checkpoint-1")
    assert manifest.parents.checkpoints == {asked: checkpoint}
    assert manifest.config["target"]["model"] == checkpoint
    assert manifest.parents.policies[0].model == checkpoint
    assert f"{asked} is {checkpoint}" in [event["event"] for event in manifest.statistics["events"]]
    assert not run_pipeline(config).is_new

    write_checkpoint(tmp_path, 2)
    (tmp_path / "training" / "checkpoint-2" / "trainer_state.json").unlink()  # it is still being written
    assert run_pipeline(config).version == first.version
    write_checkpoint(tmp_path, 2)
    second = run_pipeline(config)
    assert second.is_new
    manifest = load(second.reference or "").manifest
    newest = str(tmp_path / "training" / "checkpoint-2")
    assert manifest.parents.checkpoints == {asked: newest}
    assert manifest.counts["changes"]["since"] == first.version

    ok = [one.detail for one in findings(config) if one.what == "checkpoint"]
    assert ok == [f"{asked} is {newest}"]
    assert make_plan(config, tokens_per_second=100.0).checkpoints == ok
    shutil.rmtree(tmp_path / "training" / "checkpoint-2")
    back = run_pipeline(config)
    assert (back.version, back.is_new) == (first.version, False)
