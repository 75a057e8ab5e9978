"""The same rows give the same shards, whatever files they come in and however often a run was stopped."""

import os
import pickle
import random
import time

import fsspec
import orjson
import pytest

from grape_service.errors import UserError
from grape_service.models import digests
from grape_service.prepare.counts import summarise_map
from grape_service.prepare.finish import finish_prepare, load_prepared
from grape_service.prepare.map import map_piece
from grape_service.prepare.plan import PREPARED, plan_prepare
from grape_service.prepare.reduce import reduce_partition, shard_paths
from grape_service.storage.storage import Storage
from tests.prepared_pools import WordRenderer, all_rows, make_config, prepare, write_jsonl

pytestmark = pytest.mark.quick

WORKERS = {"partition_bytes": 4000, "shard_tokens": 60}


def pool_rows(number_of_rows):
    return [
        {
            "prompt": f"question {number % 41}",
            "response": f"answer {number % 150}",
            "source": "abc"[number % 3],
            "mixed": number if number % 7 else "x",
            "meta": {"n": number % 5},
        }
        for number in range(number_of_rows)
    ]


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "workspace"))


def shard_bytes(storage, prepared):
    return [storage.read(path) for name in sorted(prepared.partitions) for path in shard_paths(prepared, name)]


def test_other_order_and_other_files_give_the_same_shards_byte_for_byte(tmp_path, storage):
    rows = [*pool_rows(200), *pool_rows(30)]
    write_jsonl(tmp_path / "one" / "p.jsonl", rows)
    plan, first = prepare(make_config(tmp_path / "one", workers=WORKERS, pool={"max_reject_share": 1}), storage)
    assert first.left_out.by_reason == {"duplicate candidate": 30}
    assert first.rejects.by_reason == {}
    random.Random(7).shuffle(rows)
    for number in range(3):
        write_jsonl(tmp_path / "three" / f"{number}.jsonl", rows[number::3])
    other, second = prepare(make_config(tmp_path / "three", workers=WORKERS, pool={"max_reject_share": 1}), storage)
    assert other.prepare_id != plan.prepare_id
    assert other.num_partitions == plan.num_partitions > 2
    assert shard_bytes(storage, second) == shard_bytes(storage, first)
    assert second.left_out.by_reason == first.left_out.by_reason


def test_rows_keep_their_keys_when_the_pool_grows(tmp_path, storage):
    rows = [{"prompt": f"question {n // 4}", "response": f"answer {n} " * (1 + n % 5)} for n in range(220)]
    pool = write_jsonl(tmp_path / "p.jsonl", rows[:200])
    _, first = prepare(make_config(pool, workers=WORKERS), storage)
    before = all_rows(storage, first)
    write_jsonl(tmp_path / "p.jsonl", random.Random(3).sample(rows, 220))
    _, second = prepare(make_config(pool, workers={"partition_bytes": 2000}), storage)
    after = all_rows(storage, second)
    assert second.num_partitions > first.num_partitions
    assert after.num_rows == 220
    keys = [dict(zip(t["candidate_id"].to_pylist(), t["row_key"].to_pylist(), strict=True)) for t in (before, after)]
    assert keys[0].items() <= keys[1].items()


def test_the_number_of_partitions_and_the_plan_come_from_the_pool_alone(tmp_path, storage):
    pool = write_jsonl(tmp_path / "p.jsonl", pool_rows(100))
    size = pool.stat().st_size
    for partition_bytes, expected in [(size, 1), (size - 1, 2), (size // 3, 4), (size // 8 + 1, 8)]:
        config = make_config(pool, workers={"partition_bytes": partition_bytes, "cpus": 7, "replicas": 3})
        assert plan_prepare(config, "words", storage).num_partitions == expected
    same = make_config(pool, workers={"partition_bytes": size}, pool={"max_reject_share": 0.5})
    plan = plan_prepare(make_config(pool, workers={"partition_bytes": size}), "words", storage)
    assert plan_prepare(same, "words", storage) == plan
    others = [
        plan_prepare(same, "other words", storage),
        plan_prepare(make_config(pool, pool={"truncated": "keep"}), "words", storage),
        plan_prepare(make_config(pool, behavior={"column": "lp"}), "words", storage),
        plan_prepare(make_config(pool, behavior={"sources": {"a": {"column": "lp"}}}), "words", storage),
        plan_prepare(make_config(pool, behavior={"sources": {"b": {"column": "lp"}}}), "words", storage),
        plan_prepare(make_config(pool, workers={"shard_tokens": 1}), "words", storage),
    ]
    assert len({plan.prepare_id, *(other.prepare_id for other in others)}) == 1 + len(others)


def test_a_pool_that_is_written_again_with_the_same_content_is_not_prepared_again(tmp_path, storage):
    pool = write_jsonl(tmp_path / "p.jsonl", pool_rows(10))
    config = make_config(pool)
    plan, prepared = prepare(config, storage)
    pool.unlink()
    write_jsonl(pool, pool_rows(10))
    again = plan_prepare(config, "words", storage)
    assert again.prepare_id == plan.prepare_id
    assert load_prepared(again, config, storage) == prepared
    write_jsonl(pool, pool_rows(11))
    assert load_prepared(plan_prepare(config, "words", storage), config, storage) is None


def test_a_prepared_pool_cannot_be_loaded_by_a_config_that_refuses_it(tmp_path, storage):
    pool = write_jsonl(tmp_path / "p.jsonl", [*pool_rows(9), b"{"])
    plan, prepared = prepare(make_config(pool, pool={"max_reject_share": 0.1}), storage)
    strict = make_config(pool, pool={"max_reject_share": 0.05})
    for _ in range(2):
        with pytest.raises(UserError, match=r"more than pool\.max_reject_share 0\.05"):
            load_prepared(plan_prepare(strict, "words", storage), strict, storage)
    assert load_prepared(plan, make_config(pool, pool={"max_reject_share": 0.1}), storage) == prepared


class Stopped(Exception):
    pass


class StoppingRenderer(WordRenderer):
    """Stops the task for good when it has rendered so many batches."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def render(self, candidates):
        if self.left == 0:
            raise Stopped
        self.left -= 1
        return super().render(candidates)


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(tmp_path):
    pool = write_jsonl(tmp_path / "p.jsonl", [*pool_rows(150), b"{"])
    config = make_config(pool, workers=WORKERS, pool={"max_reject_share": 1})
    undisturbed = Storage(str(tmp_path / "undisturbed"))
    _, expected = prepare(config, undisturbed)
    storage = Storage(str(tmp_path / "workspace"))
    for batches in (0, 1, 2):
        with pytest.raises(Stopped):
            prepare(config, storage, StoppingRenderer(batches))
    plan = plan_prepare(config, "words", storage)
    done = [info.path for info in storage.list(f"{plan.folder}/dealt") if info.path.endswith(".json")]
    assert len(done) == 3, "each run finished as many pieces as it rendered"
    renderer = StoppingRenderer(len(plan.pieces) - 3)
    counts = [map_piece(plan, piece, config, renderer, storage) for piece in plan.pieces]
    assert renderer.left == 0

    summary = summarise_map(plan, counts, config)
    first = reduce_partition(plan, plan.partitions[0], config, summary, storage)
    written = {path: storage.info(path).etag for path in [info.path for info in storage.list(f"{plan.folder}/shards")]}
    assert reduce_partition(plan, plan.partitions[0], config, summary, storage) == first
    partitions = [reduce_partition(plan, name, config, summary, storage) for name in plan.partitions]
    prepared = finish_prepare(plan, summary, partitions, config, storage)
    assert {path: storage.info(path).etag for path in written} == written, "a finished partition is not written again"
    assert prepared == expected
    assert shard_bytes(storage, prepared) == shard_bytes(undisturbed, expected)
    assert storage.list(f"{plan.folder}/dealt") == []
    assert load_prepared(plan, config, storage) == prepared


def test_shards_that_are_gone_are_made_again(tmp_path, any_storage):
    pool = write_jsonl(tmp_path / "p.jsonl", [*pool_rows(150), b"{"])
    config = make_config(pool, workers=WORKERS, pool={"max_reject_share": 1})
    plan, prepared = prepare(config, any_storage)
    paths = [path for name in sorted(prepared.partitions) for path in shard_paths(prepared, name)]
    before = shard_bytes(any_storage, prepared)
    for gone in (paths[-1:], paths[1:3], paths):
        any_storage.delete_files(gone)
        assert load_prepared(plan, config, any_storage) is None
        _, again = prepare(config, any_storage)
        assert again == prepared
        assert shard_bytes(any_storage, again) == before
        assert load_prepared(plan, config, any_storage) == prepared


def test_a_prepared_pool_that_was_deleted_in_part_is_made_again(tmp_path, storage):
    """In whatever order files went: each of those that say what is done is believed only with what it speaks of."""
    pool = write_jsonl(tmp_path / "p.jsonl", [*pool_rows(60), b"{"])
    config = make_config(pool, workers=WORKERS, pool={"max_reject_share": 1})
    plan, expected = prepare(config, storage, fan_out=2)
    before = shard_bytes(storage, expected)
    storage.delete_folder(plan.folder)
    with pytest.raises(Stopped):
        stop_before_the_end(config, storage)
    files = [info.path for info in storage.list(plan.folder) if not info.path.endswith(("plan.json", PREPARED))]
    assert {path.split("/")[2] for path in files} == {"dealt", "partitions", "rejects", "shards"}
    for path in files:
        storage.delete(path)
        _, again = prepare(config, storage, fan_out=2)
        assert again == expected, path
        assert shard_bytes(storage, again) == before, path
        storage.delete_folder(plan.folder)
        with pytest.raises(Stopped):
            stop_before_the_end(config, storage)


def stop_before_the_end(config, storage):
    """A run that is killed when all its partitions are done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.prepared_pools.finish_prepare", lambda *arguments: stop(list(arguments[2])))
        prepare(config, storage, fan_out=2)


def stop(_):
    raise Stopped


def test_pieces_of_another_size_take_nothing_from_a_run_that_was_stopped(tmp_path, storage):
    rows = pool_rows(60)
    pool = write_jsonl(tmp_path / "p.jsonl", rows)
    size = pool.stat().st_size
    with pytest.raises(Stopped):
        prepare(make_config(pool, workers={"partition_bytes": -(-size // 4)}), storage, StoppingRenderer(1))
    plan, prepared = prepare(make_config(pool, workers={"partition_bytes": -(-size // 3)}), storage)
    assert plan.num_partitions == 4, "as many as before, in other pieces"
    found = [orjson.loads(messages)[-1]["content"] for messages in all_rows(storage, prepared)["messages"].to_pylist()]
    assert sorted(found) == sorted(row["response"] for row in rows)


def test_several_arrow_files_of_a_piece_give_the_same_shards(tmp_path, storage, monkeypatch):
    pool = write_jsonl(tmp_path / "p.jsonl", [*pool_rows(150), *[b"{"] * 20])
    config = make_config(pool, workers=WORKERS, pool={"max_reject_share": 1})
    _, expected = prepare(config, Storage(str(tmp_path / "other")))
    monkeypatch.setattr("grape_service.prepare.map.BATCH_ROWS", 5)
    monkeypatch.setattr("grape_service.prepare.map.FILE_BYTES", 1)
    monkeypatch.setattr("grape_service.prepare.map.FILE_REJECTS", 3)
    plan = plan_prepare(config, "words", storage)
    counts = [map_piece(plan, piece, config, WordRenderer(), storage) for piece in plan.pieces]
    assert max(count.num_files for count in counts) > 3
    assert max(count.num_reject_files for count in counts) > 1
    _, prepared = prepare(config, storage)
    assert prepared.rejects == expected.rejects
    assert shard_bytes(storage, prepared) == shard_bytes(Storage(str(tmp_path / "other")), expected)


def test_local_files_that_have_not_changed_are_not_read_for_their_digest_again(tmp_path, storage, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    pool = write_jsonl(tmp_path / "p.jsonl", pool_rows(10))
    long_ago = 1_700_000_000_000_000_000
    os.utime(pool, ns=(long_ago, long_ago))
    config = make_config(pool)
    plan = plan_prepare(config, "words", storage)
    (remembered,) = [info.path for info in storage.list("prepared") if "/digests-" in info.path]
    known = storage.read_json(remembered)
    storage.write_json(remembered, {url: [*stamp[:-1], "0" * 64] for url, stamp in known.items()})
    assert plan_prepare(config, "words", storage).prepare_id != plan.prepare_id, "what is remembered is used"
    storage.write_json(remembered, known)
    assert plan_prepare(config, "words", storage) == plan
    time.sleep(0.02)  # more than a tick of the file system's clock
    pool.write_bytes(pool.read_bytes()[::-1])
    os.utime(pool, ns=(long_ago, long_ago))
    assert plan_prepare(config, "words", storage).prepare_id != plan.prepare_id, "the time of its change says so"


def test_files_of_which_their_store_says_only_the_size_are_read_for_their_digest(storage):
    elsewhere = fsspec.filesystem("memory")
    ids = []
    for word in ("one", "two", "one"):
        elsewhere.pipe_file("/pool-of-sizes/p.jsonl", b'{"prompt": "q", "response": "%s"}\n' % word.encode())
        config = make_config("memory://pool-of-sizes/p.jsonl")
        ids.append(plan_prepare(config, "words", storage).prepare_id)
    assert ids[0] == ids[2] != ids[1]


def test_digests_of_young_files_are_not_remembered(tmp_path, storage):
    pool = write_jsonl(tmp_path / "p.jsonl", pool_rows(10))
    plan_prepare(make_config(pool), "words", storage)
    assert [info.path for info in storage.list("prepared") if "/digests-" in info.path] == []


def test_a_run_that_is_overtaken_by_another_of_the_same_plan_takes_its_partitions(tmp_path, storage):
    pool = write_jsonl(tmp_path / "p.jsonl", pool_rows(100))
    config = make_config(pool, workers=WORKERS, pool={"max_reject_share": 1})
    plan = plan_prepare(config, "words", storage)
    counts = [map_piece(plan, piece, config, WordRenderer(), storage) for piece in plan.pieces]
    summary = summarise_map(plan, counts, config)
    _, prepared = prepare(config, storage)
    partitions = [reduce_partition(plan, name, config, summary, storage) for name in plan.partitions]
    assert finish_prepare(plan, summary, partitions, config, storage) == prepared


def test_what_tasks_are_given_and_give_back_can_be_sent_to_another_process(tmp_path, storage):
    pool = write_jsonl(tmp_path / "p.jsonl", [*pool_rows(100), b"{"])
    config = make_config(pool, workers=WORKERS, pool={"max_reject_share": 1})
    plan = plan_prepare(config, "words", storage)
    counts = [map_piece(plan, piece, config, WordRenderer(), storage) for piece in plan.pieces]
    summary = summarise_map(plan, counts, config)
    partition = reduce_partition(plan, plan.partitions[0], config, summary, storage)
    for value in (plan, counts, summary, partition, config):
        assert repr(pickle.loads(pickle.dumps(value))) == repr(value)
    _, prepared = prepare(config, storage)
    for value in (counts[0], partition, prepared):
        assert type(value).from_json(orjson.loads(orjson.dumps(value.to_json()))) == value


def test_which_of_two_equal_candidates_stays_does_not_depend_on_their_order(tmp_path, storage):
    pair = [{"prompt": "one two", "response": "three", "note": note} for note in ("first", "second")]
    found = []
    for name, rows in (("there", pair), ("back", pair[::-1])):
        _, prepared = prepare(make_config(write_jsonl(tmp_path / f"{name}.jsonl", rows)), storage)
        found.append(all_rows(storage, prepared)["note"].to_pylist())
    assert found[0] == found[1]
    assert len(found[0]) == 1
