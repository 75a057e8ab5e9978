"""A workspace that a newer version of grape-service wrote is refused in a sentence, by whatever reads it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from grape_service.cli.app import app
from grape_service.config.loading import parse_config
from grape_service.errors import UserError
from grape_service.estimate.finding import Finding
from grape_service.estimate.preflight import check
from grape_service.keys import digest_of
from grape_service.prepare.result import Prepared
from grape_service.release.candidates import open_scored_pool
from grape_service.release.load import load
from grape_service.release.rejects import rejects_of_config, rejects_of_release
from grape_service.rows.columns import FAILURE, SCORE, SHARD
from grape_service.rows.statistics import STATISTICS
from grape_service.storage.storage import Storage
from grape_service.storage.workspace import FORMAT, PATH, begin_workspace, open_workspace
from grape_service.ui.folder import Folder
from grape_service.ui.left_out import left_out
from grape_service.ui.prompt import opened_pool
from grape_service.ui.runs import runs_of
from tests.grape_service.release.made_up import publish_version
from workers.run import new_run

pytestmark = pytest.mark.quick
NEWER = f"was written by a newer grape-service (its format is {FORMAT + 1}, this one reads {FORMAT})"


def test_a_workspace_gets_its_format_once(any_storage: Storage) -> None:
    assert open_workspace(any_storage.root, any_storage.options).root == any_storage.root
    begin_workspace(any_storage)
    begin_workspace(any_storage)
    assert any_storage.read_json(PATH) == {"format": FORMAT}
    any_storage.write_json(PATH, {"format": FORMAT - 1})  # of an older version, which this one reads
    begin_workspace(any_storage)
    assert any_storage.read_json(PATH) == {"format": FORMAT}
    any_storage.write_json(PATH, {"format": FORMAT + 1})
    for use in (begin_workspace, lambda workspace: open_workspace(workspace.root, workspace.options)):
        with pytest.raises(UserError, match="was written by a newer grape-service"):
            use(any_storage)
    any_storage.write_json(PATH, [])
    with pytest.raises(UserError, match="does not hold a format"):
        begin_workspace(any_storage)


def test_whatever_reads_a_newer_workspace_says_so(tmp_path: Path) -> None:
    output, workspace = Storage(str(tmp_path / "out")), Storage(str(tmp_path / "out" / ".grape"))
    parents = {"workspace": workspace.root, "prepare_id": "p", "run_id": "r"}
    publish_version(output, parents=parents)
    workspace.write_json("prepared/p/plan.json", {"pool": "pool"})
    prepared = Prepared("p", 1).to_json()
    workspace.write_json("prepared/p/prepared.json", {**prepared, "of_next_year": 1})
    release, folder = load(f"{output.root}/math-sft"), Folder(output.root)
    for read in (lambda: open_scored_pool(release), lambda: opened_pool(folder, release)):
        with pytest.raises(UserError, match="'of_next_year', which this version of grape-service does not know"):
            read()
    workspace.write_json("prepared/p/prepared.json", prepared)
    assert open_scored_pool(release) is not None
    run_id = "20261130T122419-12d3ae3e"
    workspace.write_json(f"runs/{run_id}/end.json", {"state": "succeeded"})
    assert CliRunner().invoke(app, ["runs", "show", run_id, "--path", output.root]).exit_code == 0
    workspace.write_json(PATH, {"format": FORMAT + 1})
    config = parse_config(
        {"name": "x", "pool": {"path": "pool"}, "target": {"model": "m"}, "output": {"path": output.root}}
    )
    for read in (
        lambda: open_scored_pool(release),
        lambda: opened_pool(folder, release),
        lambda: rejects_of_release(release),
        lambda: rejects_of_config(config),
        lambda: new_run(config).__enter__(),
    ):
        with pytest.raises(UserError) as refused:
            read()
        assert NEWER in str(refused.value)
    assert NEWER in runs_of(folder)[2]
    for words in (
        ["list", output.root],
        ["show", run_id, "--path", output.root],
        ["logs", run_id, "--path", output.root],
    ):
        done = CliRunner().invoke(app, ["runs", *words])
        assert NEWER in str(done.exception), done.output
    no_models: Any = None
    seen = {one.what: one for one in islice(check(config, no_models), 2) if isinstance(one, Finding)}
    assert (seen["output"].status, seen["workspace"].status) == ("ok", "error")
    assert NEWER in seen["workspace"].detail
    assert NEWER in left_out(folder, release)[1]
    assert workspace.folders("runs") == [run_id], "nothing was written"


def described(kind: Any) -> Any:
    """The fields of a dataclass that is stored as JSON, at every depth."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return {item.name: described(hints[item.name]) for item in fields(kind)}
    return [str(kind), *(described(one) for one in get_args(kind))]


def test_what_is_stored_changes_with_the_format() -> None:
    """What code of before reads in a workspace that a manifest names: a prepared pool, shards, scores, failures.

    A change of it fails here. Raise FORMAT in storage/workspace.py where that code could not read it any more; then
    write down what is stored now.
    """
    tables = {name: schema.to_string() for name, schema in (("shard", SHARD), ("score", SCORE), ("failure", FAILURE))}
    stored = {"prepared": described(Prepared), "tables": tables, "statistics": list(STATISTICS)}
    assert (FORMAT, digest_of(stored, 16)) == (1, "85a9320658435fd2")
