"""Rows of a release: arrays as long as input_ids, aligned with the token that is predicted."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

import grape_service
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.release.rows import final_batches, kept_rows, messages_array, write_kept_rows
from grape_service.rows.columns import (
    BEHAVIOR_KNOWN,
    BEHAVIOR_ROW_COLUMNS,
    KEPT_COLUMNS,
    SHARD,
    WEIGHED_COLUMNS,
    message_type,
    release_schema,
)
from grape_service.rows.keys import row_keys
from grape_service.score.store import ScoreStore
from grape_service.storage.parquet import read_tables, write_parquet
from grape_service.storage.storage import Storage
from grape_service.weigh.lookup import Stores
from grape_service.weigh.partition import WeighContext, WeighPartition, weigh_partition
from tests.made_rows import Row, put_scores, row_table
from tests.workers.training.tiny_release import make_rows, write_release

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


TURNS = [
    # what of the row's tokens is known of its behavior, and who weighs it
    Row("p", "recorded", "column", num_loss=3, recorded=[-1.0, -0.25, -0.5, -0.125]),
    Row("p", "no turn end", "column", num_loss=3, recorded=[-1.0, -0.25, -0.5, float("nan")]),
    Row("p", "sure", "column", num_loss=2, recorded=[-1.0, -0.25, 0.0]),
    Row("q", "cut off", "column", num_loss=2, turn_end=False, recorded=[-1.0, -0.25]),
    Row("q", "hot", "column", num_loss=2, recorded=[-1.0, -0.25, float("nan")], sampling={"temperature": 0.5}),
    Row("q", "cut support", "column", num_loss=1, recorded=[-1.0, -2.0], sampling={"top_p": 0.9}),
    Row("r", "scored", "policy", num_loss=3),
    Row("r", "other turn end", "policy", num_loss=2),
    Row("r", "nobody's", None, num_loss=2),
]
STOP = 7


def weigh_again(tmp_path, weights: dict, rows: list[Row], first_weighed: bool) -> tuple[pa.Table, pa.Table]:
    """The weights of a pool, and those of the release that is made of it, weighed again."""
    config = Config.model_validate(
        {
            "name": "test",
            "pool": {"path": "pool.jsonl"},
            "target": {"model": "model", "dtype": "float32"},
            "behavior": {
                "sources": {
                    "column": {"column": "behavior_logprobs", "recorded": "processed"},
                    "policy": {"model": "w"},
                },
                "missing": "uniform",
            },
            "select": {"method": "all"},
            "weights": {"method": "pear", **weights},
            "output": {"path": "out"},
        }
    )
    storage = Storage(str(tmp_path))
    table = row_table(rows)
    ids, masks = table["input_ids"].to_pylist(), table["loss_mask"].to_pylist()
    masks[0][1], ids[0][1] = 1, 9  # a trajectory: a turn before the last one
    for row, mask in zip(ids, masks, strict=True):
        for place, kind in enumerate(mask):
            row[place] = STOP if kind == 2 else row[place] + 10
    flat, offsets = np.concatenate([np.array(row, np.int32) for row in ids]), np.cumsum([0, *map(len, ids)])
    keys = row_keys(flat, np.concatenate([np.array(m, np.uint8) for m in masks]), offsets)
    table = table.set_column(table.column_names.index("row_key"), SHARD.field("row_key"), keys)
    for name, values in (("input_ids", ids), ("loss_mask", masks)):
        table = table.set_column(
            table.column_names.index(name), SHARD.field(name), pa.array(values, SHARD.field(name).type)
        )
    recorded = table["recorded_logprobs"].to_pylist()
    recorded[0] = [-0.75, *recorded[0]]
    column = pa.array(recorded, pa.list_(pa.float32()))
    table = table.set_column(table.column_names.index("recorded_logprobs"), SHARD.field("recorded_logprobs"), column)
    random = np.random.default_rng(0)
    stores = {name: ScoreStore(storage, name) for name in ("target", "hot", "writer")}
    lengths = [sum(value > 0 for value in mask) for mask in masks]
    scored = {}
    for name, store in stores.items():
        scored[name] = [-random.random(length).astype(np.float32) for length in lengths]
        put_scores(store, {key.as_py(): values.tolist() for key, values in zip(keys, scored[name], strict=True)})
    behavior_rows = pa.table(
        {
            "prompt_id": table["prompt_id"],
            "candidate_id": table["candidate_id"],
            "target_row_key": keys,
            "row_key": keys,
            "turn_end_differs": [row.candidate_id == "other turn end" for row in rows],
            "target_spans": pa.nulls(len(rows), pa.list_(pa.int32())),
            "own_spans": pa.nulls(len(rows), pa.list_(pa.int32())),
        },
        schema=BEHAVIOR_ROW_COLUMNS,
    )
    write_parquet(storage, "behavior.parquet", behavior_rows.schema, [behavior_rows])
    kept = {item.name: pa.nulls(len(rows), item.type) for item in KEPT_COLUMNS}
    kept["num_candidates"] = pa.array(np.ones(len(rows), np.int32))
    kept["target_logprobs"] = pa.array([values.tolist() for values in scored["target"]], pa.list_(pa.float32()))
    for item in KEPT_COLUMNS:
        table = table.append_column(item, kept[item.name])
    write_parquet(storage, "kept.parquet", table.schema, [table])

    def weigh(kept_path: str, out: str) -> tuple[pa.Table, int]:
        found = Stores(None, [stores["writer"]], {0.5: stores["hot"]})
        partition = WeighPartition("b", kept_path, [["behavior.parquet"]], out)
        counts = weigh_partition(WeighContext(storage, config, found), partition)
        return next(iter(read_tables(storage, [out], None))), counts.unknown_tokens

    first, unknown = weigh("kept.parquet", "weighed.parquet")
    sampling = pa.field("sampling", pa.string())
    path = "weighed.parquet" if first_weighed else "kept.parquet"
    batches = list(final_batches(storage, path, [], [sampling, *([BEHAVIOR_KNOWN] if unknown else [])]))
    again = kept_rows(pa.Table.from_batches(batches), pa.schema([*SHARD, *KEPT_COLUMNS]), [STOP], keep_scores=True)
    assert again["row_key"].to_pylist() == keys.to_pylist()
    assert again["loss_mask"].to_pylist()[1:] == masks[1:]
    write_parquet(storage, "again.parquet", again.schema, [again])
    return first, weigh("again.parquet", "weighed-again.parquet")[0]


@pytest.mark.parametrize("first_weighed", [True, False], ids=["weighed", "not weighed"])
@pytest.mark.parametrize("weights", [{}, {"center": "sequence"}, {"normalize": "sequence"}, {"level": "block"}])
@pytest.mark.parametrize("without", [None, 1, 7])
def test_weighing_a_release_again_gives_the_same_bits(tmp_path, first_weighed, weights, without):
    rows = [row for place, row in enumerate(TURNS) if place != without]
    first, again = weigh_again(tmp_path, weights, rows, first_weighed)
    for name in ("weights", "weight_source"):
        assert again[name].to_pylist() == first[name].to_pylist()
    if first_weighed:
        assert again["behavior_logprobs"].to_pylist() == first["behavior_logprobs"].to_pylist()


def test_a_release_with_a_token_id_that_the_target_does_not_have_is_not_weighed_again(tmp_path):
    rows = make_rows(6)
    rows[4]["input_ids"][0] = 515
    release = grape_service.load(write_release(tmp_path / "out", rows, {}))
    (entry,) = release.manifest.files
    part = (release.storage, f"{release.folder}/{entry.path}", entry.sha256, release.storage, "kept.parquet")
    assert write_kept_rows(*part, [], [STOP], True, known_ids=(516, "m"))[0] == 6
    with pytest.raises(UserError, match=r"row 5 of .*part-00000.parquet .prompt_id prompt-4. holds the token id 515"):
        write_kept_rows(*part, [], [STOP], True, known_ids=(515, "m"))
