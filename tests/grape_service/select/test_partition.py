"""The select stage on real files: shards and scores in, kept rows and counts out."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.config.schema import Config
from grape_service.errors import StageError
from grape_service.score.store import ScoreStore
from grape_service.select.counts import SelectCounts
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.storage.storage import Storage
from tests.made_rows import Row, even_scores, put_scores, put_shards

pytestmark = pytest.mark.quick


def config(**select) -> Config:
    return Config.model_validate(
        {
            "name": "test",
            "pool": {"path": "pool.jsonl"},
            "target": {"model": "model"},
            "output": {"path": "out"},
            "select": select,
        }
    )


ROWS = [
    Row("p1", "p1-a", "a", num_loss=3),
    Row("p1", "p1-b", "b", num_loss=5),
    Row("p2", "p2-a", "a", num_loss=2),
    Row("p2", "p2-b", "b", num_loss=2),
    Row("p3", "p3-a", None, num_loss=4),
]
SCORES = {"p1-a": -2.0, "p1-b": -1.0, "p2-a": -1.0, "p2-b": -1.0, "p3-a": -3.0}


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def store(storage) -> ScoreStore:
    return ScoreStore(storage, "target")


def kept(storage: Storage) -> list[dict]:
    with pq.ParquetFile(storage.full("kept.parquet")) as file:
        return file.read().to_pylist()


def select(storage, store, shards, settings=None, failures=None, observer=None) -> SelectCounts:
    context = SelectContext(storage, config(**(settings or {})), store, frozenset())
    return select_partition(context, SelectPartition("b", shards, "kept.parquet"), failures, observer)


def test_the_best_of_each_prompt_is_kept(storage, store):
    shards = put_shards(storage, [ROWS[:2], ROWS[2:]], [pa.field("level", pa.int64())])
    put_scores(store, even_scores(SCORES, ROWS))
    counts = select(storage, store, shards)
    first, second, third = kept(storage)
    assert [row["candidate_id"] for row in (first, second, third)] == ["p1-b", "p2-a", "p3-a"]
    assert (first["grape_score"], first["grape_rank"], first["grape_margin"]) == (-1.0, 1, 1.0)
    assert (second["grape_margin"], third["grape_margin"], third["num_candidates"]) == (0.0, None, 1)
    assert first["target_logprobs"] == [-1.0] * 6
    assert first["input_ids"] == ROWS[1].as_dict()["input_ids"]
    assert "level" in first
    assert (counts.prompts, counts.candidates, counts.kept_rows, counts.kept_prompts) == (3, 5, 3, 3)
    assert counts.kept_loss_tokens == 6 + 3 + 5
    assert counts.kept_tokens == counts.kept_loss_tokens + 9
    assert counts.rows_left_out == {"not chosen": 2}
    assert {name: (c.candidates, c.kept) for name, c in counts.sources.items()} == {
        "a": (2, 1), "b": (2, 1), "(none)": (1, 1),
    }  # fmt: skip
    assert SelectCounts.from_json(counts.to_json()) == counts
    assert (counts + counts).sources["a"].candidates == 4


def test_the_turn_end_counts_only_where_it_is_asked_for(storage, store):
    rows = [Row("p", "long", num_loss=3), Row("p", "short", num_loss=1)]
    shards = put_shards(storage, [rows])
    put_scores(store, {rows[0].key: [-1, -1, -1, -1], rows[1].key: [-0.5, -9]})
    select(storage, store, shards)
    assert kept(storage)[0]["candidate_id"] == "short"
    select(storage, store, shards, {"count_turn_end": True})
    assert kept(storage)[0]["candidate_id"] == "long"


def test_failed_candidates_take_their_prompt_with_them(storage, store):
    shards = put_shards(storage, [ROWS])
    scores = even_scores(SCORES, ROWS)
    del scores[ROWS[0].key]  # a reported failure
    scores[ROWS[2].key] = [-1.0, float("nan"), -1.0]
    put_scores(store, scores)
    counts = select(storage, store, shards, failures=pa.array([ROWS[0].key], type=pa.binary(16)))
    assert [row["candidate_id"] for row in kept(storage)] == ["p3-a"]
    assert counts.prompts_left_out == {"failed candidate": 2}
    assert counts.rows_left_out == {"failed candidate": 4, "not chosen": 0}
    assert (counts.failed_candidates, counts.not_finite, counts.unexplained_failures) == (2, 1, 0)
    assert select(storage, store, shards).unexplained_failures == 1


def test_a_row_of_which_nothing_counts_has_no_score(storage, store):
    rows = [Row("p", "empty", num_loss=0), Row("p", "good", num_loss=2), Row("q", "alone", num_loss=0)]
    shards = put_shards(storage, [rows])
    put_scores(store, {rows[0].key: [-0.1], rows[1].key: [-3, -3, -3], rows[2].key: [-0.1]})
    counts = select(storage, store, shards, {"keep": 2})
    assert [row["candidate_id"] for row in kept(storage)] == ["good"]
    assert counts.nothing_counted == 2
    assert counts.failed_candidates == 0
    assert counts.prompts_left_out == {"no eligible candidate": 1}


def test_a_score_of_the_wrong_length_is_an_error(storage, store):
    shards = put_shards(storage, [ROWS])
    put_scores(store, {ROWS[0].key: [-1.0]})
    with pytest.raises(StageError, match=ROWS[0].key.hex()):
        select(storage, store, shards)
    assert not storage.exists("kept.parquet")


@pytest.mark.parametrize("method", ["all", "random", "longest", "shortest", "source:b"])
def test_methods_without_scores_attach_none(storage, store, method):
    shards = put_shards(storage, [ROWS])
    put_scores(store, even_scores(SCORES, ROWS))
    counts = select(storage, None, shards, {"method": method})
    rows = kept(storage)
    assert len(rows) == counts.kept_rows == {"all": 5, "source:b": 2}.get(method, 3)
    for row in rows:
        assert row["target_logprobs"] is row["grape_score"] is row["grape_rank"] is row["grape_margin"] is None
        assert row["num_candidates"] in (1, 2)


def many_rows(num_prompts: int) -> list[list[Row]]:
    """Prompts of several candidates, source a strongest."""
    generator = random.Random(3)
    return [
        [
            Row(f"p{prompt}", f"p{prompt}-{number}", "abc"[number % 3], num_loss=generator.randint(1, 9))
            for number in range(generator.randint(1, 6))
        ]
        for prompt in range(num_prompts)
    ]


def random_scores(rows: list[Row]) -> dict[bytes, list[float]]:
    scores = {}
    for row in rows:
        generator = np.random.default_rng(int.from_bytes(row.key[:4], "big"))
        level = {"a": 0.3, "b": 1.0, "c": 2.0}[row.source or "a"]
        scores[row.key] = (-generator.exponential(level, row.num_scores)).tolist()
    return scores


@pytest.mark.parametrize(
    "settings",
    [{}, {"keep": 2, "min_margin": 0.2}, {"max_source_share": 0.4}, {"method": "random"}, {"method": "longest"}],
)
def test_order_and_cutting_of_the_shards_never_change_a_choice(storage, store, settings):
    prompts = many_rows(60)
    everything = [row for rows in prompts for row in rows]
    put_scores(store, random_scores(everything))
    shards = put_shards(
        storage, [[row for rows in prompts[start : start + 20] for row in rows] for start in (0, 20, 40)]
    )
    counts = select(storage, store, shards, settings)
    expected = {row["candidate_id"]: row for row in kept(storage)}
    assert 0 < len(expected) == counts.kept_rows

    shuffled = Storage(storage.root + "-shuffled")
    generator = random.Random(5)
    for rows in prompts:
        generator.shuffle(rows)
    generator.shuffle(prompts)
    other_shards = put_shards(
        shuffled, [[row for rows in prompts[:45] for row in rows], [row for rows in prompts[45:] for row in rows]]
    )
    context = SelectContext(shuffled, config(**settings), store, frozenset())
    again = select_partition(context, SelectPartition("b", other_shards, "kept.parquet"))
    assert {row["candidate_id"]: row for row in kept(shuffled)} == expected
    assert again == counts


def test_max_source_share_holds(storage, store):
    prompts = many_rows(80)
    put_scores(store, random_scores([row for rows in prompts for row in rows]))
    shards = put_shards(storage, [[row for rows in prompts for row in rows]])
    before = select(storage, store, shards)
    assert before.sources["a"].kept / before.kept_rows > 0.6
    counts = select(storage, store, shards, {"max_source_share": 0.4})
    for source in counts.sources.values():
        assert source.kept <= 0.4 * counts.kept_rows + 1e-9
    assert counts.passed_on > 10
    assert counts.kept_prompts + counts.prompts_left_out.get("source share", 0) == 80
    for row in kept(storage):
        assert row["grape_score"] == pytest.approx(np.mean(row["target_logprobs"][:-1]), rel=1e-6)


def test_the_same_scores_give_the_same_bytes(storage, store, tmp_path):
    prompts = many_rows(30)
    put_scores(store, random_scores([row for rows in prompts for row in rows]))
    shards = put_shards(storage, [[row for rows in prompts for row in rows]])
    select(storage, store, shards)
    first = storage.read("kept.parquet")
    select(storage, store, shards)
    assert storage.read("kept.parquet") == first


def test_an_empty_partition_is_an_empty_file(storage, store):
    counts = select(storage, store, [])
    assert counts == SelectCounts()
    assert kept(storage) == []
    counts = select(storage, store, put_shards(storage, [[]]), {"max_source_share": 0.5})
    assert counts.candidates == 0


class Seen:
    def __init__(self):
        self.rows = 0
        self.kept = 0

    def add_candidates(self, candidates, choice):
        self.rows += len(candidates.prompts)
        self.kept += int(choice.kept.sum())


@pytest.mark.parametrize("settings", [{}, {"max_source_share": 0.5}])
def test_an_observer_sees_every_candidate(storage, store, settings):
    shards = put_shards(storage, [ROWS[:2], ROWS[2:]])
    put_scores(store, even_scores(SCORES, ROWS))
    seen = Seen()
    counts = select(storage, store, shards, settings, observer=seen)
    assert (seen.rows, seen.kept) == (5, counts.kept_rows)


def test_on_s3_the_choice_and_the_bytes_are_the_same(storage, store, s3_url):
    rows = [row for rows in many_rows(20) for row in rows]
    remote = Storage(s3_url)
    for place in (storage, remote):
        shards = put_shards(place, [rows])
        put_scores(ScoreStore(place, "target"), random_scores(rows))
        context = SelectContext(place, config(), ScoreStore(place, "target"), frozenset())
        select_partition(context, SelectPartition("b", shards, "kept.parquet"))
    assert remote.read("kept.parquet") == storage.read("kept.parquet")
    remote_store = ScoreStore(remote, "target")
    assert not remote_store.missing("b01", pa.array([row.key for row in rows], type=pa.binary(16))).any()
    remote.write("scores/target/b0/0000000000000-note.parquet", b"no Parquet at all")
    with pytest.raises(StageError, match=r"s3://.*0000000000000-note\.parquet is not a score file"):
        remote_store.read("b01", pa.array([rows[0].key], type=pa.binary(16)))
