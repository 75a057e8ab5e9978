"""Windows of rows: by hand, and against a slow way to make them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_service.methods.base import Window
from grape_service.rows.columns import LOSS_TOKEN, LOSS_TURN_END
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import list_array, list_offsets_and_values, offsets_from_lengths
from grape_service.score import windows
from grape_service.score.windows import WINDOW, windows_of

pytestmark = pytest.mark.quick


def table_of(rows: list[tuple[list[int], list[int], int]]) -> pa.Table:
    """(ids, mask, tokens before the first with loss) of each row."""
    offsets = offsets_from_lengths([len(ids) for ids, _, _ in rows])
    ids, mask = (np.concatenate([row[place] for row in rows]) for place in (0, 1))
    return pa.table(
        {
            "prompt_id": [f"p{place}" for place in range(len(rows))],
            "candidate_id": [f"c{place}" for place in range(len(rows))],
            "input_ids": list_array(offsets, ids.astype(np.int32), pa.int32()),
            "loss_mask": list_array(offsets, mask.astype(np.uint8), pa.uint8()),
            "prompt_len": pa.array([row[2] for row in rows], pa.int32()),
        }
    )


def made(table: pa.Table, steps: list[int], window: Window) -> list[tuple[str, list[int], list[int], int]]:
    found = []
    for part in windows_of(table, np.array(steps), window).tables(table):
        assert part.schema.equals(WINDOW)
        names = ("candidate_id", "input_ids", "loss_mask", "prompt_len")
        found += [tuple(row[name] for name in names) for row in part.to_pylist()]
    return found


ROW = ([1, 2, 10, 11, 20, 30, 31, 9], [0, 0, 1, 1, 1, 1, 1, 2], 2)
STEPS = [0, 0, 1, 2, 2, 2]


def test_by_hand() -> None:
    table = table_of([ROW, ([5, 6, 7], [0, 1, 1], 1)])
    assert made(table, [*STEPS, 0, 0], Window(steps=1)) == [
        ("c0", [1, 2, 10, 11], [0, 0, 1, 1], 2),
        ("c0", [1, 2, 10, 11, 20], [0, 0, 0, 0, 1], 4),
        ("c0", [1, 2, 20, 30, 31, 9], [0, 0, 0, 1, 1, 2], 3),
        ("c1", [5, 6, 7], [0, 1, 1], 1),
    ]
    assert made(table, [*STEPS, 0, 0], Window(tokens=2))[1:3] == [
        ("c0", [1, 2, 10, 11, 20], [0, 0, 0, 0, 1], 4),
        ("c0", [1, 2, 11, 20, 30, 31, 9], [0, 0, 0, 0, 1, 1, 2], 4),
    ]
    with pytest.raises(ValueError, match="exactly one of: steps, tokens"):
        Window(steps=1, tokens=2)


def test_steps_in_common_are_scored_once() -> None:
    table = table_of([ROW, ([1, 2, 10, 11, 21, 9], [0, 0, 1, 1, 1, 2], 2)])
    windows = windows_of(table, np.array([*STEPS, 0, 0, 1, 1]), Window(steps=1))
    assert len(windows) == 5
    (once,) = windows.distinct().tables(table)
    assert once["candidate_id"].to_pylist() == ["c0", "c0", "c0", "c1"]
    assert once["row_key"].unique() == windows.keys().unique()


def test_what_a_tool_said_between_is_in_the_window() -> None:
    row = ([1, 10, 9, 50, 51, 20, 9], [0, 1, 2, 0, 0, 1, 2], 1)
    assert made(table_of([row]), [0, 0, 1, 1], Window(steps=1)) == [
        ("c0", [1, 10, 9], [0, 1, 2], 1),
        ("c0", [1, 10, 9, 50, 51, 20, 9], [0, 0, 0, 0, 0, 1, 2], 5),
    ]


@st.composite
def some_rows(draw):
    rows, steps = [], []
    for _ in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(st.integers(0, 99), min_size=1, max_size=5))
        ids, mask, step = list(prompt), [0] * len(prompt), -1
        for span in range(draw(st.integers(1, 3))):
            if span:
                between = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3))
                ids, mask = ids + between, mask + [0] * len(between)
            for length in draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)):
                step += 1
                ids += draw(st.lists(st.integers(0, 99), min_size=length, max_size=length))
                mask += [LOSS_TOKEN] * length
                steps += [step] * length
            if draw(st.booleans()):
                ids, mask, steps = [*ids, 7], [*mask, LOSS_TURN_END], [*steps, step]
        rows.append((ids, mask, len(prompt)))
    return rows, steps


@settings(deadline=None, max_examples=120)
@given(some_rows(), st.sampled_from(["steps", "tokens"]), st.integers(1, 6), st.integers(1, 40))
def test_against_a_slow_way(found, kind, number, slice_tokens) -> None:
    rows, steps = found
    expected, place = [], 0
    for candidate, (ids, mask, prompt_len) in enumerate(rows):
        loss = [i for i, value in enumerate(mask) if value]
        own, place = steps[place : place + len(loss)], place + len(loss)
        begins = {step: min(i for i, s in zip(loss, own, strict=True) if s == step) for step in own}
        for step in sorted(begins):
            begin = begins[step]
            end = max(i for i, s in zip(loss, own, strict=True) if s == step) + 1
            start = begins.get(step - number, prompt_len) if kind == "steps" else max(prompt_len, begin - number)
            context = ids[:prompt_len] + ids[start:begin]
            expected.append(
                (f"c{candidate}", context + ids[begin:end], [0] * len(context) + mask[begin:end], len(context))
            )
    table, window = table_of(rows), Window(**{kind: number})
    before = windows.SLICE_TOKENS
    try:
        windows.SLICE_TOKENS = slice_tokens
        assert made(table, steps, window) == expected
        keys = windows_of(table, np.array(steps), window).keys()
    finally:
        windows.SLICE_TOKENS = before
    offsets = offsets_from_lengths([len(ids) for _, ids, _, _ in expected])
    flat = [np.concatenate([row[place] for row in expected]) for place in (1, 2)]
    assert keys.equals(row_keys(flat[0].astype(np.int32), flat[1], offsets))
    _, masks = list_offsets_and_values(table["loss_mask"].combine_chunks())
    assert (flat[1] > 0).sum() == (masks > 0).sum()  # each token with loss once
