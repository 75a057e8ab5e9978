"""What a run with nothing to do is told by: everything that decides a release, and nothing where code of the user's may
have changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from grape_service.config.schema import Config
from grape_service.prepare.plan import plan_prepare
from grape_service.prepare.result import Prepared
from grape_service.release.claim import claim_version
from grape_service.release.manifest import ManifestFields
from grape_service.release.writer import publish, write_part
from tests import tiny_models
from tests.prepared_pools import write_jsonl
from workers.outcome import Outcome
from workers.run import Run, new_run
from workers.stages.unchanged import release_key, remember_release, unchanged_release


def key_of(folder: Path, **gather: Any) -> str | None:
    values = {
        "name": "sampled",
        "pool": {"path": str(write_jsonl(folder / "pool" / "a.jsonl", [{"question": "1+1?"}]))},
        "target": {"model": str(folder / "target")},
        "gather": {"policies": {"teacher": {"model": str(folder / "teacher")}}, **gather},
        "output": {"path": str(folder / "out")},
    }
    with new_run(Config.model_validate(values)) as run:
        return release_key(run)


def test_new_weights_of_a_policy_that_samples_are_another_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPE_CACHE", str(tmp_path / "cache"))
    tiny_models.make_model(tmp_path / "target")
    tiny_models.make_model(tmp_path / "teacher", seed=1)
    before = key_of(tmp_path)
    assert before is not None
    assert key_of(tmp_path) == before
    tiny_models.make_model(tmp_path / "teacher", seed=2)
    assert key_of(tmp_path) not in (before, None)

    # A judge's code may have changed, as any function's of the user's.
    assert key_of(tmp_path, verify={"method": "regex", "pattern": "2"}) is not None
    assert key_of(tmp_path, verify={"method": "mine:judge"}) is None


def released(run: Run) -> str:
    rows = pa.table({"x": [1]})
    claim = claim_version(run.output, run.name)
    entry = write_part(run.output, claim.folder, 0, rows.schema, [rows])
    return publish(run.output, claim, rows.schema, [entry], ManifestFields(content_digest="1")).version


def test_what_was_made_while_a_model_changed_is_not_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPE_CACHE", str(tmp_path / "cache"))
    model = Path(tiny_models.make_model(tmp_path / "model"))
    values = {
        "name": "x",
        "pool": {"path": str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1+1?", "response": "2"}]))},
        "target": {"model": str(model)},
        "output": {"path": str(tmp_path / "out")},
    }
    with new_run(Config.model_validate(values)) as run:
        key = release_key(run)
        assert key is not None
        prepared = Prepared(plan_prepare(run.config, "r", run.workspace).prepare_id, 1)
        outcome = Outcome(version=released(run))
        there = (model / "tokenizer_config.json").read_text()
        (model / "tokenizer_config.json").write_text(f"{there} ")
        remember_release(run, key, run.config, prepared, outcome)
        assert unchanged_release(run, key) is None
        (model / "tokenizer_config.json").write_text(there)
        remember_release(run, key, run.config, prepared, outcome)
        found = unchanged_release(run, key)
        assert found is not None
        assert found.version == outcome.version
