"""`workers.reuse: exact` takes scores of one version of the engine alone, wherever they are used again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from grape_service.config.schema import Config
from grape_service.errors import StageError
from tests import tiny_models
from tests.jobs import pool_rows, write_jsonl
from workers.pipeline import reweigh, run_pipeline

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(600)]

OTHERS = [{"version": "0.0.1"}, {"torch": "2.0.0+cu118"}]
REFUSED = [
    r"scores of .* were made by transformers 0\.0\.1 with torch \S+, and the engine here is transformers [1-9]\S+ with",
    r"scores of .* were made by transformers \S+ with torch 2\.0\.0\+cu118, and the engine here is .* with torch [2-9]",
]


def made_by(file: Path, other: dict[str, Any]) -> None:
    """Have a file of scores say that another version of the engine or of torch made it."""
    table = pq.read_table(file)
    metadata = dict(table.schema.metadata)
    metadata[b"grape.engine"] = orjson.dumps({**orjson.loads(metadata[b"grape.engine"]), **other})
    pq.write_table(table.replace_schema_metadata(metadata), file)


@pytest.mark.parametrize(("other", "refused"), zip(OTHERS, REFUSED, strict=True), ids=["transformers", "torch"])
def test_scores_of_another_version_are_refused_and_those_of_a_release_looked_up(
    other: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    model = tiny_models.make_model(tmp_path / "model")
    write_jsonl(tmp_path / "pool.jsonl", pool_rows(4))
    policy = {"model": model, "engine": "transformers", "dtype": "float32"}

    def config(reuse: str, **keys: Any) -> Config:
        return Config.model_validate(
            {
                "name": "sft",
                "pool": {"path": str(tmp_path / "pool.jsonl")},
                "target": policy,
                "behavior": {**policy, "system_prompt": "Be brief."},
                "weights": {"method": "pear"},
                "output": {"path": str(tmp_path / "out")},
                "workers": {"replicas": 1, "reuse": reuse},
                **keys,
            }
        )

    exact = config("exact")
    released = run_pipeline(exact)
    assert released.reference is not None
    again = reweigh(released.reference, exact, force=True)
    assert (again.scored, again.reused) == (0, 8), "target and behavior, from the workspace"
    files = [file for file in (tmp_path / "out/.grape/scores").glob("*/b/*.parquet") if "-repeat" not in str(file)]
    made_by(
        min(files, key=lambda file: file.name), other
    )  # the manifest says nothing of it: the run that made the release had scored the rest
    for run in (
        lambda: run_pipeline(exact, until="score"),
        lambda: run_pipeline(config("exact", score={"race": "exact"}), until="score"),
        lambda: run_pipeline(config("exact", score={"statistics": ["entropy"]}), until="score"),
        lambda: reweigh(str(released.reference), exact, force=True),
    ):
        with pytest.raises(StageError, match=refused):
            run()
    assert run_pipeline(config("compatible"), until="score").scored == 0
