"""Releases read with the tools that teams already use, over S3 and from disk."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pytest
import torch

import grape_service
from grape_service.errors import UserError
from grape_service.release.load import Release, load
from grape_service.storage.s3 import RetryingS3
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import SCHEMA, publish_version, rows
from tests.seaweed import KEY, REGION, SECRET, SeaweedServer

pytestmark = pytest.mark.alone

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


def test_a_path_is_a_reference_too(tmp_path: Path) -> None:
    publish_version(Storage(str(tmp_path)), parts=PARTS)
    assert grape_service.load(tmp_path / "math-sft@v0001").to_table().num_rows == EXPECTED.num_rows
    with pytest.raises(UserError, match=r"has lost a slash.*as text"):
        grape_service.load(Path("s3://team/datasets/math-sft"))


def test_a_column_that_does_not_exist_gets_the_near_ones(release: Release) -> None:
    for read in (
        lambda: release.to_table(["grape_scores"]),
        lambda: list(release.batches(["grape_scores"])),
        lambda: release.to_pandas(filter=pc.field("grape_scores") > 0),
        lambda: list(release.batches(["source"], pc.field("grape_scores") > 0)),
    ):
        with pytest.raises(UserError, match=r"has no column 'grape_scores'.*did you mean 'grape_score'"):
            read()
    with pytest.raises(UserError, match=r"has no column 'zzz'; there are: prompt_id, candidate_id"):
        release.to_table(["zzz"])
    with pytest.raises(UserError, match="the filter does not fit"):
        release.to_table(filter=pc.field("source") > 1)
    assert release.to_table(["source"], pc.field("grape_score") > 1e9).num_rows == 0


class Rows(torch.utils.data.Dataset):
    """A release as torch's map-style dataset; each worker opens its files itself."""

    def __init__(self, release: Release):
        self.release = release

    def __len__(self) -> int:
        return self.release.row_count // 50

    def __getitem__(self, place: int) -> list[str]:
        rows = pa.array(range(50 * place, 50 * place + 50))
        return self.release.dataset.take(rows, columns=["prompt_id"])["prompt_id"].to_pylist()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_read_it(s3_release: Release, start: str) -> None:
    assert s3_release.to_table(["prompt_id"]).num_rows == EXPECTED.num_rows  # connections that a fork cannot use
    loader = torch.utils.data.DataLoader(
        Rows(s3_release), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=60
    )
    read = [prompt for batch in loader for prompt in batch]
    assert read == EXPECTED["prompt_id"].to_pylist()
