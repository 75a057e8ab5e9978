"""A segment of a pool file as a stream of rows, with the reason for each row that cannot be read."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from grape_service.errors import UserError
from grape_service.pool.column_types import Kind, arrow_kind, as_json_values, as_text
from grape_service.pool.files import PoolFile, decompressed, open_pool_file
from grape_service.pool.lines import BOM, BrokenDocument, is_document, json_elements, parse_line, split_lines
from grape_service.rows.candidate import Rejection

PARQUET_BATCH_ROWS = 512
SNIFFED_BYTES = 2**20
"""Of a file's beginning, to tell a JSON document from a row a line."""
TEXT_ROWS = 64
"""Rows of a file by which columns of bytes are taken for text."""
CONTROL = re.compile("[\0-\x08\x0e-\x1a]")
COMPRESSED_BYTES = 2**18
"""Of what a compressed file holds, read at a time: where it is damaged, the rows before are known so well."""
PAGE_BYTES = 2**20
"""What is read at a time of a Parquet column of which only the beginning is wanted."""


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
                else:
                    yield from self._text_rows(file)
        except (BrokenDocument, pa.ArrowException) as error:
            raise self._damaged(error) from error
        except OSError as error:
            if error.errno is None and self.file.format.endswith((".gz", ".zst", ".parquet")):
                raise self._damaged(error) from error
            raise

    def _damaged(self, error: BaseException) -> UserError:
        return UserError(
            f"the pool file '{self.file.url}' is damaged after row {self.num_lines}: "
            f"{str(error)[:200] or type(error).__name__}; restore it or take it out of the pool"
        )

    def _text_rows(self, file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any] | Rejection]]:
        stream = decompressed(file, self.file.format)
        if stream is not file:
            if self.file.size == 0:
                raise BrokenDocument("it is empty, which no finished compressed file is")
            stream = _Again(stream)
        if self.segment.start == 0 and _holds_document(stream, self.file.format):
            for row in json_elements(stream):
                yield self.num_lines, row
                self.num_lines += 1
        else:
            yield from self._line_rows(stream)

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
        texts = _columns_of_text(file, [name for name, kind in self.column_kinds.items() if kind == "binary"])
        for name in texts:
            del self.column_kinds[name]
        for batch in parquet.iter_batches(PARQUET_BATCH_ROWS, row_groups=list(groups), use_threads=False):
            for row in _batch_rows(batch, texts):
                yield self.num_lines, row
                self.num_lines += 1


def _columns_of_text(file: IO[bytes], names: list[str]) -> frozenset[str]:
    """Of columns of bytes those whose first values in the file are all text: what a writer did without saying so."""
    texts: set[str] = set()
    if not names:
        return frozenset()
    parquet = pq.ParquetFile(file, buffer_size=PAGE_BYTES, page_checksum_verification=True)
    if parquet.num_row_groups:
        for batch in itertools.islice(parquet.iter_batches(TEXT_ROWS, row_groups=[0], columns=names), 1):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    values = [value for value in as_text(column) if value is not None]
                except UnicodeDecodeError:
                    continue
                if values and not any(CONTROL.search(value) for value in values):
                    texts.add(name)
    return frozenset(texts)


def holds_document(file: PoolFile, options: dict[str, Any]) -> bool:
    """Whether a plain .json or .jsonl file is one JSON document, which cannot be read in parts."""
    with open_pool_file(file, options) as stream:
        return _holds_document(stream, file.format)


def _holds_document(stream: Any, format: str) -> bool:
    """The same of a stream at its beginning, where it is left."""
    head = stream.read(SNIFFED_BYTES)
    stream.seek(0)
    return is_document(head, format.startswith(".jsonl"))


class _Again:
    """A stream that cannot be read twice, whose beginning can."""

    def __init__(self, stream: Any):
        self.head, self.place, self.stream = bytes(stream.read(COMPRESSED_BYTES)), 0, stream

    def read(self, size: int) -> bytes:
        if self.place < len(self.head):
            data = self.head[self.place : self.place + size]
            self.place += len(data)
            return data
        return bytes(self.stream.read(min(size, COMPRESSED_BYTES)))

    def seek(self, place: int) -> None:
        assert place == 0, "only the beginning is kept"
        self.place = 0


def _batch_rows(batch: pa.RecordBatch, texts: frozenset[str]) -> Iterator[dict[str, Any] | Rejection]:
    names = batch.schema.names
    try:
        columns = [
            as_text(column) if name in texts else as_json_values(column)
            for name, column in zip(names, batch.columns, strict=True)
        ]
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield Rejection("not UTF-8", f"byte {error.start} of a value")
        else:
            for place in range(batch.num_rows):
                yield from _batch_rows(batch.slice(place, 1), texts)
        return
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))
