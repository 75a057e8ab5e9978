"""One bad row costs one row: those that are too long, in a compressed file too, or nested too deep."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_service.errors import UserError
from grape_service.pool.wrapped import csv_rows
from grape_service.rows.candidate import Rejection
from grape_service.storage.storage import Storage
from tests.prepared_pools import make_config, prepare

pytestmark = pytest.mark.quick

LIMIT = 2**20
GOOD = [orjson.dumps({"prompt": f"q{n}", "response": f"a{n}", "meta": [n]}) for n in range(3)]


@pytest.mark.parametrize("bad", ["bomb", "long", "deep", "parquet", "arrow", "dictionary", "csv"])
def test_the_other_rows_are_kept(bad: str, tmp_path: Path) -> None:
    endings = {"bomb": "jsonl.gz", "long": "jsonl", "deep": "jsonl", "dictionary": "arrow"}
    pool = tmp_path / f"pool.{endings.get(bad, bad)}"
    if bad == "bomb":  # 64 MiB in 64 KiB, of which one MiB is looked at
        pool.write_bytes(gzip.compress(b"\n".join([GOOD[0], b" " * 2**26, *GOOD[1:]])))
    elif bad == "long":
        pool.write_bytes(b"\n".join([GOOD[0], b'{"prompt":"%s"}' % (b"x" * (LIMIT + 1)), *GOOD[1:]]))
    elif bad == "deep":
        pool.write_bytes(b"\n".join([GOOD[0], b'{"prompt":"q","meta":%s}' % (b"[" * 900 + b"]" * 900), *GOOD[1:]]))
    else:
        rows = [{**orjson.loads(line), "meta": "x" * (LIMIT + 1) * (n == 1)} for n, line in enumerate([*GOOD, GOOD[0]])]
        rows[3]["prompt"] = "another"
        table = pa.Table.from_pylist(rows)
        if bad == "parquet":
            pq.write_table(table, pool)
        elif bad == "csv":
            pacsv.write_csv(table, pool)
        else:
            if bad == "dictionary":  # which all rows share: only one has the long value
                table = table.set_column(2, "meta", table["meta"].dictionary_encode())
            with pa.ipc.new_file(pool, table.schema) as file:
                file.write_table(table)
    config = make_config(pool, pool={"max_reject_share": 1, "max_row_bytes": LIMIT})
    _, prepared = prepare(config, Storage(str(tmp_path / "workspace")))
    assert (prepared.rows, prepared.rejects.total) == (3, 1)
    reason = "row is nested too deep" if bad == "deep" else "row is too long to read"
    assert list(prepared.rejects.by_reason) == [reason]


def test_a_csv_without_line_ends_is_one_row(tmp_path: Path) -> None:
    pool = tmp_path / "pool.csv.gz"
    pool.write_bytes(gzip.compress(b"prompt,response\nq,a\n" + b"x" * 2**26))
    config = make_config(pool, pool={"max_row_bytes": LIMIT, "max_reject_share": 1})
    _, prepared = prepare(config, Storage(str(tmp_path / "workspace")))
    assert (prepared.rows, dict(prepared.rejects.by_reason)) == (1, {"row is too long to read": 1})


def test_a_csv_whose_long_row_has_no_end_is_damaged(tmp_path: Path) -> None:
    pool = tmp_path / "pool.csv"
    pool.write_bytes(b'prompt,response\nq,a\nq,"' + b"x\n" * LIMIT + b"q,b\n")
    config = make_config(pool, pool={"max_row_bytes": LIMIT})
    with pytest.raises(
        UserError, match=r"damaged after line 1: line \d+: the quotes of a row with more than 1,048,576"
    ):
        prepare(config, Storage(str(tmp_path / "workspace")))


CELLS = st.lists(st.sampled_from(["a", '"', ",", "\n", "\r\n", " ", "é", "bc"]), max_size=20).map("".join)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=8), st.integers(1, 9), st.sampled_from(["minimal", "all"]))
@settings(max_examples=300)
def test_rows_of_a_csv_are_those_of_a_plain_reader_but_for_long_ones(
    rows: list[tuple[str, str, str]], part: int, quotes: str
) -> None:
    """Wherever the stream is cut, and whatever stands in the cells of a row that is passed over."""
    limit, texts = 24, []
    for row in [("x", "y", "z"), *rows]:
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL if quotes == "all" else csv.QUOTE_MINIMAL).writerow(row)
        texts.append(text.getvalue())
    expected = [
        "row is too long to read"
        if len(text) > limit
        else {name: cell or None for name, cell in zip("xyz", row, strict=True)}
        for text, row in zip(texts[1:], rows, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grape_service.pool.wrapped.CSV_BYTES", part)
        found = list(csv_rows(io.BytesIO("".join(texts).encode()), limit))
    assert [row.reason if isinstance(row, Rejection) else row for row in found] == expected
