"""A segment of a pool file as candidates: its rows, under the layout that the file's first rows show."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.pool.candidates import Normaliser
from grape_service.pool.files import PoolFile
from grape_service.pool.reader import Segment, SegmentReader
from grape_service.pool.shapes import find_layout
from grape_service.rows.candidate import Rejection

HEAD_ROWS = 64
HEAD_BYTES = 16 * 2**20
"""Rows of a file by which its layout is found: the first ones, of about so many bytes."""


class FileCandidates:
    """Rows of a segment of a pool file, and `normaliser`, which makes candidates of them, from the first row on."""

    def __init__(self, config: Config, file: PoolFile, segment: Segment):
        self.config, self.file, self.segment = config, file, segment
        self.reader = SegmentReader(file, segment, config.storage)
        self.normaliser: Normaliser

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | Rejection]]:
        """(place in the segment, row). Raises UserError where the file is damaged or gone."""
        rows = self.reader.rows()
        if self.segment.start == 0:
            head = list(_head(rows))
            first = head
        else:
            beginning = SegmentReader(self.file, Segment(self.segment.file), self.config.storage)
            head, first = [], list(_head(beginning.rows()))
        group = self.config.pool.groups[self.file.group]
        parsed = [row for _, row in first if isinstance(row, dict)]
        layout = find_layout(parsed, group, dict(self.file.folders))
        self.normaliser = Normaliser(self.config, layout, self.file)
        for name in self.normaliser.columns_read():
            if self.reader.column_kinds.get(name) == "binary":
                raise UserError(
                    f"the column '{name}' of the pool file '{self.file.url}' holds bytes that are not text: "
                    "give the text, or name another column"
                )
        yield from head
        yield from rows


def _head(rows: Iterator[tuple[int, dict[str, Any] | Rejection]]) -> Iterator[tuple[int, dict[str, Any] | Rejection]]:
    size = 0
    for place, row in itertools.islice(rows, HEAD_ROWS):
        yield place, row
        size += 0 if isinstance(row, Rejection) else len(str(row))
        if size > HEAD_BYTES:
            return
