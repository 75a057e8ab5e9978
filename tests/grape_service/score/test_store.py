"""The score store on a real folder: what is written is found, whatever the partitions were then."""

import hashlib
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grape_service.errors import StageError
from grape_service.rows.columns import SCORE
from grape_service.rows.ragged import offsets_from_lengths
from grape_service.score.store import ScoreStore
from grape_service.score.tables import KeyIndex, key_halves
from grape_service.storage.parquet import open_parquet
from grape_service.storage.storage import Storage

pytestmark = pytest.mark.quick


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:16]


def keys(*numbers: int) -> pa.Array:
    return pa.array([key(number) for number in numbers], type=pa.binary(16))


def put(store: ScoreStore, partition: str, scores: dict[int, list[float]], **more) -> str:
    offsets = offsets_from_lengths([len(values) for values in scores.values()])
    flat = np.array([value for values in scores.values() for value in values], dtype=np.float32)
    return store.write(partition, keys(*scores), offsets, flat, more.get("metadata", {}), more.get("shard", "s"))


@pytest.fixture
def store(tmp_path) -> ScoreStore:
    return ScoreStore(Storage(str(tmp_path)), "policy")


def test_scores_come_back_in_the_order_asked_for(store):
    put(store, "b", {1: [-1.0, -2.0], 2: [-3.0], 3: []})
    put(store, "b", {4: [-4.0, -5.0, -6.0]})
    table = store.read("b", keys(4, 9, 1, 3, 1))
    assert table.found.tolist() == [True, False, True, True, True]
    assert table.lengths.tolist() == [3, 0, 2, 0, 2]
    assert table.take(np.array([2, 0, 1, 4])).tolist() == [-1, -2, -4, -5, -6, -1, -2]
    assert table.values.size == 5  # a row asked for twice is held once, one not asked for never
    assert store.missing("b", keys(4, 9, 1, 10)).tolist() == [False, True, False, True]


def test_an_empty_store_misses_everything(store):
    assert store.missing("b", keys(1, 2)).all()
    assert not store.read("b", keys(1)).found.any()
    assert len(store.read("b", keys()).found) == 0
    assert len(store.missing("b", keys())) == 0
    none = pa.chunked_array([], type=pa.binary(16))  # of a partition without shards
    assert len(store.missing("b", none)) == len(store.read("b", none).found) == 0


def test_the_first_file_name_wins(store):
    first = put(store, "b0", {1: [-1.0], 2: [-2.0]})
    time.sleep(0.002)
    second = put(store, "b", {1: [-10.0], 3: [-30.0]})  # in another folder, but later
    assert first.rsplit("/", 1)[-1] < second.rsplit("/", 1)[-1]
    table = store.read("b0", keys(1, 2, 3))
    assert table.take(np.arange(3)).tolist() == [-1, -2, -30]


def test_the_first_of_equal_rows_of_a_file_wins(store):
    offsets = np.array([0, 1, 2, 3])
    store.write("b", keys(5, 6, 5), offsets, np.array([-1, -2, -3], dtype=np.float32), {})
    assert store.read("b", keys(5, 6)).take(np.arange(2)).tolist() == [-1, -2]


def test_more_and_fewer_partitions_find_the_same_scores(store):
    put(store, "b01", {1: [-1.0]})
    put(store, "b0", {2: [-2.0]})
    put(store, "b", {3: [-3.0]})
    put(store, "b010", {4: [-4.0]})
    put(store, "b00", {5: [-5.0]})
    assert store.missing("b01", keys(1, 2, 3, 4, 5)).tolist() == [False, False, False, False, True]
    assert store.missing("b010", keys(1, 2, 3, 4, 5)).tolist() == [False, False, False, False, True]
    assert store.missing("b011", keys(1, 2, 3, 4, 5)).tolist() == [False, False, False, True, True]
    assert not store.missing("b", keys(1, 2, 3, 4, 5)).any()


def test_policies_do_not_mix(store):
    put(store, "b", {1: [-1.0]})
    assert ScoreStore(store.storage, "other").missing("b", keys(1)).all()


def test_the_file_says_which_engine_made_it(store):
    path = put(
        store, "b", {1: [-1.0]}, metadata={"engine": "vllm", "version": "0.32"}, shard="shards/b/shard-00007.parquet"
    )
    assert store.metadata(path) == {"engine": "vllm", "version": "0.32"}
    name = path.rsplit("/", 1)[-1]
    assert name[:13].isdigit()
    assert name[13:].startswith("-shard-00007-")


def test_rows_that_are_not_finite_are_told_apart(store):
    put(store, "b", {1: [-1.0, np.nan], 2: [-1.0], 3: [-np.inf], 4: []})
    table = store.read("b", keys(4, 1, 2, 3, 9))
    assert table.finite().tolist() == [True, False, True, False, False]


def test_foreign_and_damaged_files_are_named(store, tmp_path):
    path = put(store, "b", {1: [-1.0]})
    folder = tmp_path / "scores" / "policy" / "b"
    foreign = folder / "0000000000000-notes.parquet"
    foreign.write_bytes(b"not parquet at all")
    with pytest.raises(StageError, match=r"0000000000000-notes\.parquet is not a score file"):
        store.read("b", keys(1))
    pq.write_table(pa.table({"a": [1]}), foreign)
    with pytest.raises(StageError, match=r"0000000000000-notes\.parquet is not a score file: its columns are a"):
        store.missing("b", keys(1))
    foreign.unlink()
    damaged = tmp_path / path
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(StageError, match=damaged.name):
        store.read("b", keys(1))


def test_keys_with_equal_first_halves_are_told_apart():
    same = [b"\xff" * 8 + bytes([0] * 7 + [n]) for n in (5, 3, 9, 4)]
    index = KeyIndex(pa.array(same, type=pa.binary(16)))
    assert index.num_unique == 4
    wanted = [same[2], same[0], b"\xff" * 8 + bytes([0] * 7 + [7]), b"\xff" * 16, b"\x00" * 16]
    places = index.places(pa.array(wanted, type=pa.binary(16)))
    assert places.tolist()[2:] == [-1, -1, -1]
    assert index.inverse.tolist()[2] == places[0]
    assert index.inverse.tolist()[0] == places[1]


def test_halves_of_a_slice():
    whole = keys(*range(10))
    np.testing.assert_array_equal(key_halves(whole.slice(3, 4)), key_halves(whole)[3:7])
    assert sorted(whole.to_pylist()) == whole.take(pa.array(np.lexsort(key_halves(whole).T[::-1]))).to_pylist()


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), max_size=8), max_size=6),
    st.lists(st.integers(0, 40), max_size=30),
)
def test_reading_equals_a_dictionary(tmp_path_factory, files, wanted):
    store = ScoreStore(Storage(str(tmp_path_factory.mktemp("store"))), "policy")
    expected: dict[int, list[float]] = {}
    stored = []
    for number, rows in enumerate(files):
        values = [[-float(number * 100 + place)] * length for place, (_, length) in enumerate(rows)]
        offsets = offsets_from_lengths([len(row) for row in values])
        flat = np.array([value for row in values for value in row], dtype=np.float32)
        path = store.write("b", keys(*[row for row, _ in rows]), offsets, flat, {}, "s")
        stored.append((path, rows, values))
    for _, rows, values in sorted(stored, key=lambda item: item[0]):
        for (row, _), scores in zip(rows, values, strict=True):
            expected.setdefault(row, scores)
    table = store.read("b", keys(*wanted))
    for place, row in enumerate(wanted):
        assert table.found[place] == (row in expected)
        assert table.take(np.array([place])).tolist() == expected.get(row, [])
    assert store.missing("b", keys(*wanted)).tolist() == [row not in expected for row in wanted]


def test_a_statistic_that_a_row_lacks_is_missing_and_the_first_log_probabilities_stay(store: ScoreStore) -> None:
    offsets = offsets_from_lengths([2, 1])
    put(store, "b", {1: [-1, -2], 2: [-3]})
    assert not store.missing("b", keys(1, 2)).any()
    assert store.missing("b", keys(1, 2), ["rank"]).all()
    again = np.array([-1.5, -2.5, -3.5], dtype=np.float32)
    statistics = {"rank": np.array([1, 65_535, 7]), "entropy": np.array([0.5, 1.5, 2.5])}
    path = store.write("b", keys(1, 3), offsets, again, {}, statistics=statistics)
    with open_parquet(store.storage, path) as file:
        assert file.schema_arrow.names == ["row_key", "logprobs", "entropy", "rank"]
        assert str(file.schema_arrow.field("rank").type) == "list<element: uint16>"
    assert store.missing("b", keys(1, 2, 3), ["rank", "entropy"]).tolist() == [False, True, False]
    assert store.missing("b", keys(1, 3), ["top20_entropy"]).all()
    found = store.read_statistics("b", keys(1, 2, 3), ["rank"])
    assert list(found) == ["logprob", "rank"]
    assert found["logprob"].take(np.arange(3)).tolist() == [-1, -2, -3, -3.5]
    assert found["rank"].found.tolist() == [True, False, True]
    assert found["rank"].take(np.arange(3)).tolist() == [1, 65_535, 7]


def test_without_statistics_a_score_file_is_what_it_was(store: ScoreStore) -> None:
    path = put(store, "b", {1: [-1, -2]})
    with open_parquet(store.storage, path) as file:
        assert file.schema_arrow.remove_metadata() == SCORE


def test_every_partition_above_and_below_is_related(store):
    names = ["b", "b0", "b01", "b1", "b10", "b100", "b101", "b11", "b111", "b2", "complete", "canaries"]
    for name in names:
        store.storage.write(f"{store.folder}/{name}/file", b"")
    found = [name for name in names if set(name) <= set("b01")]
    for of in ("b", "b1", "b10", "b101", "b0", "b00"):
        expected = {name for name in found if name.startswith(of) or of.startswith(name)}
        for looked_up in (store, store.with_folders()):
            assert len(looked_up.related(of)) == len(expected)
            assert set(looked_up.related(of)) == expected


def test_a_scoring_is_complete_while_each_of_its_files_is_there(store):
    assert not store.is_complete("shards")
    store.note_complete("nothing")
    assert not store.is_complete("nothing"), "of no files nobody knows what they held"
    first, _ = put(store, "b", {1: [-1.0]}), put(store, "b", {2: [-1.0]})
    store.note_complete("shards")
    assert store.is_complete("shards")
    assert not store.is_complete("other shards")
    put(store, "b", {3: [-1.0]})
    assert store.is_complete("shards"), "a later file takes nothing away"
    store.storage.delete(first)
    assert not store.is_complete("shards"), "as many files as then are there, and not the same"
    store.note_complete("shards")
    store.forget_complete("shards")
    store.forget_complete("shards")
    assert not store.is_complete("shards")


def test_statistics_are_missing_one_by_one(store):
    ranks = np.array([1.0, 2.0], dtype=np.float32)
    put(store, "b", {1: [-1.0], 2: [-2.0]})
    store.write("b", keys(1, 3), offsets_from_lengths([1, 1]), ranks * -1, {}, statistics={"rank": ranks})
    assert store.missing("b", keys(1, 2, 3, 4)).tolist() == [False, False, False, True]
    assert store.missing("b", keys(1, 2, 3, 4), ["rank"]).tolist() == [False, True, False, True]
    assert store.missing("b", keys(1, 3), ["rank", "entropy"]).all()
    found = store.read_statistics("b", keys(2, 1), ["rank"])
    assert (found["rank"].found.tolist(), found["rank"].values.dtype) == ([False, True], np.float32)


def test_versions_are_those_of_the_scores_that_are_read(store):
    for number, version in ((1, "5.20"), (2, "5.21"), (1, "5.22")):
        put(store, "b", {number: [-1.0]}, metadata={"engine": "vllm", "version": version}, shard=f"{version}")
        time.sleep(0.002)  # the earlier file name wins
    put(store, "b0", {3: [-1.0]}, metadata={"engine": "transformers", "version": "5.23"})
    assert store.versions("b", keys(1)) == {"vllm 5.20"}
    assert store.versions("b", keys(1, 2, 9)) == {"vllm 5.20", "vllm 5.21"}
    assert store.versions("b", keys(3, 2)) == {"transformers 5.23", "vllm 5.21"}
    assert store.versions("b1", keys(3)) == set()
    assert store.versions("b", keys()) == set()


def test_a_scoring_stays_complete_in_whichever_partition_later_files_come(store):
    put(store, "b1", {1: [-1.0]})
    store.note_complete("shards")
    time.sleep(0.002)
    put(store, "b0", {2: [-1.0]})
    assert store.is_complete("shards")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"logprobs": pa.array([[-1.0]], pa.list_(pa.float64()))},
            "not a score file: its columns are row_key, logprobs",
        ),
        ({"logprobs": None, "entropy": pa.array([[1.0]], pa.list_(pa.float32()))}, "its columns are row_key, entropy"),
        ({"seed": pa.array([1])}, "its columns are row_key, logprobs, seed, not row_key, logprobs"),
        ({"logprobs": pa.array([None], pa.list_(pa.float32()))}, "it holds rows without scores"),
        ({"logprobs": pa.array([[None]], pa.list_(pa.float32()))}, "it holds rows without scores"),
    ],
)
def test_a_file_of_something_else_is_named(store, columns, sentence):
    values = {"row_key": keys(1), "logprobs": pa.array([[-1.0]], pa.list_(pa.float32())), **columns}
    table = pa.table({name: array for name, array in values.items() if array is not None})
    path = store.storage.full(f"{store.folder}/b/0-of-another-program.parquet")
    put(store, "b", {2: [-1.0]})
    pq.write_table(table, path)
    with pytest.raises(StageError, match=sentence):
        store.read("b", keys(1))


def test_a_store_is_begun_with_its_first_scores(store):
    store.storage.write(f"{store.folder}/canary.json", b"{}")
    store.storage.write(f"{store.folder}/canaries/vllm-1.json", b"{}")
    assert not store.is_begun()
    put(store, "b01", {1: [-1.0]})
    assert store.is_begun()


def test_a_score_file_of_another_policy_is_refused(tmp_path):
    storage = Storage(str(tmp_path))
    keys = pa.array([bytes([7]) * 16], pa.binary(16))
    other = ScoreStore(storage, "other").write("b", keys, np.arange(2), np.zeros(1, np.float32), {})
    storage.write(other.replace("scores/other/", "scores/mine/"), storage.read(other))
    assert not ScoreStore(storage, "other").missing("b", keys).any()
    mine = ScoreStore(storage, "mine")
    for ask in (mine.missing, mine.versions):
        with pytest.raises(StageError, match="is not a score file: it holds scores of other, not of mine; move it out"):
            ask("b", keys)
