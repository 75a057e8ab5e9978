"""The score stage: which rows have no score yet, engines policy by policy, failures on record."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from grape_service.config.policy import PolicyConfig
from grape_service.estimate.eta import record_rate
from grape_service.prepare.result import Prepared
from grape_service.prepare.shards import shard_paths
from grape_service.progress.reporter import reporter
from grape_service.score.shards import ShardFile, ShardWriter
from grape_service.score.store import ScoreStore
from grape_service.storage.storage import Storage
from workers.cluster.tasks import run_tasks
from workers.run import Run
from workers.scoring.actor import Unit, read_rows, write_failures
from workers.scoring.engines import Engines
from workers.scoring.metrics import ScoringMetrics
from workers.scoring.replicas import ScoreTotals, Work


def score_shards(
    run: Run,
    engines: Engines,
    policy: PolicyConfig,
    shards: Sequence[ShardFile],
    stage: str,
    temperature: float = 1.0,
    store_id: str | None = None,
) -> ScoreTotals:
    """Score the rows of `shards` that have no score yet under `policy`; no engine starts when none is missing.

    Scores are kept under the policy's id at this temperature, unless a `store_id` is given.
    """
    store_id = store_id or run.policy_id(policy, temperature)
    units, reused = plan_units(run, store_id, shards)
    totals = ScoreTotals(reused=reused)
    ScoringMetrics(run.name, store_id, gpus=0).add("grape_rows_reused", reused)
    if not units:
        run.event(f"{stage}: all {reused:,} rows have stored scores, no engine is started")
        return totals
    replicas = engines.of(policy, len(units))
    reporter().begin(stage, sum(unit.tokens for unit in units), "tokens")
    works = [Work(unit, store_id, temperature) for unit in units]
    began = time.monotonic()
    totals = replicas.score(works, lambda tokens: reporter().advance(stage, tokens))
    totals.reused += reused
    reporter().end(stage)
    record_rate(run.workspace, store_id, totals.tokens, time.monotonic() - began)
    record_failed_units(run, totals)
    return totals


def plan_units(run: Run, store_id: str, shards: Sequence[ShardFile]) -> tuple[list[Unit], int]:
    """The units that are left of `shards`, and how many rows have scores already."""
    by_partition: dict[str, list[ShardFile]] = {}
    for shard in shards:
        by_partition.setdefault(shard.partition, []).append(shard)
    folder = f"{run.folder}/todo/{store_id}"
    shard_tokens = run.config.workers.shard_tokens
    arguments = [(run.workspace, store_id, group, folder, shard_tokens) for group in by_partition.values()]
    planned = run_tasks(plan_partition, arguments, run.config.workers)
    return [unit for units, _ in planned for unit in units], sum(stored for _, stored in planned)


def plan_partition(
    storage: Storage, store_id: str, shards: list[ShardFile], folder: str, shard_tokens: int
) -> tuple[list[Unit], int]:
    """The units of one partition and its rows that have scores (a Ray task).

    A shard without any score is a unit as it is. What is missing of the others is put together in files of
    about `shard_tokens` tokens, so that a pool that grew by a tenth is a tenth of the work in full units.
    """
    partition = shards[0].partition
    store = ScoreStore(storage, store_id)
    if not store.partition_files(partition):
        return [Unit(shard.path, partition, shard.rows, shard.tokens, check=False) for shard in shards], 0
    keys = [read_rows(storage, shard.path, ["row_key"]) for shard in shards]
    missing = store.missing(partition, pa.concat_tables(keys)["row_key"])
    units: list[Unit] = []
    rest = ShardWriter(storage, f"{folder}/{partition}", partition, shard_tokens)
    ends = np.cumsum([table.num_rows for table in keys])[:-1]
    for shard, here in zip(shards, np.split(missing, ends), strict=True):
        if here.all():
            units.append(Unit(shard.path, partition, shard.rows, shard.tokens, check=False))
        elif here.any():
            rest.add(read_rows(storage, shard.path).filter(pa.array(here)))
    units += [Unit(shard.path, partition, shard.rows, shard.tokens, check=False) for shard in rest.close()]
    return units, int((~missing).sum())


def record_failed_units(run: Run, totals: ScoreTotals) -> None:
    """Write the rows of units that failed too often to the failures table and count them."""
    for work, reason in totals.failed_units:
        run.event(f"shard {work.unit.path} failed its last attempt and is skipped: {reason}")
    arguments = [(run.workspace, run.run_id, work.store_id, work.unit, reason) for work, reason in totals.failed_units]
    failed = run_tasks(record_failed_unit, arguments, run.config.workers)
    for (work, _), rows in zip(totals.failed_units, failed, strict=True):
        ScoringMetrics(run.name, work.store_id, gpus=0).add("grape_failures", rows)
    totals.failed += sum(failed)


def record_failed_unit(storage: Storage, run_id: str, store_id: str, unit: Unit, reason: str) -> int:
    """Record the rows of a unit that still have no score (a Ray task); how many."""
    rows = read_rows(storage, unit.path, ["row_key", "prompt_id", "candidate_id"])
    missing = ScoreStore(storage, store_id).missing(unit.partition, rows["row_key"])
    rows = rows.take(pa.array(np.flatnonzero(missing)))
    if rows.num_rows:
        write_failures(storage, run_id, store_id, unit, rows, [reason] * rows.num_rows)
    return rows.num_rows


def score(run: Run, engines: Engines, prepared: Prepared) -> ScoreTotals:
    """log p of every response token of the pool under the target policy."""
    if not run.config.select.needs_scores:
        return ScoreTotals()
    shards = []
    for partition, totals in prepared.partitions.items():
        for path in shard_paths(prepared, partition):
            rows, tokens = totals.rows // totals.num_shards, totals.tokens // totals.num_shards
            shards.append(ShardFile(path, partition, rows, tokens))
    with run.stage("score"):
        return score_shards(run, engines, run.config.target, shards, "score target")
