"""Rows that stand in something else: in one object of a .json file, or in the lines of a .csv."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from typing import Any

from grape_service.pool.column_names import CONVERSATIONS, PROMPTS
from grape_service.pool.lines import MAX_ROW_BYTES, BrokenDocument, checked_row, too_long
from grape_service.rows.candidate import Rejection, Row

WRAPPERS = frozenset(("data", "rows", "examples", "instances", "train", "items", "samples", "records"))
"""Fields of one object that hold all rows of a file."""
SEVERAL_LISTS = "file holds several lists of rows"
CSV_BYTES = 2**20
BAD_CSV = "row does not fit the header"


class RepeatedColumn(Exception):
    """Two columns of a file have one name, of which rows would show the last."""

    def __init__(self, name: str):
        super().__init__(f"two columns named '{name}'" if name else "two columns without a name")


def refuse_repeated(names: Sequence[str]) -> None:
    """Raises RepeatedColumn for names of a file's columns of which two are the same."""
    for name in names:
        if names.count(name) > 1:
            raise RepeatedColumn(name)


def unwrapped(row: Row | Rejection) -> Iterator[Row | Rejection]:
    """The rows in an object that holds a list of them and no prompt, as {"data": [...]}; any other row as it is."""
    names = [] if isinstance(row, Rejection) else [name for name in row if name in WRAPPERS and _are_rows(row[name])]
    if isinstance(row, Rejection) or not names or any(name in row for name in (*PROMPTS, *CONVERSATIONS)):
        yield row
        return
    fields = {field for one in row[names[0]] for field in one}
    others = [name for name, value in row.items() if name != names[0] and _are_rows(value) and fields & value[0].keys()]
    if others:
        lists = ", ".join((names[0], *others))
        yield Rejection(SEVERAL_LISTS, f"{lists}: write the rows that are wanted to a file of their own")
        return
    for one in row[names[0]]:
        if isinstance(one, dict) and "row_idx" in one and isinstance(one.get("row"), dict):  # of the dataset viewer
            one = one["row"]
        yield checked_row(one)


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def csv_rows(stream: Any, max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Row | Rejection]:
    """Rows of a .csv, UTF-8, with a header; its cells are text, empty ones null. A row with more than `max_row_bytes`
    is a rejection, and its text is not held. Raises BrokenDocument where a quote does not end; RepeatedColumn."""
    csv.field_size_limit(max(MAX_ROW_BYTES, max_row_bytes))
    lines = _CsvLines(stream, max_row_bytes)
    reader = csv.reader(iter(lines), strict=True)
    try:
        header = next(reader, None)
        if lines.begin_row():
            raise BrokenDocument(f"its header has more than {max_row_bytes:,} bytes")
        refuse_repeated(header or ())
        for cells in reader if header is not None else ():
            if lines.begin_row():
                yield too_long(max_row_bytes)
            elif cells and len(cells) != len(header or ()):
                yield Rejection(
                    BAD_CSV, f"it has {len(cells)} cells for {len(header or ())} columns", ",".join(cells)[:200]
                )
            elif cells:
                yield checked_row(
                    {name: cell if cell != "" else None for name, cell in zip(header or (), cells, strict=True)}
                )
    except csv.Error as error:
        raise BrokenDocument(f"line {lines.number}: {error}") from None


class _CsvLines:
    """Lines of a .csv as its reader takes them, but for the rest of a row that is too long: it is passed over, and the
    row closed."""

    def __init__(self, stream: Any, max_row_bytes: int):
        self.stream, self.most = stream, max_row_bytes
        self.number = 0  # lines so far
        self._given = 0  # characters of the row under way that the reader has
        self._rest: _CsvRowEnd | None = None  # of the row under way, where it is passed over
        self._was_cut = False

    def begin_row(self) -> bool:
        """Whether the row that the reader has made was cut; what is read from now on is of the next."""
        was_cut, self._given, self._was_cut = self._was_cut, 0, False
        return was_cut

    def __iter__(self) -> Iterator[str]:
        carried: list[str] = []
        for text in _texts(self.stream):
            first, *lines = text.split("\n")
            carried.append(first)
            for line in lines:
                carried.append("\n")
                yield from self._line("".join(carried))
                carried = [line]
            if self._given + sum(map(len, carried)) > self.most:  # its end is not there yet
                self._pass_over("".join(carried))
                carried = []
        if (last := "".join(carried)) or self._rest is not None:
            yield from self._line(last if self._rest is None else f"{last}\n")
        if self._rest is not None:
            raise BrokenDocument(
                f"line {self.number}: the quotes of a row with more than {self.most:,} bytes do not end"
            )

    def _line(self, line: str) -> Iterator[str]:
        self.number += 1
        if self._rest is None and self._given + len(line) <= self.most:
            self._given += len(line)
            yield line
        elif self._pass_over(line):
            self._rest, self._was_cut = None, True
            yield '"\n' if self._given else "\n"  # the reader has the beginning of a quoted cell, or nothing

    def _pass_over(self, text: str) -> bool:
        """Whether the row ends with the text."""
        if self._rest is None:
            self._rest = _CsvRowEnd(in_quotes=self._given > 0)
        return self._rest.is_in(text)


class _CsvRowEnd:
    """Finds the end of a row in its text, which comes in parts."""

    def __init__(self, in_quotes: bool):
        self._state = "quoted" if in_quotes else "begin"

    def is_in(self, text: str) -> bool:
        """Whether the row ends in this part, with its last character."""
        place = 0
        while place < len(text):
            if self._state == "quoted":
                found = text.find('"', place)
                if found < 0:
                    return False
                self._state, place = "quote", found + 1
            elif self._state in ("begin", "quote") and text[place] == '"':
                self._state, place = "quoted", place + 1  # a cell begins with it, or it stands twice
            else:
                end = _CELL_END.search(text, place)
                if end is None:
                    self._state = "plain"
                    return False
                if end[0] == "\n":
                    return True
                self._state, place = "begin", end.end()
        return False


_CELL_END = re.compile(r"[,\n]")


def _texts(stream: Any) -> Iterator[str]:
    """A stream in parts of about CSV_BYTES, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    is_first = True
    while data := stream.read(CSV_BYTES):
        text = decoder.decode(bytes(data))
        yield text.removeprefix("\ufeff") if is_first else text
        is_first = False
    yield decoder.decode(b"", final=True)
