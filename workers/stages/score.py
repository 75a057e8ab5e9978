"""The score stage: log-probabilities of the pool under the target, and whatever another stage has scored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from grape_service.config.methods import SelectConfig
from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.estimate.eta import record_rate
from grape_service.keys import complete_key
from grape_service.prepare.result import Prepared
from grape_service.progress.reporter import reporter
from grape_service.rows.columns import SHARD
from grape_service.score.shards import Shards, shards_of_pool
from grape_service.score.store import ScoreStore
from grape_service.select.limits import keep_column, kept_of_prompts
from grape_service.select.race_rows import Race
from grape_service.storage.parquet import array_of
from grape_service.storage.storage import Storage
from workers.cluster.tasks import run_tasks, together
from workers.run import Run
from workers.scoring.engines import Engines
from workers.scoring.failures import FailureLimit
from workers.scoring.metrics import ScoringMetrics
from workers.scoring.queue import WorkQueue
from workers.scoring.rows import read_rows
from workers.scoring.unscored import Unscored, plan_units
from workers.scoring.versions import refuse_other_versions
from workers.scoring.work import ScoreTotals, Work
from workers.stages.accounts import check_scored


@dataclass(frozen=True)
class Scoring:
    """What is asked of the rows of some shards."""

    policy: PolicyConfig
    title: str
    """Of the stage, in progress and events."""
    temperature: float = 1.0
    """What the logits are divided by."""
    statistics: tuple[str, ...] = ()
    """What is made beside log-probabilities; a row that lacks one has no score yet."""
    store_id: str | None = None
    """Where the scores are kept; None: under the policy's id at this temperature."""
    race: Race | None = None
    """Between the candidates of a prompt."""
    max_failed_share: float = 1.0
    """Of the rows that are scored: with more failures the run stops."""


def score_shards(run: Run, engines: Engines, asked: Scoring, shards: Sequence[Shards]) -> ScoreTotals:
    """Score the rows of `shards` that have no score yet; no engine starts when none is missing.

    Raises StageError as soon as more rows have failed than may.
    """
    store_id = asked.store_id or run.policy_id(asked.policy, asked.temperature)
    unscored = plan_units(run, store_id, shards, asked.statistics, asked.race)
    reused, stopped = (sum(getattr(one, name) for one in unscored) for name in ("stored", "stopped"))
    if run.config.workers.reuse == "exact":
        refuse_other_versions(run, asked.policy, store_id, shards, asked.statistics)
    num_units = sum(one.num_units for one in unscored)
    ScoringMetrics(run.name, store_id, gpus=0).add("grape_rows_reused", reused)
    if num_units:
        totals = _score_units(run, engines, asked, store_id, shards, unscored)
    else:
        stay = f" or were stopped ({stopped:,})" if stopped else ""
        run.event(f"{asked.title}: all {reused + stopped:,} rows have stored scores{stay}, no engine is started")
        totals = ScoreTotals()
    totals.reused += reused
    totals.stopped += stopped
    if totals.spared:
        run.event(
            f"{asked.title}: racing stopped {totals.stopped:,} rows and spared {totals.spared:,} tokens; "
            f"{totals.tokens:,} went through the engine"
        )
    check_scored(asked.title, sum(one.rows for one in shards), totals)
    return totals


def _score_units(
    run: Run, engines: Engines, asked: Scoring, store_id: str, shards: Sequence[Shards], unscored: Sequence[Unscored]
) -> ScoreTotals:
    num_units, rows = sum(one.num_units for one in unscored), sum(one.rows for one in shards)
    replicas = engines.of(asked.policy, num_units)
    reporter().begin(asked.title, sum(one.tokens for one in unscored), "tokens")
    works = (Work(unit, store_id, asked.temperature) for one in unscored for unit in one.units())
    began = time.monotonic()
    look = FailureLimit(run, asked.max_failed_share, rows).look
    totals = replicas.score(WorkQueue(works, num_units), lambda done: reporter().advance(asked.title, done), look)
    look(totals)
    reporter().end(asked.title)
    record_rate(run.workspace, store_id, totals.tokens, time.monotonic() - began)
    return totals


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


def complete_keys(config: Config, prepared: Prepared) -> list[str]:
    """Names under which a scoring is noted that has all that a config needs, its own first."""
    whole = complete_key(prepared.prepare_id, config.statistics)
    if config.score.race == "off":
        return [whole]
    return [complete_key(prepared.prepare_id, config.statistics, config.score.race, config.select), whole]


def score(run: Run, engines: Engines, prepared: Prepared) -> ScoreTotals:
    """log p of every response token of the pool under the target, and the other statistics that are asked for."""
    refuse_missing_columns(run.config, prepared)
    if not run.config.select.needs_scores:
        return ScoreTotals()
    shards = shards_of_pool(prepared)
    store = ScoreStore(run.workspace, run.policy_id(run.config.target))
    with run.stage("score"):
        keys = complete_keys(run.config, prepared)
        if run.config.workers.reuse != "exact" and any(map(store.is_complete, keys)):
            run.event(f"score target: all {prepared.rows:,} rows have stored scores, no engine is started")
            return ScoreTotals(reused=prepared.rows)
        refuse_bad_keep(run, shards)
        statistics = run.config.statistics
        race, share = Race.of(run.config.select, run.config.score), run.config.workers.max_failed_share
        asked = Scoring(run.config.target, "score target", statistics=statistics, race=race, max_failed_share=share)
        totals = score_shards(run, engines, asked, shards)
        if totals.failed == 0 and not totals.failed_units:
            store.note_complete(keys[0])
        return totals
