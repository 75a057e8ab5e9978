"""A flipped bit in a data file is found by whatever reads it."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import grape_service
from grape_service.errors import UserError
from grape_service.exports import export
from grape_service.release.rows import write_kept_rows
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows


def flip(path: Path, place: int) -> bytes:
    """Flip one bit of a file; its bytes before."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place // 8] ^= 1 << place % 8
    path.write_bytes(damaged)
    return whole


def test_a_flipped_bit_in_a_page_never_gives_other_rows(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    publish_version(storage, parts=[rows(0, 40)])
    release = grape_service.load(f"{tmp_path}/math-sft@v0001")
    path = tmp_path / "math-sft" / "versions" / "v0001" / release.manifest.files[0].path
    expected = release.dataset.to_table()
    columns = pq.ParquetFile(path).metadata.row_group(0)
    pages = max(
        columns.column(i).data_page_offset + columns.column(i).total_compressed_size for i in range(columns.num_columns)
    )
    draw = random.Random(3)
    other = 0
    for _ in range(60):
        whole = flip(path, draw.randrange(32, 8 * min(pages, path.stat().st_size // 2)))
        with contextlib.suppress(pa.ArrowException, OSError, UserError):
            other += not grape_service.load(f"{tmp_path}/math-sft@v0001").dataset.to_table().equals(expected)
        path.write_bytes(whole)
    assert other == 0


def test_export_weigh_and_load_compare_digests(tmp_path: Path) -> None:
    output = Storage(str(tmp_path / "sets"))
    publish_version(output, parts=[rows(0, 4), rows(4, 4)])
    reference = f"{tmp_path}/sets/math-sft@v0001"
    release = grape_service.load(reference, check_files=True)
    entry = release.manifest.files[1]
    path = tmp_path / "sets" / "math-sft" / "versions" / "v0001" / entry.path
    flip(path, 8 * (path.stat().st_size - 40))  # in the footer, which no page checksum covers
    with pytest.raises(UserError, match=r"part-00001\.parquet is not the file that its manifest names"):
        grape_service.load(reference, check_files=True)
    with pytest.raises(UserError, match=r"part-00001\.parquet is not the file"):
        export(release, "jsonl", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"part-00001\.parquet is not the file"):
        write_kept_rows(output, f"{release.folder}/{entry.path}", entry.sha256, output, "kept.parquet", [], [], True)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        grape_service.load(reference, check_files=True)
