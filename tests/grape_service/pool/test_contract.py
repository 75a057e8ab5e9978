"""A row that does not fit the layout of its group is a reject, wherever it stands, and decides nothing for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.errors import UserError
from grape_service.pool import sample
from grape_service.prepare import plan as planning
from grape_service.storage.storage import Storage
from tests.prepared_pools import all_rejects, all_rows, make_config, prepare, write_jsonl

LENIENT = {"max_reject_share": 1.0}
TALK = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]


def judged(number: int) -> dict[str, Any]:
    return {"prompt": f"q {number}", "responses": [f"right {number}", f"wrong {number}"], "correct": [True, False]}


def shards(folder: Path, pool: Path, **keys: Any) -> tuple[list[str], list[tuple[str, int, str, str]], Any]:
    """(responses of the shards, rejects as (file, row, reason, detail), prepared)."""
    storage = Storage(str(folder / "workspace"))
    plan, prepared = prepare(make_config(pool, pool={**LENIENT, **keys}), storage)
    rejects = [(row["file"], row["row"], row["reason"], row["detail"]) for row in all_rejects(storage, plan)]
    return sorted(all_rows(storage, prepared)["messages"].to_pylist()), rejects, prepared


@pytest.mark.parametrize("place", [0, 4, 40, 79])
@pytest.mark.parametrize("correct", [[True], [True, False, True], True, "yes", {"a": True}])
@pytest.mark.parametrize("where", [{"equals": True}, {"not_equals": False}])
def test_a_short_long_or_late_typed_list_costs_its_row_alone(tmp_path, place, correct, where):
    rows = [judged(number) for number in range(80)]
    rows[place]["correct"] = correct
    write_jsonl(tmp_path / "pool" / "a.jsonl", rows[:40])
    write_jsonl(tmp_path / "pool" / "b.jsonl", rows[40:])
    found, rejects, prepared = shards(tmp_path, tmp_path / "pool", where=[{"column": "correct", **where}])
    assert len(found) == 79
    assert not any("wrong" in text for text in found)
    ((file, row, reason, detail),) = rejects
    assert (file, row, reason) == ("ab"[place // 40] + ".jsonl", place % 40, "a list does not match the responses")
    assert "'correct'" in detail
    assert prepared.filtered == 79


def test_a_file_that_holds_nothing_but_such_a_row_is_held_to_its_group(tmp_path):
    write_jsonl(tmp_path / "pool" / "a.jsonl", [judged(number) for number in range(9)])
    write_jsonl(tmp_path / "pool" / "b.jsonl", [{**judged(9), "correct": [True]}])
    found, rejects, _ = shards(tmp_path, tmp_path / "pool")
    assert len(found) == 18
    assert [(file, reason) for file, _, reason, _ in rejects] == [("b.jsonl", "a list does not match the responses")]


def test_lists_that_only_later_files_have_are_dealt_there(tmp_path):
    plain = [{name: value for name, value in judged(number).items() if name != "correct"} for number in range(9)]
    write_jsonl(tmp_path / "pool" / "a.jsonl", plain)
    write_jsonl(tmp_path / "pool" / "b.jsonl", [judged(number) for number in range(9, 18)])
    found, rejects, _ = shards(tmp_path, tmp_path / "pool", where=[{"column": "correct", "equals": True}])
    assert (len(found), rejects) == (9, [])


LATE = {
    "generations": (
        lambda n: {"problem": f"{n}+{n}?", "solution": f"It is {n}."},
        lambda n: {"generations": [f"G1 {n}", f"G2 {n}"]},
        "a list of responses in 'generations'",
    ),
    "responses": (
        lambda n: {"question": f"{n}+{n}?", "answer": f"It is {n}."},
        lambda n: {"responses": [f"G1 {n}"]},
        "a list of responses in 'responses'",
    ),
    "input": (
        lambda n: {"instruction": f"Translate {n}.", "input": "", "output": f"house {n}"},
        lambda n: {"input": "Haus"},
        "'input' continues its prompt",
    ),
    "system": (
        lambda n: {"system": "", "question": f"q {n}?", "response": f"a {n}"},
        lambda n: {"system": "Speak like a pirate."},
        "'system' holds its system_prompt",
    ),
    "stop_reason": (
        lambda n: {"prompt": f"q {n}", "response": f"a {n}"},
        lambda n: {"stop_reason": "max_tokens"},
        "'stop_reason' holds its finish_reason",
    ),
    "messages": (
        lambda n: {"question": f"q {n}", "output": f"a {n}", "messages": None},
        lambda n: {"messages": TALK},
        "messages that end with the response",
    ),
    "a third response": (
        lambda n: {"question": f"q {n}", "answer_1": f"a {n}", "answer_2": f"b {n}"},
        lambda n: {"answer_3": f"c {n}"},
        "'answer_3' holds a response",
    ),
    "model": (
        lambda n: {"prompt": f"q {n}", "response": f"a {n}"},
        lambda n: {"model": "gpt"},
        "'model' holds its source",
    ),
}


@pytest.mark.parametrize("name", LATE)
def test_a_known_column_that_no_sampled_row_has_makes_its_row_a_reject(tmp_path, monkeypatch, name):
    """As in a file of millions of rows, where no sample sees all of them."""
    monkeypatch.setattr(sample, "HEAD_ROWS", 8)
    monkeypatch.setattr(sample, "STREAM_BYTES", 0)
    row, late, words = LATE[name]
    rows = [row(number) | (late(number) if number in (70, 71) else {}) for number in range(90)]
    _, rejects, prepared = shards(tmp_path, write_jsonl(tmp_path / "p.jsonl", rows))
    assert [(at, reason) for _, at, reason, _ in rejects] == [(n, "read otherwise than its file") for n in (70, 71)]
    assert all(words in detail for *_, detail in rejects)
    assert prepared.rows == 88 * len(row(0).keys() & {"answer_1", "answer_2"} or "1")


@pytest.mark.parametrize("name", sorted(LATE))
def test_a_known_column_that_the_sample_has_late_is_read_or_its_rows_are_rejects(tmp_path, name):
    row, late, _ = LATE[name]
    rows = [row(number) | (late(number) if number >= 66 else {}) for number in range(70)]
    storage = Storage(str(tmp_path / "workspace"))
    plan, prepared = prepare(make_config(write_jsonl(tmp_path / "p.jsonl", rows)), storage)
    rejects = all_rejects(storage, plan)
    texts = " ".join(str(one) for one in all_rows(storage, prepared).to_pylist())
    if name in ("generations", "responses", "messages"):
        assert [one["row"] for one in rejects] == [66, 67, 68, 69]
    elif name == "stop_reason":
        assert prepared.left_out.by_reason == {"truncated": 4}
    else:
        assert rejects == []
        assert {"input": "Haus", "system": "pirate", "a third response": "c 69", "model": "gpt"}[name] in texts


def test_above_max_reject_share_the_run_stops_and_says_why(tmp_path):
    row, late, _ = LATE["generations"]
    rows = [row(number) | (late(number) if number >= 50 else {}) for number in range(70)]
    config = make_config(write_jsonl(tmp_path / "p.jsonl", rows))
    with pytest.raises(UserError, match=r"20 of 70 rows .*read otherwise than its file .*'generations'"):
        prepare(config, Storage(str(tmp_path / "workspace")))


def test_null_and_damaged_heads_decide_nothing(tmp_path):
    rows: list[Any] = [{"prompt": f"q {n}", "responses": None, "correct": None, "answer": "x"} for n in range(3)]
    rows += [b"{", {"prompt": 7, "responses": 7, "correct": 7}, *(judged(number) for number in range(80))]
    found, rejects, _ = shards(tmp_path, write_jsonl(tmp_path / "p.jsonl", rows))
    assert len(found) == 160
    assert [row for _, row, *_ in rejects] == [0, 1, 2, 3, 4]


def test_row_groups_of_parquet_that_differ_later(tmp_path):
    rows = [{"system": "", **judged(number)} for number in range(80)]
    rows[70]["correct"] = [True]
    rows[71]["system"] = "Be brief."
    schema = pa.Table.from_pylist(rows).schema
    with pq.ParquetWriter(tmp_path / "p.parquet", schema) as writer:
        for start in range(0, 80, 20):
            writer.write_table(pa.Table.from_pylist(rows[start : start + 20], schema))
    where = [{"column": "correct", "equals": True}]
    found, rejects, _ = shards(tmp_path, tmp_path / "p.parquet", where=where)
    assert len(found) == 79
    assert sum("Be brief." in text for text in found) == 1
    assert [(row, reason) for _, row, reason, _ in rejects] == [(70, "a list does not match the responses")]


def test_pieces_of_one_file_are_read_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "PIECE_BYTES", 2000)
    monkeypatch.setattr(sample, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(sample, "PLACE_BYTES", 400)
    rows = [{"system": "Be brief." if n > 150 else "", **judged(n)} for n in range(200)]
    rows[120]["correct"] = [False]
    pool = write_jsonl(tmp_path / "p.jsonl", rows)
    storage = Storage(str(tmp_path / "workspace"))
    config = make_config(pool, pool=LENIENT, workers={"partition_bytes": 2000})
    plan, prepared = prepare(config, storage)
    assert len(plan.pieces) > 4
    assert [row["row"] for row in all_rejects(storage, plan)] == [120]
    assert sum("Be brief." in text for text in all_rows(storage, prepared)["messages"].to_pylist()) == 2 * 49


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"column": "tags", "equals": "math"}, "'tags' is a list"),
        ({"column": "level", "at_least": 3}, "'level' is a text 'hard'"),
    ],
)
def test_a_filter_on_what_cannot_be_compared_stops_the_run(tmp_path, where, words):
    rows = [{"prompt": f"q {n}", "response": "a", "tags": ["math"], "level": "hard"} for n in range(9)]
    config = make_config(write_jsonl(tmp_path / "p.jsonl", rows), pool={"where": [where]})
    with pytest.raises(UserError, match=f"pool.where cannot compare a value .*{words}"):
        prepare(config, Storage(str(tmp_path / "workspace")))


def test_decimals_and_numbers_as_text_compare_as_numbers(tmp_path):
    column = {
        "prompt": ["a", "b", "c"],
        "response": ["x", "y", "z"],
        "score": pa.array(["0.50", "0.25", None], pa.string()).cast(pa.decimal128(5, 2)),
        "text": ["0.9", "1e0", "0.1"],
    }
    pq.write_table(pa.table(column), tmp_path / "p.parquet")
    for name, left in (("score", 1), ("text", 2)):
        where = [{"column": name, "at_least": 0.5}]
        config = make_config(tmp_path / "p.parquet", pool={"where": where})
        assert prepare(config, Storage(str(tmp_path / name)))[1].rows == left


def test_a_filter_on_one_of_our_names_means_the_column_that_holds_it(tmp_path):
    rows = [{"prompt": f"q {n}", "response": "a", "generator": "ab"[n % 2], "source": "web"} for n in range(10)]
    pool = write_jsonl(tmp_path / "p.jsonl", rows)
    columns = {"source": "generator"}
    for column, value, left in (("source", "a", 5), ("generator", "b", 5), ("pool_source", "web", 10)):
        where = [{"column": column, "equals": value}]
        config = make_config(pool, pool={"columns": columns, "where": where})
        assert prepare(config, Storage(str(tmp_path / column)))[1].rows == left


def test_a_column_under_carry_is_neither_read_nor_dealt(tmp_path):
    rows = [{**judged(number), "system": "Be brief."} for number in range(5)]
    rows[3]["correct"] = [True]
    found, rejects, prepared = shards(tmp_path, write_jsonl(tmp_path / "p.jsonl", rows), carry=["correct", "system"])
    assert (len(found), rejects) == (10, [])
    assert {"correct", "system"} <= prepared.other_columns.keys()
    assert not any("Be brief." in text for text in found)
