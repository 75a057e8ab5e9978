import os

import pytest

from grape_service.errors import UserError
from grape_service.pool.files import open_pool_file
from grape_service.pool.listing import list_files
from tests.prepared_pools import write_jsonl

pytestmark = pytest.mark.quick


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jsonl", "a.JSONL.gz", "deep/er/c.parquet", "d.json", "e.jsonl.zst"):
        write_jsonl(tmp_path / "pool" / name, [{"x": 1}])
    for name in ("README.md", "_SUCCESS", ".hidden/x.jsonl", "_temporary/y.jsonl", "LICENSE", "notes.txt"):
        write_jsonl(tmp_path / "pool" / name, [b""])
    return tmp_path / "pool"


def names(files, folder):
    return [os.path.relpath(file.url, folder) for file in files]


def test_a_folder_gives_its_data_files_at_any_depth(folder):
    files = list_files(str(folder), {})
    assert names(files, folder) == ["a.JSONL.gz", "b.jsonl", "d.json", "deep/er/c.parquet", "e.jsonl.zst"]
    assert [file.format for file in files] == [".jsonl.gz", ".jsonl", ".json", ".parquet", ".jsonl.zst"]
    assert files == list_files(f"file://{folder}/", {})


def test_globs_and_single_files(folder):
    assert names(list_files(f"{folder}/*.json*", {}), folder) == ["b.jsonl", "d.json", "e.jsonl.zst"]
    assert names(list_files(f"{folder}/**/*.parquet", {}), folder) == ["deep/er/c.parquet"]
    assert names(list_files(f"{folder}/b.jsonl", {}), folder) == ["b.jsonl"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    path = write_jsonl(tmp_path / "a[1].jsonl", [{}])
    assert [file.url for file in list_files(str(path), {})] == [str(path)]


def test_a_relative_path_is_made_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [file.url for file in list_files("b.jsonl", {})] == [str(folder / "b.jsonl")]


def test_any_file_system_that_fsspec_knows_will_do():
    import fsspec

    with fsspec.open("memory://pool-files/a.jsonl", "wb") as file:
        file.write(b"{}\n")
    (found,) = list_files("memory://pool-files", {})
    assert found.url == "memory:///pool-files/a.jsonl"
    assert open_pool_file(found, {}).read() == b"{}\n"


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("missing", "does not exist"),
        ("missing/*.jsonl", "has no file that ends with"),
        ("empty", "has no file that ends with"),
        ("bad", "table.xlsx' is none of .jsonl, .jsonl.gz"),
        ("bad/table.xlsx", "table.xlsx' is none of .jsonl, .jsonl.gz"),
    ],
)
def test_a_pool_that_is_not_there_is_an_error(tmp_path, path, sentence):
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "bad" / "table.xlsx", [b"a,b"])
    with pytest.raises(UserError, match=sentence):
        list_files(str(tmp_path / path), {})


def test_an_address_of_an_unknown_kind_is_an_error():
    with pytest.raises(UserError, match="'nosuch://x/y' cannot be opened"):
        list_files("nosuch://x/y", {})


def test_a_file_that_changed_or_went_since_it_was_listed_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"x": 1}])
    (file,) = list_files(str(path), {})
    write_jsonl(path, [{"x": 2}, {"x": 3}])
    with pytest.raises(UserError, match="changed while the run was reading it"):
        open_pool_file(file, {})
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl' is gone"):
        open_pool_file(file, {})
