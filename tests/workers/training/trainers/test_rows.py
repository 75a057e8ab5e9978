from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.training.tiny_release import SCHEMA, make_rows
from workers.training.trainers.rows import LocalRows, packed_groups, rounded_up, write_local_rows


@given(lengths=st.lists(st.integers(1, 50), max_size=300), limit=st.integers(50, 80), seed=st.integers(0, 5))
def test_packing_keeps_each_row_once_and_within_the_limit(lengths: list[int], limit: int, seed: int) -> None:
    array = np.array(lengths, dtype=np.int64)
    groups = packed_groups(np.arange(len(array)), array, limit, seed).to_pylist()
    assert sorted(row for group in groups for row in group) == list(range(len(array)))
    assert all(0 < array[group].sum() <= limit for group in groups)
    # Best fit leaves no two groups that would fit into one.
    sizes = sorted(int(array[group].sum()) for group in groups)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > limit


def test_empty_groups_fill_up_to_a_multiple() -> None:
    groups = packed_groups(np.arange(5), np.full(5, 10), 10, None)
    assert rounded_up(groups, 4).to_pylist()[5:] == [[], [], []]
    assert rounded_up(groups, 5).to_pylist() == groups.to_pylist()


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = make_rows(2500)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    write_local_rows(pads.dataset(table), tmp_path / "rows.arrow", eval_share=0.2)
    local = LocalRows(tmp_path / "rows.arrow")
    assert len(local) == 2500
    assert 0.15 < local.is_eval.mean() < 0.25
    for index in (0, 1023, 1024, 2048, 2499):
        found, expected = local.row(index), rows[index]
        for name in ("input_ids", "loss_mask", "loss_weights"):
            np.testing.assert_array_equal(getattr(found, name), expected[name])
        if expected["behavior_logprobs"] is None:
            assert found.behavior_logprobs is None
        else:
            np.testing.assert_array_equal(found.behavior_logprobs, expected["behavior_logprobs"])
    assert local.num_without_behavior(np.arange(2500)) == 1


def test_the_evaluation_split_depends_on_the_prompt_alone(tmp_path: Path) -> None:
    rows = make_rows(300)
    for number, chosen in enumerate((rows, rows[::-1][:200])):
        table = pa.Table.from_pylist(chosen, schema=SCHEMA)
        write_local_rows(pads.dataset(table), tmp_path / f"{number}.arrow", eval_share=0.5)
    first, second = (LocalRows(tmp_path / f"{number}.arrow").is_eval for number in (0, 1))
    np.testing.assert_array_equal(first[::-1][:200], second)
