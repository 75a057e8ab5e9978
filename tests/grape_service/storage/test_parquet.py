"""One way of writing Parquet: the same rows give the same bytes, in row groups of bounded size."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.errors import StageError
from grape_service.storage.parquet import array_of, read_tables, row_groups, write_parquet
from grape_service.storage.storage import Storage

pytestmark = pytest.mark.quick

SCHEMA = pa.schema([("name", pa.string()), ("values", pa.list_(pa.int32()))])


def batches(num_batches: int, rows: int, length: int) -> list[pa.RecordBatch]:
    generator = np.random.default_rng(0)
    return [
        pa.RecordBatch.from_pylist(
            [{"name": f"n{row}", "values": generator.integers(0, 9, length).tolist()} for row in range(rows)],
            schema=SCHEMA,
        )
        for _ in range(num_batches)
    ]


def test_equal_rows_give_equal_bytes(tmp_path):
    storage = Storage(str(tmp_path))
    for name in ("a.parquet", "b.parquet"):
        assert write_parquet(storage, name, SCHEMA, batches(3, 10, 5)) == 30
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_row_groups_are_cut_by_bytes(tmp_path):
    storage = Storage(str(tmp_path))
    given = batches(7, 20, 100)  # about 8 kB each
    write_parquet(storage, "a.parquet", SCHEMA, given, row_group_bytes=20_000)
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        assert file.read().equals(pa.Table.from_batches(given))
    assert sizes == [50, 50, 40]  # each ends with the row that reaches the target
    write_parquet(storage, "a.parquet", SCHEMA, given[:1], row_group_bytes=2_000)
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        assert file.num_row_groups >= 4  # one large batch is cut too


def test_no_rows_are_a_file_with_columns(tmp_path):
    storage = Storage(str(tmp_path))
    assert write_parquet(storage, "a.parquet", SCHEMA, []) == 0
    assert pq.read_schema(tmp_path / "a.parquet").equals(SCHEMA)
    assert list(read_tables(storage, ["a.parquet"])) == []


def test_files_come_back_in_order_and_about_the_size_asked_for(tmp_path):
    storage = Storage(str(tmp_path))
    given = batches(6, 20, 100)
    for number, batch in enumerate(given):
        write_parquet(storage, f"{number}.parquet", SCHEMA, [batch])
    paths = [f"{number}.parquet" for number in range(6)]
    tables = list(read_tables(storage, paths, target_bytes=20_000))
    assert [table.num_rows for table in tables] == [60, 60]
    assert pa.concat_tables(tables).equals(pa.Table.from_batches(given))
    names = list(read_tables(storage, paths, columns=["name"]))
    assert [table.column_names for table in names] == [["name"]]
    assert array_of(names[0], "name").to_pylist()[:2] == ["n0", "n1"]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(StageError, match=r"bad\.parquet"):
        list(read_tables(Storage(str(tmp_path)), ["bad.parquet"]))


def test_row_groups_do_not_depend_on_how_rows_are_cut() -> None:
    schema = pa.schema([pa.field("x", pa.int64())])
    table = pa.table({"x": np.arange(600)}, schema=schema)
    cuts = [[60] * 10, [0, 60, 0, 0, 240, 0, 299, 1, 0], [600], [1] * 600, [0, 0, 599, 0, 1]]
    found = []
    for lengths in cuts:
        starts = np.cumsum([0, *lengths])[:-1]
        batches = [table.slice(int(start), length) for start, length in zip(starts, lengths, strict=True)]
        found.append([group["x"].to_pylist() for group in row_groups(batches, schema, 1000)])
    assert all(groups == found[0] for groups in found)
    assert len(found[0]) > 3
