"""What is wrong with a version is found and named; hostile manifests and data files are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.errors import UserError
from grape_service.release.load import load
from grape_service.release.verify import render_text, verify
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows

FOLDER = "math-sft/versions/v0001"


def test_a_whole_version_has_no_problems(any_storage: Storage) -> None:
    publish_version(any_storage)
    release = load(f"{any_storage.root}/math-sft")
    assert verify(release) == []
    assert "is whole: 2 data files, 80 rows" in render_text(release, [])


def test_every_problem_is_named(any_storage: Storage) -> None:
    publish_version(any_storage, parts=[rows(i * 10, 10) for i in range(4)])
    release = load(f"{any_storage.root}/math-sft")
    part = any_storage.read(f"{FOLDER}/data/part-00001.parquet")
    flipped = bytearray(part)
    flipped[100] ^= 1
    any_storage.delete(f"{FOLDER}/data/part-00000.parquet")
    any_storage.write(f"{FOLDER}/data/part-00001.parquet", bytes(flipped))
    any_storage.write(f"{FOLDER}/data/part-00002.parquet", b"short")
    any_storage.write(f"{FOLDER}/data/extra.parquet", b"extra")
    any_storage.write(f"{FOLDER}/README.md", b"# other")
    found = {problem.path: problem.problem for problem in verify(release)}
    assert sorted(found) == [
        "README.md",
        "data/extra.parquet",
        "data/part-00000.parquet",
        "data/part-00001.parquet",
        "data/part-00002.parquet",
    ]
    assert found["data/part-00000.parquet"] == "is missing"
    assert "has other contents: sha256" in found["data/part-00001.parquet"]
    assert found["data/part-00002.parquet"].startswith("has 5 bytes, not")
    assert found["data/extra.parquet"] == "is in the folder but not in the manifest"
    assert "5 problems" in render_text(release, verify(release))
    with pytest.raises(UserError, match=r"part-00000\.parquet is missing: see `grape datasets verify"):
        _ = release.dataset


def test_a_file_of_another_version_is_not_read_for_its_own(any_storage: Storage) -> None:
    publish_version(any_storage)
    publish_version(any_storage, parts=[rows(100, 40), rows(500, 41)])
    release, other = load(f"{any_storage.root}/math-sft@v0001"), "math-sft/versions/v0002"
    release.dataset.count_rows()
    any_storage.write(f"{FOLDER}/data/part-00001.parquet", any_storage.read(f"{other}/data/part-00001.parquet"))
    sentence = r"part-00001\.parquet is not the file that its manifest names \([\d,]+ bytes, not [\d,]+\): see"
    again = load(f"{any_storage.root}/math-sft@v0001")
    for read in (again.to_table, lambda: list(again.batches()), again.to_hf):
        with pytest.raises(UserError, match=sentence):
            read()


def test_files_that_may_be_read_and_not_listed_are_asked_for_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_version(Storage(str(tmp_path)))

    def refused(self: Storage, prefix: str = "") -> None:
        raise UserError("these credentials may not list it")

    monkeypatch.setattr(Storage, "list", refused)
    release = load(f"{tmp_path}/math-sft@v0001")
    assert release.to_table().num_rows == 80
    (tmp_path / FOLDER / "data/part-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"part-00000\.parquet is missing: see"):
        load(f"{tmp_path}/math-sft@v0001").to_table()


def _change(storage: Storage, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = storage.read_json(f"{FOLDER}/manifest.json")
    change(manifest)
    storage.write(f"{FOLDER}/manifest.json", json.dumps(manifest).encode())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m["files"][0].update(path="../../../secret.parquet"), "is not a data file of a version"),
        (lambda m: m["files"][0].update(path="/etc/passwd"), "is not a data file of a version"),
        (lambda m: m["files"][0].update(path="data/part-00000.parquet\n"), "is not a data file of a version"),
        (lambda m: m["documents"][0].update(path="../claim.json"), "is not a document of a version"),
        (lambda m: m["files"].append(m["files"][0]), "a data file is listed twice"),
        (lambda m: m["files"][0].update(sha256="0"), "files.0.sha256"),
        (lambda m: m["files"][0].update(size=-1), "files.0.size"),
        (lambda m: m["files"][0].update(rows="many"), "files.0.rows"),
        (lambda m: m.update(format=99), "written by a newer grape-service .its format is 99"),
        (lambda m: m.update(name="other"), "says it is 'other' 'v0001'"),
        (lambda m: m.update(version="v0007"), "says it is 'math-sft' 'v0007'"),
        (lambda m: m.pop("columns"), "columns: Field required"),
        (lambda m: m["columns"].pop(3), "column 'messages' is not in the manifest"),
        (lambda m: m["columns"][0].update(type="int32"), "column 'prompt_id' is string, not int32"),
    ],
)
def test_hostile_manifests_are_refused_with_one_sentence(
    tmp_path, change: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    storage = Storage(str(tmp_path))
    publish_version(storage, parts=[rows(0, 3)])
    _change(storage, change)
    with pytest.raises(UserError, match=sentence) as refused:
        _ = load(f"{tmp_path}/math-sft").dataset
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    "data", [b"", b"not json", b"[]", b"null", b"[" * 100_000, b'{"format": 1, "files": ' + b"[" * 5000]
)
def test_manifests_that_are_none_are_refused(tmp_path, data: bytes) -> None:
    storage = Storage(str(tmp_path))
    publish_version(storage, parts=[rows(0, 3)])
    storage.write(f"{FOLDER}/manifest.json", data)
    with pytest.raises(UserError, match=r"manifest\.json is"):
        load(f"{tmp_path}/math-sft")


def test_a_huge_manifest_is_not_even_read(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    publish_version(storage, parts=[rows(0, 3)])
    with open(tmp_path / FOLDER / "manifest.json", "wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(UserError, match="such a file has at most 67108864"):
        load(f"{tmp_path}/math-sft")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PAR1",
        b"PAR1" + b"\xff" * 100 + b"\xff\xff\xff\x7fPAR1",
        b"PAR1" + b"\0" * 64 + b"\x10\0\0\0PAR1",
        b"x" * 5000,
    ],
)
def test_hostile_parquet_is_refused_with_one_sentence(any_storage: Storage, data: bytes) -> None:
    publish_version(any_storage, parts=[rows(0, 3)])
    any_storage.write(f"{FOLDER}/data/part-00000.parquet", data)
    _change(any_storage, lambda manifest: manifest["files"][0].update(size=len(data)))
    release = load(f"{any_storage.root}/math-sft")
    with pytest.raises(UserError, match=r"part-00000\.parquet is not readable Parquet") as refused:
        _ = release.dataset
    assert "\n" not in str(refused.value)
    assert len(verify(release)) == 1


def test_parquet_with_other_columns_or_rows_is_named(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    publish_version(storage, parts=[rows(0, 3), rows(3, 3)])
    file = tmp_path / FOLDER / "data/part-00001.parquet"

    for table, problem in (
        (pa.table({"x": [1]}), "holds 1 rows, not 3"),
        (pa.table({"x": [1, 2, 3]}), "column 'prompt_id'"),
    ):
        pq.write_table(table, file)
        data = file.read_bytes()
        _change(
            storage,
            lambda m, data=data: m["files"][1].update(size=len(data), sha256=hashlib.sha256(data).hexdigest()),
        )
        (found,) = verify(load(f"{tmp_path}/math-sft"))
        assert problem in found.problem
