"""Publishing versions: claims, parts, the manifest, tags of a new version."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.errors import StageError, UserError
from grape_service.release.claim import claim_version
from grape_service.release.load import load
from grape_service.release.manifest import ManifestFields
from grape_service.release.writer import find_identical, is_whole, publish, write_part
from grape_service.storage.parquet import row_bytes, row_groups
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import SCHEMA, batches, publish_version, rows


def test_a_version_published_is_read_back(any_storage: Storage) -> None:
    version = publish_version(any_storage, counts={"rows_in": 80})
    assert version.version == "v0001"
    assert version.tags == ["latest"]
    release = load(f"{any_storage.root}/math-sft")
    expected = pa.concat_tables([rows(0, 50), rows(50, 30)])
    assert release.dataset.to_table().equals(expected)
    assert release.row_count == 80
    assert release.manifest.counts == {"rows_in": 80}
    assert release.manifest.loss_tokens == sum(sum(mask) for mask in expected["loss_mask"].to_pylist())
    assert release.manifest.tokens == sum(len(ids) for ids in expected["input_ids"].to_pylist())
    for entry in [*release.manifest.files, *release.manifest.documents]:
        data = any_storage.read(f"{release.folder}/{entry.path}")
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256)
    assert release.tags() == ["latest"]
    assert str(any_storage.root) in release.reference


def test_versions_count_up_and_unchanged_content_is_found(any_storage: Storage) -> None:
    assert find_identical(any_storage, "math-sft", "a" * 64) is None
    for digest in ("a", "b", "a"):
        publish_version(any_storage, parts=[rows(0, 3)], digest=digest * 64)
    assert find_identical(any_storage, "math-sft", "a" * 64) == "v0003"
    assert find_identical(any_storage, "math-sft", "b" * 64) == "v0002"
    assert find_identical(any_storage, "math-sft", "c" * 64) is None
    assert find_identical(any_storage, "other", "a" * 64) is None
    any_storage.delete("math-sft/catalog.json")
    assert find_identical(any_storage, "math-sft", "b" * 64) == "v0002"


def test_content_of_a_version_that_is_not_whole_is_not_found(any_storage: Storage) -> None:
    for _ in range(3):
        publish_version(any_storage, parts=[rows(0, 3)], digest="a" * 64)
    any_storage.delete("math-sft/versions/v0003/manifest.json")  # as by a gc that was killed
    assert find_identical(any_storage, "math-sft", "a" * 64) == "v0002"
    (part,) = any_storage.list("math-sft/versions/v0002/data")
    any_storage.write(part.path, b"another file")
    assert find_identical(any_storage, "math-sft", "a" * 64) == "v0001"
    assert not is_whole(any_storage, "math-sft", "v0001", "b" * 64)
    (part,) = any_storage.list("math-sft/versions/v0001/data")
    data = any_storage.read(part.path)
    any_storage.write(part.path, data[:50] + bytes([data[50] ^ 1]) + data[51:])  # of the same size
    assert find_identical(any_storage, "math-sft", "a" * 64) is None
    any_storage.write(part.path, data)
    assert find_identical(any_storage, "math-sft", "a" * 64) == "v0001"
    any_storage.delete_folder("math-sft/versions/v0001/data")
    assert find_identical(any_storage, "math-sft", "a" * 64) is None


def test_bytes_do_not_depend_on_batches(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    table = rows(0, 400)
    entries = [
        write_part(storage, f"x/versions/v000{i + 1}", 0, SCHEMA, batches(table, size))
        for i, size in enumerate((1, 7, 400))
    ]
    assert len({entry.sha256 for entry in entries}) == 1


@pytest.mark.parametrize("size", [1, 13, 100, 500])
def test_row_groups_end_with_the_row_that_reaches_the_target(size: int) -> None:
    table = rows(0, 500)
    sizes = row_bytes(table)
    groups = list(row_groups(batches(table, size), SCHEMA, 10_000))
    assert pa.concat_tables(groups).equals(table)
    end = 0
    for group in groups[:-1]:
        start, end = end, end + group.num_rows
        assert sizes[start:end].sum() >= 10_000 > sizes[start : end - 1].sum()
    assert sizes[end:].sum() < 10_000 or groups[-1].num_rows > 0
    assert [g.num_rows for g in groups] == [g.num_rows for g in row_groups([table], SCHEMA, 10_000)]


def test_row_bytes_follow_the_data() -> None:
    table = pa.table(
        {
            "i": pa.array([1, 2, None], pa.int32()),
            "s": ["ab", None, "abcd"],
            "l": pa.array([[1.0], [], None], pa.list_(pa.float32())),
            "m": [[{"r": "x", "c": "yz"}, {"r": "", "c": "q"}], [], None],
        }
    )
    assert row_bytes(table).tolist() == [1 + 4 + 2 + 4 + 4, 1 + 4, 1 + 4 + 4]
    assert np.array_equal(row_bytes(table.slice(1)), row_bytes(table)[1:])


def test_row_groups_are_bounded(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    entry = write_part(storage, "x/versions/v0001", 0, SCHEMA, (rows(i, 500, tokens=800) for i in range(0, 9000, 500)))
    file = pq.ParquetFile(f"{tmp_path}/x/versions/v0001/{entry.path}")
    assert entry.rows == file.metadata.num_rows == 9000
    assert file.metadata.num_row_groups > 3
    assert file.metadata.row_group(0).column(4).compression == "ZSTD"


def test_an_empty_version_is_a_version(any_storage: Storage) -> None:
    publish_version(any_storage, parts=[])
    release = load(f"{any_storage.root}/math-sft@v0001")
    assert release.row_count == 0
    publish_version(any_storage, parts=[rows(0, 0), rows(0, 2)])
    assert load(f"{any_storage.root}/math-sft@v0002").dataset.count_rows() == 2


def test_misaligned_token_columns_are_a_bug(tmp_path) -> None:
    table = rows(0, 3)
    short = table.set_column(
        SCHEMA.get_field_index("labels"), SCHEMA.field("labels"), pa.array([[1]] * 3, pa.list_(pa.int32()))
    )
    with pytest.raises(AssertionError, match="labels is not aligned"):
        write_part(Storage(str(tmp_path)), "x/versions/v0001", 0, SCHEMA, [short])


def test_missing_foreign_and_double_files_are_not_published(any_storage: Storage) -> None:
    fields = ManifestFields(content_digest="a" * 64)
    with claim_version(any_storage, "math-sft") as claim:
        entry = write_part(any_storage, claim.folder, 0, SCHEMA, [rows(0, 2)])
        with pytest.raises(StageError, match="have one name"):
            publish(any_storage, claim, SCHEMA, [entry, entry], fields)
        any_storage.write(f"{claim.folder}/data/part-00001.parquet", b"foreign")
        with pytest.raises(StageError, match=r"part-00001\.parquet has 7 bytes where no were written"):
            publish(any_storage, claim, SCHEMA, [entry], fields)
        any_storage.delete(f"{claim.folder}/data/part-00001.parquet")
        any_storage.delete(f"{claim.folder}/{entry.path}")
        with pytest.raises(StageError, match=r"part-00000\.parquet has no bytes"):
            publish(any_storage, claim, SCHEMA, [entry], fields)
    with pytest.raises(UserError, match="has no version v0001"):
        load(f"{any_storage.root}/math-sft@v0001")
    assert any_storage.read_json("math-sft/versions/v0001/claim.json")["state"] == "abandoned"
    assert publish_version(any_storage).version == "v0002"


def test_a_claim_that_was_taken_away_publishes_nothing(any_storage: Storage) -> None:
    with claim_version(any_storage, "math-sft") as claim:
        any_storage.write_json(f"{claim.folder}/claim.json", {"writer": "gc", "state": "burned"})
        with pytest.raises(StageError, match="was taken away"):
            publish(any_storage, claim, SCHEMA, [], ManifestFields(content_digest="a" * 64))
    assert not any_storage.exists(f"{claim.folder}/manifest.json")
    assert any_storage.read_json(f"{claim.folder}/claim.json")["state"] == "burned"


def test_secrets_of_a_config_never_reach_the_manifest(any_storage: Storage) -> None:
    config = {
        "storage": {"endpoint_url": "http://u:hunter2@host", "client_kwargs": {"aws_secret_access_key": "hunter2"}},
        "notify": {"webhook": "https://hooks.example.com/hunter2"},
        "train": {"sft": {"environment": {"HF_TOKEN": "hunter2", "WANDB_API_KEY": "hunter2", "SEED": "1"}}},
        "render": {"max_tokens": 4096, "tokenizer": "x"},
    }
    version = publish_version(any_storage, config=config)
    text = any_storage.read(f"math-sft/versions/{version.version}/manifest.json").decode()
    assert "hunter2" not in text
    shown = load(version.reference).manifest.config
    assert shown["render"] == config["render"]
    assert shown["train"]["sft"]["environment"]["SEED"] == "1"
    assert shown["storage"]["endpoint_url"] == "http://***@host"
