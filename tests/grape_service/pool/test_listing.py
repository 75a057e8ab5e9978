"""Each entry below a pool's path is read, passed over with its reason, or refused."""

import os

import pytest

from grape_service.errors import UserError
from grape_service.pool.listing import list_files, list_pool, passed_over_text
from grape_service.storage.storage import Storage
from tests.prepared_pools import all_rows, make_config, prepare, write_jsonl
from tests.ray_cluster import free_port

pytestmark = pytest.mark.quick

ROW = [{"prompt": "q", "response": "a"}]


def names(listing, folder):
    return [os.path.relpath(file.url, folder) for file in listing.files]


def reasons(listing):
    return {reason: passed.count for reason, passed in listing.passed_over.items()}


def test_links_to_files_and_folders_are_read_as_in_a_hub_snapshot(tmp_path):
    write_jsonl(tmp_path / "blobs" / "0a1b", [{"prompt": "q", "response": f"a {n}"} for n in range(4)])
    write_jsonl(tmp_path / "elsewhere" / "more.jsonl", [{"prompt": "q", "response": "b"}])
    pool = tmp_path / "snapshots" / "main"
    write_jsonl(pool / "own.jsonl", [{"prompt": "q", "response": "c"}])
    (pool / "linked.jsonl").symlink_to("../../blobs/0a1b")
    (pool / "folder").symlink_to(tmp_path / "elsewhere")
    (pool / "again.jsonl").symlink_to("own.jsonl")
    (pool / "loop").symlink_to(pool)
    listing = list_pool(make_config(pool))
    assert names(listing, pool) == ["folder/more.jsonl", "linked.jsonl", "own.jsonl"]
    assert reasons(listing) == {"the same file as another": 1, "link to a folder above it": 1}
    storage = Storage(str(tmp_path / "workspace"))
    plan, prepared = prepare(make_config(pool), storage)
    assert prepared.rows == 6
    assert prepared.counts()["passed_over"] == plan.passed_over
    assert plan.passed_over["the same file as another"]["examples"] == [str(pool / "again.jsonl")]
    (pool / "linked.jsonl").unlink()
    (pool / "linked.jsonl").symlink_to("../../blobs/gone")
    for path in (pool, f"{pool}/*.jsonl", pool / "linked.jsonl"):
        with pytest.raises(
            UserError, match=r"linked\.jsonl' is a link to '\.\./\.\./blobs/gone', which does not exist"
        ):
            list_pool(make_config(path))


def test_a_web_server_that_is_away_is_not_a_pool_that_does_not_exist():
    url = f"http://127.0.0.1:{free_port()}/pool.jsonl"
    with pytest.raises(UserError, match=rf"pool.path '{url}' is not there or cannot be reached \(.*Cannot connect"):
        list_files(url, {})


def test_what_is_no_data_is_passed_over_with_its_reason(tmp_path):
    pool = tmp_path / "pool"
    for name in ("a.jsonl", "_SUCCESS", "x/.b.jsonl.crc", ".cache/c.jsonl", "_tmp/d.jsonl", ".e.jsonl", "README.md"):
        write_jsonl(pool / name, ROW)
    listing = list_pool(make_config(pool))
    assert names(listing, pool) == ["a.jsonl"]
    assert reasons(listing) == {"marker without rows": 2, "hidden": 3, "notes": 1}
    assert passed_over_text(listing.passed_over) == (
        "3 hidden (.cache, .e.jsonl, …); 2 marker without rows (_SUCCESS, .b.jsonl.crc); 1 notes (README.md)"
    )


def test_what_is_neither_is_refused(tmp_path):
    write_jsonl(tmp_path / "pool" / "a.jsonl", ROW)
    os.mkfifo(tmp_path / "pool" / "b.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl' in the pool is neither a file nor a folder"):
        list_pool(make_config(tmp_path / "pool"))


@pytest.mark.parametrize(("pool", "output"), [("data", "data/out"), ("data", "data"), (".", "data")])
def test_our_own_output_inside_the_pool_is_passed_over(tmp_path, pool, output):
    write_jsonl(tmp_path / "data" / "a.jsonl", ROW)
    write_jsonl(tmp_path / "data" / "versions" / "b.jsonl", ROW)  # a folder of that name is no dataset
    for name in ("versions/v0001/manifest.json", "versions/v0001/report.html", "tags/latest.json"):
        write_jsonl(tmp_path / output / "t" / name, ROW)
    config = make_config(tmp_path / pool, output={"path": str(tmp_path / output)}, workspace=str(tmp_path / "data/ws"))
    write_jsonl(tmp_path / "data" / "ws" / "plan.json", ROW)
    listing = list_pool(config)
    assert names(listing, tmp_path / "data") == ["a.jsonl", "versions/b.jsonl"]
    assert listing.passed_over["output of this service"].count == 4


def test_folders_named_like_columns_give_columns(tmp_path):
    for folder in ("source=gen-a/level=1", "source=gen%20b/level=20", "source=__HIVE_DEFAULT_PARTITION__/level=3"):
        write_jsonl(tmp_path / "pool" / folder / "p.jsonl", [{"prompt": "q", "response": folder}])
    config = make_config(tmp_path / "pool", pool={"where": [{"column": "level", "at_least": 2}]})
    storage = Storage(str(tmp_path / "workspace"))
    _, prepared = prepare(config, storage)
    rows = [(row["source"], row["level"]) for row in all_rows(storage, prepared).to_pylist()]
    assert sorted(rows, key=str) == [("gen b", 20), (None, 3)]
    assert list_files(f"{tmp_path}/pool/source=gen-a/level=1", {})[0].folders == (("source", "gen-a"), ("level", 1))
    assert list_files(f"{tmp_path}/pool/source=g*", {})[0].folders == (("source", "gen b"), ("level", 20))


def test_groups_of_files_that_differ(tmp_path):
    write_jsonl(tmp_path / "a" / "p.jsonl", [{"q": "one", "r": "x", "ok": n, "source": "own"} for n in (0, 1)])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "one", "response": "y", "gen": "m"}])
    groups = [
        {
            "path": f"{tmp_path}/a",
            "columns": {"prompt": "q", "response": "r"},
            "source": "gen-a",
            "where": [{"column": "ok", "equals": 1}],
        },
        {"path": f"{tmp_path}/b.jsonl", "columns": {"source": "gen"}},
    ]
    config = make_config("", pool={"path": groups})
    storage = Storage(str(tmp_path / "workspace"))
    plan, prepared = prepare(config, storage)
    rows = [(row["source"], row["pool_source"], row["ok"]) for row in all_rows(storage, prepared).to_pylist()]
    assert sorted(rows) == [("gen-a", "own", 1), ("m", None, None)]
    assert prepared.prompts == 1
    assert plan.pool == f"{tmp_path}/a, {tmp_path}/b.jsonl"
    assert [(group["path"], group["rows_in"], group["filtered"]) for group in prepared.groups] == [
        (f"{tmp_path}/a", 2, 1),
        (f"{tmp_path}/b.jsonl", 1, 0),
    ]
    groups[1]["columns"] = {"source": "generator"}
    with pytest.raises(UserError, match=r"pool\.path\.1\.columns\.source .*'generator', which no row of"):
        prepare(make_config("", pool={"path": groups}), storage)
    groups[1] = {"path": f"{tmp_path}/a/p.jsonl"}
    with pytest.raises(UserError, match="is in two groups"):
        list_pool(make_config("", pool={"path": groups}))


def test_markers_of_folders_on_s3_are_passed_over(s3_url):
    store = Storage(s3_url)
    store.write("pool/a.jsonl", b'{"prompt": "q", "response": "a"}\n')
    store.write("pool/source=x/b.jsonl", b'{"prompt": "q", "response": "b"}\n')
    store.write("pool/deep_$folder$", b"")
    store.write("pool/_SUCCESS", b"")
    bucket, _, key = s3_url.removeprefix("s3://").partition("/")
    store.fs.call_s3("put_object", Bucket=bucket, Key=f"{key}/pool/empty/", Body=b"")
    store.fs.invalidate_cache()
    listing = list_pool(make_config(f"{s3_url}/pool", output={"path": f"{s3_url}/out"}))
    assert [file.url.removeprefix(s3_url) for file in listing.files] == ["/pool/a.jsonl", "/pool/source=x/b.jsonl"]
    assert listing.files[1].folders == (("source", "x"),)
    assert set(reasons(listing)) == {"marker without rows"}
    assert [file.url for file in list_files(f"{s3_url}/pool/*", {})] == [file.url for file in listing.files]
