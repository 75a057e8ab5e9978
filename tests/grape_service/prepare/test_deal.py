"""The levels between map and reduce: the same shards whatever their number, and requests in step with the pool."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grape_service.prepare import plan as planning
from grape_service.prepare.plan import PIECE_BYTES, PIECES, plan_prepare
from grape_service.prepare.reduce import shard_paths
from grape_service.storage.storage import Storage
from tests.prepared_pools import make_config, prepare, write_jsonl


def pool(path: Path, num_rows: int) -> Path:
    rows = [
        {"prompt": f"question {row // 2}", "response": f"answer {row} " + "word " * (row % 5)}
        for row in range(num_rows)
    ]
    return write_jsonl(path, [*rows, rows[0]])


def shards_of(config: Any, storage: Storage, fan_out: int) -> list[bytes]:
    _, prepared = prepare(config, storage, fan_out=fan_out)
    return [storage.read(path) for name in sorted(prepared.partitions) for path in shard_paths(prepared, name)]


def test_any_number_of_levels_gives_the_same_shards(tmp_path: Path) -> None:
    path = pool(tmp_path / "pool.jsonl", 60)
    config = make_config(path, workers={"partition_bytes": path.stat().st_size // 10, "shard_tokens": 60})
    plan = plan_prepare(config, "words", Storage(str(tmp_path / "plan")))
    assert plan.num_partitions == 16
    assert [len(replace(plan, fan_out=fan_out).level_bits) for fan_out in (64, 8, 2)] == [1, 2, 4]
    found = [shards_of(config, Storage(str(tmp_path / str(fan_out))), fan_out) for fan_out in (64, 8, 2)]
    assert len(found[0]) > 10
    assert found[0] == found[1] == found[2]


class Counted(Storage):
    """Counts what would be a request each on S3."""

    def __init__(self, root: str):
        super().__init__(root)
        self.requests = 0
        files = self._files
        for name in ("read_with_etag", "read_range", "open", "info", "list", "folders", "open_write", "delete_folder"):
            setattr(files, name, self.counted(getattr(files, name)))

    def counted(self, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.requests += 1
            return function(*arguments)

        return call


def test_small_buckets_are_joined_to_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(planning, "PIECES", PIECES)
    path = pool(tmp_path / "pool.jsonl", 400)
    found = {}
    for buckets in (PIECES, 8 * PIECES):
        workers = {"partition_bytes": -(-path.stat().st_size // buckets), "shard_tokens": 60}
        config, storage = make_config(path, workers=workers), Storage(str(tmp_path / str(buckets)))
        plan = plan_prepare(config, "words", storage)
        assert (plan.num_buckets, plan.num_partitions) == (buckets, PIECES)
        found[buckets] = shards_of(config, storage, 64)
    assert len(found[PIECES]) > PIECES
    assert found[PIECES] == found[8 * PIECES]


def test_requests_for_each_partition_do_not_grow_with_the_pool(tmp_path: Path) -> None:
    each = {}
    for rows, partitions in ((20, 4), (80, 16), (320, 64)):
        path = pool(tmp_path / f"{partitions}.jsonl", rows)
        config = make_config(path, workers={"partition_bytes": -(-path.stat().st_size // partitions)})
        storage = Counted(str(tmp_path / f"workspace-{partitions}"))
        plan, _ = prepare(config, storage, fan_out=4)
        assert (plan.num_partitions, len(plan.pieces)) == (partitions, pytest.approx(partitions, abs=2))
        each[partitions] = storage.requests / partitions
    levels = {4: 1, 16: 2, 64: 3}
    print(each)
    for partitions, requests in each.items():
        assert requests < 10 + levels[partitions] * 6, "four slices and a file with its bounds for each level"
