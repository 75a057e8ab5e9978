"""Releases read with the tools that teams already use, over S3 and from disk."""

from __future__ import annotations

import pickle
from typing import Any

import duckdb
import fsspec
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pytest

import grape_service
from grape_service.release.load import Release, load
from grape_service.storage.s3 import RetryingS3
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import SCHEMA, publish_version, rows
from tests.seaweed import KEY, REGION, SECRET, SeaweedServer

PARTS = [rows(i * 50, 50) for i in range(4)]
EXPECTED = pa.concat_tables(PARTS)


@pytest.fixture
def release(any_storage: Storage) -> Release:
    publish_version(any_storage, parts=PARTS)
    return grape_service.load(f"{any_storage.root}/math-sft@v0001")


@pytest.fixture
def s3_release(s3_url: str) -> Release:
    publish_version(Storage(s3_url), parts=PARTS)
    return load(f"{s3_url}/math-sft@latest")


def test_dataset_projects_and_filters(release: Release) -> None:
    assert isinstance(release.dataset, pads.Dataset)
    assert release.dataset.schema.names == SCHEMA.names
    found = release.dataset.to_table(columns=["prompt_id", "source"], filter=pc.field("grape_score") > -1)
    expected = EXPECTED.filter(pc.greater(EXPECTED["grape_score"], -1)).select(["prompt_id", "source"])
    assert found.equals(expected)
    assert release.dataset.count_rows() == release.row_count == 200
    again = pickle.loads(pickle.dumps(release))
    assert again.dataset.head(3, columns=["prompt_id"]).equals(EXPECTED.select(["prompt_id"]).slice(0, 3))


def test_projection_and_filter_reach_the_files(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [rows(i * 400, 400, tokens=300) for i in range(4)]
    publish_version(Storage(s3_url), parts=parts)
    fetched: list[int] = []
    call = RetryingS3._call_s3

    async def counted(self: RetryingS3, method: str, *more: Any, **kwargs: Any) -> Any:
        if method == "get_object" and "Range" in kwargs:
            first, last = kwargs["Range"].removeprefix("bytes=").split("-")
            fetched.append(int(last) - int(first) + 1)
        return await call(self, method, *more, **kwargs)

    monkeypatch.setattr(RetryingS3, "_call_s3", counted)

    def bytes_of(**scan: Any) -> int:
        release = load(f"{s3_url}/math-sft")
        fetched.clear()
        release.dataset.to_table(**scan)
        return sum(fetched)

    everything = bytes_of()
    assert everything > sum(entry.size for entry in load(f"{s3_url}/math-sft").manifest.files) * 0.9
    assert bytes_of(columns=["source", "grape_score"]) < everything / 5
    assert bytes_of(filter=pc.field("prompt_id") < "p00000100") < everything / 2


def test_pandas(s3_server: SeaweedServer, s3_release: Release) -> None:
    frame = pd.concat(pd.read_parquet(file, storage_options=s3_server.storage_options) for file in s3_release.files)
    assert frame["prompt_id"].tolist() == EXPECTED["prompt_id"].to_pylist()
    assert frame["input_ids"].iloc[7].tolist() == EXPECTED["input_ids"][7].as_py()


def test_polars(s3_server: SeaweedServer, s3_release: Release) -> None:
    options = {
        "aws_endpoint_url": s3_server.endpoint,
        "aws_access_key_id": KEY,
        "aws_secret_access_key": SECRET,
        "aws_region": REGION,
        "aws_allow_http": "true",
    }
    lazy = pl.scan_parquet(f"{s3_release.path}/data/*.parquet", storage_options=options)
    found = lazy.filter(pl.col("source") == "gen-a").select("prompt_id", "loss_weights").collect()
    expected = EXPECTED.filter(pc.equal(EXPECTED["source"], "gen-a"))
    assert found["prompt_id"].to_list() == expected["prompt_id"].to_pylist()
    assert found["loss_weights"].to_list() == expected["loss_weights"].to_pylist()


def test_duckdb(s3_server: SeaweedServer, s3_release: Release) -> None:
    with duckdb.connect() as connection:
        connection.register_filesystem(fsspec.filesystem("s3", **s3_server.storage_options))
        found = connection.execute(
            "select source, count(*), sum(len(input_ids)) from read_parquet(?) group by source order by source",
            [s3_release.files],
        ).fetchall()
        dataset = s3_release.dataset  # duckdb finds it by this name, and pushes down into it
        assert connection.execute("select count(*) from dataset where truncated").fetchone() == (0,)
    assert [row[0] for row in found] == ["gen-a", "gen-b", "person"]
    assert sum(row[1] for row in found) == 200
    assert sum(row[2] for row in found) == s3_release.manifest.tokens
    assert dataset.count_rows() == 200


def test_hugging_face(release: Release, tmp_path) -> None:
    whole = release.to_hf(cache_dir=str(tmp_path / "cache"))
    assert whole["prompt_id"][:] == EXPECTED["prompt_id"].to_pylist()
    assert whole[3]["messages"] == EXPECTED["messages"][3].as_py()
    first = next(iter(release.to_hf(streaming=True)))
    assert first["input_ids"] == EXPECTED["input_ids"][0].as_py()


def test_hugging_face_by_its_own_means(s3_server: SeaweedServer, s3_release: Release, tmp_path) -> None:
    import datasets

    found = datasets.load_dataset(
        "parquet",
        data_files=f"{s3_release.path}/data/*.parquet",
        storage_options=s3_server.storage_options,
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert found.num_rows == 200
    assert found["candidate_id"][:] == EXPECTED["candidate_id"].to_pylist()


def test_the_card_lets_load_dataset_open_the_folder(tmp_path) -> None:
    import datasets

    publish_version(Storage(str(tmp_path / "sets")), parts=PARTS)
    folder = str(tmp_path / "sets/math-sft/versions/v0001")
    found = datasets.load_dataset(folder, split="train", cache_dir=str(tmp_path / "cache"))
    assert found.num_rows == 200
    assert found["loss_mask"][0] == EXPECTED["loss_mask"][0].as_py()


def test_ray_data(s3_release: Release) -> None:
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        paths = [file.removeprefix("s3://") for file in s3_release.files]
        found = ray.data.read_parquet(paths, filesystem=s3_release.storage.arrow)
        assert (
            sorted(row["prompt_id"] for row in found.select_columns(["prompt_id"]).take_all())
            == EXPECTED["prompt_id"].to_pylist()
        )
    finally:
        if ours:
            ray.shutdown()
