"""`grape init`, `check`, `run`, `rejects` and `explain` on a pool as it is published, with no edit of the config."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from tests.jobs import tiny_job
from tests.published_rollouts import PUBLISHED
from tests.tiny_models import make_model

pytestmark = [pytest.mark.long, pytest.mark.alone]


def test_from_a_published_pool_to_a_release_without_an_edit(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    pool = PUBLISHED["openr1"]
    pool.write(tmp_path / "openr1")
    with tiny_job(tmp_path, model) as job:
        written = job.grape("init", "openr1", "--model", str(model))
        assert written.returncode == 0, written.stderr
        (tmp_path / "grape.yaml").write_text(written.stdout)
        checked = job.grape("check", "grape.yaml", "--json")
        assert checked.returncode == 0, checked.stderr
        found = orjson.loads(checked.stdout)
        assert found["groups"][0]["rows"] == "5"
        assert [row["source"] for row in found["sources"]] == ["cn_contest", "olympiads"]
        assert not [one for one in found["findings"] if one["status"] == "error"]
        done = job.grape("run", "grape.yaml", "--json")
        assert done.returncode == 0, done.stderr[-4000:]
        outcome = orjson.loads(done.stdout)
        assert (outcome["prompts"], outcome["rows"], outcome["rejected"]) == (2, 2, 0)
        assert outcome["counts"]["pool"]["left_out_by_reason"] == {"truncated": 1}
        assert isinstance(outcome["warnings"], list)
        rejects = orjson.loads(job.grape("rejects", "grape.yaml", "--json").stdout)
        assert outcome["rejects"] == rejects["table"]
        assert [(row["reason"], row["text"]) for row in rejects["rows"]] == [("truncated", "Let me")]
        of_release = orjson.loads(job.grape("rejects", outcome["reference"], "--json").stdout)
        assert of_release == rejects
        explained = orjson.loads(job.grape("explain", outcome["reference"], "2+2?", "--json").stdout)
        assert {candidate["kept"] for candidate in explained["candidates"]} == {True, False}
