"""croissant.json: mlcroissant, the reference implementation, takes it and reads the rows through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlcroissant
import orjson
import pyarrow as pa
import pytest
import yaml

from grape_service.release.load import load
from grape_service.release.manifest import CodeVersion, Parents, PolicyUse, PoolFile
from grape_service.release.verify import verify
from grape_service.release.writer import write_part
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows

PARENTS = Parents(
    pool=[PoolFile(path="s3://team/pool/a.jsonl", size=10, etag="e1")],
    prompts=[PoolFile(path="s3://team/pool/a.jsonl", size=10), PoolFile(path="s3://team/prompts/q.jsonl", size=3)],
    policies=[PolicyUse(role="target", policy_id="m-1", model="org/m", revision="abc", weights_digest="d")],
    code=CodeVersion(package_version="1.0"),
    run_id="r1",
)


@pytest.fixture
def version(tmp_path: Path) -> tuple[Storage, dict[str, Any]]:
    storage = Storage(str(tmp_path))
    published = publish_version(storage, parents=PARENTS, config={"select": {"method": "grape", "keep": 1}})
    text = storage.read(f"math-sft/versions/{published.version}/croissant.json")
    return storage, orjson.loads(text)


def test_mlcroissant_takes_it_and_reads_the_rows(version: tuple[Storage, dict[str, Any]]) -> None:
    storage, value = version
    folder = Path(storage.root, "math-sft", "versions", "v0001")
    dataset = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    assert dataset.metadata.issues.errors == set()
    assert dataset.metadata.name == "math-sft"
    release = load(f"{storage.root}/math-sft@v0001")
    found = list(dataset.records("rows"))
    assert len(found) == 80
    for row, wanted in zip(found, release.dataset.to_table().to_pylist(), strict=True):
        assert row["rows/prompt_id"] == wanted["prompt_id"].encode()
        assert row["rows/input_ids"] == wanted["input_ids"]
        assert row["rows/loss_mask"] == wanted["loss_mask"]
        assert row["rows/grape_score"] == wanted["grape_score"]
        contents = [message["rows/messages/content"] for message in row["rows/messages"]]
        assert contents == [message["content"].encode() for message in wanted["messages"]]
    hashes = {one["@id"]: one["sha256"] for one in value["distribution"] if "sha256" in one}
    assert hashes == {entry.path: entry.sha256 for entry in release.manifest.files}
    assert verify(release) == []


def test_it_says_what_the_version_was_derived_from(version: tuple[Storage, dict[str, Any]]) -> None:
    _, value = version
    derived = {one["@id"] for one in value["prov:wasDerivedFrom"]}
    assert derived == {"s3://team/pool/a.jsonl", "s3://team/prompts/q.jsonl", "urn:grape-service:policy:m-1"}
    assert len(value["prov:wasDerivedFrom"]) == 3
    assert "self-distillation" not in value["rai:dataBiases"]
    assert value["rai:dataBiases"].startswith("Winners lean to the target's own family")
    fields = {one["@id"]: one for one in value["recordSet"][0]["field"]}
    assert fields["rows/input_ids"]["dataType"] == "sc:Integer"
    assert fields["rows/input_ids"]["repeated"]
    assert [one["@id"] for one in fields["rows/messages"]["subField"]] == [
        "rows/messages/role",
        "rows/messages/content",
    ]
    assert fields["rows/loss_mask"]["dataType"] == "sc:Boolean"
    assert fields["rows/grape_score"]["dataType"] == "sc:Float"
    assert fields["rows/topic"]["description"] == "A column of the pool."
    assert "license" not in value


def test_licenses_of_the_pool_pass_through(tmp_path: Path) -> None:
    table = rows(0, 3).append_column("license", pa.array(["Apache-2.0", None, "MIT"]))
    entry = write_part(Storage(str(tmp_path)), "x", 0, table.schema, [table])
    assert (entry.model_extra or {})["licenses"] == {"Apache-2.0": 1, "MIT": 1}
    storage = Storage(str(tmp_path / "out"))
    published = publish_version(storage)
    with_licenses = published.manifest.model_copy(update={"files": [entry]})
    from grape_service.release.card import render_card
    from grape_service.release.croissant import render_croissant

    assert orjson.loads(render_croissant(with_licenses, "x"))["license"] == ["Apache-2.0", "MIT"]
    header = yaml.safe_load(render_card(with_licenses).split("---")[1])
    assert header["license"] == ["apache-2.0", "mit"]
