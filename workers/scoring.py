"""The scoring stages: which units are left, engines policy by policy, failures on record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config import PolicyConfig
from grape_service.models import text_digests
from grape_service.parquet import write_parquet
from grape_service.progress import reporter
from grape_service.scores import ScoreStore
from grape_service.storage import Storage
from workers.actor import ScoringSpec, Unit, read_rows, write_failures
from workers.cluster import run_tasks
from workers.metrics import ScoringMetrics
from workers.outlook import keep_rate
from workers.replicas import Replicas, ScoreTotals, Work, num_replicas
from workers.run import Run


@dataclass(frozen=True)
class ShardFile:
    """A file of rows to score."""

    path: str
    partition: str
    rows: int
    tokens: int


class Engines:
    """The engines of one policy at a time: policies take turns, and one that comes again at once stays up."""

    def __init__(self, run: Run):
        self.run = run
        self.replicas: Replicas | None = None

    def of(self, policy: PolicyConfig, num_units: int) -> Replicas:
        """Started engines for a policy; those of another policy are ended first."""
        if self.replicas is not None and self.are_up(policy):
            return self.replicas
        self.close()
        policy_id = self.run.policy_id(policy)
        config = self.run.config
        texts = text_digests(self.run.files_of(policy).folder)
        spec = ScoringSpec(policy, policy_id, self.run.workspace, self.run.run_id, config.workers.reuse, texts)
        count = num_replicas(config, policy.tensor_parallel, num_units)
        self.replicas = Replicas(config, spec, count)
        return self.replicas

    def are_up(self, policy: PolicyConfig) -> bool:
        """Whether engines of this policy are started."""
        return self.replicas is not None and self.replicas.spec.policy_id == self.run.policy_id(policy)

    def close(self) -> None:
        """End the engines and keep what they were and did for the manifest."""
        if self.replicas is None:
            return
        self.run.engines.extend(
            {"policy_id": self.replicas.spec.policy_id, **description} for description in self.replicas.descriptions()
        )
        self.run.events.extend(self.replicas.events)
        self.replicas.close()
        self.replicas = None


@contextlib.contextmanager
def engines_of(run: Run) -> Iterator[Engines]:
    """Engines that are gone after the block."""
    started = Engines(run)
    try:
        yield started
    finally:
        started.close()


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
        run.event(f"{stage}: all {reused:,} rows have scores already, no engine is started")
        return totals
    replicas = engines.of(policy, len(units))
    reporter().begin(stage, sum(unit.tokens for unit in units), "tokens")
    works = [Work(unit, store_id, temperature) for unit in units]
    began = time.monotonic()
    totals = replicas.score(works, lambda tokens: reporter().advance(stage, tokens))
    totals.reused += reused
    reporter().end(stage)
    keep_rate(run, store_id, totals.tokens, time.monotonic() - began)
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
    rest = Gatherer(storage, f"{folder}/{partition}", partition, shard_tokens)
    ends = np.cumsum([table.num_rows for table in keys])[:-1]
    for shard, here in zip(shards, np.split(missing, ends), strict=True):
        if here.all():
            units.append(Unit(shard.path, partition, shard.rows, shard.tokens, check=False))
        elif here.any():
            rest.add(read_rows(storage, shard.path).filter(pa.array(here)))
    return units + rest.close(), int((~missing).sum())


class Gatherer:
    """Puts rows of several shards together into units."""

    def __init__(self, storage: Storage, folder: str, partition: str, unit_tokens: int):
        self.storage, self.folder, self.partition, self.unit_tokens = storage, folder, partition, unit_tokens
        self.units: list[Unit] = []
        self.waiting: list[pa.Table] = []
        self.tokens = 0

    def add(self, table: pa.Table) -> None:
        """Rows of one shard."""
        self.waiting.append(table)
        self.tokens += pc.sum(pc.list_value_length(table["input_ids"])).as_py()
        if self.tokens >= self.unit_tokens:
            self._write()

    def _write(self) -> None:
        table = pa.concat_tables(self.waiting)
        path = f"{self.folder}/shard-{len(self.units):05d}.parquet"
        write_parquet(self.storage, path, table.schema, [table.combine_chunks()])
        self.units.append(Unit(path, self.partition, table.num_rows, self.tokens, check=False))
        self.waiting, self.tokens = [], 0

    def close(self) -> list[Unit]:
        """Every unit."""
        if self.waiting:
            self._write()
        return self.units


def record_failed_units(run: Run, totals: ScoreTotals) -> None:
    """Write the rows of units that failed too often to the failures table and count them."""
    for work, reason in totals.failed_units:
        run.event(f"shard {work.unit.path} is given up after its last attempt: {reason}")
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
