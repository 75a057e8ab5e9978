"""A segment of a pool file as a stream of rows, with the reason for each row that cannot be read."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from grape_service.errors import UserError
from grape_service.pool.column_types import Kind, arrow_kind, as_json_values, as_text
from grape_service.pool.files import PoolFile, decompressed, open_pool_file
from grape_service.pool.lines import (
    BOM,
    MAX_ROW_BYTES,
    BrokenDocument,
    is_document,
    json_elements,
    parse_line,
    split_lines,
    too_long,
)
from grape_service.pool.wrapped import WRAPPERS, RepeatedColumn, csv_rows, refuse_repeated, unwrapped
from grape_service.rows.candidate import Rejection, Row
from grape_service.storage.options import StorageOptions

PARQUET_BATCH_ROWS = 512
PARQUET_BATCH_BYTES = 128 * 2**20
"""Of a batch, about: rows of megabytes each are read a few at a time."""
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
    options: StorageOptions
    max_row_bytes: int = MAX_ROW_BYTES
    num_lines: int = 0
    """Places of the segment: lines of a .jsonl, blank ones too; rows of the others."""
    column_kinds: dict[str, Kind] = field(default_factory=dict)
    """Kinds of Parquet columns that JSON lacks."""

    def rows(self) -> Iterator[tuple[int, Row | Rejection]]:
        """(place in the segment, row). Raises UserError where the file is damaged or gone."""
        try:
            with open_pool_file(self.file, self.options) as file:
                if self.file.format == ".parquet":
                    yield from self._parquet_rows(file)
                elif self.file.format == ".arrow":
                    yield from self._arrow_rows(file)
                else:
                    yield from self._text_rows(file)
        except RepeatedColumn as error:
            raise UserError(f"the pool file '{self.file.url}' has {error}: give each a name of its own") from None
        except (BrokenDocument, pa.ArrowException) as error:
            raise self._damaged(error) from error
        except OSError as error:
            if error.errno is None and self.file.format.endswith((".gz", ".zst", ".parquet", ".arrow")):
                raise self._damaged(error) from error
            raise

    def _damaged(self, error: BaseException) -> UserError:
        return UserError(
            f"the pool file '{self.file.url}' is damaged after line {self.num_lines}: "
            f"{str(error)[:200] or type(error).__name__}; restore it or take it out of the pool"
        )

    def _text_rows(self, file: IO[bytes]) -> Iterator[tuple[int, Row | Rejection]]:
        stream = decompressed(file, self.file.format)
        if stream is not file:
            if self.file.size == 0:
                raise BrokenDocument("it is empty, which no finished compressed file is")
            stream = _Again(stream)
        if self.segment.start == 0:
            self._refuse_utf_16(stream)
        if self.file.format.startswith(".csv"):
            for row in csv_rows(stream, self.max_row_bytes):
                yield self.num_lines, row
                self.num_lines += 1
        elif self.segment.start == 0 and _holds_document(stream, self.file.format):
            for element in json_elements(stream, self.max_row_bytes):
                for row in unwrapped(element):
                    yield self.num_lines, row
                    self.num_lines += 1
        else:
            yield from self._line_rows(stream)

    def _refuse_utf_16(self, stream: Any) -> None:
        """Raises UserError for a text that is not UTF-8 as a whole."""
        head = bytes(stream.read(4))
        stream.seek(0)
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or (len(head) > 1 and 0 in head[:2] and any(head)):
            raise UserError(
                f"the pool file '{self.file.url}' is UTF-16, and pools are UTF-8: "
                "convert it, such as with iconv -f UTF-16 -t UTF-8"
            )

    def _line_rows(self, stream: IO[bytes]) -> Iterator[tuple[int, Row | Rejection]]:
        for lines in split_lines(stream, self.segment.start, self.segment.end, self.max_row_bytes):
            for line in lines:
                if self.num_lines == 0 and self.segment.start == 0 and line is not None:
                    line = line.removeprefix(BOM)
                row = parse_line(line, self.max_row_bytes)
                if row is not None:
                    for one in (
                        (row,) if isinstance(row, Rejection) or row.keys().isdisjoint(WRAPPERS) else unwrapped(row)
                    ):
                        yield self.num_lines, one
                self.num_lines += 1

    def _arrow_rows(self, file: IO[bytes]) -> Iterator[tuple[int, Row | Rejection]]:
        """Rows of an Arrow file or stream, as `save_to_disk` of datasets writes it."""
        magic = file.read(6)
        file.seek(0)
        batches: Iterable[pa.RecordBatch]
        if magic == b"ARROW1":
            whole = pa.ipc.open_file(file)
            schema, batches = whole.schema, map(whole.get_batch, range(whole.num_record_batches))
        else:
            stream = pa.ipc.open_stream(file)
            schema, batches = stream.schema, stream
        refuse_repeated(schema.names)
        kinds = {column.name: arrow_kind(column.type) for column in schema}
        self.column_kinds = {name: kind for name, kind in kinds.items() if kind is not None}
        for batch in batches:
            for start in range(0, batch.num_rows, PARQUET_BATCH_ROWS):
                yield from self._numbered(batch.slice(start, PARQUET_BATCH_ROWS), frozenset())

    def _parquet_rows(self, file: IO[bytes]) -> Iterator[tuple[int, Row | Rejection]]:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        groups = range(self.segment.start, parquet.num_row_groups if self.segment.end is None else self.segment.end)
        refuse_repeated(parquet.schema_arrow.names)
        kinds = {column.name: arrow_kind(column.type) for column in parquet.schema_arrow}
        self.column_kinds = {name: kind for name, kind in kinds.items() if kind is not None}
        texts = _columns_of_text(file, [name for name, kind in self.column_kinds.items() if kind == "binary"])
        for name in texts:
            del self.column_kinds[name]
        rows = _rows_at_once(parquet.metadata, groups)
        for batch in parquet.iter_batches(rows, row_groups=list(groups), use_threads=False):
            yield from self._numbered(batch, texts)

    def _numbered(self, batch: pa.RecordBatch, texts: frozenset[str]) -> Iterator[tuple[int, Row | Rejection]]:
        """The rows of a batch with their numbers in the file."""
        is_large = batch.nbytes > self.max_row_bytes
        for place, row in enumerate(_batch_rows(batch, texts)):
            if is_large and _row_bytes(batch, place) > self.max_row_bytes:
                row = too_long(self.max_row_bytes)
            yield self.num_lines, row
            self.num_lines += 1


def _row_bytes(batch: pa.RecordBatch, place: int) -> int:
    """Bytes of one row: of a dictionary its own value alone, not all that the column's rows share."""
    values = (column.slice(place, 1) for column in batch.columns)
    return sum((value.dictionary_decode() if pa.types.is_dictionary(value.type) else value).nbytes for value in values)


def _rows_at_once(metadata: pq.FileMetaData, groups: range) -> int:
    """Rows of a batch: fewer where they are large."""
    of_groups = [metadata.row_group(group) for group in groups]
    most = max((group.total_byte_size / max(1, group.num_rows) for group in of_groups), default=0)
    return max(1, min(PARQUET_BATCH_ROWS, int(PARQUET_BATCH_BYTES / max(1, most))))


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


def num_row_groups(file: PoolFile, options: StorageOptions) -> int:
    """Row groups of a Parquet file. Raises UserError where it is damaged."""
    try:
        with open_pool_file(file, options) as stream:
            return int(pq.ParquetFile(stream).metadata.num_row_groups)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"the pool file '{file.url}' is not a Parquet file: {str(error)[:200]}") from error


def holds_document(file: PoolFile, options: StorageOptions) -> bool:
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


def _batch_rows(batch: pa.RecordBatch, texts: frozenset[str]) -> Iterator[Row | Rejection]:
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
