"""A segment of a pool file as candidates: its rows, under the contract of the file's group."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from grape_service.config.pool import PoolGroup
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.pool.candidates import Normaliser
from grape_service.pool.contract import FileContract, GroupContract
from grape_service.pool.files import PoolFile
from grape_service.pool.reader import Segment, SegmentReader
from grape_service.pool.rollouts import MARKS, rollouts
from grape_service.rows.candidate import Rejection, Row

HEAD_ROWS = 64
HEAD_BYTES = 16 * 2**20
"""Rows of a file by which its layout is found: the first ones, of about so many bytes."""


class FileCandidates:
    """Rows of a segment of a pool file, and `normaliser`, which makes candidates of them, from the first row on."""

    def __init__(self, config: Config, file: PoolFile, segment: Segment, contract: GroupContract):
        """`contract` is that of the file's group."""
        self.config, self.file, self.segment, self.contract = config, file, segment, contract
        self.reader = SegmentReader(file, segment, config.storage, config.pool.max_row_bytes)
        self.normaliser: Normaliser

    def rows(self) -> Iterator[tuple[int, Row | Rejection]]:
        """(place in the segment, row). Raises UserError where the file is damaged or gone."""
        group = self.config.pool.groups[self.file.group]
        rows = _read(self.reader, group)
        if self.segment.start == 0:
            head = list(_head(rows))
            first = head
        else:
            beginning = SegmentReader(
                self.file, Segment(self.segment.file), self.config.storage, self.config.pool.max_row_bytes
            )
            head, first = [], list(_head(_read(beginning, group)))
        parsed = [row for _, row in first if isinstance(row, dict)]
        contract = FileContract(group, parsed, dict(self.file.folders), self.contract)
        self.normaliser = Normaliser(self.config, contract, self.file)
        for name in self.normaliser.columns_read():
            if self.reader.column_kinds.get(name) == "binary":
                raise UserError(
                    f"the column '{name}' of the pool file '{self.file.url}' holds bytes that are not text: "
                    "give the text, or name another column"
                )
        yield from head
        yield from rows


def _read(reader: SegmentReader, group: PoolGroup) -> Iterator[tuple[int, Row | Rejection]]:
    for place, row in reader.rows():
        if isinstance(row, Rejection) or row.keys().isdisjoint(MARKS):
            yield place, row
        else:
            yield from ((place, one) for one in rollouts(row, group))


def _head(rows: Iterator[tuple[int, Row | Rejection]]) -> Iterator[tuple[int, Row | Rejection]]:
    size = 0
    for place, row in itertools.islice(rows, HEAD_ROWS):
        yield place, row
        size += 0 if isinstance(row, Rejection) else len(str(row))
        if size > HEAD_BYTES:
            return
