"""What tasks are given: what all of them need goes into the object store once, and each gets little beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import grape_service
from tests import tiny_models
from tests.jobs import pool_rows, write_jsonl
from workers.cluster import tasks

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(300)]
MOST = 64 * 2**10


def test_no_task_of_a_whole_run_takes_more_than_64_kib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(tiny_models.make_model(tmp_path / "model"))
    pool = write_jsonl(tmp_path / "pool.jsonl", pool_rows(40))
    held_out = [{"question": " ".join(f"word{n}x{k}" for k in range(40))} for n in range(400)]
    items = write_jsonl(tmp_path / "held-out.jsonl", held_out)
    config = {
        "name": "arguments",
        "pool": {"path": str(pool)},
        "target": {"model": model, "dtype": "float32"},
        "behavior": {"model": model, "dtype": "float32", "system_prompt": "Answer well."},
        "weights": {"method": "pear"},
        "checks": {"contamination": {"files": [str(items)]}},
        "output": {"path": str(tmp_path / "datasets")},
        "workers": {"cpus": 2, "partition_bytes": 400},
    }
    sizes: dict[str, list[int]] = {}
    shared: dict[str, int] = {}
    run_tasks = tasks.run_tasks
    groups = tasks._groups

    def measured(arguments: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
        for group in groups(arguments, size):
            sizes.setdefault(", ".join(group[0]), []).append(len(cloudpickle.dumps(group)))
            yield group

    def watched(function: Any, *arguments: Any, **options: Any) -> Any:
        shared[function.__name__] = len(cloudpickle.dumps(options.get("shared")))
        return run_tasks(function, *arguments, **options)

    monkeypatch.setattr(tasks, "_groups", measured)
    for stage in ("prepare", "score", "select", "weigh", "check", "release"):
        monkeypatch.setattr(f"workers.stages.{stage}.run_tasks", watched)
    release = grape_service.run(config)
    assert release.manifest.counts["pool"]["prompts"] == 40
    print(shared, {name: max(found) for name, found in sizes.items()})
    assert sum(len(found) for found in sizes.values()) > 20
    assert max(max(found) for found in sizes.values()) < MOST
    assert max(shared.values()) > MOST, "the n-grams of the evaluation sets are among what is shared"
