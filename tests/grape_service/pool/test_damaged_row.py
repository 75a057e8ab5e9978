"""A damaged row at any place of any file of any shape costs itself alone: the shards are those without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_service.storage.storage import Storage
from tests.prepared_pools import all_rejects, all_rows, make_config, prepare, write_jsonl

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


SHAPES: dict[str, Callable[[int], Row]] = {
    "response": lambda n: {"prompt": f"q {n // 2}", "response": f"a {n}", "source": "ab"[n % 2], "level": n},
    "alpaca": lambda n: {"instruction": f"Do {n}.", "input": "this" if n % 2 else "", "output": f"a {n}"},
    "responses": lambda n: {"prompt": f"q {n}", "responses": [f"a {n}", f"b {n}"], "correct": [True, n % 3 == 0]},
    "openr1": lambda n: {
        "problem": f"q {n}",
        "solution": f"s {n}",
        "generations": [f"a {n} {k}" for k in range(1 + n % 3)],
        "correct": [k == 0 for k in range(1 + n % 3)],
        "finish_reasons": None if n % 2 else ["stop"] * (1 + n % 3),
    },
    "objects": lambda n: {"question": f"q {n}", "completions": [{"model": m, "response": f"{m} {n}"} for m in "xy"]},
    "columns": lambda n: {"question": f"q {n}", "answer_1": f"a {n}", "answer_2": None if n % 4 else f"b {n}"},
    "messages": lambda n: {"messages": [user(f"q {n}"), assistant(f"a {n}")], "system": "Be brief."},
    "pairs": lambda n: {
        "prompt": f"q {n}",
        "chosen": [user(f"q {n}"), assistant(f"a {n}")],
        "rejected": [user(f"q {n}"), assistant(f"b {n}")],
    },
}
LISTS = ("correct", "finish_reasons")
DAMAGES: dict[str, Callable[[Row], Any]] = {
    "broken": lambda row: b'{"prompt": "q", ',
    "no object": lambda row: b"[1, 2]",
    "not UTF-8": lambda row: b'{"prompt": "\xff"}',
    "empty": lambda row: {},
    "null": dict.fromkeys,
    "short": lambda row: _changed(row, lambda value: value[:-1] if len(value) > 1 else [*value, *value], LISTS),
    "long": lambda row: _changed(row, lambda value: [*value, value[-1]], LISTS),
    "late-typed": lambda row: _changed(row, lambda value: 7),
    "late text": lambda row: _changed(row, lambda value: "yes", ("correct", "messages", "generations", "completions")),
    "late list": lambda row: {**row, "responses": ["x"], "generations": ["y"], "answer_3": "z", "chosen": None},
    "late object": lambda row: {name: {"value": value} for name, value in row.items()},
}


def _changed(row: Row, change: Callable[[Any], Any], names: tuple[str, ...] = ()) -> Row | bytes:
    """A row of which the first list (of `names`) is another; without one, its prompt."""
    chosen = next((name for name in names or (*row,)[::-1] if isinstance(row.get(name), list)), None)
    if chosen is not None:
        return {**row, chosen: change(row[chosen])}
    return {**row, next(iter(row)): 7}


def shards(folder: Path, pool: Path, where: list[Row]) -> tuple[pa.Table, set[tuple[str, int]], int]:
    """(rows of the shards, rows that were rejected, candidates that were filtered)."""
    storage = Storage(str(folder))
    plan, prepared = prepare(make_config(pool, pool={"where": where, "max_reject_share": 1.0}), storage)
    rejects = {(row["file"], row["row"]) for row in all_rejects(storage, plan)}
    return all_rows(storage, prepared), rejects, prepared.filtered


@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    damage=st.sampled_from(sorted(DAMAGES)),
    sizes=st.lists(st.integers(6, 14), min_size=1, max_size=3),
    place=st.integers(0, 1000),
    is_filtered=st.booleans(),
)
def test_a_damaged_row_costs_itself_alone(tmp_path_factory, shape, damage, sizes, place, is_filtered):
    folder = tmp_path_factory.mktemp("damaged")
    rows: list[Any] = [SHAPES[shape](number) for number in range(sum(sizes))]
    place %= len(rows)
    bad = DAMAGES[damage](rows[place])
    where = [{"column": "correct", "not_equals": False}] if is_filtered and "correct" in rows[0] else []
    start, bad_place = 0, ("", 0)
    for number, size in enumerate(sizes):
        part = rows[start : start + size]
        whole = [bad if start + at == place else row for at, row in enumerate(part)]
        bad_place = (f"{number}.jsonl", place - start) if start <= place < start + size else bad_place
        write_jsonl(folder / "whole" / f"{number}.jsonl", whole)
        write_jsonl(folder / "without" / f"{number}.jsonl", [row for row in whole if row is not bad])
        start += size
    found, rejects, filtered = shards(folder / "one", folder / "whole", where)
    expected, none, filtered_without = shards(folder / "two", folder / "without", where)
    assert none == set()
    if damage == "empty" and where:  # a row without the column that a filter names is filtered
        assert (rejects, filtered) == (set(), filtered_without + 1)
    else:
        assert (rejects, filtered) == ({bad_place}, filtered_without)
    assert found.equals(expected)
