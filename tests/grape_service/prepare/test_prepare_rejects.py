import gzip
import hashlib
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_service.errors import UserError
from grape_service.prepare import plan as planning
from grape_service.prepare.map import map_piece
from grape_service.prepare.plan import plan_prepare
from grape_service.storage.storage import Storage
from tests.prepared_pools import WordRenderer, all_rejects, all_rows, make_config, prepare, write_jsonl

pytestmark = pytest.mark.quick

LENIENT = {"max_reject_share": 1.0}
GOOD = [{"prompt": f"q {number}", "response": f"a {number}"} for number in range(20)]


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "workspace"))


def rejects_of(tmp_path, storage, rows, **keys):
    pool = write_jsonl(tmp_path / "p.jsonl", rows)
    plan, prepared = prepare(make_config(pool, pool=LENIENT, **keys), storage)
    found = all_rejects(storage, plan)
    assert len(found) == prepared.rejects.total + prepared.left_out.total == prepared.rows_in - prepared.rows
    return prepared, [(row["row"], row["prompt_id"], row["candidate_id"], row["reason"]) for row in found]


def test_every_unusable_row_is_in_the_table_with_its_file_row_and_ids(tmp_path, storage):
    write_jsonl(tmp_path / "pool" / "a.jsonl", [*GOOD, b"{", b"", {"prompt_id": "x", "prompt": "q"}])
    write_jsonl(tmp_path / "pool" / "b.jsonl", [b"\xff", GOOD[0], {"prompt": "long " * 50, "response": "b"}])
    config = make_config(tmp_path / "pool", pool=LENIENT, workers={"partition_bytes": 200})
    plan, prepared = prepare(config, storage, WordRenderer(max_tokens=20))
    assert len(plan.pieces) > 4
    found = [(row["file"], row["row"], row["prompt_id"] == "x", row["reason"]) for row in all_rejects(storage, plan)]
    assert found == [
        ("a.jsonl", 20, False, "broken JSON"),
        ("a.jsonl", 22, True, "missing response"),
        ("b.jsonl", 0, False, "not UTF-8"),
        ("b.jsonl", 1, False, "duplicate candidate"),
        ("b.jsonl", 2, False, "longer than max_tokens"),
    ]
    assert (prepared.rows_in, prepared.rows, prepared.filtered) == (25, 20, 0)
    example = prepared.rejects.examples["missing response"]
    assert (example.file.rsplit("/", 1)[-1], example.row) == ("a.jsonl", 22)


def test_of_exact_duplicates_one_stays(tmp_path, storage):
    row = {"prompt": "q", "response": "a", "source": "s"}
    prepared, found = rejects_of(tmp_path, storage, [row, {**row, "source": "t"}, row, {**row, "level": 3}])
    assert prepared.rows == 2
    assert [reason for *_, reason in found] == ["duplicate candidate"] * 2


def test_of_duplicates_with_ids_the_smallest_stays(tmp_path, storage):
    row = {"prompt": "q", "response": "a", "prompt_id": "p"}
    prepared, found = rejects_of(tmp_path, storage, [{**row, "candidate_id": id_} for id_ in "cab"])
    assert all_rows(storage, prepared)["candidate_id"].to_pylist() == ["a"]
    assert found == [(0, "p", "c", "duplicate candidate"), (2, "p", "b", "duplicate candidate")]


def test_a_candidate_id_that_is_used_twice_keeps_one_content(tmp_path, storage):
    rows = [{"prompt": "q", "response": f"a {number}", "prompt_id": "p", "candidate_id": "c"} for number in range(3)]
    prepared, found = rejects_of(tmp_path, storage, [*rows, {**rows[0], "prompt_id": "q", "prompt": "other"}])
    assert prepared.rows == 2
    assert [reason for *_, reason in found] == ["candidate_id is used twice"] * 2


def test_a_prompt_id_that_names_two_prompts_keeps_one(tmp_path, storage):
    rows = [{"prompt": f"q {number % 2}", "response": f"a {number}", "prompt_id": "p"} for number in range(6)]
    prepared, found = rejects_of(tmp_path, storage, rows)
    assert prepared.prompts == 1
    assert [reason for *_, reason in found] == ["prompt_id names two different prompts"] * 3
    assert len({number % 2 for number, *_ in found}) == 1


KINDS = {
    "good": lambda n: {"prompt": f"q {n % 5}", "response": f"a {n}", "ok": 1},
    "same": lambda n: {"prompt": "q 1", "response": "the same", "ok": 1},
    "list": lambda n: {
        "prompt": f"q {n % 5}",
        "responses": [f"b {n}", "", {"response": f"c {n}", "ok": 1}],
        "ok": n % 2,
    },
    "bad list": lambda n: {"prompt": "", "responses": ["a", "b"], "ok": 1},
    "filtered": lambda n: {"prompt": "q", "response": f"a {n}", "ok": 0},
    "no column": lambda n: {"prompt": "q", "response": f"a {n}"},
    "long": lambda n: {"prompt": "q " * 99, "response": "a", "ok": 1},
    "ids": lambda n: {"prompt": f"q {n % 3}", "response": f"a {n}", "prompt_id": 1, "candidate_id": n % 2, "ok": 1},
    "broken": lambda n: b'{"prompt": ',
    "blank": lambda n: b" ",
}


@settings(max_examples=25, deadline=None)
@given(kinds=st.lists(st.sampled_from(sorted(KINDS)), max_size=30), partition_bytes=st.sampled_from([300, 10**6]))
def test_no_row_is_ever_lost(tmp_path_factory, kinds, partition_bytes):
    folder = tmp_path_factory.mktemp("lost")
    storage = Storage(str(folder / "workspace"))
    rows = [KINDS["good"](1000), *(KINDS[kind](number) for number, kind in enumerate(kinds))]
    pool = write_jsonl(folder / "p.jsonl", rows)
    config = make_config(
        pool,
        pool={**LENIENT, "where": [{"column": "ok", "equals": 1}]},
        workers={"partition_bytes": partition_bytes, "shard_tokens": 30},
    )
    plan, prepared = prepare(config, storage, WordRenderer(max_tokens=50))
    candidates = 1 + len(kinds) - kinds.count("blank") + 2 * kinds.count("list")
    assert prepared.rows_in == candidates
    assert len(all_rejects(storage, plan)) == prepared.rejects.total + prepared.left_out.total
    assert all_rows(storage, prepared).num_rows == prepared.rows
    assert candidates == prepared.rows + prepared.filtered + prepared.rejects.total + prepared.left_out.total
    assert prepared.left_out.by_reason.get("longer than max_tokens", 0) >= min(1, kinds.count("long"))
    assert prepared.rejects.by_reason.get("broken JSON", 0) == kinds.count("broken")
    assert prepared.filtered >= kinds.count("filtered") + kinds.count("no column")


def error_of(tmp_path, storage, rows, **pool):
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(UserError) as error:
        prepare(make_config(path, pool=pool), storage)
    return str(error.value)


def test_too_many_rejects_are_an_error_that_shows_the_top_reasons(tmp_path, storage):
    rows = [*GOOD, b"{", b"{", {"prompt": "q"}, {"response": "a"}, {"prompt": 3, "response": "x"}]
    text = error_of(tmp_path, storage, rows)
    assert "5 of 25 rows" in text
    assert "more than pool.max_reject_share 0.1" in text
    assert f"broken JSON (2, first {tmp_path}/p.jsonl:21: Expecting property name" in text
    assert "missing prompt (1" in text
    assert "prompt has the wrong type" not in text, "only the top three"
    assert f"{tmp_path}/workspace/prepared/" in text
    _, prepared = prepare(make_config(tmp_path / "p.jsonl", pool={"max_reject_share": 0.2}), storage)
    assert prepared.rows == 20


@pytest.mark.parametrize(
    ("rows", "pool", "sentence"),
    [
        ([], {}, "has no rows"),
        ([b"", b" "], {}, "has no rows"),
        ([b"{", b"["], {"max_reject_share": 1}, "nothing in the pool .* 2 of 2 rows .*broken JSON \\(2, first"),
        (GOOD, {"where": [{"column": "prompt", "equals": "x"}]}, "pool.where leaves none of the 20 rows"),
        (GOOD, {"where": [{"column": "promt", "equals": 1}]}, "'promt', which no row has; did you mean 'prompt'"),
        (
            [{"Anfrage": "q", "response": "a"}],
            {},
            "no row of the pool has the column 'prompt' .*Anfrage, response.* pool.columns.prompt",
        ),
        ([{"prompt": "q", "respons": "a"}], {}, "no row .* 'response' .* pool.columns.response .*such as 'respons'"),
        (GOOD, {"columns": {"prompt": "Prompts"}}, "pool.columns.prompt .*'Prompts', which no row has.*'prompt'"),
        (GOOD, {"columns": {"source": "modle"}}, "pool.columns.source .*'modle', which no row has"),
        (GOOD, {"columns": {"responses": ["response", "b"]}}, "pool.columns.responses .*'b', which no row has"),
    ],
)
def test_a_pool_that_cannot_be_used_at_all_is_an_error(tmp_path, storage, rows, pool, sentence):
    assert re.search(sentence, error_of(tmp_path, storage, rows, **pool))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "q", "response": "a"}\n' * 999)[:-20]),
        ("no.jsonl.gz", b"this is no gzip"),
        ("no.jsonl.zst", b"this is no zstd"),
        ("empty.jsonl.zst", b""),
        ("empty.jsonl.gz", b""),
        ("cut.json.zst", zstandard.compress(b'[{"prompt": "q", "response": "a"}]')[:-3]),
        ("cut.json", b'[{"prompt": "q", "response": "a"}, {"prompt"'),
        ("no.parquet", b"PAR1 this is no Parquet PAR1"),
        ("empty.parquet", b""),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, storage, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}' is (damaged after line|not a Parquet file)"):
        prepare(make_config(tmp_path / name), storage)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_compressed_file_that_ends_early_is_damaged_wherever_it_was_cut(tmp_path, storage, compress):
    lines = [
        b'{"prompt": "q %d", "response": "%s"}\n' % (n, hashlib.sha256(b"%d" % n).hexdigest().encode())
        for n in range(9)
    ]
    data = compress(b"".join(lines[:4])) + compress(b"".join(lines[4:]))
    whole = len(compress(b"".join(lines[:4])))
    name = "p.jsonl.gz" if compress is gzip.compress else "p.jsonl.zst"
    for end in {0, 1, 2, 5, 11, whole - 1, whole + 1, whole + 9, len(data) - 1, *range(20, len(data), 37)} - {whole}:
        (tmp_path / name).write_bytes(data[:end])
        with pytest.raises(UserError, match="is damaged after line"):
            prepare(make_config(tmp_path / name), storage)
    (tmp_path / name).write_bytes(data)
    assert prepare(make_config(tmp_path / name), storage)[1].rows == 9


def test_duplicates_and_truncated_and_long_rows_are_counted_apart_and_stop_no_run(tmp_path, storage):
    rows = [
        {"prompt": "q", "responses": ["2", "2", "It is 2.", "2"], "finish_reasons": ["stop"] * 4},
        {"prompt": "r", "responses": ["3", "cut off"], "finish_reasons": ["stop", "length"]},
        {"prompt": "long " * 50, "responses": ["3"], "finish_reasons": ["stop"]},
    ]
    pool = write_jsonl(tmp_path / "p.jsonl", rows)
    plan, prepared = prepare(make_config(pool), storage, WordRenderer(max_tokens=20))
    assert prepared.left_out.by_reason == {"duplicate candidate": 2, "truncated": 1, "longer than max_tokens": 1}
    assert prepared.rejects.by_reason == {}
    counts = prepared.counts()
    assert (counts["rows_in"], counts["rows"], counts["left_out"], counts["rejected"]) == (7, 3, 4, 0)
    assert counts["prompt_sizes"] == {"1": 1, "2": 1}
    table = [(row["row"], row["reason"], row["text"][:7]) for row in all_rejects(storage, plan)]
    assert table == [
        (0, "duplicate candidate", "2"),
        (0, "duplicate candidate", "2"),
        (1, "truncated", "cut off"),
        (2, "longer than max_tokens", "3"),
    ]


def test_ids_keep_every_digit(tmp_path, storage):
    ids = [12345678901234567890123, 12345678901234567890124, 2**53 + 1, 2**64 - 1]
    rows = [b'{"prompt": "q %d", "response": "a", "prompt_id": %d}' % (n, id_) for n, id_ in enumerate(ids)]
    for name, data in (("p.jsonl", b"\n".join(rows)), ("p.json", b"[" + b",".join(rows) + b"]")):
        (tmp_path / name).write_bytes(data)
        _, prepared = prepare(make_config(tmp_path / name), storage)
        assert sorted(all_rows(storage, prepared)["prompt_id"].to_pylist()) == sorted(map(str, ids))
    pq.write_table(pa.table({"prompt": ["q"], "response": ["a"], "prompt_id": [float(2**60)]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="prompt_id has lost digits"):
        prepare(make_config(tmp_path / "p.parquet"), storage)


def test_too_many_other_columns_are_an_error(tmp_path, storage, monkeypatch):
    rows = [{"prompt": "q", "response": f"a {n}", **{f"c{n}-{m}": 1 for m in range(100)}} for n in range(11)]
    for pieces in (1, 100):
        monkeypatch.setattr(planning, "PIECES", pieces)
        assert "more than 1000 other columns" in error_of(tmp_path, storage, rows), f"in {pieces} pieces"


def test_a_pool_that_changes_between_plan_and_map_is_an_error(tmp_path, storage):
    pool = write_jsonl(tmp_path / "p.jsonl", GOOD)
    config = make_config(pool)
    plan = plan_prepare(config, "words", storage)
    write_jsonl(pool, GOOD[:3])
    with pytest.raises(UserError, match="changed while the run was reading it"):
        map_piece(plan, plan.pieces[0], config, WordRenderer(), storage)
