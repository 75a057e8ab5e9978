"""What the driver holds of a pool of 65,536 partitions and 2,000,000 shards, with made-up counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from grape_service.prepare.counts import MapSummary, PartitionCounts, ShardCounts
from grape_service.prepare.finish import finish_prepare
from grape_service.prepare.groups import GroupCounts
from grape_service.prepare.plan import PreparePlan
from grape_service.prepare.reduce import shard_paths
from grape_service.report.statistics import SelectStatistics, WeighStatistics
from grape_service.score.shards import Shards
from grape_service.select.counts import SelectCounts
from grape_service.storage.storage import Storage
from tests.prepared_pools import make_config
from workers.run import MAX_EVENTS, Events
from workers.scoring.queue import WorkQueue
from workers.scoring.replicas import Work
from workers.scoring.unscored import Unscored

PARTITIONS = 2**16
SHARDS = 31  # of a partition
LIMIT = 2**30


def counts(plan: PreparePlan) -> Iterator[PartitionCounts]:
    """What reduce tasks would return."""
    for name in plan.partitions:
        shards = [ShardCounts(400, 65_000, 32_000) for _ in range(SHARDS)]
        yield PartitionCounts(name, shards, 400 * SHARDS, 50 * SHARDS, 65_000 * SHARDS, 32_000 * SHARDS, 900)


def hold(folder: Path) -> None:
    """The driver's part of prepare, score, select and weigh."""
    config, storage = make_config(folder), Storage(str(folder))
    plan = PreparePlan("made-up", "pool", (), (), PARTITIONS, PARTITIONS)
    rows = 400 * SHARDS * PARTITIONS
    prepared = finish_prepare(
        plan, MapSummary(rows_in=rows, rows=rows, groups=[GroupCounts()]), counts(plan), config, storage
    )
    shards = [
        Shards(shard_paths(prepared, name).folder, name, one.num_shards, one.rows, one.tokens)
        for name, one in prepared.partitions.items()
    ]
    unscored = [Unscored(one) for one in shards]
    queue = WorkQueue((Work(unit, "policy") for one in unscored for unit in one.units()), SHARDS * PARTITIONS)
    first = queue.popleft()
    queue.appendleft(first)
    tokens = paths = 0
    while queue:
        work = queue.popleft()
        tokens, paths = tokens + work.unit.tokens, paths + len(work.unit.path)
    assert tokens == 65_000 * SHARDS * PARTITIONS
    selected, select_total = SelectStatistics.empty(["a", "b"]), SelectCounts()
    weighed = WeighStatistics.empty(["a", "b"])
    for _ in islice(plan.partitions, PARTITIONS // 256):  # each is folded and forgotten: more of them hold no more
        selected += SelectStatistics.empty(["a", "b"])
        select_total += SelectCounts(prompts=1, sources={})
        weighed += WeighStatistics.empty(["a", "b"])
    assert select_total.prompts == PARTITIONS // 256
    assert np.shape(selected.kept) == np.shape(weighed.weights[:, 0])


def test_two_million_shards_fit_into_a_gibibyte(tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"from tests.workers.test_driver_memory import main; main({str(tmp_path)!r})"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert int(done.stdout.split()[-1]) < LIMIT


def main(folder: str) -> None:
    hold(Path(folder))
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count what the parent held when it started this
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    print("peak bytes", int(peak) * 1024)


def test_a_run_keeps_some_events_and_says_how_many_more_there_were() -> None:
    events = Events()
    for number in range(MAX_EVENTS + 5):
        events.add(f"event {number}")
    told = events.to_json()
    assert len(told) == MAX_EVENTS + 1
    assert told[-1]["event"] == "5 more events are left out"


def test_work_that_comes_back_goes_first_and_nothing_is_made_before_it_is_asked_for() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    queue = WorkQueue(items(), 5)
    assert (len(queue), made) == (5, [])
    assert [queue.popleft(), queue.popleft()] == [0, 1]
    queue.appendleft(0)
    assert (len(queue), made) == (4, [0, 1])
    assert [queue.popleft() for _ in range(4)] == [0, 2, 3, 4]
    assert not queue
