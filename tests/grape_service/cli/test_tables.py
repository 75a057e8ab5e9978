"""Tables and sentences in a terminal: no word is broken, nothing is lost, whatever its width."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from grape_service.cli.tables import LONG, column_widths, print_table, wrapped

pytestmark = pytest.mark.quick

ROWS = [
    ["quickstart", "v0001", "s3://team/pools/mathematics/part-0.jsonl:37", "it has no response"],
    ["code-sft", "v0002", "s3://team/pools/code/part-1.jsonl:1", "数学题" * 20],
]
COLUMNS = ["dataset", "version", "file:line", "detail"]


def shown(width: int, columns: list[str] = COLUMNS, rows: list[list[str]] = ROWS) -> str:
    out = io.StringIO()
    print_table(Console(file=out, width=width), "title", columns, rows)
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_table_fits_and_breaks_no_word(width: int) -> None:
    text = shown(width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    words = set(re.findall(r"[A-Za-z]+", text))
    whole = {word for row in [COLUMNS, *ROWS, ["title"]] for cell in row for word in re.findall(r"[A-Za-z]+", cell)}
    assert words <= whole
    assert "┃" in text


def test_a_word_that_fits_into_a_line_is_not_broken_at_its_marks() -> None:
    assert wrapped("it has no adapter_config.json", 25) == "it has no\nadapter_config.json"
    assert wrapped("it has no adapter_config.json", 15) == "it has no\nadapter_\nconfig.json"


def test_ids_that_are_copied_are_not_broken_where_a_column_of_sentences_can_be_narrower() -> None:
    why = "no prompt is left after selection (no eligible candidate: 12): loosen select.min_candidates or pool.where"
    row = ["20261130T172931-9495839b", "math-sft", "succeeded", "15 s", why]
    text = shown(80, ["run", "dataset", "state", "took", "why"], [row])
    assert "20261130T172931-9495839b" in text
    assert max(cell_len(line) for line in text.splitlines()) <= 80


def test_what_is_too_narrow_for_a_table_is_shown_row_by_row() -> None:
    text = shown(30)
    assert "┃" not in text
    assert "  file:line: s3://team/pools/code/part-1.jsonl:1\n" in text
    assert column_widths([["a" * 20], ["b" * 20]], 30) is None


@given(st.text(alphabet="ab /-_ \n", max_size=80), st.integers(LONG, 60))
def test_wrapping_loses_nothing_but_space(text: str, width: int) -> None:
    found = wrapped(text, width)
    assert "".join(found.split()) == "".join(text.split())
    assert all(cell_len(line) <= width or not re.search(r"\s", line.strip()) for line in found.split("\n"))
