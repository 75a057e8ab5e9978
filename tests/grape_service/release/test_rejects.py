"""`grape rejects` and `grape rows` on what the real stages wrote."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
import yaml
from typer.testing import CliRunner

from grape_service.cli.app import app
from grape_service.config.loading import load_config
from grape_service.errors import UserError
from grape_service.release.rejects import read_rejects, rejects_of_config
from grape_service.storage.storage import Storage
from tests.grape_service.report.made_releases import make_release
from tests.prepared_pools import prepare, write_jsonl


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    """A config whose pool has been prepared."""
    rows = [{"prompt": f"q {n}", "response": f"a {n}"} for n in range(20)]
    bad = [b'{"prompt": <b>', {"prompt": "q", "response": ""}, rows[3], rows[4]]
    write_jsonl(tmp_path / "pool" / "a.jsonl", [*rows, *bad])
    values = {
        "name": "x",
        "pool": {"path": str(tmp_path / "pool"), "max_reject_share": 1},
        "target": {"model": "m"},
        "output": {"path": str(tmp_path / "out")},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    config = load_config(path)
    prepare(config, Storage(config.workspace_path))
    return path


def test_rejects_of_a_config_with_reason_file_line_and_beginning(config_path: Path) -> None:
    done = CliRunner().invoke(app, ["rejects", str(config_path), "--json"])
    assert done.exit_code == 0, done.output
    found = orjson.loads(done.stdout)
    assert found["by_reason"] == {"duplicate candidate": 2, "broken JSON": 1, "empty response": 1}
    assert found["total"] == 4
    places = {row["reason"]: (row["file"], row["row"], row["text"]) for row in found["rows"]}
    file = f"{config_path.parent}/pool/a.jsonl"
    assert places["broken JSON"] == (file, 20, '{"prompt": <b>')
    assert places["empty response"] == (file, 21, "")
    assert places["duplicate candidate"][2] in ("a 3", "a 4")
    shown = CliRunner().invoke(app, ["rejects", str(config_path), "--reason", "broken JSON"], env={"COLUMNS": "300"})
    assert f"{file}:21" in shown.stdout
    assert "duplicate" not in shown.stdout.partition("1 of 1 rows")[2]
    elsewhere = CliRunner().invoke(app, ["rejects", str(config_path), "--set", "pool.path=elsewhere"])
    assert "the pool 'elsewhere' has no rejects" in str(elsewhere.exception)
    release = CliRunner().invoke(app, ["rejects", "out/math-sft@v0001", "--set", "pool.path=elsewhere"])
    assert "--set overrides a key of a config, and out/math-sft@v0001 is a release" in str(release.exception)


def test_a_reason_that_is_none_and_a_pool_that_was_never_prepared_are_errors(config_path: Path) -> None:
    config = load_config(config_path)
    with pytest.raises(UserError, match="no row was rejected with the reason 'x'; there are 'duplicate candidate'"):
        read_rejects(rejects_of_config(config), "x", 5)
    other = config.model_copy(update={"pool": config.pool.model_copy(update={"path": "elsewhere"})})
    with pytest.raises(UserError, match="the pool 'elsewhere' has no rejects"):
        rejects_of_config(other)


def test_rows_of_a_release_by_source_id_and_words(tmp_path: Path) -> None:
    release = make_release(tmp_path, "one", lambda prompt, place: -1.0 - place, num_prompts=12)

    def rows(*arguments: str) -> dict:
        done = CliRunner().invoke(app, ["rows", release.reference, "--json", *arguments])
        assert done.exit_code == 0, done.output
        return orjson.loads(done.stdout)

    found = rows("--limit", "2")
    assert (found["reference"], found["total"], len(found["rows"])) == (release.reference, 12, 2)
    first = found["rows"][0]
    assert (first["prompt_id"], first["prompt"], first["response"]) == ("p000", "question p000", "answer c0")
    assert first["grape_score"] == -1.0
    of_nobody = CliRunner().invoke(app, ["rows", release.reference, "--json", "--source", "s1"])
    assert "has no row of the source 's1'; did you mean 's0'?" in str(of_nobody.exception)
    assert [row["prompt_id"] for row in rows("--prompt", "p01")["rows"]] == ["p010", "p011"]
    assert [row["prompt_id"] for row in rows("--prompt", "question p004")["rows"]] == ["p004"]
    shown = CliRunner().invoke(app, ["rows", release.reference, "--limit", "1"], env={"COLUMNS": "200"})
    assert "question p000" in shown.stdout
    assert "1 of 12 rows" in shown.stdout
