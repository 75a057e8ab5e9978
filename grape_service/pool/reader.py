"""A segment of a pool file as a stream of rows, with the reason for each row that cannot be read."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from grape_service.errors import UserError
from grape_service.pool.column_types import Kind, arrow_kind, as_json_values
from grape_service.pool.files import PoolFile, decompressed, open_pool_file
from grape_service.pool.lines import BOM, BrokenDocument, json_elements, parse_line, split_lines
from grape_service.rows.candidate import Rejection

PARQUET_BATCH_ROWS = 512


@dataclass(frozen=True)
class Segment:
    """A part of a file: bytes [start, end) of a plain .jsonl, row groups [start, end) of a .parquet, or all of it."""

    file: int
    """Index in the plan's files."""
    start: int = 0
    end: int | None = None


@dataclass
class SegmentReader:
    """Reads the rows of one segment. After the last one `num_lines` and `column_kinds` are known."""

    file: PoolFile
    segment: Segment
    options: dict[str, Any]
    num_lines: int = 0
    """Places of the segment: lines of a .jsonl, blank ones too; rows of the others."""
    column_kinds: dict[str, Kind] = field(default_factory=dict)
    """Kinds of Parquet columns that JSON lacks."""

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | Rejection]]:
        """(place in the segment, row). Raises UserError where the file is damaged or gone."""
        try:
            with open_pool_file(self.file, self.options) as file:
                if self.file.format == ".parquet":
                    yield from self._parquet_rows(file)
                elif self.file.format == ".json":
                    for row in json_elements(file):
                        yield self.num_lines, row
                        self.num_lines += 1
                else:
                    yield from self._line_rows(decompressed(file, self.file.format))
        except (BrokenDocument, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException) as error:
            raise self._damaged(error) from error
        except OSError as error:
            if type(error).__name__ == "BadGzipFile" or (error.errno is None and self.file.format == ".parquet"):
                raise self._damaged(error) from error
            raise

    def _damaged(self, error: BaseException) -> UserError:
        return UserError(
            f"the pool file '{self.file.url}' is damaged after row {self.num_lines}: "
            f"{str(error)[:200] or type(error).__name__}; restore it or take it out of the pool"
        )

    def _line_rows(self, stream: IO[bytes]) -> Iterator[tuple[int, dict[str, Any] | Rejection]]:
        for lines in split_lines(stream, self.segment.start, self.segment.end):
            for line in lines:
                if self.num_lines == 0 and self.segment.start == 0 and line is not None:
                    line = line.removeprefix(BOM)
                row = parse_line(line)
                if row is not None:
                    yield self.num_lines, row
                self.num_lines += 1

    def _parquet_rows(self, file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any] | Rejection]]:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        groups = range(self.segment.start, parquet.num_row_groups if self.segment.end is None else self.segment.end)
        kinds = {column.name: arrow_kind(column.type) for column in parquet.schema_arrow}
        self.column_kinds = {name: kind for name, kind in kinds.items() if kind is not None}
        for batch in parquet.iter_batches(PARQUET_BATCH_ROWS, row_groups=list(groups), use_threads=False):
            for row in _batch_rows(batch):
                yield self.num_lines, row
                self.num_lines += 1


def _batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Rejection]:
    try:
        columns = [as_json_values(column) for column in batch.columns]
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield Rejection("not UTF-8", f"byte {error.start} of a value")
        else:
            for place in range(batch.num_rows):
                yield from _batch_rows(batch.slice(place, 1))
        return
    names = batch.schema.names
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))
