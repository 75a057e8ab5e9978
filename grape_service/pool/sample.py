"""Rows from the head, the middle and the end of a pool file, by which its layout is found and it is looked at."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from grape_service.errors import UserError
from grape_service.pool.files import PoolFile, pool_filesystem
from grape_service.pool.lines import BOM, parse_line
from grape_service.pool.reader import Segment, SegmentReader, holds_document, num_row_groups
from grape_service.rows.candidate import Rejection, Row
from grape_service.storage.options import StorageOptions

HEAD_ROWS = 64
PLACE_ROWS = 32
"""Rows of a file's beginning, and of each other place."""
PLACES = 5
"""Of a file, from its beginning to its end."""
MAX_ROWS = 256
SAMPLE_BYTES = 8 * 2**20
"""Of rows that a sample holds, about."""
WHOLE_BYTES = 2**20
"""A file that is not larger is read to its end; so is one that cannot be read in parts, up to STREAM_BYTES."""
STREAM_BYTES = 4 * 2**20
PLACE_BYTES = 2**18
"""What is read at a place of a file with a row a line; more where its rows are longer, up to LONG_BYTES."""
LONG_BYTES = 8 * 2**20


def sample_rows(file: PoolFile, options: StorageOptions) -> list[Row]:
    """Some rows of a file, from its beginning to its end, in order. What is damaged is told where all of it is read."""
    taken: list[Row] = []
    size = 0
    try:
        for row in _some(file, options):
            taken.append(row)
            size += len(str(row))
            if size > SAMPLE_BYTES:
                break
    except UserError:
        pass
    return taken


def _some(file: PoolFile, options: StorageOptions) -> Iterable[Row]:
    if file.format == ".parquet":
        return _of_parquet(file, options)
    if file.format in (".json", ".jsonl") and file.size > WHOLE_BYTES and not holds_document(file, options):
        return _of_lines(file, options)
    rows = _rows(file, options, Segment(0))
    return itertools.islice(rows, HEAD_ROWS) if file.size > STREAM_BYTES else _thinned(rows)


def _rows(file: PoolFile, options: StorageOptions, segment: Segment) -> Iterator[Row]:
    for _, row in SegmentReader(file, segment, options).rows():
        if not isinstance(row, Rejection):
            yield row


def _thinned(rows: Iterator[Row]) -> list[Row]:
    """The first rows, and of the others some at equal distances and the last."""
    head = list(itertools.islice(rows, HEAD_ROWS))
    later: list[Row] = []
    step, last = 1, None
    for place, row in enumerate(rows):
        last = row
        if place % step == 0:
            later.append(row)
        if len(later) > MAX_ROWS - HEAD_ROWS:
            later, step = later[::2], 2 * step
    if last is not None and (not later or later[-1] is not last):
        later.append(last)
    return [*head, *later]


def _of_parquet(file: PoolFile, options: StorageOptions) -> Iterator[Row]:
    groups = num_row_groups(file, options)
    if file.size <= STREAM_BYTES or groups == 1:
        rows = _rows(file, options, Segment(0))
        yield from _thinned(rows) if file.size <= STREAM_BYTES else itertools.islice(rows, HEAD_ROWS)
        return
    for place, group in enumerate(spread(list(range(groups)), PLACES)):
        rows = _rows(file, options, Segment(0, group, group + 1))
        yield from itertools.islice(rows, HEAD_ROWS if place == 0 else PLACE_ROWS)


def _of_lines(file: PoolFile, options: StorageOptions) -> Iterator[Row]:
    fs, path = pool_filesystem(file.url, options)
    for place in range(PLACES):
        size = PLACE_BYTES
        while True:
            start = (file.size - size) * place // (PLACES - 1) if file.size > size else 0
            lines = fs.cat_file(path, start=start, end=min(file.size, start + size)).split(b"\n")
            lines = lines[1 if start else 0 : -1 if start + size < file.size else None]
            if lines or size >= min(LONG_BYTES, file.size):
                break
            size *= 4
        if place == 0 and lines:  # none where the first is longer than what is looked at
            lines[0] = lines[0].removeprefix(BOM)
        most = HEAD_ROWS if place == 0 else PLACE_ROWS
        chosen = lines[-most:] if place == PLACES - 1 else lines[:most]
        for row in map(parse_line, chosen):
            if isinstance(row, dict):
                yield row


def spread(values: list[Any], most: int) -> list[Any]:
    """At most so many of some values, from the first to the last at about equal distances."""
    if len(values) <= most:
        return values
    return [values[place * (len(values) - 1) // max(1, most - 1)] for place in range(most)]
