"""What the report's statistics add to select and weigh, and the rows/s of each check, over a made-up partition.

    python benchmarks/report.py --rows 50000

CPU seconds of this process, so that a busy machine does not count. The page itself is made once a release.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.stages import make_partition
from grape_service.checks.partition import check_partition
from grape_service.checks.settings import KINDS, enabled_checks
from grape_service.checks.texts import evaluation_grams
from grape_service.config import CheckConfig, Config
from grape_service.report.page import render_page
from grape_service.report.statistics import SelectStatistics, WeighStatistics
from grape_service.scores import ScoreStore
from grape_service.select import select_partition
from grape_service.storage import Storage
from grape_service.weigh import weigh_partition

NAMES = [f"source-{number}" for number in range(5)]


def seconds(function: Callable[[], Any]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="What the report and the checks cost.")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=150)
    arguments = parser.parse_args()
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
        shards = make_partition(storage, store, arguments.rows, arguments.tokens)
        chosen, weighed = SelectStatistics.empty(NAMES), WeighStatistics.empty(NAMES)

        def select(observer: SelectStatistics | None) -> None:
            select_partition(storage, "b", shards, store, config, None, "kept.parquet", observer)

        def weigh(observer: WeighStatistics | None) -> None:
            weigh_partition(storage, "b", "kept.parquet", None, [], config, "weighed.parquet", observer=observer)

        select(None)
        plain = [seconds(lambda: select(None)), seconds(lambda: weigh(None))]
        watched = [seconds(lambda: select(chosen)), seconds(lambda: weigh(weighed))]
        for name, before, after in zip(("select", "weigh"), plain, watched, strict=True):
            per_million = (after - before) / arguments.rows * 1e6
            print(
                f"{name}: {before:.2f} s, with statistics {after:.2f} s; {per_million:.1f} s for 1,000,000 candidates"
            )
        facts: dict[str, Any] = {"name": "benchmark", "version": "v0001", "created": None, "rows": 1, "tokens": 1}
        facts |= {"loss_tokens": 1, "bytes": 1, "counts": {}, "config": {}, "parents": {}}
        facts["statistics"] = {"report": {"select": chosen.to_json(), "weights": weighed.to_json()}}
        print(f"page: {seconds(lambda: render_page(facts)):.2f} s")
        grams = evaluation_grams(["one two three four five six seven eight nine"], 8)
        kept = "kept.parquet"
        for name, kind in KINDS.items():
            if kind.scope.endswith("rows"):
                settings = {"files": ["x"]} if name == "contamination" else {}
                checks = enabled_checks({name: CheckConfig(action="warn", **settings)})
                took = seconds(partial(check_partition, storage, shards, kept, checks, grams, "f.parquet", "d.parquet"))
                looked_at = arguments.rows if kind.scope == "all rows" else chosen.kept.sum()
                print(f"check {name} ({kind.scope}): {looked_at / took:,.0f} rows/s")


if __name__ == "__main__":
    main()
