"""Rows of a release: arrays as long as input_ids, aligned with the token that is predicted."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from grape_service.release.rows import final_batches, messages_array
from grape_service.rows.columns import message_type, release_schema
from grape_service.select.partition import KEPT_COLUMNS
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from grape_service.weigh.partition import WEIGHED_COLUMNS
from tests.made_rows import Row, row_table

ROWS = [
    Row("p", "x", num_loss=2, prompt_len=2, other={"level": 3}),
    Row("q", "y", num_loss=1, prompt_len=1, turn_end=False, other={"level": None}),
    Row("r", "z", num_loss=1, prompt_len=1),
]
LEVEL = pa.field("level", pa.int64())


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path))


def write(storage: Storage, weighed: bool) -> None:
    table = row_table(ROWS, [LEVEL])
    columns = {
        "target_logprobs": [[-1.0, -2.0, -3.0], [-4.0], None],
        "grape_score": [-1.5, -4.0, None],
        "grape_rank": [1, 2, None],
        "grape_margin": [0.5, None, None],
        "num_candidates": [2, 2, 1],
    }
    if weighed:
        columns |= {
            "behavior_logprobs": [[-1.5, -2.5, -3.5], None, None],
            "weights": [[0.25, 0.5, 1.0], [1.0], [1.0, 1.0]],
            "weight_source": ["pear", "uniform", "uniform"],
        }
    for item in [*KEPT_COLUMNS, *(WEIGHED_COLUMNS if weighed else [])]:
        table = table.append_column(item, pa.array(columns[item.name], type=item.type))
    write_parquet(storage, "rows.parquet", table.schema, [table], row_group_bytes=400)


def read(storage: Storage, factor: float = 1.0) -> list[dict]:
    batches = list(final_batches(storage, "rows.parquet", [], [LEVEL], factor))
    table = pa.Table.from_batches(batches)
    assert table.schema.equals(release_schema([], [LEVEL]))
    table.validate(full=True)
    return table.to_pylist()


def test_weighed_rows_by_hand(storage):
    write(storage, weighed=True)
    first, second, third = read(storage)
    start = first["input_ids"][0]
    assert first["input_ids"] == [start, start + 1, start + 2, start + 3, start + 4]
    assert first["labels"] == [-100, -100, start + 2, start + 3, start + 4]
    assert first["loss_mask"] == [False, False, True, True, True]
    assert first["target_logprobs"] == [0, 0, -1, -2, -3]
    assert first["behavior_logprobs"] == [0, 0, -1.5, -2.5, -3.5]
    assert first["loss_weights"] == [0, 0, 0.25, 0.5, 1]
    assert first["messages"] == [
        {"role": "user", "content": "question p"},
        {"role": "assistant", "content": "answer x"},
    ]
    assert (first["grape_rank"], first["grape_margin"], first["level"]) == (1, 0.5, 3)
    assert second["target_logprobs"] == [0, -4]
    assert second["behavior_logprobs"] is None
    assert second["loss_weights"] == [0, 1]
    assert second["level"] is None
    assert third["target_logprobs"] is None
    assert third["grape_score"] is third["grape_rank"] is third["grape_margin"] is None
    assert third["loss_weights"] == [0, 1, 1]
    assert [row["weight_source"] for row in (first, second, third)] == ["pear", "uniform", "uniform"]


def test_the_factor_of_a_dataset_scales_pear_rows_alone(storage):
    write(storage, weighed=True)
    first, second, _ = read(storage, factor=2.0)
    assert first["loss_weights"] == [0, 0, 0.5, 1, 2]
    assert second["loss_weights"] == [0, 1]


def test_rows_without_weights_weigh_1_on_the_mask(storage):
    write(storage, weighed=False)
    for row in read(storage):
        assert row["loss_weights"] == [float(on) for on in row["loss_mask"]]
        assert row["weight_source"] == "uniform"
        assert row["behavior_logprobs"] is None


def test_a_column_that_the_file_lacks_is_null(storage):
    write(storage, weighed=False)
    other = [LEVEL, pa.field("topic", pa.string())]
    [batch, *_] = final_batches(storage, "rows.parquet", [], other)
    assert batch["topic"].null_count == batch.num_rows


def test_messages_keep_every_field_as_text():
    messages = [
        {"role": "user", "content": "ü\n<b>"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
    ]
    kind = message_type(["tool_calls", "tool_call_id"])
    texts = pa.array([json.dumps(messages), "[]", json.dumps(messages[:1])])
    first, empty, last = messages_array(texts, kind).cast(kind).to_pylist()
    assert [message["content"] for message in first] == ["ü\n<b>", None, "4"]
    assert json.loads(first[1]["tool_calls"]) == messages[1]["tool_calls"]
    assert first[2]["tool_call_id"] == "c1"
    assert empty == []
    assert last == [{"role": "user", "content": "ü\n<b>", "tool_calls": None, "tool_call_id": None}]


def test_many_rows_come_back_in_order(storage):
    generator = np.random.default_rng(0)
    rows = [Row(f"p{number}", "c", num_loss=int(generator.integers(1, 50))) for number in range(500)]
    table = row_table(rows)
    columns = {item.name: pa.nulls(500, item.type) for item in KEPT_COLUMNS}
    columns["num_candidates"] = pa.array(np.ones(500, dtype=np.int32))
    flat = [(-generator.random(row.num_scores)).astype(np.float32).tolist() for row in rows]
    columns["target_logprobs"] = pa.array(flat, type=pa.list_(pa.float32()))
    for item in KEPT_COLUMNS:
        table = table.append_column(item, columns[item.name])
    write_parquet(storage, "rows.parquet", table.schema, [table], row_group_bytes=30_000)
    batches = list(final_batches(storage, "rows.parquet", [], []))
    assert len(batches) > 3
    for row, result in zip(rows, pa.Table.from_batches(batches).to_pylist(), strict=True):
        place = int(row.prompt_id[1:])
        assert result["target_logprobs"] == [0.0] * row.prompt_len + flat[place]
        assert len(result["input_ids"]) == len(result["labels"]) == len(result["loss_weights"])
