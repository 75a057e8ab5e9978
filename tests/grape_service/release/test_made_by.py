"""What tells versions apart, in the catalog and in what people see of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grape_service.cli.app import app
from grape_service.release.catalog import read_catalog
from grape_service.release.made_by import MadeBy
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows

pytestmark = pytest.mark.quick


def config(**over: Any) -> dict[str, Any]:
    values = {"pool": {"path": "s3://team/pools/math/"}, "target": {"model": "org/m"}}
    return {**values, "select": {"method": "grape", "keep": 1}, "weights": {"method": "pear"}, **over}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    storage = Storage(str(tmp_path))
    publish_version(storage, parts=[rows(0, 20)], config=config())
    publish_version(storage, parts=[rows(0, 30)], config=config(select={"method": "grape", "keep": 2}))
    publish_version(storage, parts=[rows(0, 30)], config=config(select={"method": "rsr", "keep": {"column": "n"}}))
    return tmp_path


def test_each_version_says_what_it_was_made_with_and_what_is_another(folder: Path) -> None:
    first, second, third = read_catalog(Storage(str(folder)), "math-sft")
    assert first.made_by == MadeBy("grape + pear", "1", "org/m", "s3://team/pools/math/")
    assert first.since(None) == ""
    assert second.since(first) == "keep 1 -> 2, +10 rows"
    assert third.since(second) == "method grape + pear -> rsr + pear, keep 2 -> column n"


def test_a_catalog_that_lacks_it_is_completed_from_the_manifests(folder: Path) -> None:
    path = folder / "math-sft" / "catalog.json"
    value = json.loads(path.read_text())
    for entry in value["versions"]:
        del entry["made_by"]
    path.write_text(json.dumps(value))
    assert [entry.made_by.keep for entry in read_catalog(Storage(str(folder)), "math-sft")] == ["1", "2", "column n"]


def test_the_list_shows_it(folder: Path) -> None:
    shown = CliRunner().invoke(app, ["datasets", "list", str(folder)], env={"COLUMNS": "220"}).stdout
    (line,) = [line for line in shown.splitlines() if "v0002" in line]
    for cell in ("grape + pear, keep 2", " m ", "s3://team/pools/math/", "keep 1 -> 2, +10 rows"):
        assert cell in line
    told = json.loads(CliRunner().invoke(app, ["datasets", "list", str(folder), "--json"]).stdout)["versions"]
    assert [one["since"] for one in told][1] == "keep 1 -> 2, +10 rows"
    assert {"method", "keep", "target", "pool"} <= set(told[0])


def test_configs_of_other_programs_are_no_mistake() -> None:
    assert MadeBy.of({"select": 3, "pool": {"path": [{"path": "a/"}, {"path": "b/"}]}}) == MadeBy(pool="a/ and 1 more")
    assert MadeBy.of({}) == MadeBy()
