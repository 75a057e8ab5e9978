"""Files of the kinds that pools are published in give the same rows; what is no UTF-8 is told."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.errors import UserError
from grape_service.storage.storage import Storage
from tests.prepared_pools import all_rejects, all_rows, make_config, prepare

ROWS = [{"prompt": f'q {n // 2}, "quoted"\nin two lines', "response": f"a {n} ä", "level": str(n)} for n in range(40)]


def write_csv(path: Path, ending: str = "") -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
        file.write(ending)


def write_arrow(folder: Path, opened) -> None:
    table = pa.Table.from_pylist(ROWS)
    folder.mkdir()
    with opened(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (folder / "dataset_info.json").write_text("{}")


def lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


KINDS = {
    "p.ndjson": lambda path: path.write_text(lines()),
    "p.ndjson.gz": lambda path: path.write_bytes(gzip.compress(lines().encode())),
    "p.csv": write_csv,
    "p.csv.gz": lambda path: (write_csv(path), path.write_bytes(gzip.compress(path.read_bytes()))),
    "bom.csv": lambda path: (write_csv(path), path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())),
    "data.json": lambda path: path.write_text(json.dumps({"data": ROWS, "version": 1}, indent=1)),
    "line.json": lambda path: path.write_text(json.dumps({"data": ROWS})),
    "viewer.json": lambda path: path.write_text(
        json.dumps({"features": [], "rows": [{"row_idx": n, "row": row} for n, row in enumerate(ROWS)]})
    ),
    "saved": lambda path: write_arrow(path, pa.ipc.new_stream),
    "arrow-file": lambda path: write_arrow(path, pa.ipc.new_file),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    (tmp_path / "p.jsonl").write_text(lines())
    KINDS[name](tmp_path / name)
    expected, found = (Storage(str(tmp_path / folder)) for folder in ("expected", "found"))
    rows = all_rows(expected, prepare(make_config(tmp_path / "p.jsonl"), expected)[1])
    assert all_rows(found, prepare(make_config(tmp_path / name), found)[1]).equals(rows)
    assert rows.num_rows == 40


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv"])
def test_utf_16_is_told_as_such(tmp_path, name, encoding):
    (tmp_path / name).write_text(lines(), encoding=encoding)
    with pytest.raises(UserError, match=rf"{name}' is UTF-16, and pools are UTF-8: convert it"):
        prepare(make_config(tmp_path / name), Storage(str(tmp_path / "workspace")))


def test_rows_of_a_csv_that_do_not_fit_its_header_are_rejects(tmp_path):
    write_csv(tmp_path / "p.csv", 'one,two\n\nq,"a, b",3,4\nq,,5\n')
    storage = Storage(str(tmp_path / "workspace"))
    config = make_config(tmp_path / "p.csv", pool={"where": [{"column": "level", "at_least": 5}]})
    plan, prepared = prepare(config, storage)
    assert [(row["row"], row["reason"]) for row in all_rejects(storage, plan)] == [
        (40, "row does not fit the header"),
        (41, "row does not fit the header"),
        (42, "missing response"),
    ]
    assert (prepared.rows, prepared.filtered) == (35, 5)


def test_a_csv_whose_quote_does_not_end_is_damaged(tmp_path):
    write_csv(tmp_path / "p.csv", 'q,"a')
    with pytest.raises(UserError, match=r"p.csv' is damaged after line 40"):
        prepare(make_config(tmp_path / "p.csv"), Storage(str(tmp_path / "workspace")))


def test_an_object_with_data_of_its_own_beside_a_prompt_is_one_row(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"prompt": "q", "response": "a", "data": [{"x": 1}]}))
    assert prepare(make_config(tmp_path / "p.json"), Storage(str(tmp_path / "workspace")))[1].rows == 1


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".arrow"])
def test_a_file_with_two_columns_of_one_name_is_refused(tmp_path, ending):
    path = tmp_path / f"p{ending}"
    names, values = ["prompt", "response", "response"], ["q", "right", "wrong"]
    table = pa.table([pa.array([value]) for value in values], names=names)
    if ending == ".csv":
        path.write_text(f"{','.join(names)}\n{','.join(values)}\n")
    elif ending == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match=rf"p{ending}' has two columns named 'response': give each a name"):
        prepare(make_config(path), Storage(str(tmp_path / "workspace")))


def test_a_file_with_several_lists_of_rows_is_a_reject(tmp_path):
    splits = {"train": [{"prompt": "a", "response": "b"}], "test": [{"prompt": "c", "response": "d"}]}
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "splits.json").write_text(json.dumps(splits, indent=1))
    (tmp_path / "pool" / "rows.jsonl").write_text(lines())
    config = make_config(tmp_path / "pool", pool={"max_reject_share": 0.1})
    storage = Storage(str(tmp_path / "workspace"))
    plan, prepared = prepare(config, storage)
    (reject,) = all_rejects(storage, plan)
    assert reject["reason"] == "file holds several lists of rows"
    assert reject["detail"].startswith("train, test:")
    assert prepared.rows == len(ROWS)
