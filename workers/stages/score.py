"""The score stage: which rows have no score yet, engines policy by policy, failures on record."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from grape_service.config.methods import SelectConfig
from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import Config
from grape_service.errors import StageError, UserError
from grape_service.estimate.eta import record_rate
from grape_service.prepare.result import Prepared
from grape_service.prepare.shards import shard_paths
from grape_service.progress.reporter import reporter
from grape_service.rows.columns import SHARD
from grape_service.score.shards import Shards, ShardWriter
from grape_service.score.store import ScoreStore
from grape_service.select.limits import keep_column, kept_of_prompts
from grape_service.storage.parquet import array_of
from grape_service.storage.storage import Storage
from workers.cluster.tasks import run_tasks, together
from workers.engines.choose import installed_version
from workers.run import Run
from workers.scoring.actor import Unit, read_rows, write_failures
from workers.scoring.engines import Engines
from workers.scoring.metrics import ScoringMetrics
from workers.scoring.queue import WorkQueue
from workers.scoring.work import ScoreTotals, Work


def score_shards(
    run: Run,
    engines: Engines,
    policy: PolicyConfig,
    shards: Sequence[Shards],
    stage: str,
    temperature: float = 1.0,
    store_id: str | None = None,
    statistics: tuple[str, ...] = (),
    max_failed: float = math.inf,
) -> ScoreTotals:
    """Score the rows of `shards` that have no score yet under `policy`; no engine starts when none is missing.

    Scores are kept under the policy's id at this temperature, unless a `store_id` is given. `statistics` are made
    beside log-probabilities; a row that lacks one has no score yet. Raises StageError as soon as more than
    `max_failed` rows have failed.
    """
    store_id = store_id or run.policy_id(policy, temperature)
    left = plan_units(run, store_id, shards, statistics)
    reused = sum(one.stored for one in left)
    if reused and run.config.workers.reuse == "exact":
        refuse_other_versions(run, policy, store_id, shards)
    num_units = sum(one.num_units for one in left)
    ScoringMetrics(run.name, store_id, gpus=0).add("grape_rows_reused", reused)
    if not num_units:
        run.event(f"{stage}: all {reused:,} rows have stored scores, no engine is started")
        return ScoreTotals(reused=reused)
    replicas = engines.of(policy, num_units)
    reporter().begin(stage, sum(one.tokens for one in left), "tokens")
    works = (Work(unit, store_id, temperature) for one in left for unit in one.units())
    began = time.monotonic()
    look = FailureLimit(run, max_failed).look
    totals = replicas.score(WorkQueue(works, num_units), lambda tokens: reporter().advance(stage, tokens), look)
    look(totals)
    totals.reused += reused
    reporter().end(stage)
    record_rate(run.workspace, store_id, totals.tokens, time.monotonic() - began)
    return totals


@dataclass(frozen=True)
class Left:
    """What is left to score of a partition: some of its shards as they are, and shards that were put together."""

    shards: Shards
    whole: npt.NDArray[np.int32] | None = None
    """Which shards; None for all of them."""
    rest: Shards | None = None
    stored: int = 0
    """Rows that have a score."""
    statistics: tuple[str, ...] = ()
    """What is made beside log-probabilities."""

    @property
    def num_units(self) -> int:
        whole = self.shards.number if self.whole is None else len(self.whole)
        return whole + (self.rest.number if self.rest is not None else 0)

    @property
    def tokens(self) -> int:
        return sum(unit.tokens for unit in self.units()) if self.whole is not None else self.shards.tokens

    def units(self) -> Iterator[Unit]:
        """A unit for each shard, made as it is asked for."""
        whole = range(self.shards.number) if self.whole is None else self.whole.tolist()
        for shards, places in ((self.shards, whole), (self.rest, range(self.rest.number if self.rest else 0))):
            for place in places:
                assert shards is not None
                rows, tokens = shards.part(shards.rows, place), shards.part(shards.tokens, place)
                yield Unit(shards.paths[place], shards.partition, rows, tokens, check=False, statistics=self.statistics)


def plan_units(run: Run, store_id: str, shards: Sequence[Shards], statistics: tuple[str, ...] = ()) -> list[Left]:
    """What is left to score of each partition. Those without any score are not looked at."""
    store = ScoreStore(run.workspace, store_id).with_folders()
    scored = [one for one in shards if store.related(one.partition)]
    workers = run.config.workers
    planned = run_tasks(
        plan_partition,
        ({"shards": one} for one in scored),
        workers,
        shared={
            "store": store,
            "folder": f"{run.folder}/todo/{store_id}",
            "shard_tokens": workers.shard_tokens,
            "statistics": statistics,
        },
        together=together(workers, len(scored)),
    )
    found = {one.shards.partition: one for one in planned}
    return [found.get(one.partition) or Left(one, statistics=statistics) for one in shards]


def plan_partition(
    shards: Shards, store: ScoreStore, folder: str, shard_tokens: int, statistics: tuple[str, ...] = ()
) -> Left:
    """What is left to score of a partition (a Ray task).

    A shard without any score is a unit as it is. What is missing of the others is put together in files of
    about `shard_tokens` tokens, so that a pool that grew by a tenth is a tenth of the work in full units.
    """
    storage, partition = store.storage, shards.partition
    keys = [read_rows(storage, path, ["row_key"]) for path in shards.paths]
    missing = store.missing(partition, pa.concat_tables(keys)["row_key"], statistics)
    whole: list[int] = []
    rest = ShardWriter(storage, f"{folder}/{partition}", partition, shard_tokens)
    ends = np.cumsum([table.num_rows for table in keys])[:-1]
    for place, here in enumerate(np.split(missing, ends)):
        if here.all():
            whole.append(place)
        elif here.any():
            rest.add(read_rows(storage, shards.paths[place]).filter(pa.array(here)))
    return Left(shards, np.array(whole, dtype=np.int32), rest.close(), int((~missing).sum()), statistics)


def refuse_other_versions(run: Run, policy: PolicyConfig, store_id: str, shards: Sequence[Shards]) -> None:
    """Raises StageError where `workers.reuse: exact` meets scores of another engine version, file by file."""
    store = ScoreStore(run.workspace, store_id).with_folders()
    scored = [one for one in shards if store.related(one.partition)]
    found = run_tasks(
        stored_versions,
        ({"shards": one} for one in scored),
        run.config.workers,
        shared={"store": store},
        together=together(run.config.workers, len(scored)),
    )
    stored = sorted(set().union(*found))
    here = installed_version(policy, run.files_of(policy).folder, run.config.workers.ray_address == "auto")
    other = next((version for version in stored if version != (here or stored[0])), None)
    if other is not None:
        raise StageError(
            f"scores of {store_id} were made by {other}, and the engine here is {here or stored[0]}: "
            "set workers.reuse to compatible, or score with the same version"
        )


def stored_versions(shards: Shards, store: ScoreStore) -> set[str]:
    """Which engines made the scores that a partition's rows have (a Ray task)."""
    keys = [read_rows(store.storage, path, ["row_key"]) for path in shards.paths]
    return store.versions(shards.partition, pa.concat_tables(keys)["row_key"])


class FailureLimit:
    """Records the rows of units that failed too often as they fail, and stops a run that can no longer succeed."""

    def __init__(self, run: Run, max_failed: float):
        self.run, self.max_failed = run, max_failed
        self.recorded = 0  # units

    def look(self, totals: ScoreTotals) -> None:
        """Write failed units to the failures table and count their rows. Raises StageError above the limit."""
        for work, reason in totals.failed_units[self.recorded :]:
            self.recorded += 1
            self.run.event(f"shard {work.unit.path} failed its last attempt and is skipped: {reason}")
            rows = record_failed_unit(self.run.workspace, self.run.run_id, work.store_id, work.unit, reason)
            ScoringMetrics(self.run.name, work.store_id, gpus=0).add("grape_failures", rows)
            totals.failed += rows
        if totals.failed > self.max_failed:
            raise StageError(
                f"{totals.failed:,} rows could not be scored, more than workers.max_failed_share "
                f"{self.run.config.workers.max_failed_share:g} allows: the run stops and nothing is published; run "
                "again to try them once more, or see the failures folder of the run"
            )


def record_failed_unit(storage: Storage, run_id: str, store_id: str, unit: Unit, reason: str) -> int:
    """Record the rows of a unit that still have no score; how many."""
    rows = read_rows(storage, unit.path, ["row_key", "prompt_id", "candidate_id"])
    missing = ScoreStore(storage, store_id).missing(unit.partition, rows["row_key"], unit.statistics)
    rows = rows.take(pa.array(np.flatnonzero(missing)))
    if rows.num_rows:
        write_failures(storage, run_id, store_id, unit, rows, [reason] * rows.num_rows)
    return rows.num_rows


def refuse_missing_columns(config: Config, prepared: Prepared) -> None:
    """Raises UserError where a method of the user's names a column that the pool has not."""
    there = [*SHARD.names, *(item.name for item in prepared.other_fields)]
    for method in config.own_methods:
        for name in method.columns:
            if name not in there:
                others = ", ".join(item.name for item in prepared.other_fields) or "none beside ours"
                raise UserError(
                    f"{method.kind}.method {method.name} names the column '{name}', which the pool has not; "
                    f"its columns are {others}"
                )


def refuse_bad_keep(run: Run, shards: Sequence[Shards]) -> None:
    """Raises UserError where the pool's column that select.keep names does not say how many are kept."""
    if keep_column(run.config.select) is not None:
        for _ in run_tasks(
            look_at_keep,
            ({"shards": one} for one in shards),
            run.config.workers,
            shared={"storage": run.workspace, "select": run.config.select},
            together=together(run.config.workers, len(shards)),
        ):
            pass


def look_at_keep(shards: Shards, storage: Storage, select: SelectConfig) -> None:
    """refuse_bad_keep for a partition (a Ray task)."""
    name = keep_column(select)
    assert name is not None, "select.keep names a column"
    table = pa.concat_tables([read_rows(storage, path, ["prompt_id", name]) for path in shards.paths]).combine_chunks()
    prompts = array_of(table, "prompt_id").dictionary_encode()
    kept_of_prompts(table, prompts.indices.to_numpy(), len(prompts.dictionary), select)


def score(run: Run, engines: Engines, prepared: Prepared) -> ScoreTotals:
    """log p of every response token of the pool under the target, and the other statistics that are asked for."""
    refuse_missing_columns(run.config, prepared)
    if not run.config.select.needs_scores:
        return ScoreTotals()
    shards = [
        Shards(shard_paths(prepared, partition).folder, partition, totals.num_shards, totals.rows, totals.tokens)
        for partition, totals in prepared.partitions.items()
        if totals.num_shards
    ]
    store = ScoreStore(run.workspace, run.policy_id(run.config.target))
    with run.stage("score"):
        shards_id = _shards_id(run, prepared)
        if store.is_complete(shards_id):
            run.event(f"score target: all {prepared.rows:,} rows have stored scores, no engine is started")
            return ScoreTotals(reused=prepared.rows)
        refuse_bad_keep(run, shards)
        statistics = run.config.statistics
        most = run.config.workers.max_failed_share * prepared.rows
        totals = score_shards(
            run, engines, run.config.target, shards, "score target", statistics=statistics, max_failed=most
        )
        if totals.failed == 0 and not totals.failed_units:
            store.note_complete(shards_id)
        return totals


def _shards_id(run: Run, prepared: Prepared) -> str:
    """Names the pool's shards and what is asked of their tokens."""
    digest = hashlib.sha256(orjson.dumps(run.config.statistics)).hexdigest()
    return f"{prepared.prepare_id}-{digest[:16]}"
