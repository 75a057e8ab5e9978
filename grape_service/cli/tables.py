"""Tables for a terminal: cells are wrapped between words, and what is too narrow for a table is shown row by row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grape_service.display import visible

_BREAKS = re.compile("(?<=[/_@:,=\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef-])(?=\\S)")
LONG = 16
"""Words above this are wrapped where they may be: after a slash, a dash or another mark, between Chinese characters."""
SHORT = 24
"""A column of names and ids, which are copied: no wider than this it is not wrapped as long as there is room."""
LONGEST = 48
"""What has no such place, a digest, is cut here."""
BORDERS = 3
"""Of a column; one more at the table's end."""


def print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table; cells are shown as text, whatever they hold, control characters written out."""
    names = [visible(column) for column in columns]
    cells = [["" if cell is None else visible(str(cell)) for cell in row] for row in rows]
    by_column = [[name, *(row[place] for row in cells)] for place, name in enumerate(names)]
    widths = column_widths(by_column, console.width - 1 - BORDERS * len(names))
    heading = Text(visible(title)) if title else None
    if widths is None:
        if heading is not None:
            console.print(heading, style="italic")
        for row in cells:
            for name, cell in zip(names, row, strict=True):
                if cell:
                    console.print(Text(f"  {name}: {cell}" if name else f"  {cell}"), soft_wrap=True)
            console.print()
        return
    table = Table(title=heading, title_justify="left", header_style="bold")
    for name, width in zip(names, widths, strict=True):
        table.add_column(Text(wrapped(name, width)), width=width, no_wrap=True, overflow="fold")
    for row in cells:
        table.add_row(*(Text(wrapped(cell, width)) for cell, width in zip(row, widths, strict=True)))
    console.print(table)


def column_widths(columns: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Characters of each column, its longest piece at least; None where the columns do not fit into `room`."""
    least = [
        max((cell_len(piece.rstrip()) for cell in column for piece in _pieces(cell)), default=1) for column in columns
    ]
    most = [max((cell_len(line) for cell in column for line in cell.split("\n")), default=1) for column in columns]
    left = room - sum(least)
    if left < 0:
        return None
    widths = list(least)
    for place in sorted(range(len(widths)), key=lambda index: most[index] - least[index]):
        open_columns = sum(widths[other] < most[other] for other in range(len(widths))) or 1
        more = min(most[place] - least[place], left if most[place] <= SHORT else left // open_columns)
        widths[place] += more
        left -= more
    return [max(width, 1) for width in widths]


def wrapped(text: str, width: int) -> str:
    """Text in lines of at most `width` characters, broken between words and, in words longer than a line, after a
    mark."""
    lines = []
    for line in text.split("\n"):
        current = ""
        for word in _words(line):
            for piece in [word] if cell_len(word.rstrip()) <= width else _pieces(word):
                if current and cell_len((current + piece).rstrip()) > width:
                    lines.append(current.rstrip())
                    current = ""
                current += piece
        lines.append(current.rstrip())
    return "\n".join(lines)


def _words(text: str) -> list[str]:
    """Each with the space behind it."""
    return re.findall(r"\S+\s*|^\s+", text)


def _pieces(text: str) -> list[str]:
    """What is not broken, each with the space behind it."""
    found: list[str] = []
    for word in _words(text):
        found += _BREAKS.split(word) if len(word) > LONG else [word]
    return [piece[at : at + LONGEST] for piece in found for at in range(0, len(piece), LONGEST)]
