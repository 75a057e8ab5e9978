"""What `grape check` calls the policies that wrote a pool: their model, and a number where there are several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grape_service.config.schema import Config
from grape_service.estimate.finding import Finding
from grape_service.estimate.preflight import check
from tests import tiny_models
from tests.jobs import pool_rows, write_jsonl
from workers.engines.side_process import ModelsInSideProcess


def test_one_policy_has_no_number(tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    tiny_models.make_model(Path(model))
    write_jsonl(tmp_path / "pool.jsonl", pool_rows(2))
    models = ModelsInSideProcess()

    def names(**behavior: Any) -> list[str]:
        values = {
            "name": "x",
            "pool": {"path": str(tmp_path / "pool.jsonl")},
            "target": {"model": model},
            "behavior": {"missing": "uniform", **behavior},
            "weights": {"method": "pear"},
            "output": {"path": str(tmp_path / "out")},
        }
        found = check(Config.model_validate(values), models)
        return [one.what for one in found if isinstance(one, Finding) and one.what.startswith("behavior")]

    try:
        assert names(model=model) == [f"behavior: {model}"]
        two = {"a": {"model": model}, "b": {"model": model, "system_prompt": "Be brief."}}
        assert names(sources=two) == [f"behavior 1: {model}", f"behavior 2: {model}"]
    finally:
        models.close()
