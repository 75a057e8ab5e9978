"""Each shape that teams publish is found by itself, and every value of its rows reaches the shard."""

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.rows.columns import SHARD
from grape_service.storage.storage import Storage
from tests.json_type_pool import write_json_type
from tests.prepared_pools import all_rejects, all_rows, make_config, prepare, write_jsonl
from tests.published_rollouts import PUBLISHED

pytestmark = pytest.mark.quick


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "workspace"))


def messages_of(prompt, response):
    if isinstance(prompt, str):
        prompt = [("user", prompt)]
    prompt = [{"role": one[0], "content": one[1]} if isinstance(one, tuple) else one for one in prompt]
    return prompt, [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def found_rows(storage, prepared):
    """The rows of the shards as (prompt, response, source, other columns), in no order."""
    rows = []
    for row in all_rows(storage, prepared).to_pylist():
        messages = orjson.loads(row["messages"])
        other = {name: value for name, value in row.items() if name not in SHARD.names}
        end = row["num_prompt_messages"]
        rows.append((messages[:end], messages[end:], row["source"], other))
    return sorted(rows, key=str)


def expected_rows(expected):
    return sorted(((*messages_of(prompt, response), *rest) for prompt, response, *rest in expected), key=str)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_of_a_published_pool_reaches_the_shard(tmp_path, storage, name):
    pool = PUBLISHED[name]
    _, prepared = prepare(make_config(pool.write(tmp_path / "pool")), storage)
    assert found_rows(storage, prepared) == expected_rows(pool.expected)
    ((shape, files),) = prepared.groups[0]["shapes"].items()
    assert pool.says in shape
    assert files == 1
    assert prepared.left_out.by_reason == ({"truncated": pool.truncated} if pool.truncated else {})
    assert prepared.rejects.total == prepared.filtered == 0


@pytest.mark.parametrize("name", [name for name, pool in PUBLISHED.items() if pool.where])
def test_filters_look_at_what_is_dealt_to_each_candidate(tmp_path, storage, name):
    pool = PUBLISHED[name]
    _, prepared = prepare(make_config(pool.write(tmp_path / "pool"), pool={"where": pool.where}), storage)
    assert prepared.rows == pool.left
    assert prepared.filtered == prepared.rows_in - pool.left


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"nemotron"}))  # whose input has two types
def test_a_published_pool_as_parquet_is_the_same(tmp_path, storage, name):
    pool = PUBLISHED[name]
    (tmp_path / "pool").mkdir()
    pq.write_table(pa.Table.from_pylist(pool.rows), tmp_path / "pool" / "p.parquet")
    _, prepared = prepare(make_config(tmp_path / "pool"), storage)
    found = [(source, len(prompt), len(response)) for prompt, response, source, _ in found_rows(storage, prepared)]
    expected = [(source, len(prompt), len(response)) for prompt, response, source, _ in expected_rows(pool.expected)]
    assert found == expected
    assert (prepared.rows, prepared.left_out.total) == (len(pool.expected), pool.truncated)


def test_arrows_json_type_is_parsed_whole_and_inside_lists(tmp_path, storage):
    expected = write_json_type(tmp_path / "pool" / "p.parquet")
    _, prepared = prepare(make_config(tmp_path / "pool"), storage)
    assert found_rows(storage, prepared) == expected_rows(expected)
    (tools,) = all_rows(storage, prepared)["tools"].to_pylist()
    assert orjson.loads(tools) == [{"name": "add", "parameters": {"a": {"type": "integer"}}}]


def shards_of(tmp_path, storage, rows, **pool):
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    plan, prepared = prepare(make_config(path, pool={"max_reject_share": 1.0, **pool}), storage)
    rejects = [(row["row"], row["reason"]) for row in all_rejects(storage, plan)]
    return [
        (prompt[-1]["content"], response[-1]["content"], source, other)
        for prompt, response, source, other in found_rows(storage, prepared)
    ], rejects


def test_what_the_config_says_goes_over_what_is_found(tmp_path, storage):
    row = {
        "prompt": "a",
        "response": "b",
        "question": "q",
        "answers": ["x", "y"],
        "ok": [True, False],
        "by": ["m", "n"],
    }
    columns = {"prompt": "question", "responses": "answers", "source": "by"}
    found, rejects = shards_of(tmp_path, storage, [row], columns=columns)
    assert found == [
        ("q", "x", "m", {"prompt": "a", "response": "b", "ok": True}),
        ("q", "y", "n", {"prompt": "a", "response": "b", "ok": False}),
    ]
    assert rejects == []


def test_several_columns_and_objects_by_name(tmp_path, storage):
    row = {"data": {"question": "q", "level": 2}, "first": "x", "second": "y", "meta": {"writer": "m", "n": 1}}
    columns = {"prompt": "data.question", "responses": ["first", "second"], "source": "meta.writer"}
    where = [{"column": "data.level", "at_least": 2}]
    found, _ = shards_of(tmp_path, storage, [row], columns=columns, where=where)
    assert found == [
        ("q", "x", "m", {"data": {"level": 2}, "meta": {"n": 1}, "response_column": "first"}),
        ("q", "y", "m", {"data": {"level": 2}, "meta": {"n": 1}, "response_column": "second"}),
    ]


def test_a_prompt_column_that_ends_with_the_answer_holds_both(tmp_path, storage):
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    found, _ = shards_of(tmp_path, storage, [{"talk": turns}], columns={"prompt": "talk"})
    assert found == [("Hi?", "Hello.", None, {})]


def test_a_list_that_has_to_match_the_responses_and_does_not_is_a_reject(tmp_path, storage):
    rows = [
        {"prompt": "a", "responses": ["x", "y"], "finish_reasons": ["stop", "length"], "tags": ["p", "q"]},
        {"prompt": "b", "responses": ["x", "y", "z"], "finish_reasons": ["stop"], "tags": ["p", "q"]},
        {"prompt": "c", "responses": ["x"], "finish_reasons": ["stop"], "tags": ["p", "q"]},
    ]
    found, rejects = shards_of(tmp_path, storage, rows)
    assert found == [("a", "x", None, {"tags": ["p", "q"]}), ("c", "x", None, {"tags": ["p", "q"]})]
    assert rejects == [(0, "truncated"), (1, "a list does not match the responses")]


def test_conversations_without_an_answer_and_two_system_prompts_are_rejects(tmp_path, storage):
    user, answer = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"messages": [user, answer], "system": None},
        {"messages": [user], "system": None},
        {"messages": [answer], "system": None},
        {"messages": [], "system": None},
        {"messages": [system, user, answer], "system": "Be long."},
        {"messages": [system, user, answer], "system": "Be brief."},
    ]
    found, rejects = shards_of(tmp_path, storage, rows)
    assert len(found) == 2
    assert rejects == [
        (1, "conversation does not end with a response"),
        (2, "missing prompt"),
        (3, "conversation does not end with a response"),
        (4, "two system prompts"),
    ]


def test_sharegpt_calls_of_functions_are_calls_of_tools(tmp_path, storage):
    turns = [
        {"from": "human", "value": "1+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ]
    write_jsonl(tmp_path / "p.jsonl", [{"conversations": turns}])
    _, prepared = prepare(make_config(tmp_path / "p.jsonl"), storage)
    ((_, response, _, _),) = found_rows(storage, prepared)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert response == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]


def test_a_prompt_that_only_looks_like_json_stays_text(tmp_path, storage):
    prompts = ["[1, 2] is what?", '[{"a": 1}]', '{"role": "user", "content": "x"}', "[]"]
    found, _ = shards_of(tmp_path, storage, [{"prompt": prompt, "response": "b"} for prompt in prompts])
    assert sorted(prompt for prompt, *_ in found) == sorted(prompts)


def test_the_shape_may_be_said(tmp_path, storage):
    row = {"question": "q", "generations": ["x", "y"], "answer": "z"}
    assert len(shards_of(tmp_path, storage, [row])[0]) == 2
    ((prompt, response, _, other),), _ = shards_of(tmp_path, storage, [row], shape="response")
    assert (prompt, response, other) == ("q", "z", {"generations": ["x", "y"]})
