"""What the report's statistics add to select and weigh, and the rows/s of each check, over a made-up partition.

    python benchmarks/report.py --rows 50000

CPU seconds of this process, so that a busy machine does not count. The page itself is made once a release.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from benchmarks.stages import make_partition
from grape_service.checks.run import CheckContext, CheckPartition, check_partition
from grape_service.checks.texts import evaluation_grams
from grape_service.config.checks import ChecksConfig
from grape_service.config.schema import Config
from grape_service.report.page import render_page
from grape_service.report.statistics import SelectStatistics, WeighStatistics
from grape_service.score.store import ScoreStore
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.storage.storage import Storage
from grape_service.weigh.lookup import Stores
from grape_service.weigh.partition import WeighContext, WeighPartition, weigh_partition

REPEATS = 5
NAMES = [f"source-{number}" for number in range(5)]


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
    """CPU seconds of a call, the least of `repeats`."""
    took = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        took.append(time.process_time() - started)
    return min(took)


@dataclass(frozen=True)
class Costs:
    """CPU seconds for a number of candidates, without and with the report's statistics."""

    select: tuple[float, float]
    weigh: tuple[float, float]
    page: float

    @property
    def statistics(self) -> float:
        """CPU seconds that the statistics add."""
        return sum(watched - plain for plain, watched in (self.select, self.weigh))


@dataclass(frozen=True)
class Made:
    """A made-up partition, selected and weighed."""

    storage: Storage
    shards: list[str]
    num_kept: int
    costs: Costs


@contextlib.contextmanager
def made_partition(rows: int, tokens: int) -> Iterator[Made]:
    """Select and weigh a made-up partition without and with statistics, and render the page."""
    config = Config.model_validate(
        {
            "name": "benchmark",
            "pool": {"path": "pool"},
            "target": {"model": "target", "dtype": "float32"},
            "behavior": {"column": "behavior_logprobs"},
            "weights": {"method": "pear"},
            "output": {"path": "out"},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        store = ScoreStore(storage, "target")
        shards = make_partition(storage, store, rows, tokens)
        observed: dict[str, Any] = {}

        def select(watched: bool) -> None:
            observer = observed["select"] = SelectStatistics.empty(NAMES) if watched else None
            context = SelectContext(storage, config, store, frozenset())
            select_partition(context, SelectPartition("b", shards, "kept.parquet"), observer=observer)

        def weigh(watched: bool) -> None:
            observer = observed["weights"] = WeighStatistics.empty(NAMES) if watched else None
            partition = WeighPartition("b", "kept.parquet", [], "weighed.parquet")
            weigh_partition(WeighContext(storage, config, Stores()), partition, observer=observer)

        (plain_select, select_too), (plain_weigh, weigh_too) = (
            [seconds(partial(stage, watched), REPEATS) for watched in (False, True)] for stage in (select, weigh)
        )
        facts: dict[str, Any] = {"name": "benchmark", "version": "v0001", "created": None, "rows": 1, "tokens": 1}
        facts |= {"loss_tokens": 1, "bytes": 1, "counts": {}, "config": {}, "parents": {}}
        facts["statistics"] = {"report": {name: observer.to_json() for name, observer in observed.items()}}
        page = seconds(lambda: render_page(facts))
        costs = Costs((plain_select, select_too), (plain_weigh, weigh_too), page)
        yield Made(storage, shards, int(observed["select"].kept.sum()), costs)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the report and the checks cost.")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=150)
    arguments = parser.parse_args()
    with made_partition(arguments.rows, arguments.tokens) as made:
        for name, (before, after) in (("select", made.costs.select), ("weigh", made.costs.weigh)):
            per_million = (after - before) / arguments.rows * 1e6
            print(
                f"{name}: {before:.2f} s, with statistics {after:.2f} s; {per_million:.1f} s for 1,000,000 candidates"
            )
        print(f"page: {made.costs.page:.2f} s")
        grams = evaluation_grams(["one two three four five six seven eight nine"], 8)
        for name, field in ChecksConfig.model_fields.items():
            scope = field.default.scope
            if scope.endswith("rows"):
                settings = {"files": ["x"]} if name == "contamination" else {}
                checks = ChecksConfig.model_validate({name: {"action": "warn", **settings}}).enabled()
                context = CheckContext(made.storage, checks, grams)
                partition = CheckPartition(made.shards, "kept.parquet", "findings.parquet", "digests.parquet")
                took = seconds(partial(check_partition, context, partition))
                looked_at = arguments.rows if scope == "all rows" else made.num_kept
                print(f"check {name} ({scope}): {looked_at / took:,.0f} rows/s")
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
