import gzip
import json
import uuid

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.errors import UserError
from grape_service.pool.lines import BOM
from grape_service.prepare.reduce import shard_paths
from grape_service.render.loading import load_renderer
from grape_service.rows.columns import LOSS_TOKEN, SHARD
from grape_service.rows.keys import partition_of, row_keys
from grape_service.rows.ragged import list_offsets_and_values
from grape_service.storage.storage import Storage
from tests.prepared_pools import (
    all_rejects,
    all_rows,
    make_config,
    partition_shards,
    prepare,
    read_shard,
    write_jsonl,
)
from tests.tiny_models import make_tokenizer

pytestmark = pytest.mark.quick

ROWS = [
    {"prompt": f"question {n // 3}", "response": f"answer {n} ä\u2028", "source": "abc"[n % 3], "n": n}
    for n in range(60)
]


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "workspace"))


def jsonl(rows, newline=b"\n"):
    return newline.join(orjson.dumps(row) for row in rows)


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)


FORMATS = {
    "p.jsonl": lambda path: path.write_bytes(jsonl(ROWS) + b"\n"),
    "no-final-newline.jsonl": lambda path: path.write_bytes(jsonl(ROWS)),
    "crlf.jsonl": lambda path: path.write_bytes(jsonl(ROWS, b"\r\n")),
    "blank-lines.jsonl": lambda path: path.write_bytes(BOM + jsonl(ROWS, b"\n\n")),
    "p.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(jsonl(ROWS[:9]) + b"\n") + gzip.compress(jsonl(ROWS[9:]))
    ),
    "p.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(jsonl(ROWS[:9]) + b"\n") + zstandard.compress(jsonl(ROWS[9:]))
    ),
    "p.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "p.parquet": lambda path: write_parquet(path, ROWS),
    "lines.json": lambda path: path.write_bytes(jsonl(ROWS) + b"\n"),
    "array.jsonl": lambda path: path.write_bytes(BOM + orjson.dumps(ROWS)),
    "lines.json.gz": lambda path: path.write_bytes(gzip.compress(jsonl(ROWS))),
    "array.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(orjson.dumps(ROWS))),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("partition_bytes", [700, 10**9])
def test_every_format_gives_the_same_rows(tmp_path, storage, name, partition_bytes):
    reference = write_jsonl(tmp_path / "reference.jsonl", ROWS)
    _, expected = prepare(make_config(reference), storage)
    FORMATS[name](tmp_path / name)
    config = make_config(tmp_path / name, workers={"partition_bytes": partition_bytes})
    plan, prepared = prepare(config, storage)
    if partition_bytes == 700:
        assert plan.num_partitions > 1
        assert len(plan.pieces) > 1 or name.endswith((".gz", ".zst", "p.json")) or name.startswith("array")
    assert all_rows(storage, prepared).equals(all_rows(storage, expected))
    assert (prepared.rows_in, prepared.rows, prepared.prompts) == (60, 60, 20)
    assert prepared.sources == {"a": 20, "b": 20, "c": 20}


def test_a_json_file_of_one_object_is_one_row(tmp_path, storage):
    (tmp_path / "p.json").write_text('{"prompt": "a", "responses": ["x", "y"]}')
    assert prepare(make_config(tmp_path / "p.json"), storage)[1].rows == 2


def test_a_shard_has_the_columns_of_the_contract(tmp_path, storage):
    rows = [
        {
            "prompt": "two words",
            "response": "one",
            "score": 1,
            "tokens": 7,
            "when": "now",
            "prompt_id": "p",
            "source": 3,
        },
        {"prompt": "two words", "response": "a b", "score": 0.5, "when": None, "kept": [1]},
    ]
    pool = write_jsonl(tmp_path / "p.jsonl", [*rows, {**rows[0], "input_ids": {"x": 1}, "response": "c"}])
    _, prepared = prepare(make_config(pool), storage)
    table = all_rows(storage, prepared)
    assert table.schema.names == [*SHARD.names, "kept", "pool_input_ids", "score", "tokens", "when"]
    assert table.schema.field("score").type == pa.float64()
    assert prepared.other_fields == [table.schema.field(name) for name in table.schema.names[-5:]]
    assert table.select(SHARD.names).schema.equals(SHARD)
    row = next(row for row in table.to_pylist() if row["tokens"] == 7 and row["pool_input_ids"] is None)
    assert row["input_ids"] == [316, 519, 1, 311, 2]
    assert row["loss_mask"] == [0, 0, 0, 1, 2]
    assert (row["prompt_len"], row["source"], row["num_prompt_messages"]) == (3, "3", 1)
    assert orjson.loads(row["messages"]) == [
        {"role": "user", "content": "two words"},
        {"role": "assistant", "content": "one"},
    ]
    offsets, ids = list_offsets_and_values(table["input_ids"].combine_chunks())
    _, mask = list_offsets_and_values(table["loss_mask"].combine_chunks())
    assert table["row_key"].to_pylist() == row_keys(ids, mask, offsets).to_pylist()
    assert prepared.used_token_ids.tolist() == sorted(set(ids[mask == LOSS_TOKEN].tolist()))


def test_parquet_types_and_chats_come_through(tmp_path, storage):
    column = {
        "prompt": [[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]] * 2,
        "response": ["a", "b"],
        "response_ids": [[1], None],
        "behavior_logprobs": [[-0.5], None],
        "sampling": [{"temperature": 0.5, "seed": 1}, None],
        "when": pa.array([0, None], pa.timestamp("ms", "UTC")),
        "small": pa.array([1, 2], pa.int8()),
    }
    pq.write_table(pa.table(column), tmp_path / "p.parquet")
    _, prepared = prepare(make_config(tmp_path / "p.parquet"), storage)
    table = all_rows(storage, prepared)
    assert table.schema.field("when").type == pa.timestamp("ms", "UTC")
    assert table.schema.field("small").type == pa.int64()
    assert sorted(table["when"].to_pylist(), key=str) == sorted(column["when"].to_pylist(), key=str)
    assert prepared.recorded == 1
    assert prepared.sampling == {'{"temperature":0.5}': 1}
    assert table["num_prompt_messages"].to_pylist() == [2, 2]


def test_arrow_types_that_are_text_become_text(tmp_path, storage):
    id_ = uuid.uuid4()
    column = {
        "prompt": pa.array([b"q 1", "q ä".encode()], pa.binary()),
        "response": pa.array(["a", "b"], pa.string_view()),
        "source": pa.array([b"gen", None], pa.binary()).dictionary_encode(),
        "prompt_id": pa.array([id_.bytes, None], pa.uuid()),
        "lang": pa.array([b"en", b"en"], pa.binary_view()),
        "picture": pa.array([b"\x89PNG\0", None], pa.large_binary()),
        "scores": pa.array([[("x", 1)], None], pa.map_(pa.string(), pa.int64())),
        "ids": pa.array([[id_.bytes], None], pa.list_(pa.binary(16))),
    }
    pq.write_table(pa.table(column), tmp_path / "p.parquet")
    config = make_config(tmp_path / "p.parquet", pool={"where": [{"column": "lang", "equals": "en"}]})
    _, prepared = prepare(config, storage)
    rows = sorted(all_rows(storage, prepared).to_pylist(), key=lambda row: row["messages"])
    assert [orjson.loads(row["messages"])[0]["content"] for row in rows] == ["q 1", "q ä"]
    assert [row["source"] for row in rows] == ["gen", None]
    assert rows[0]["prompt_id"] == str(id_)
    assert [row["lang"] for row in rows] == ["en", "en"]
    assert [row["picture"] for row in rows] == [b"\x89PNG\0", None]
    assert [row["scores"] for row in rows] == [{"x": 1}, None]
    column["prompt"] = pa.array([b"\xff\xfe", b"x"], pa.binary())
    pq.write_table(pa.table(column), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"column 'prompt' of .*p\.parquet' holds bytes that are not text"):
        prepare(config, storage)


def test_a_text_that_is_not_utf8_costs_its_parquet_row_alone(tmp_path, storage):
    texts = pa.array([b"fine", b"\xff\xfe", b"also"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"prompt": ["p"] * 3, "response": texts}), tmp_path / "p.parquet")
    plan, prepared = prepare(make_config(tmp_path / "p.parquet", pool={"max_reject_share": 0.5}), storage)
    assert prepared.rows == 2
    assert [(row["row"], row["reason"]) for row in all_rejects(storage, plan)] == [(1, "not UTF-8")]


def test_shards_hold_whole_prompts_of_their_partition_of_about_the_same_size(tmp_path, storage):
    pool = write_jsonl(tmp_path / "p.jsonl", ROWS)
    config = make_config(pool, workers={"partition_bytes": 1200, "shard_tokens": 40})
    plan, prepared = prepare(config, storage)
    assert plan.num_partitions == 4
    seen: list[str] = []
    for partition in plan.partitions:
        shards = partition_shards(storage, prepared, partition)
        assert [path for path, _ in shards] == list(shard_paths(prepared, partition))
        for path, counts in shards:
            table = read_shard(storage, path, ["prompt_id", "input_ids"])
            prompts = table["prompt_id"].to_pylist()
            assert all(partition_of(prompt, 4) == partition for prompt in prompts)
            assert sum(map(len, table["input_ids"].to_pylist())) == counts.tokens <= 40
            assert len(prompts) == counts.rows
            assert all(prompts.count(prompt) == 3 for prompt in prompts)
            seen += sorted(set(prompts))
        assert sum(counts.tokens for _, counts in shards) == prepared.partitions[partition].tokens
    assert len(seen) == len(set(seen)) == 20
    assert prepared.num_shards == sum(totals.num_shards for totals in prepared.partitions.values()) > 4


def test_the_real_renderer(tmp_path, storage):
    folder = tmp_path / "model"
    tokenizer = make_tokenizer(folder)
    renderer = load_renderer(str(folder), PolicyConfig(model=str(folder)), RenderConfig())
    ids = [int(id_) for id_ in tokenizer("a b", add_special_tokens=False)["input_ids"]]
    recorded = {"prompt": "q", "response": "a b", "response_ids": ids, "behavior_logprobs": [-0.5] * len(ids)}
    rows = [
        *ROWS,
        recorded,
        {**recorded, "prompt": "two too many", "behavior_logprobs": [-0.5] * (len(ids) + 2)},
        {**recorded, "prompt": "above 0", "behavior_logprobs": [0.5] * len(ids)},
        {**recorded, "prompt": "other words", "response": "c"},
        {"prompt": "no ids", "response": "a", "behavior_logprobs": [-1.0]},
        {"prompt": "no token", "response": "a", "response_ids": [10**6]},
    ]
    pool = write_jsonl(tmp_path / "p.jsonl", rows)
    plan, prepared = prepare(make_config(pool), storage, renderer)
    assert (prepared.rows, prepared.recorded) == (61, 1)
    assert prepared.rejects.by_reason == {
        "recorded log-probabilities do not match response_ids": 3,
        "response_ids are not the response": 1,
        "token id outside the vocabulary": 1,
    }
    assert [row["row"] for row in all_rejects(storage, plan)] == [61, 62, 63, 64, 65]
    row = next(row for row in all_rows(storage, prepared).to_pylist() if row["recorded_logprobs"])
    mask = np.array(row["loss_mask"])
    assert np.array(row["input_ids"])[mask == LOSS_TOKEN].tolist() == ids
    np.testing.assert_equal(row["recorded_logprobs"], [-0.5] * len(ids) + [np.nan] * int((mask == 2).sum()))


def test_a_pool_on_s3(tmp_path, s3_url):
    store = Storage(s3_url)
    write_jsonl(tmp_path / "p.jsonl", ROWS)
    _, expected = prepare(make_config(tmp_path / "p.jsonl"), Storage(str(tmp_path / "local")))
    store.write("pool/one.jsonl", jsonl(ROWS[:40]))
    store.write("pool/more/two.jsonl.gz", gzip.compress(jsonl(ROWS[40:])))
    config = make_config(f"{s3_url}/pool", workers={"partition_bytes": 1500})
    plan, prepared = prepare(config, store.sub("workspace"))
    assert [file.url for file in plan.files] == [f"{s3_url}/pool/more/two.jsonl.gz", f"{s3_url}/pool/one.jsonl"]
    assert all(file.version for file in plan.files)
    assert all_rows(store.sub("workspace"), prepared).equals(all_rows(Storage(str(tmp_path / "local")), expected))
    assert prepare(make_config(f"{s3_url}/pool/*.jsonl"), store.sub("workspace"))[1].rows == 40
